"""The smallest codec and ears that keep the runtime's contract, in a module of their own so that a worker process finds them."""
import itertools
import time

import numpy as np
import torch
from tiny import make_dit

from tmlib import flow
from tmlib.stream import Streamer

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
WAVE = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
PROMPT = dict(text=torch.ones(1, 3, 10), image_tokens=torch.ones(1, 2, 12), audio_mask=torch.ones(2, 2))


class FakeVAE:
    """Frames are the mean latent plus its number, counted in the cache: a decoder that notices a lost or repeated latent frame."""

    def encode(self, video):
        return video[:, :1, ::4, ::8, ::8].expand(-1, 16, -1, -1, -1) * 0.5

    def decode(self, z, cache=None):
        start = 0 if cache is None else cache
        numbered = z.mean(1, keepdim=True) + 0.01 * torch.arange(start, start + z.shape[2])[:, None, None]
        video = numbered.repeat_interleave(4, 2)[:, :, 3 if cache is None else 0:].expand(-1, 3, -1, -1, -1)
        return video.repeat_interleave(8, 3).repeat_interleave(8, 4), start + z.shape[2]


class SharpVAE(FakeVAE):
    """Shows the smallest change of a latent: a tiny DiT turns its picture by less than one grey level for another sound."""

    def decode(self, z, cache=None):
        video, cache = super().decode(z, cache)
        return torch.sin(3000 * video), cache


class HungryVAE(FakeVAE):
    """Asks for more memory than there is when it has decoded `enough` latents, `times` times."""

    def __init__(self, enough=6, times=1):
        self.enough, self.times = enough, times

    def decode(self, z, cache=None):
        if cache == self.enough and self.times:
            self.times -= 1
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().decode(z, cache)


class BrokenVAE(FakeVAE):
    """Fails by a mistake of its own at the third chunk."""

    def __init__(self, error):
        self.error = error

    def decode(self, z, cache=None):
        if cache == 6:
            raise self.error
        return super().decode(z, cache)


class FakeEars:
    """A token holds the sum of its own frames' samples: any sample lost, doubled or late changes it, and its direction, which is all that a LayerNorm leaves."""

    lookahead_samples = 700

    def __init__(self):
        self.calls = []

    def tokens(self, wave, first, n, start=0):
        self.calls.append((first, len(wave)))
        edges = [max(4 * k - 3, 0) * 1000 - start for k in range(first, first + n + 1)]
        assert edges[0] >= 0 and edges[-1] + self.lookahead_samples <= len(wave)
        sums = [wave[a:b].sum() for a, b in itertools.pairwise(edges)]
        return torch.tensor(sums, dtype=torch.float32)[:, None, None] / 50 * torch.eye(1, 6) + torch.arange(6.0).repeat(n, 4, 1)


TIMES = flow.timesteps(2, 5)


def make_streamer(vae=None, placement="serial", dit=None, ears=None, **more):
    return Streamer(dit or make_dit(), vae or FakeVAE(), ears or FakeEars(), placement, timesteps=TIMES, **more)


def until(condition, seconds=60):
    """Whether it has become true within that time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
