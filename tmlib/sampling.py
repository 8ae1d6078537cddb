"""From a batch of conditions to latents: the many-step guided teacher and the few-step student, behind one `denoiser`.

Clips, noise and results live on the CPU, so that they are the same on every machine; a batch goes to where the network is, and its
latents come back.
"""
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from . import chain, flow, ranks
from .latents import Batch


def denoiser(dit, batch: Batch, guidance: float = 1.0, mask: str = "bidirectional") -> Callable[[Tensor, Tensor], Tensor]:
    """(x_t, t) -> velocity under the batch's conditions; guidance on the audio, standard form (1 = none).

    With guidance both branches run as one batch of 2 B: the condition, then the same with null (zero) audio.
    """
    given = batch.conditions() if guidance == 1 else chain.with_null_audio(batch.conditions())
    return lambda x_t, t: chain.predict(dit, x_t, batch.cond, t if guidance == 1 else torch.cat([t, t]), given, guidance, mask=mask)


def clip_noise(seeds, shape: tuple[int, ...]) -> Tensor:
    """One noise per clip from its own seed, so that a clip's result does not depend on its batch: (B, *shape)."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds])


def at_speed(dit):
    """bfloat16 on a GPU, whose attention in float32 is several times slower; a CPU computes as ever."""
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=ranks.WORLD == 1) if torch.device(dit.device).type == "cuda" else nullcontext()


@torch.no_grad()
def teacher(dit, batch: Batch, seeds, steps: int, shift: float, guidance: float, mask: str = "bidirectional") -> Tensor:
    """Latents (B, 16, F, h, w) from the seeds' noise by `steps` Euler steps with guidance on the audio."""
    batch, noise = batch.to(dit.device), clip_noise(seeds, batch.z.shape[1:]).to(dit.device)
    with at_speed(dit):
        return flow.sample(denoiser(dit, batch, guidance, mask), noise, flow.timesteps(steps, shift)).cpu()


@torch.no_grad()
def student(dit, batch: Batch, seeds, p, mask: str | None = None) -> Tensor:
    """Latents (B, 16, F, h, w) as deployed: chunk by chunk with caches, `p.steps` steps; p: steps, shift, chunk, cache. With a mask instead the whole clip at once, under it."""
    noise = [clip_noise([100_003 * int(s) + i for s in seeds], batch.z.shape[1:]).to(dit.device) for i in range(p.steps)]
    batch = batch.to(dit.device)
    how = dict(timesteps=flow.timesteps(p.steps, p.shift), noise=lambda i: noise[i], **batch.conditions())
    with at_speed(dit):
        return (chain.full(dit, batch.cond, mask=mask, **how) if mask else chain.rollout(dit, batch.cond, chunk=p.chunk, cache=p.cache, **how)).cpu()
