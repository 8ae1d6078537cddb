"""timing: medians, memory and FLOPs are right, placements play one stream, and no rival is another model. No time decides a test."""

import math
from importlib.util import find_spec

import pytest
import torch

from tiny import WAN_VAE
from tmlib import plan, stand_in, timing
from tmlib.config import UserError

CPU = torch.device("cpu")
needs_diffusers = pytest.mark.skipif(not find_spec("diffusers"), reason="diffusers is not installed")


def test_medians_and_percentiles():
    assert timing.typical([3.0, 1.0, 2.0]) == {"ms_p50": 2.0, "ms_p95": pytest.approx(2.9), "n": 3}
    calls = []
    assert all(ms >= 0 for ms in timing.measure(lambda: calls.append(1), 5, CPU)) and len(calls) == 5
    assert math.isfinite(timing.median(lambda: None, 3, CPU))


def test_memory_that_grows_is_seen():
    kept, before = [], timing.held(CPU)
    kept.append(torch.empty(1000))
    assert timing.held(CPU) - before == 4000
    kept.append(kept[0][:10])                                           # a view holds no more
    assert timing.held(CPU) - before == 4000


def test_the_attentions_timed_are_those_counted():
    c = plan.build("talkingmachines-18b").config
    pairs = sum(batch * queries * keys for batch, queries, keys in timing.attentions(c, 3, 1024))
    assert 4 * c.num_layers * c.dim * pairs == plan.total(plan.step_flops(c, 3, 1024), "products")


# The decoder

@needs_diffusers
@torch.no_grad()
def test_a_zero_decoder_is_not_timed():
    vae = stand_in.random_vae(CPU, torch.float32, **WAN_VAE)
    assert vae.net.encoder is None and not any(p.requires_grad for p in vae.parameters())
    z = torch.randn(1, 16, 3, 2, 2)
    assert timing.decoder(vae, z, 1, CPU)["ms_p50"] > 0
    vae.net.decoder.conv_out.weight.zero_()
    vae.net.decoder.conv_out.bias.zero_()
    with pytest.raises(UserError, match="constant"):
        timing.decoder(vae, z, 1, CPU)


def test_placements_play_one_stream():
    """Every chunk is decoded once, in order, from the past that the one before it left; a new stream begins without one."""
    class Tape:
        def __init__(self):
            self.seen = []

        def decode(self, z, past=None):
            self.seen.append((int(z[0, 0, 0, 0, 0]), past))
            return z, (past or 0) + 1

    class Played:
        def __init__(self):
            self.made = []

        def next(self):
            self.made.append(len(self.made))
            return torch.full((1, 16, 3, 2, 2), float(len(self.made) - 1))

        def restart(self):
            self.made.append("restart")
    vae, played = Tape(), Played()
    found = {key: value for part in timing.placements(vae, played, 3, CPU) for key, value in part.items()}
    assert vae.seen == [(0, None), (1, 1), (2, 2), (3, 3), (4, 4), (6, None)] and played.made[5] == "restart"
    assert found["serial_fps"] == pytest.approx(12_000 / found["serial_ms"]) and "overlap_fps" not in found


# The rivals

@pytest.mark.parametrize("chunk,places", [(3, [0, 1, 2, 15, 16, 17, 18, 19, 20]), (1, [0, 19, 20]), (7, [*range(21)])])
def test_the_window_is_what_a_streamed_chunk_sees(chunk, places):
    x, t, positions = timing.window(stand_in.Scene(plan.build("smoke").config, (2, 3), 3 * chunk, CPU))
    assert positions == places and x.shape == (1, 36, 3 * chunk, 4, 6) and t.shape == (1,)


@needs_diffusers
@torch.no_grad()
def test_another_model_is_no_rival(monkeypatch):
    dit, other = (stand_in.random_dit("smoke", CPU, torch.float32, seed, num_layers=1) for seed in (0, 1))
    assert timing.diffusers_window(dit, (2, 2), 3, CPU, 1)["difference"] < 1e-4
    net = stand_in.of_diffusers(other)
    monkeypatch.setattr(timing, "of_diffusers", lambda dit: net)
    with pytest.raises(UserError, match="diffusers' window is .* away"):
        timing.diffusers_window(dit, (2, 2), 3, CPU, 1)
