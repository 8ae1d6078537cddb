"""Stage 3: from the bidirectional many-step teacher to the sparse-causal few-step student.

The training layout is the paper's: seven chunks [C_0 .. C_6] at RoPE positions 0 .. 20, one timestep shared by all of them,
attention to {chunk 0, previous, self}. Two losses: regression onto the teacher's solution of the same noise, and distribution
matching (DMD) against the guided teacher with a critic that learns the student's own distribution as it goes.
"""
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import chain, flow, losses, ranks, sampling
from .config import RANK, SCRATCH, Progress, UserError, atomic
from .latents import Batch, Latents
from .sampling import clip_noise, denoiser
from .train import code, fingerprint


def load_pairs(path: Path) -> dict[str, Tensor]:
    """What `solve` wrote."""
    from safetensors.torch import load_file
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run `make repro` (stage distillation)")
    try:
        return load_file(path)
    except Exception as e:
        raise UserError(f"{path} cannot be read ({type(e).__name__}): delete it and run `make repro` (stage distillation)") from e


def shared(teacher, p, *inputs: Path) -> Path:
    """Where one notebook leaves this very teacher's solutions for another, hours at full size: another file for other weights, configuration, code or parameters."""
    asked = [p.seed, p.pairs, p.pair_steps, p.pair_shift, p.guidance, p.batch, p.at_once]
    return SCRATCH / f"pairs-{fingerprint(asked, chain.bare(teacher).config, *code(), *inputs)}.safetensors"


def solve(teacher, latents: Latents, p, kept: Path, path: Path | None = None) -> dict[str, Tensor]:
    """The teacher's guided ODE solutions of `p.pairs` noises: {"index" (n,), "seed" (n,), "target" (n, 16, F, h, w)}.

    Written to `kept` in the resume state, batch by batch beside it, from where a killed run takes them, and to `path`, for other stages.
    """
    from safetensors.torch import save_file
    if Path(kept).exists():
        if path and not RANK:
            shutil.copyfile(kept, path)
        return load_pairs(kept)
    g = torch.Generator().manual_seed(p.seed)
    index = torch.randperm(len(latents), generator=g).repeat(1 + p.pairs // len(latents))[:p.pairs]
    seed = torch.arange(p.pairs) + 1_000_000 * (1 + p.seed)
    progress, target = Progress(p.pairs, "teacher solutions"), []
    for k, some in enumerate(torch.arange(p.pairs).split(ranks.WORLD * p.at_once if p.at_once else p.batch)):
        part = Path(kept).with_name(f"{Path(kept).stem}-{k}.safetensors")
        if not part.exists():                                                 # rank 0 writes it once all have seen that it is missing
            made = ranks.spread(some, lambda mine: sampling.teacher(teacher, latents.batch(index[mine]), seed[mine],
                                                                    p.pair_steps, p.pair_shift, p.guidance))
            with atomic(part) as tmp:
                save_file({"target": made}, tmp)
        else:
            made = load_pairs(part)["target"]
        target.append(made)
        progress.step(len(some))
    pairs = {"index": index, "seed": seed, "target": torch.cat(target)}
    for to in filter(None, (path, kept)):
        with atomic(to) as tmp:
            save_file(pairs, tmp)
    return pairs


def student(dit, batch: Batch, noise: Callable[[int], Tensor], p, grad: int | None = None, start: Tensor | None = None) -> Tensor:
    """The student's x_0 (B, 16, F, h, w), in the layout it is trained in; `noise(i)` is the noise of step i.

    grad: the step whose x_0 is wanted, the one that keeps its gradient (Self-Forcing, Algorithm 1). start: clean latents to be noised to
    step `grad` in place of the student's own estimate (the figure's "real video"); step 0 starts from noise alone. With per-step caches a chunk's context is the previous chunk at the
    same noise level, so one masked pass over the whole sequence equals the chunk-by-chunk rollout; the other caches have to roll. Equal are the
    values: through the mask gradients reach the chunks before, in a rollout (`attention.KVCache`) they end there. p.rolled rolls with per-step caches too.
    """
    ts = flow.timesteps(p.steps, p.shift)
    if p.rolled or p.cache != "per_step":                                     # `matching_losses` sees to it that none is to start from real video
        return chain.rollout(dit, batch.cond, timesteps=ts, chunk=p.chunk, cache=p.cache, noise=noise, grad=grad, **batch.conditions())
    mask = chain.bare(dit).config.mask
    if start is not None and grad:
        x_t = flow.add_noise(start, noise(grad), ts[grad])
        v = denoiser(dit, batch, mask=mask)(x_t, torch.full((len(batch),), ts[grad], device=dit.device))
        return flow.x0_from_v(x_t, v, ts[grad])
    return chain.full(dit, batch.cond, timesteps=ts, mask=mask, noise=noise, grad=grad, **batch.conditions())


def drawn(shape, g: torch.Generator, part: slice, first: Tensor | None = None, device="cpu") -> Callable[[int], Tensor]:
    """Noise of step i for a part of a batch (whose shape is given): drawn whole and once, put on the device; step 0's part may be given."""
    made = {} if first is None else {0: first.to(device)}

    def noise(i: int) -> Tensor:
        if i not in made:
            made[i] = torch.randn(shape, generator=g)[part].to(device)
        return made[i]
    return noise


def regression_loss(dit, latents: Latents, pairs: dict[str, Tensor], p) -> list[Callable[[torch.Generator, int], dict[str, Tensor]]]:
    """Player's loss, one for each part of the batch: squared error to the teacher's x_0, at each denoising step in turn, plus that of its change across chunk borders."""
    def loss(part: slice, g: torch.Generator, step: int) -> dict[str, Tensor]:
        j = torch.randint(len(pairs["seed"]), (p.batch,), generator=g)[part]
        batch, target = latents.batch(pairs["index"][j]).to(dit.device), pairs["target"][j].to(dit.device)
        noise = drawn((p.batch, *latents.shape), g, part, clip_noise(pairs["seed"][j], latents.shape), dit.device)
        x = student(dit, batch, noise, p, grad=step % p.steps)
        regression = losses.weighted_mse(x, target, batch.weight)
        border = losses.border(x, target, p.chunk, batch.weight)
        return {"loss": regression + p.border_weight * border, "regression": regression, "border": border}
    return [partial(loss, part) for part in ranks.parts(p.batch, p.at_once)]


def matching_losses(dit, critic, teacher, latents: Latents, pairs: dict[str, Tensor], p):
    """The two players of DMD, in parts: (student's loss, critic's loss). DMD2 (Yin et al. 2024) with the paper's added regression.

    Both cycle through the denoising steps and use real video equally often, so the critic learns the distribution that it judges.
    UserError for a student that rolls and real_ratio above 0: its chunks follow from one another, none can start from real video.
    """
    if p.real_ratio and (p.rolled or p.cache != "per_step"):
        raise UserError(f"distillation.real_ratio must be 0 with {'rolled' if p.rolled else f'cache {p.cache}'}: chunks that follow from one another cannot start from real video")
    shape = p.batch, *latents.shape

    def sample(part: slice, g: torch.Generator, grad: int) -> tuple[Batch, Tensor]:
        batch = latents.batch(latents.draw(p.batch, g)[part]).to(dit.device)
        start = batch.z if float(torch.rand((), generator=g)) < p.real_ratio else None
        return batch, student(dit, batch, drawn(shape, g, part, device=dit.device), p, grad, start)

    def student_loss(part: slice, regress, g: torch.Generator, step: int) -> dict[str, Tensor]:
        turn = step // p.critic_steps                                         # the student's own count
        batch, x = sample(part, g, grad=turn % p.steps)
        t = flow.random_timesteps(p.batch, p.shift, g, low=20, high=980)[part].to(dit.device)
        with torch.no_grad():
            x_t = flow.add_noise(x, torch.randn(shape, generator=g)[part].to(dit.device), t)
            real = flow.x0_from_v(x_t, denoiser(teacher, batch, p.guidance)(x_t, t), t)
            fake = flow.x0_from_v(x_t, denoiser(critic, batch)(x_t, t), t)
        match = losses.dmd(x, real, fake, batch.weight)
        reg = regress(g, turn)
        return {"loss": match + p.regression_weight * reg["loss"], "dmd": match, "regression": reg["regression"],
                "gap": (fake - real).abs().mean()}

    def critic_loss(part: slice, g: torch.Generator, step: int) -> dict[str, Tensor]:
        with torch.no_grad():
            batch, x = sample(part, g, grad=step % p.steps)
        t = flow.random_timesteps(p.batch, p.shift, g)[part].to(dit.device)
        eps = torch.randn(shape, generator=g)[part].to(dit.device)
        return {"loss": losses.flow_matching(denoiser(critic, batch), x, eps, t, batch.weight * critic.loss_weight(x, t))}
    parts, regressions = ranks.parts(p.batch, p.at_once), regression_loss(dit, latents, pairs, p)
    return [partial(student_loss, *both) for both in zip(parts, regressions)], [partial(critic_loss, part) for part in parts]
