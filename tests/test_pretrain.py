"""pretrain: noise levels cover their range, conditions are dropped clip by clip, and parts of a batch are the batch."""
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tiny import make_dit, make_latents
from tmlib import flow, train
from tmlib.config import UserError
from tmlib.pretrain import flow_matching_loss
from tmlib.train import Optim, Player, generator


def flow_params(**changes):
    return SimpleNamespace(**{**dict(batch=3, at_once=None, repeats=4, shift=3.0, drop_audio=0.0, drop_text=0.0, sway_weight=20), **changes})


def test_noise_levels_are_stratified(tmp_path):
    latents, seen = make_latents(tmp_path), []

    def dit(x, t, **conditions):
        seen.append((x, t, conditions))
        return torch.zeros_like(x[:, :16])

    dit.loss_weight, dit.device = lambda x, t: 1.0, "cpu"
    out = flow_matching_loss(dit, latents, flow_params())[0](generator(0), 0)
    x, t, conditions = seen[0]
    u = flow.shift_sigma(t.double() / 1000, 1 / 3.0)
    assert sorted((u * 12).floor().int().tolist()) == list(range(12))    # one level in each twelfth, all clips together
    for i in range(0, 12, 4):                                            # each clip four times
        assert all(torch.equal(conditions["audio"][i], conditions["audio"][i + j]) for j in range(4))
    assert out["loss"].item() == pytest.approx(2, rel=0.2)               # |eps - x_0|^2 of two unit Gaussians


def test_flow_matching_on_the_real_model(tmp_path):
    dit, latents = make_dit(), make_latents(tmp_path)
    [loss] = flow_matching_loss(dit, latents, flow_params(drop_audio=0.5, drop_text=0.5))
    a, b = loss(generator(0), 0)["loss"], loss(generator(0), 5)["loss"]
    assert a.isfinite() and torch.equal(a, b) and not torch.equal(a, loss(generator(1), 0)["loss"])


def test_conditions_are_dropped_clip_by_clip(tmp_path):
    latents, seen = make_latents(tmp_path), defaultdict(list)

    def dit(x, t, **conditions):
        for k in ("audio", "text"):
            seen[k].append((conditions[k] != 0).flatten(1).any(1).view(-1, 2))
        return torch.zeros_like(x[:, :16])

    dit.loss_weight, dit.device = lambda x, t: 1.0, "cpu"
    [loss] = flow_matching_loss(dit, latents, flow_params(batch=20, repeats=2, drop_audio=0.3, drop_text=0.1))
    for step in range(20):
        loss(generator(step), step)
    kept = {k: torch.cat(v) for k, v in seen.items()}
    assert all(torch.equal(v[:, 0], v[:, 1]) for v in kept.values())     # a clip's repeats share their fate
    lost = [(~kept[k]).float().mean().item() for k in ("audio", "text")]
    assert lost == [pytest.approx(0.3, abs=0.07), pytest.approx(0.1, abs=0.05)]
    assert (kept["audio"] & ~kept["text"]).any() and (~kept["audio"] & kept["text"]).any()       # each by itself


def test_parts_of_a_batch_are_the_batch(tmp_path):
    """Gradients are the mean over parts, whose clips weigh alike."""
    latents, grads = make_latents(tmp_path), []
    latents.store["weight"] = torch.ones_like(latents.store["weight"])
    for at_once in (None, 2, 1):
        dit = make_dit()
        loss = flow_matching_loss(dit, latents, flow_params(batch=4, at_once=at_once, drop_audio=0.3))
        assert len(loss) == 4 // (at_once or 4)
        player = Player("dit", dit, loss, Optim(1e-3, clip=1e9))
        player.optimisers = train.build_optimisers(dit, player.optim)
        numbers = train.play(player, 0, 2, 0)
        grads.append((numbers, {n: q.grad for n, q in dit.named_parameters()}))
    for numbers, grad in grads[1:]:
        assert numbers == pytest.approx(grads[0][0], rel=1e-4)
        for n, q in grad.items():
            torch.testing.assert_close(q, grads[0][1][n], atol=1e-6, rtol=1e-4)


def test_a_model_that_has_not_met_sound_learns_nothing_about_it(tmp_path):
    dit, latents = make_dit(), make_latents(tmp_path)
    sounding = lambda: [n for n, q in dit.named_parameters() if "audio" in n and q.grad is not None and q.grad.any()]
    flow_matching_loss(dit, latents, flow_params(drop_audio=1.0))[0](generator(0), 0)["loss"].backward()
    assert not sounding() and dit.blocks[0].attn1.to_q.weight.grad.any()
    flow_matching_loss(dit, latents, flow_params())[0](generator(0), 0)["loss"].backward()
    assert sounding()


def test_sway_that_the_latents_do_not_tell(tmp_path):
    latents = make_latents(tmp_path)
    del latents.store["sway"]
    with pytest.raises(UserError, match="params.yaml needs latents.sway: true, or sway_weight: 0"):
        flow_matching_loss(None, latents, flow_params())
    flow_matching_loss(None, latents, flow_params(sway_weight=0))
