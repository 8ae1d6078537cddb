"""bench: everything that one call on a GPU does, here on a CPU at a shrunken shape."""

import json
import math

import pytest
import torch

from tmlib import bench, clock, config, plan
from tmlib.config import UserError

CPU = torch.device("cpu")
QUICK = ["--variant", "smoke", "--size", "32", "--repeats", "2", "--layers", "2"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file that two runs with other options wrote."""
    out = tmp_path_factory.mktemp("measured") / "cpu.json"
    assert bench.main([*QUICK, "--compile", "--backend", "eager", "--out", str(out)]) == 0
    assert bench.main([*QUICK, "--dtype", "fp8", "--steps", "1", "--chunk", "7", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_it_measures_every_form(written):
    first, second = written.values()
    assert list(written) == ["smoke 32 chunk 3 x 2 fp32 2 layers", "smoke 32 chunk 7 x 1 fp8 2 layers"]
    assert set(first["runs"]) == {"eager", "qkv+attention+compile", "qkv", "attention", "compile"}
    assert set(second["runs"]) == {"eager", "qkv+attention+fp8", "qkv+attention", "qkv", "attention", "fp8"}
    for result in written.values():
        assert result["missing"] == {} and result["no_cache"]["ms_p50"] > 0
        assert sum(result["profile"].values()) == pytest.approx(1) and result["profile"]["matrix products"] > 0
        for run in result["runs"].values():
            assert 0 < run["ms_p50"] <= run["ms_p95"] and run["n"] == 2 and run["first_chunk_ms"] > 0
            assert run["mfu"] == pytest.approx(run["tflops"] / result["machine"]["matmul_tflops"], rel=1e-4)
            assert run["tflops"] == pytest.approx(result["tflop_per_chunk"] / run["ms_p50"] * 1e3, rel=1e-4)
    assert first["runs"]["eager"]["dit_fps"] == pytest.approx(12_000 / first["runs"]["eager"]["ms_p50"], rel=1e-4)


def test_it_reports_errors_against_float32(written):
    first, second = written.values()
    assert first["runs"]["eager"]["error"] == 0 and all(run["error"] < 1e-4 for run in first["runs"].values())
    errors = {label: run["error"] for label, run in second["runs"].items()}
    assert 0 < errors["eager"] < 0.05 and errors["eager"] < errors["fp8"] < bench.BOUNDS["fp8"]


def test_it_says_where_and_how(written):
    for result in written.values():
        assert result["torch"] == torch.__version__ and result["date"].endswith("+00:00") and result["device"]
        assert result["options"]["variant"] == "smoke" and "commit" in result and "out" not in result["options"]
        assert result["attention_ms"][result["attention_kernel"]] > 0 and isinstance(result["attention_ms"]["cudnn"], str)
        assert result["machine"]["copy_gb_per_s"] > 0
    c = plan.build("smoke", num_layers=2).config
    assert written["smoke 32 chunk 3 x 2 fp32 2 layers"]["tflop_per_chunk"] == pytest.approx(plan.total(plan.chunk_flops(c, 3, 4, 2)) / 1e12, rel=1e-5)
    assert written["smoke 32 chunk 7 x 1 fp8 2 layers"]["machine"]["matmul_fp8_rowwise_tflops"] > 0


def test_the_attentions_timed_are_those_counted():
    c = plan.build("talkingmachines-18b").config
    pairs = sum(batch * queries * keys for batch, queries, keys in bench.attentions(c, 3, 1024))
    assert 4 * c.num_layers * c.dim * pairs == plan.total(plan.step_flops(c, 3, 1024), "products")


def test_it_decodes_or_says_why_not(written, monkeypatch):
    pytest.importorskip("diffusers")
    vae = written["smoke 32 chunk 3 x 2 fp32 2 layers"]["vae"]
    assert vae["vae_ms_p50"] > 0 and vae["first_frame_ms"] > 0 and vae["vae_channels_last_ms_p50"] > 0

    def absent(*_, **__):
        raise ImportError
    monkeypatch.setattr(bench, "Decoder", absent)
    args = bench.arguments().parse_args(QUICK)
    assert "diffusers is not installed" in bench.decoding(args, bench.form(args, (), CPU), 2, 2, CPU)["missing"]


@torch.no_grad()
def test_chunkwise_decoding_equals_whole_decoding():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    decoder, z = bench.Decoder(CPU, torch.float32, base_dim=8), torch.randn(1, 16, 7, 4, 4)
    parts = [decoder(part) for part in z.split(3, dim=2)]
    assert [p.shape[2] for p in parts] == [9, 12, 4] and parts[0].std() > 0
    whole = decoder.vae.decode(z).sample
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=0)


def test_random_models_are_alive_and_alike_at_any_depth():
    a, b = (bench.random_model("smoke", CPU, torch.bfloat16, num_layers=n) for n in (1, 3))
    for name, p in a.named_parameters():
        assert torch.equal(p, dict(b.named_parameters())[name]) or name.startswith("proj_out") and p.std() > 0
        assert p.float().std() > 0 and p.isfinite().all()
    assert a.dtype == torch.bfloat16 and a.blocks[0].scale_shift_table.dtype == torch.float32


@pytest.mark.parametrize("spoil,words", [(torch.nan, "not finite"), (torch.inf, "not finite"), (0.0, "constant")])
def test_zeros_and_nan_are_never_timed(monkeypatch, spoil, words):
    made = bench.random_model

    def spoiled(*how, **more):
        dit = made(*how, **more)
        dit.proj_out.weight.fill_(spoil), dit.proj_out.bias.fill_(spoil)
        return dit
    monkeypatch.setattr(bench, "random_model", spoiled)
    monkeypatch.setattr(bench.flow, "few_step", lambda model, noise, ts, *_, **__: model(0, noise(0)))      # the velocity itself
    with pytest.raises(UserError, match=words):
        bench.bench(bench.arguments().parse_args(QUICK), CPU)


def test_a_wrong_form_is_reported_and_the_others_measured(monkeypatch, tmp_path):
    def wrong(dit):
        dit.blocks[0].attn1.to_q.weight.neg_()
        return dit

    def broken(kernel):
        raise RuntimeError("no such kernel\nand much more")
    monkeypatch.setattr(bench.fast, "fuse_qkv", wrong)
    monkeypatch.setattr(bench.fast, "compile_blocks", lambda dit, backend: broken(backend))
    assert bench.main([*QUICK, "--compile", "--out", str(tmp_path / "a.json")]) == 1
    (result,) = json.loads((tmp_path / "a.json").read_text()).values()
    assert set(result["runs"]) == {"eager", "attention"}
    assert "wrong, not rounded" in result["missing"]["qkv"] and result["missing"]["compile"] == "RuntimeError: no such kernel"


def test_a_spent_budget_leaves_what_there_is(tmp_path):
    saved = []
    result = bench.bench(bench.arguments().parse_args([*QUICK, "--budget-minutes", "1e-9"]), CPU, lambda r: saved.append(json.dumps(r)))
    assert result["runs"] == {} and set(result["missing"].values()) == {bench.OVER}


def test_medians_and_percentiles():
    assert clock.typical([3.0, 1.0, 2.0]) == {"ms_p50": 2.0, "ms_p95": pytest.approx(2.9), "n": 3}
    calls = []
    assert all(ms >= 0 for ms in clock.measure(lambda: calls.append(1), 5, CPU)) and len(calls) == 5
    assert math.isfinite(clock.median(lambda: None, 3, CPU))


def test_it_writes_beside_the_data_by_default(root):
    assert bench.main([*QUICK, "--repeats", "1"]) == 0
    (file,) = (config.DATA / "measured").iterdir()
    assert file.suffix == ".json" and file.name == file.name.lower()


@pytest.mark.parametrize("argv,words", [(["--variant", "huge"], "huge.*unknown"), (["--size", "33"], "size 33"), (["--chunk", "8"], "--chunk 8.*21"),
                                        (["--steps", "0"], "--steps 0"), (["--budget-minutes", "0"], "--budget-minutes")])
def test_bad_input_gets_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        bench.main([*QUICK, *argv])


def test_a_mistake_ends_the_command(python):
    done = python("-m", "tmlib.bench", "--variant", "huge")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
