"""One form of the model at one setting: built, held against float32, timed. The measurements themselves; `bench` says which, and when."""

import gc
import math
from typing import NamedTuple

import torch

from . import attention as att
from . import clock, decoding, fast, flow, plan, stand_in
from .chain import Chain, bare
from .clock import measure, typical
from .config import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
SHIFT = 5.0
LAYERS_CHECKED = 2
LONGEST_S = 8                                             # of timing one form at one setting, warm-up aside


class Setting(NamedTuple):
    """Latent frames per chunk and denoising steps: "3x2"."""

    chunk: int
    steps: int

    @classmethod
    def parse(cls, text: str):
        parts = text.split("x")
        if len(parts) != 2 or not all(p.isdecimal() and int(p) for p in parts):
            raise UserError(f"--settings {text}: give latent frames per chunk x denoising steps, such as 3x2")
        if 3 * int(parts[0]) > att.WINDOW:
            raise UserError(f"--settings {text}: chunk 0, the previous and the present one must fit {att.WINDOW} latent frames")
        return cls(*map(int, parts))

    def __str__(self):
        return f"{self.chunk}x{self.steps}"


def named(switches) -> str:
    return "+".join(switches) or "eager"


def form(args, switches, device, kernel="auto", layers=None):
    """The model with its switches on. The order matters: attention is settled before compilation, graphs wrap it all."""
    gc.collect(), torch.cuda.empty_cache()                              # the form before this one must not be there any more
    torch._dynamo.reset()                                               # and compiled graphs have its attention kernel baked in
    fast.use_attention(kernel if "attention" in switches else "auto")
    dit = stand_in.random_dit(args.variant, device, DTYPES[args.dtype], args.seed, chunk=args.settings[0].chunk,
                              **({} if layers is None else {"num_layers": layers}))
    dit = fast.fuse_qkv(dit) if "qkv" in switches else dit
    dit = fast.to_fp8(dit) if "fp8" in switches else dit
    dit = fast.compile_blocks(dit, backend=args.backend) if "compile" in switches else dit
    return fast.Graphed(dit) if "graphs" in switches else dit


def new_chain(dit, scene, steps):
    if isinstance(dit, fast.Graphed):
        dit.forget()
    return Chain(dit, scene.cond, flow.timesteps(steps, SHIFT), chunk=scene.chunk)


def to_steady_state(chain, scene):
    """Chunks until positions are pinned, and two more: graphs run once as they are and are then recorded."""
    for _ in range(math.ceil(att.WINDOW / chain.chunk) + 2):
        x_0 = scene.next(chain)
    return x_0


def checked(x, what):
    wrong = "not finite" if not x.isfinite().all() else "constant" if x.float().std() == 0 else None
    if wrong:
        raise UserError(f"bench: {what} gave latents that are {wrong}: nothing to time")
    return x


def compare(args, switches, kernel, place, device, reference=None):
    """Latents of a shallow model's chunk after a whole window; with a `reference`, their error relative to it."""
    dit = form(args, switches, device, kernel, layers=min(LAYERS_CHECKED, args.layers or LAYERS_CHECKED))
    if reference is None:
        dit = dit.float()                                               # the same weights, rounded as they are at speed
    scene = stand_in.Scene(bare(dit).config, *place, args.settings[0].chunk, device)
    chain = new_chain(dit, scene, args.settings[0].steps)
    x_0 = checked(to_steady_state(chain, scene), f"the check of {named(switches)}")
    return x_0 if reference is None else float((x_0 - reference).norm() / reference.norm())


def timed(dit, setting, place, device, n, rate, vae=None) -> dict:
    """One form at one setting: steady chunks, whether memory stays, a new stream's first chunk; with a decoder, both on this device.

    place: rows and columns of tokens; n: chunks at most; rate: TFLOP/s of this machine's matrix products.
    """
    c = bare(dit).config
    scene = stand_in.Scene(c, *place, setting.chunk, device)
    counted = plan.total(plan.chunk_flops(c, setting.chunk, math.prod(place), setting.steps))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    chain = new_chain(dit, scene, setting.steps)
    to_steady_state(chain, scene)
    n = max(3, min(n, round(1000 * LONGEST_S / clock.median(lambda: scene.next(chain), 1, device, warm=0))))
    last, before = [], clock.held(device)
    found = typical(measure(lambda: last.__setitem__(slice(None), [scene.next(chain)]), n, device))
    checked(last.pop(), "the timed stream")
    found |= {"grown_bytes": clock.held(device) - before, "tflop": counted / 1e12, "tflops": counted / found["ms_p50"] / 1e9}
    found |= {"mfu": found["tflops"] / rate, "dit_fps": 4000 * setting.chunk / found["ms_p50"]}
    if device.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    streams = [chain]

    def restart():
        streams.clear()                                                 # large chunks' caches fit once
        streams.append(new_chain(dit, scene, setting.steps))
    if vae is not None:
        found |= decoding.placements(vae, lambda: scene.next(streams[0]), restart, n, device)
    del chain
    restart()
    return found | {"first_chunk_ms": measure(lambda: scene.next(streams[0]), 1, device)[0]}
