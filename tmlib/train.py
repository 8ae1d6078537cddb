"""The one training loop: any number of players, EMA, exact resume.

What is special
- Every random draw of step s comes from a generator seeded by (seed, s, player): nothing to save, nothing to drift. A run that
  was killed and resumed gives the same weights as one that was not, on a CPU bit for bit; some of a GPU's kernels add in any order.
- Resume state lives in data/scratch/<stage>-<fingerprint of parameters, code and inputs>/: other parameters never pick it up.
- Hidden matrices and kernels take Muon, everything else AdamW; learning rates warm up and decay linearly to zero.
"""
import hashlib
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import ranks
from .config import SCRATCH, Progress, atomic, note, resumable
from .muon import Muon


@dataclass
class Optim:
    """How one player learns; `muon` is the learning rate of the matrices and kernels of HIDDEN (0: AdamW for all)."""
    lr: float
    muon: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 50
    decay: bool = True
    clip: float = 1.0
    ema: float = 0.0                             # 0: keep no average


@dataclass
class Player:
    """A network with its own loss and optimiser: a plain model is one, a student and its critic are two."""
    name: str
    model: nn.Module
    loss: Callable[[torch.Generator, int], dict[str, Tensor]] | list          # {"loss": scalar to minimise, other numbers ...}; several: their mean
    optim: Optim
    every: int = 1                               # plays on steps divisible by `every`
    bf16: bool = False                           # computes its loss under `autocast`
    optimisers: list = field(default_factory=list, repr=False)
    average: dict[str, Tensor] = field(default_factory=dict, repr=False)


LARGE = 1 << 30
HIDDEN = "blocks.", "encoder.", "decoder.", "convs."       # where Muon's matrices are: in the DiT, the codec, the speech encoder


def fingerprint(*things) -> str:
    """Twelve hex digits that change with parameters (anything JSON can hold) and with the content of files (Paths).

    Files of more than LARGE bytes are known by size and time of change: latents of hundreds of gigabytes take too long to read.
    """
    h = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            for path in sorted(p for p in thing.rglob("*") if p.is_file()) if thing.is_dir() else [thing]:
                known = path.stat()
                with open(path, "rb") as f:
                    content = hashlib.file_digest(f, "sha256").digest() if known.st_size <= LARGE else f"{known.st_size} {known.st_mtime_ns}".encode()
                h.update(path.name.encode() + content)
        else:
            h.update(json.dumps(thing, sort_keys=True, default=lambda o: getattr(o, "__dict__", str(o))).encode())
        h.update(b"\n")                                                      # so that 1, 2 is not 12
    return h.hexdigest()[:12]


def state_folder(stage: str, params, *inputs: Path) -> Path:
    """Where a stage keeps its resume state: keyed by parameters, this library's code, the notebook's and the input files."""
    return resumable(SCRATCH / f"{stage}-{fingerprint(params, os.environ.get('TM_NOTEBOOK'), *code(), *inputs)}")


def code() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.py"))


def once(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """make(), arrays by name; or what it made before a restart, of which `path` (.npz), in the resume state, is kept. Every rank must ask."""
    if path.exists():
        return dict(np.load(path))
    made = make()
    with atomic(path) as temporary:                                          # once all ranks have seen that it is missing: they make it together
        np.savez(temporary, **made)
    return made


def generator(*key: int | str) -> torch.Generator:
    """A generator that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def build_optimisers(model: nn.Module, o: Optim) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels of HIDDEN, AdamW for what stands around them, for norms, biases and tables."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrix = lambda n, p: o.muon > 0 and n.startswith(HIDDEN) and min(len(p), p.numel() // len(p)) > 8
    rest = [p for n, p in named if not matrix(n, p)]
    fused = all(p.is_cuda for p in rest) or None                              # there the other forms make copies of all weights
    out = [torch.optim.AdamW(rest, lr=o.lr, betas=tuple(o.betas), weight_decay=o.weight_decay, fused=fused)]
    if len(rest) < len(named):
        out.append(Muon([p for n, p in named if matrix(n, p)], lr=o.muon, weight_decay=o.weight_decay))
    for opt in out:
        for group in opt.param_groups:
            group["peak"] = group["lr"]
    return out


def schedule(step: int, steps: int, o: Optim) -> float:
    """Linear warm-up, then linear decay to zero: the factor on the peak learning rate at `step` of `steps`."""
    up = min(1.0, (step + 1) / max(o.warmup, 1))
    return up * (1 - step / steps) if o.decay else up


def play(p: Player, step: int, steps: int, seed: int) -> dict[str, float]:
    """One optimisation step of one player; returns its numbers."""
    factor = schedule(step // p.every, -(-steps // p.every), p.optim)         # by the player's own steps
    for opt in p.optimisers:
        for group in opt.param_groups:
            group["lr"] = group["peak"] * factor
        opt.zero_grad(set_to_none=True)
    parts, numbers = p.loss if isinstance(p.loss, list) else [p.loss], defaultdict(float)
    for loss in parts:                                                        # one after another: see `ranks.parts`
        with autocast(p.bf16, next(p.model.parameters()).device):
            out = loss(generator(seed, step, p.name), step)
        (out["loss"] / len(parts)).backward()
        for k, v in out.items():
            numbers[k] += float(v.detach()) / len(parts)
    norm = float(ranks.whole(nn.utils.clip_grad_norm_([q for q in p.model.parameters() if q.grad is not None], p.optim.clip)))
    if not math.isfinite(norm):
        raise FloatingPointError(f"{p.name}: gradient is {norm} at step {step}, loss {numbers['loss']}; lower its learning rate")
    for opt in p.optimisers:
        opt.step()
    if p.optim.ema:
        decay = min(p.optim.ema, (step + 1) / (step + 10))                    # follows the early weights quickly
        for k, v in p.model.state_dict().items():
            if v.dtype.is_floating_point:
                p.average[k].lerp_(v, 1 - decay)
    return ranks.mean(numbers) | {"grad_norm": norm}


def states(folder: Path) -> dict[int, Path]:
    """This rank's saved states by step: one, but for the moment in which the next is written."""
    return {int(path.stem.split("-")[1]): path for path in Path(folder).glob(f"state-*-{ranks.RANK}-of-{ranks.WORLD}.pt")}


def save_state(folder: Path, players: list[Player], step: int, history: list[dict], recent: dict) -> None:
    """Every rank writes its piece; the last state goes when all have the new one, so that one is whole whenever this is killed."""
    state = {"step": step, "history": history, "recent": recent, "players": {p.name: {
        "model": p.model.state_dict(), "average": p.average, "optimisers": [o.state_dict() for o in p.optimisers]} for p in players}}
    earlier = states(folder)
    with atomic(Path(folder) / f"state-{step}-{ranks.RANK}-of-{ranks.WORLD}.pt", every_rank=True) as tmp:
        torch.save(state, tmp)
    ranks.wait()
    for path in (path for k, path in earlier.items() if k != step):
        path.unlink()


def load_state(folder: Path, players: list[Player]) -> tuple[int, list[dict], dict]:
    """Players as they were at the newest step that all ranks have saved: (step, history, numbers since its last entry); (0, [], {}) where none is."""
    mine = states(folder)
    step = max(set.intersection(*map(set, ranks.agreed(list(mine)))), default=0)
    if not step:
        return 0, [], {}
    state = torch.load(mine[step], weights_only=True)
    for p in players:
        saved = state["players"][p.name]
        p.model.load_state_dict(saved["model"])
        p.average = saved["average"]
        for opt, s in zip(p.optimisers, saved["optimisers"]):
            opt.load_state_dict(s)
    return state["step"], state["history"], state["recent"]


def train(players: list[Player], steps: int, seed: int, folder: Path, what: str, save_share: float = 0.03,
          log_every: int = 20, stop_at: int | None = None) -> list[dict]:
    """Runs steps 0 .. steps - 1, going on from the state in `folder` if there is one; returns the log (one dict per `log_every`, of means since the last).

    Saving the state may take `save_share` of the time, and counts as 0.06 s at least: so 0.03 is every two seconds at most. With EMA the players' models hold the averaged weights at the end. `stop_at` ends early with the state saved (tests).
    """
    for p in players:
        p.optimisers = build_optimisers(p.model, p.optim)
        p.average = {k: v.detach().clone() for k, v in p.model.state_dict().items()} if p.optim.ema else {}
    step, history, recent = load_state(folder, players)
    if step:
        print(f"{what}: going on from step {step} of {steps}", flush=True)
    elif others := {path.stem.rpartition("-")[2] for path in Path(folder).glob("state-*-0-of-*.pt")} - {str(ranks.WORLD)}:
        note(f"{what} begins at step 0: the state in {folder} is of {' or '.join(sorted(others))} processes, and this run has {ranks.WORLD}. "
             "To go on from it, set `processes` in params.yaml back; or delete it")
    progress, saved, pause = Progress(steps, what, start=step), time.monotonic(), 0.06 / save_share
    while step < steps:
        if ranks.agreed(time.monotonic() - saved > pause)[0]:                # rank 0's clock counts
            began = time.monotonic()
            save_state(folder, players, step, history, recent)
            saved = time.monotonic()
            pause = max(0.06, saved - began) / save_share
        if stop_at is not None and step >= stop_at:
            save_state(folder, players, step, history, recent)
            return history
        for p in players:
            if step % p.every == 0:
                for k, v in play(p, step, steps, seed).items():
                    recent.setdefault(k if len(players) == 1 else f"{p.name}_{k}", []).append(v)
        step += 1
        progress.step(**{k: v[-1] for k, v in recent.items() if k.endswith("loss")})
        if step % log_every == 0 or step == steps:
            history.append({**(history[-1] if history else {}), "step": step, **{k: sum(v) / len(v) for k, v in recent.items()}})
            recent.clear()
    save_state(folder, players, step, history, recent)
    for p in players:
        if p.optim.ema:
            p.model.load_state_dict(p.model.state_dict() | p.average)
        p.model.zero_grad(set_to_none=True)
        p.optimisers, p.average = [], {}                                     # what comes next may need the room
    return history


def least_memory(dit: nn.Module, shape: tuple[int, ...], batch: int, trained: int = 1, averaged: int = 1, frozen: int = 0, graphs: int = 1) -> int:
    """Bytes that training takes on this process's GPU at the very least: weights, gradients, moments, averages, and the inputs of blocks that are computed again.

    shape: (16, F, h, w) of a clip's latents; batch: clips at once. The rest as in `plan.training_memory`, which counts all of it.
    """
    weights = sum((p.to_local() if ranks.in_pieces(p) else p).numel() for p in dit.parameters())
    tokens = math.prod(shape[1:]) // math.prod(dit.config.patch_size)
    return 4 * weights * (4 * trained + averaged + frozen) + 2 * graphs * dit.config.num_layers * batch * tokens * dit.config.dim


def heed_memory(what: str, dit: nn.Module, *args, **how) -> None:
    """A line at once if `least_memory` is more than the GPU has: the stage may run out of it after hours."""
    if torch.device(dit.device).type == "cuda":
        least, there = least_memory(dit, *args, **how) / 1e9, torch.cuda.get_device_properties(0).total_memory / 1e9
        if least > there:
            note(f"{what} will run out of memory: it takes more than {least:.0f} GB on each GPU, and this one has {there:.0f} GB; use larger cards, or more of them (`processes` in params.yaml)")


def autocast(wanted: bool, device: torch.device) -> torch.autocast:
    """bfloat16 where the hardware multiplies it fast (CUDA, AMX, AVX512_BF16), else float32: the codec trains 1.7 times faster with it, a DiT 1.3.

    A model in pieces (`ranks`) keeps no copies of its weights in bfloat16 between a layer's calls: they would add up to a whole one.
    """
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=wanted, cache_enabled=ranks.WORLD == 1)
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()))


def finish(folder: Path) -> None:
    """The stage's outputs are written: its resume state may go."""
    ranks.wait()
    shutil.rmtree(folder, ignore_errors=True)
