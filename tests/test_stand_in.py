"""stand_in: random networks are alive, diffusers' is the same model, streams begin anew, and wrong forms are told from rounded ones."""

import weakref
from importlib.util import find_spec

import pytest
import torch

from tiny import make_dit
from tmlib import fast, stand_in, timing
from tmlib.bench import Setting
from tmlib.config import UserError

CPU = torch.device("cpu")
needs_diffusers = pytest.mark.skipif(not find_spec("diffusers"), reason="diffusers is not installed")


def test_random_models_are_alive_and_alike_at_any_depth():
    a, b = (stand_in.random_dit("smoke", CPU, torch.bfloat16, num_layers=n) for n in (1, 3))
    for name, p in a.named_parameters():
        assert torch.equal(p, dict(b.named_parameters())[name]) or name.startswith("proj_out") and p.std() > 0
        assert p.float().std() > 0 and p.isfinite().all()
    assert a.dtype == torch.bfloat16 and a.blocks[0].scale_shift_table.dtype == torch.float32


@needs_diffusers
@torch.no_grad()
@pytest.mark.parametrize("trained", [{}, dict(condition="repeat", prior_std=((0.5, 0.2), (0.3, 0.4)))], ids=["random", "of the miniature"])
def test_diffusers_has_the_very_tensors(trained):
    dit = make_dit(**trained)
    net, ours = stand_in.of_diffusers(dit), dict(dit.named_parameters())
    assert all(p.data_ptr() == ours[name].data_ptr() and not p.requires_grad for name, p in net.named_parameters())
    assert {name for name in ours if "audio" not in name} == {name for name, _ in net.named_parameters()}


@needs_diffusers
@torch.no_grad()
def test_diffusers_gives_the_same_velocity():
    dit = stand_in.random_dit("smoke", CPU, torch.float32, num_layers=2)
    scene = stand_in.Scene(dit.config, (2, 2), 9, CPU)
    x, t, _ = timing.window(scene)
    theirs = stand_in.of_diffusers(dit)(x, t, scene.text, scene.image, return_dict=False)[0]
    torch.testing.assert_close(theirs, dit(x, t, text=scene.text, image=scene.image), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_stream_begins_anew_with_other_sound_in_the_same_scene():
    stream = stand_in.Stream(stand_in.random_dit("smoke", CPU, torch.float32, num_layers=1, chunk=7), Setting(7, 1), (2, 2), CPU)
    first, old, given = stream.next(), stream.chain, stream.scene.conditions()
    assert first.shape == (1, 16, 7, 4, 4) and not torch.equal(stream.to_steady_state(), first) and stream.chain is old
    stream.restart()
    again = stream.scene.conditions()
    assert stream.chain is not old and given["text"] is again["text"] and given["audio_mask"] is again["audio_mask"]
    assert given["audio"].shape == again["audio"].shape and not torch.equal(given["audio"], again["audio"])


@torch.no_grad()
def test_the_old_streams_caches_are_gone_before_there_are_new_ones(monkeypatch):
    stream, met = stand_in.Stream(stand_in.random_dit("smoke", CPU, torch.float32, num_layers=1, chunk=7), Setting(7, 1), (2, 2), CPU), []
    stream.to_steady_state()
    old, real = weakref.ref(stream.chain), stand_in.Chain
    monkeypatch.setattr(stand_in, "Chain", lambda *given, **how: met.append(old()) or real(*given, **how))
    stream.restart()
    assert met == [None] and isinstance(stream.chain, real)


def test_a_new_stream_forgets_recordings():
    graphed = fast.Graphed(stand_in.random_dit("smoke", CPU, torch.float32, num_layers=1, chunk=7))
    stream = stand_in.Stream(graphed, Setting(7, 1), (2, 2), CPU)
    graphed.recordings["of the old stream"] = None
    stream.restart()
    assert graphed.recordings == {}


@pytest.mark.parametrize("x,words", [([0.0, torch.nan], "not finite"), ([1.0, torch.inf], "not finite"), ([2.0, 2.0], "constant")])
def test_the_dead_are_not_timed(x, words):
    assert stand_in.alive(torch.tensor([0.0, 1.0]), "x").numel() == 2
    with pytest.raises(UserError, match=f"the stream.*{words}"):
        stand_in.alive(torch.tensor(x), "the stream")


@pytest.mark.parametrize("dtype", stand_in.BOUNDS, ids=str)
def test_a_wrong_form_is_more_than_rounded(dtype):
    exact = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert stand_in.bounded_error(exact, exact, dtype, "x") == 0
    assert stand_in.bounded_error(exact * (1 + stand_in.BOUNDS[dtype] / 2), exact, dtype, "x") == pytest.approx(stand_in.BOUNDS[dtype] / 2, rel=1e-3)
    for wrong in (-exact, exact * torch.nan, exact * (1 + 2 * stand_in.BOUNDS[dtype])):
        with pytest.raises(UserError, match="x is .* wrong, not rounded"):
            stand_in.bounded_error(wrong, exact, dtype, "x")
