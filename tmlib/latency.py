"""What the runtime takes, and what each of its optimisations buys: timed in the very loop that serves.

A laptop has no second GPU, so here one device is one core: `cores` keeps a stream on one, or gives it two. Medians and rates
leave the warm-up out. Whatever is compared is measured in turns, since a machine is rarely alone for long.
"""
import os
import time
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from . import attention, fast, figures, flow, metrics, plan
from .stand_in import of_diffusers
from .chain import Chain
from .config import FRAME, UserError
from .dit import WanDiT
from .placement import Chunk, ahead
from .stream import Streamer

ONE, TWO = ("serial", "overlap"), ("two_device", "two_process")           # placements by how many devices they use


# Streams

def scene(dit, side: int, seed: int = 0) -> dict[str, Tensor]:
    """Fixed conditions of a stream: a prompt of 3 tokens, a picture of 17, a face everywhere; side: of the latents."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g).to(dit.device, dit.dtype)
    return {"text": randn(1, 3, dit.config.text_dim), "image_tokens": randn(1, 17, dit.config.image_dim),
            "audio_mask": torch.ones(side // 2, side // 2)}


def streamed(streamer: Streamer, picture: np.ndarray, chunks: int) -> list[Chunk]:
    """So many chunks of a noise, all taken at once; mark "out": from when one was asked for until it was there."""
    wave = 0.05 * np.random.default_rng(0).standard_normal((4 * streamer.chunk * chunks - 3) * FRAME).astype(np.float32)
    made, asked = [], time.perf_counter()
    for chunk in streamer.chunks(picture, [wave], **scene(streamer.dit, picture.shape[0] // 8)):
        now = time.perf_counter()
        chunk.marks["out"], chunk.frames, chunk.wave = (asked, now), None, None
        made.append(chunk)
        asked = now
    return made


def rates(runs: list[list[Chunk]], frames: int, warmup: int) -> np.ndarray:
    """Frames per second of each run after its warm-up, (runs,)."""
    return np.array([frames * (len(run) - 1 - warmup) / (run[-1].marks["out"][1] - run[warmup].marks["out"][1]) for run in runs])


def summary(runs: list[list[Chunk]], frames: int, warmup: int) -> dict[str, float]:
    """Numbers of the same stream run several times: medians over runs of the rate and the first frame, over chunks of the stages."""
    out = [np.array([c.marks["out"][1] for c in run]) for run in runs]
    numbers = {"first_frame_ms": 1e3 * float(np.median([run[0].marks["out"][1] - run[0].marks["out"][0] for run in runs])),
               "fps": float(np.median(rates(runs, frames, warmup))),
               **metrics.latency(np.concatenate([np.diff(times)[warmup:] for times in out]), "chunk")}
    late = [c for run in runs for c in run[warmup + 1:]]
    for stage in ("hear", "dit", "latents", "vae", "frames"):
        if stage in late[0].marks:
            numbers |= metrics.latency([ended - began for began, ended in (c.marks[stage] for c in late)], stage)
    span = sum(float(times[-1] - times[warmup]) for times in out)
    busy = lambda stage: sum(c.marks[stage][1] - c.marks[stage][0] for c in late) / span
    return numbers | {"dit_busy": busy("dit") + busy("hear"), "vae_busy": busy("vae")}


@contextmanager
def cores(n: int):
    """This thread, and those it starts, on n cores; where the system cannot (only Linux can), nothing changes."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:n])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def free_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_turns(ways: dict, picture, chunks: int, rounds: int) -> dict[object, list[list[Chunk]]]:
    """Every way's stream ({name: Streamer}), `rounds` times, the ways in turns; one core for placements of one device, two for the others."""
    runs = {name: [] for name in ways}
    for _ in range(rounds):
        for name, streamer in ways.items():
            with cores(1 if streamer.placement in ONE else 2):
                runs[name].append(streamed(streamer, picture, chunks))
    return runs


def matrix(dit, vae, encoder, picture, p, how) -> list[dict]:
    """A row for every chunk size, number of steps and placement, all in turns; "fps_each": of each round.

    how: shift, cache of the student; p: sizes, steps, chunks_each, rounds_each, warmup_each.
    """
    times = {steps: flow.timesteps(steps, how.shift) for steps in p.steps}
    with cores(2), Streamer(dit, vae, encoder, "two_process", timesteps=times[p.steps[0]]) as first:      # one decoder's process serves all
        ways = {(chunk, steps, name): Streamer(dit, vae, encoder, name, chunk=chunk, timesteps=times[steps], cache=how.cache,
                                               worker=first.worker) for chunk in p.sizes for steps in p.steps for name in (*ONE, *TWO)}
        runs = in_turns(ways, picture, p.chunks_each, p.rounds_each)
    rows, tokens = [], (picture.shape[0] // 16) ** 2
    for (chunk, steps, name), made in runs.items():
        cost = plan.total(plan.chunk_flops(dit.config, chunk, tokens, steps, text=3, image=17, audio=encoder.tokens_per_latent)) / 1e9
        numbers = summary(made, 4 * chunk, p.warmup_each)
        rows.append({"chunk": chunk, "steps": steps, "placement": name, "gflop": cost, "dit_gflop_per_s": 1e3 * cost / numbers["dit_ms_p50"],
                     "fps_each": rates(made, 4 * chunk, p.warmup_each).tolist(), **numbers})
    return rows


def bound(serial: dict[str, float], frames: int) -> float:
    """Frames per second of an ideal pipeline of two devices: that of the slower one, from the split measured on one."""
    return 1e3 * frames / max(serial["dit_ms_p50"] + serial["hear_ms_p50"], serial["vae_ms_p50"])


# An emulated link

def slow(chunks, seconds: float):
    """Chunks, each after `seconds` of sleep, which takes a link's time and no core's."""
    with closing(chunks):
        for chunk in chunks:
            time.sleep(seconds)
            yield chunk


def linked(streamer: Streamer, seconds: float, overlapped: bool) -> Streamer:
    """The streamer with a slow link behind its DiT, in a thread of its own, or (not overlapped) in the DiT's, which waits for it.

    Either way the DiT may be as many chunks ahead, so that only the waiting differs.
    """
    made, depth = streamer.denoised, streamer.depth
    streamer.denoised = lambda *take: slow(ahead(made(*take), depth), seconds) if overlapped else ahead(slow(made(*take), seconds), depth)
    return streamer


def link(dit, vae, encoder, picture, p, how: dict, serial: dict[str, float]) -> list[dict]:
    """A row for every share of p.link, all in turns: frame rates of two processes when a transfer takes that share of the slower stage's time.

    "waiting_fps": the DiT waits for the transfer; "overlapped_fps": it does not; "gain", of the second over the first; "ideal_gain": of
    pipelines without any friction, from the split on one device. p: chunks_each, rounds_each, warmup_each; how: of the Streamer; serial: see `bound`.
    """
    stages = serial["dit_ms_p50"] + serial["hear_ms_p50"], serial["vae_ms_p50"]
    ms = {share: share * max(stages) for share in p.link}
    with cores(2), Streamer(dit, vae, encoder, "two_process", **how) as first:
        ways = {(share, overlapped): linked(Streamer(dit, vae, encoder, "two_process", worker=first.worker, **how), 1e-3 * ms[share], overlapped)
                for share in p.link for overlapped in (False, True)}
        runs = in_turns(ways, picture, p.chunks_each, p.rounds_each)
    fps = {way: rates(made, 4 * first.chunk, p.warmup_each) for way, made in runs.items()}
    return [{"share": share, "link_ms": ms[share], "waiting_fps": float(np.median(fps[share, False])),
             "overlapped_fps": float(np.median(fps[share, True])), **metrics.paired("gain", fps[share, True], fps[share, False]),
             "ideal_gain": max(stages[0] + ms[share], stages[1]) / max(*stages, ms[share])} for share in p.link]


def gantt(path, runs: dict[str, list[Chunk]], first: int, n: int = 5) -> None:
    """When each device worked on which chunk: chunks first .. first + n of each run, {title: chunks}; pale: the chunks before and after. Grey: hearing, and between the devices the transfer."""
    with figures.figure(path, len(runs), size=(7, 0.4 + 1.1 * len(runs)), squeeze=False, sharex=True) as (fig, axes):
        for ax, (name, chunks) in zip(axes[:, 0], runs.items()):
            zero = chunks[first].marks["dit"][0]
            for i, c in enumerate(chunks[:first + n + 2]):
                colour, told = ("#0072b2", "#3f8fd0")[c.index % 2], first <= i < first + n
                for stage, y, height, colour in (("hear", 0, 0.7, "#bbbbbb"), ("latents", 0.5, 0.06, "#888888"), ("dit", 0, 0.7, colour), ("vae", 1, 0.7, colour)):
                    if stage in c.marks:
                        began, ended = (1e3 * (t - zero) for t in c.marks[stage])
                        ax.barh(y, ended - began, left=began, height=height, color=colour, alpha=1 if told else 0.25)
                        if told and stage in ("dit", "vae"):
                            ax.text((began + ended) / 2, y, c.index, ha="center", va="center", color="white", fontsize=7)
            ax.set(title=name, yticks=(0, 1), yticklabels=("DiT", "VAE"), ylim=(1.6, -0.6))
        ends = [1e3 * (chunks[first:first + n][-1].marks["vae"][1] - chunks[first].marks["dit"][0]) for chunks in runs.values()]
        axes[-1, 0].set(xlabel="milliseconds", xlim=(-0.05 * max(ends), 1.05 * max(ends)))


# The DiT alone

class Forgetful(dict):
    """A `KVCache.memo` that remembers nothing: embeddings, text and image K/V are made anew in every pass."""

    def setdefault(self, key, default):
        return default


@torch.no_grad()
def turns(ways: dict[str, Callable[[], None]], n: int) -> dict[str, list[float]]:
    """Seconds of each of n calls of each way, in turns on the same machine."""
    seconds = {name: [] for name in ways}
    for _ in range(n):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def dit_ladder(dit, side: int, tokens: int, p, chunks: int) -> dict[str, list[float]]:
    """Seconds that the DiT takes for each of `chunks` chunks, three ways.

    "recompute": chunk 0, the previous and the present chunk through the whole network, at every step;
    "keys_and_values": the first two come from the cache; "everything": so do embeddings, text and image K/V, time modulation.
    side: of the latents; tokens: of sound, per latent frame; p: steps, shift, chunk, cache of the student.
    """
    g, c, n = torch.Generator().manual_seed(p.seed), dit.config, p.chunk
    randn = lambda *shape: torch.randn(*shape, generator=g).to(dit.device, dit.dtype)
    given = {"text": randn(1, 3, c.text_dim), "image": randn(1, 17, c.image_dim)}
    cond, ts = randn(1, 20, attention.WINDOW, side, side), flow.timesteps(p.steps, p.shift)
    times = [torch.full((1,), t, device=dit.device) for t in ts]
    places = [*range(n), *range(attention.WINDOW - 2 * n, attention.WINDOW)]              # chunk 0, previous, present

    def sound(frames: int) -> dict[str, Tensor]:
        return {"audio": randn(1, frames, tokens, c.audio_dim), "audio_mask": torch.ones(1, frames, side // 2, side // 2, device=dit.device)}

    def recompute() -> None:
        heard = sound(3 * n)
        for t in times:
            dit(randn(1, c.in_channels, 3 * n, side, side), t, positions=places, mask="sparse_causal", **given, **heard)

    def chained(memo: dict | None) -> Callable[[], None]:
        state = Chain(dit, cond, ts, chunk=n, cache=p.cache)
        if memo is not None:
            for cache, _ in state.caches.values():
                cache.memo = memo
        return lambda: state.next(lambda step: randn(1, 16, n, side, side), **given, **sound(n))

    return turns({"recompute": recompute, "keys_and_values": chained(Forgetful()), "everything": chained(None)}, chunks)


def without_sound(dit: WanDiT) -> WanDiT:
    """The same weights as plain Wan, without sound or prior, which diffusers' model does not know."""
    plain = WanDiT(replace(dit.config, audio_dim=None, prior_std=None, condition="grey"))
    plain.load_state_dict({name: w for name, w in dit.state_dict().items() if "audio" not in name})
    return plain.to(dit.device).eval().requires_grad_(False)


@torch.no_grad()
def against_diffusers(dit: WanDiT, side: int, chunk: int, compiled: bool = False, **how) -> dict[str, Callable[[], Tensor]]:
    """Denoising steps to be timed: "cached", one chunk from its K/V cache; "window", diffusers computing all its frames anew.

    compiled: a "compiled" cached step too, its graph made here (`fast.compile_step`, how: its options), held against the eager one, and
    "again", the window once more, so that each of ours runs right behind one. The prompt is 512 tokens long: diffusers counts on that
    when it tells words from picture.
    """
    ours = without_sound(dit)
    theirs, c, g = of_diffusers(ours), dit.config, torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g).to(dit.device)
    text, image, t = randn(1, plan.TEXT, c.text_dim), randn(1, 17, c.image_dim), torch.full((1,), 900.0, device=dit.device)
    window = randn(1, c.in_channels, attention.WINDOW, side, side)
    x = window[:, :, :chunk].contiguous()

    def cached(dit: WanDiT) -> Callable[[], Tensor]:
        cache = dit.new_cache(1, side, side, chunk=chunk)
        return lambda: dit(x, t, text=text, image=image, cache=cache)

    anew = lambda: theirs(window, t, text, image)
    ways = {"cached": cached(ours), "window": anew}
    if compiled:
        ways |= {"compiled": cached(fast.compile_step(fast.fuse_qkv(without_sound(dit)), **how)), "again": anew}
        for _ in range(attention.WINDOW // chunk + 1):                        # until positions stay where they are
            a, b = ways["cached"](), ways["compiled"]()
            if not torch.allclose(a, b, atol=1e-3 * float(a.abs().max())):
                raise UserError(f"the compiled step differs from the eager one by {float((a - b).abs().max()):.2g}: this torch compiles it wrongly")
    return ways
