"""The clocks: what this machine can do at most, and how long a stream takes, with its decoder, and with what both are held against.

Both rivals of the stream put chunk 0, the previous and the present chunk, the latent frames that a streamed chunk sees, through the whole
network at every denoising step: `recomputing` is ours without a cache, `diffusers_window` is diffusers'.
A decoder is a `wan_vae.WanVAE`, whose past the caller keeps: one decoder serves every stream measured here.
"""

import gc
import itertools
import math
import re
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch

from . import attention as att
from . import fast, flow, kernels, plan
from .chain import bare
from .stand_in import SHIFT, Ears, Scene, Stream, alive, bounded_error, of_diffusers
from .stream import Streamer

LONGEST_S = 8                                             # of timing one form at one setting, warm-up aside
SUSTAINED_S = 1.5                                         # of matrix products without a pause
KINDS = {"fused elementwise": "triton", "attention": "flash|fmha|sdpa|attention", "matrix products": "gemm|nvjet|cutlass|xmma|mm|linear",
         "copies": "copy|memcpy|memset|cat"}


def measure(run, n: int, device) -> list[float]:
    """Milliseconds of each of n calls: events on a GPU, without waiting in between; the clock elsewhere."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:])]
    marks = [time.perf_counter()]
    for _ in range(n):
        run()
        marks.append(time.perf_counter())
    return [1000 * (b - a) for a, b in zip(marks, marks[1:])]


def typical(ms: list[float]) -> dict[str, float]:
    p50, p95 = torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return {"ms_p50": p50, "ms_p95": p95, "n": len(ms)}


def median(run, n, device, warm=3) -> float:
    measure(run, warm, device)
    return typical(measure(run, n, device))["ms_p50"]


def held(device) -> int:
    """Bytes of tensors that are alive: on a GPU as its allocator counts them, elsewhere those that Python can reach."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device == device]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# The machine

def ceilings(dtype, device, repeats=20) -> dict:
    """TFLOP/s of a large square matrix product of random numbers, at first and when it goes on; GB/s of a copy (bytes read and written)."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product, rate = lambda: a @ b, lambda ms: 2 * n ** 3 / ms / 1e9
    ms = median(product, repeats, device)
    found = {"matmul_tflops": rate(ms), "matmul_n": n, "matmul_dtype": str(dtype).removeprefix("torch.")}
    long = max(repeats, round(1000 * (SUSTAINED_S if device.type == "cuda" else 0.05) / ms))         # a card that has run for a second is warm, and slower
    found["matmul_sustained_tflops"] = rate(typical(measure(product, long, device)[long // 2:])["ms_p50"])
    source = torch.randn(2 ** (30 if device.type == "cuda" else 20) // 4, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = 2 * source.nbytes / median(lambda: target.copy_(source), repeats, device) / 1e6
    return found


def fp8_ceiling(n: int, dtype, device, repeats=20) -> dict:
    """TFLOP/s of that product of n x n with its operands in e4m3, scaled by rows and columns."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    (a, scale_a), (b, scale_b), bias = fast.quantise(a), fast.quantise(b), torch.zeros(n, device=device)
    product = lambda: fast.scaled_product(a, b, scale_a, scale_b.T.contiguous(), bias, dtype)
    return {"matmul_fp8_rowwise_tflops": 2 * n ** 3 / median(product, repeats, device) / 1e9}


def attentions(c, chunk: int, tokens: int) -> list[tuple[int, int, int]]:
    """(batch, queries, keys) of a layer's attentions in the steady state: self, text, image, audio."""
    L, sound = chunk * tokens, [(chunk, tokens, c.audio_tokens)] if c.audio_dim else []
    return [(1, L, 3 * L), (1, L, plan.TEXT), *([(1, L, plan.IMAGE)] if c.image_dim else []), *sound]


def attention_kernels(c, chunk, tokens, dtype, device, repeats=20) -> dict[str, float | str]:
    """Milliseconds of one layer's attentions together, by kernel; a line of why for one that cannot do them all."""
    heads, D, found = c.num_attention_heads, c.attention_head_dim, {}
    randn = lambda batch, L: torch.randn(batch, heads, L, D, device=device).to(dtype)
    inputs = [(randn(batch, q), randn(batch, k), randn(batch, k)) for batch, q, k in attentions(c, chunk, tokens)]
    able = (*kernels.ATTENTIONS[:-1], *kernels.FLASH3) if device.type == "cuda" else kernels.ATTENTIONS      # "math" would hold all scores
    for kernel in able:
        try:
            kernels.use_attention(kernel)
            found[kernel] = median(lambda: [att.attention(*qkv) for qkv in inputs], repeats, device)
        except Exception as error:                                      # not to be had, or not for these shapes: the others are
            found[kernel] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    kernels.use_attention("auto")
    return found


# The stream

def stream(played, place, device, n: int, machine: dict) -> dict:
    """One form at one setting: steady chunks, and whether memory stays.

    played: a new `stand_in.Stream`; place: rows and columns of tokens; n: chunks at most; machine: its `ceilings`.
    """
    setting = played.setting
    counted = plan.total(plan.chunk_flops(bare(played.dit).config, setting.chunk, math.prod(place), setting.steps))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    played.to_steady_state()
    n = max(3, min(n, round(1000 * LONGEST_S / median(played.next, 1, device, warm=0))))
    last, before = [], held(device)
    found = typical(measure(lambda: last.__setitem__(slice(None), [played.next()]), n, device))
    alive(last.pop(), "the timed stream")
    found |= {"grown_bytes": held(device) - before, "tflop": counted / 1e12, "tflops": counted / found["ms_p50"] / 1e9}
    found |= {"mfu": found["tflops"] / machine["matmul_tflops"], "mfu_sustained": found["tflops"] / machine["matmul_sustained_tflops"]}
    found |= {"dit_fps": 4000 * setting.chunk / found["ms_p50"]}
    return found | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {})


def first_chunk(played, device) -> dict[str, float]:
    """Milliseconds of the first chunk of a new stream."""
    played.restart()
    return {"first_chunk_ms": measure(played.next, 1, device)[0]}


def where_time_goes(dit, setting, place, device) -> dict[str, float]:
    """Share of the device's time by kind of kernel, of one chunk in the steady state, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile
    played, spent = Stream(dit, setting, place, device), {}
    played.to_steady_state()
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as prof:
        played.next()
    for event in prof.key_averages():
        kind = next((k for k, words in KINDS.items() if re.search(words, event.key.lower())), "the rest")
        spent[kind] = spent.get(kind, 0) + (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
    return {kind: us / sum(spent.values()) for kind, us in sorted(spent.items())}


# The decoder, alone and beside the DiT

def decoder(vae, z, n, device) -> dict:
    """Milliseconds of a chunk of latents z (1, 16, chunk, H, W) in the steady state."""
    _, past = vae.decode(z)
    for _ in range(2):
        video, past = vae.decode(z, past)
    alive(video, "the decoder")
    return typical(measure(lambda: vae.decode(z, past), n, device))


def decode_on(side, vae, x_0, past):
    """The decoder on a CUDA stream of its own, after x_0 is there; side None: in turn."""
    if side is None:
        return vae.decode(x_0, past)
    side.wait_stream(torch.cuda.current_stream())
    x_0.record_stream(side)
    with torch.cuda.stream(side):
        return vae.decode(x_0, past)


def placements(vae, played, n, device) -> Iterator[dict[str, float]]:
    """Milliseconds of a chunk and frames per second of DiT and decoder on this one device: "serial", and on a GPU "overlap", where the
    DiT makes the next chunk meanwhile; then the time to the first frames of a new stream. One by one: the side stream may not fit.

    played: a `stand_in.Stream` in its steady state; it begins anew.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for name, side in (("serial", None), *([("overlap", torch.cuda.Stream())] if device.type == "cuda" else [])):
        past, before = None, 0
        if side:
            torch.cuda.empty_cache()                                    # it takes memory of its own
        for k in range(n + 2):                                          # two chunks fill the decoder's cache and load its kernels
            if k == 2:
                before = held(device)
                wait()
                began = time.perf_counter()
            x_0 = played.next()
            video, past = decode_on(side, vae, x_0, past)
        wait()
        seconds = (time.perf_counter() - began) / n
        yield {f"{name}_ms": 1000 * seconds, f"{name}_fps": 4 * x_0.shape[2] / seconds, f"{name}_grown_bytes": held(device) - before}
    del video, past
    played.restart()
    yield {"first_frames_ms": measure(lambda: vae.decode(played.next()), 1, device)[0]}


def runtime(dit, vae, setting, place, device, n: int) -> dict[str, float]:
    """Frames per second of the runtime itself, a `stream.Streamer`, from pieces of sound to pictures in host memory; on a GPU its decoder works in a
    thread and on a CUDA stream of its own. picture_to_frames_ms: from a picture, which is encoded, to the first frames, of a second stream; _cold_ms: of the first, for which kernels load."""
    scene, rng = Scene(bare(dit).config, place, setting.chunk, device), np.random.default_rng(0)
    streamer = Streamer(dit, vae, Ears(scene), "overlap" if device.type == "cuda" else "serial", chunk=setting.chunk, timesteps=flow.timesteps(setting.steps, SHIFT))
    picture, sound = rng.integers(0, 256, (16 * place[0], 16 * place[1], 3), np.uint8), itertools.repeat(rng.normal(0, 0.1, 16_000).astype(np.float32))
    play = lambda: closing(streamer.stream(picture, sound, text=scene.text, image_tokens=scene.image, audio_mask=scene.face[0, 0]))
    first = []
    for _ in range(2):
        began = time.perf_counter()
        with play() as chunks:
            next(chunks)
            first.append(1000 * (time.perf_counter() - began))          # not after: closing waits for the chunk that is being made ahead
    with play() as chunks:
        next(chunks)
        for _ in range(math.ceil(att.WINDOW / setting.chunk) + 3):      # kernels load, code is compiled, passes are recorded
            next(chunks)
        began = time.perf_counter()
        for _ in range(n):
            frames = next(chunks)
        seconds = time.perf_counter() - began
    alive(torch.from_numpy(frames).float(), "the runtime")
    return {"runtime_fps": 4 * setting.chunk * n / seconds, "picture_to_frames_ms": first[1], "picture_to_frames_cold_ms": first[0]}


# The rivals

def window(scene: Scene):
    """x (1, C, 3 chunk, H, W), t and the RoPE positions of chunk 0, the previous and the present chunk of a steady stream."""
    frames = scene.shape[2]
    x = torch.cat([scene.randn(*scene.shape), scene.cond[:, :, :frames]], 1)
    return x, torch.full((1,), 500.0, device=x.device), [*range(frames // 3), *range(att.WINDOW - 2 * frames // 3, att.WINDOW)]


def recomputing(dit, place, chunk, device, n) -> float:
    """Milliseconds of a denoising step without any cache: the window under the sparse-causal mask."""
    scene = Scene(dit.config, place, 3 * chunk, device)
    (x, t, positions), given = window(scene), scene.conditions()
    return median(lambda: dit(x, t, positions=positions, mask="sparse_causal", **given), n, device, warm=1)


def diffusers_window(dit, place, chunk, device, n) -> dict[str, float]:
    """Milliseconds of diffusers' forward pass of the window (bidirectional, without sound), and how far it is from ours."""
    scene = Scene(dit.config, place, 3 * chunk, device)
    x, t, _ = window(scene)
    net, given = of_diffusers(dit), (scene.text.to(dit.dtype), scene.image.to(dit.dtype) if scene.image is not None else None)
    ours, theirs = lambda: dit(x, t, text=scene.text, image=scene.image), lambda: net(x.to(dit.dtype), t, *given, return_dict=False)[0]
    rounding = dit.dtype if dit.dtype == torch.float32 else fast.E4M3               # that of all layers adds up to more than that of a few
    difference = bounded_error(theirs().float(), ours().float(), rounding, "diffusers' window")
    return {"step_ms_p50": median(theirs, n, device, warm=1), "difference": difference, "ours_step_ms_p50": median(ours, n, device, warm=1)}
