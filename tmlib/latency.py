"""What each kind of memory buys in the stream: the same chunk, made with ever less repeated work, timed in turns."""
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import attention, flow
from .chain import Chain


class Forgetful(dict):
    """A `KVCache.memo` that remembers nothing: embeddings, text and image K/V are made anew in every pass."""

    def setdefault(self, key, default):
        return default


def dit_ladder(dit, side: int, tokens: int, p, chunks: int) -> dict[str, list[float]]:
    """Seconds that the DiT takes for each of `chunks` chunks, three ways, in turns on the same machine.

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

    ways = {"recompute": recompute, "keys_and_values": chained(Forgetful()), "everything": chained(None)}
    seconds = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(chunks):
            for name, run in ways.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    return seconds
