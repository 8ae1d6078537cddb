"""budget: the scale `gpu` fits its card and its ten minutes by arithmetic, and counts what the losses really do."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny import distillation, make_dit, make_latents
from tmlib import budget, config, distill, plan
from tmlib.config import UserError


def test_the_scale_gpu_fits_its_card_and_its_minutes():
    params = budget.read("gpu")
    assert plan.parameters(plan.build(params["base"]["variant"])) >= 1e8 and params["data"]["size"] >= 256 and params["common"]["device"] == "cuda"
    found = budget.stages(params)
    minutes = {stage: whole * 1e12 / budget.FLOPS / 60 for stage, (_, _, whole, _, gpus) in found.items() if gpus == 1}
    assert max(*(minutes[stage] for stage in ("base", "adaptation", "teacher", "plain")), minutes["solutions"] + minutes["regression"] + minutes["matching"]) < 8    # of 10: pictures too
    assert max(peak for *_, peak, _ in found.values()) < 60                                                                  # of 80 GB
    assert all(steps == params[stage]["steps"] for stage, (steps, *_) in found.items() if stage in params)


def test_full_size_is_counted_as_it_is_trained():
    """On eight GPUs, a clip at once and repeats of it, with blocks computed again; what is public, or has no steps, trains nothing."""
    params = budget.read("wan14b")
    found, dit = budget.stages(params), plan.build("talkingmachines-18b")
    assert set(found) == {"adaptation", "teacher", "solutions", "regression", "matching"} and {gpus for *_, gpus in found.values()} == {8}
    assert found["teacher"][3] == pytest.approx(sum(plan.training_memory(dit, 8, 32, 32).values()) / 1e9)
    assert found["matching"][3] == pytest.approx(sum(plan.training_memory(dit, 8, 32, 32, trained=2, frozen=1, graphs=2, mask="sparse_causal").values()) / 1e9)
    passes = plan.stage_passes()
    assert found["teacher"][1] == pytest.approx(plan.training_flops(dit.config, 1024, passes["teacher"], batch=64) / 1e12)
    assert found["solutions"][1] == pytest.approx(80 * plan.total(plan.sequence_flops(dit.config, 21, 1024)) / 1e12)        # 40 steps, guided
    params["teacher"] |= {"repeats": 2, "at_once": None}
    whole = sum(plan.training_memory(dit, 8, 32, 32, batch=16).values()) / 1e9                                              # a share of eight clips, twice
    assert budget.stages(params)["teacher"][3] == pytest.approx(whole)


def test_stages_scale_as_their_parameters():
    params = budget.read("mini")
    once = budget.stages(params)
    params["teacher"] |= {"steps": 2 * params["teacher"]["steps"], "batch": 2 * params["teacher"]["batch"]}
    params["distillation"] |= {"critic_steps": 10 ** 9}
    twice = budget.stages(params)
    assert twice["teacher"][2] == pytest.approx(4 * once["teacher"][2]) and twice["base"] == once["base"]
    assert twice["teacher"][3] > 1.5 * once["teacher"][3] and twice["matching"][1] < once["matching"][1]                   # the critic alone is left


def test_a_regression_step_costs_what_torch_counts(tmp_path):
    """At the first of two steps and at the second, whose start is made without a gradient: half a pass more on average."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    latents, dit, p = make_latents(tmp_path), make_dit(), distillation()
    pairs = {"index": torch.arange(4), "seed": torch.arange(4), "target": latents.store["z"]}
    [loss], counted = distill.regression_loss(dit, latents, pairs, p), 0
    for step in (0, 1):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss(torch.Generator().manual_seed(0), step)["loss"].backward()
        counted += counter.get_total_flops() / 2
    parts = plan.sequence_flops(dit.config, 6, 4, "sparse_causal", batch=p.batch, text=3, image=3, audio=4)
    assert counted == 1.5 * plan.total(parts) + plan.backward(parts)


def test_the_command(capsys):
    assert budget.main(["gpu", "--tflops", "200"]) == 0
    printed = capsys.readouterr().out
    assert "min at 200 TFLOP/s each" in printed and all(stage in printed for stage in ("base", "adaptation", "teacher", "solutions", "regression", "matching"))
    assert budget.main(["wan14b", "--tflops", "400"]) == 0 and "days at 400 TFLOP/s each" in capsys.readouterr().out
    with pytest.raises(UserError, match="huge.*known"):
        budget.main(["huge"])
    with pytest.raises(UserError, match="--tflops 0"):
        budget.main(["gpu", "--tflops", "0"])


def test_a_smaller_house_has_its_own(root):
    """Parameters are those of the house it runs in."""
    (root / "params.yaml").write_text("common: {scale: mini}\n")
    with pytest.raises(UserError, match="gpu"):
        budget.read("gpu")
    assert config.ROOT == root
