"""bench: everything that one call on a GPU does, here on a CPU at a shrunken shape."""

import gc
import json
import time
from types import SimpleNamespace

import pytest
import torch

from tiny import WAN_VAE
from tmlib import bench, config, fast, measured, plan, stand_in, timing
from tmlib.config import UserError

CPU = torch.device("cpu")
QUICK = ["--variant", "smoke", "--size", "32", "--repeats", "2", "--layers", "1", "--settings", "2x1", "--budget-minutes", "1000"]
DECODERS = ("by_frames",)
needs_diffusers = pytest.mark.skipif(bench.find_spec("diffusers") is None, reason="diffusers is not installed")


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """On a CPU the bench looks for tensors among all objects of Python: those that large imports made are put out of sight."""
    torch._dynamo.reset()                                               # the first use imports it
    if bench.find_spec("diffusers"):
        stand_in.random_vae(CPU, torch.float32, **WAN_VAE)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a file that two calls with other options wrote: float32 with compilation at two settings, and fp8."""
    out = tmp_path_factory.mktemp("measured") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:                         # tracing the decoder takes longest of all: once, in a test of its own
        patch.setattr(bench, "DECODER", DECODERS)
        options = ["--settings", "2x2", "2x1", "--parts", "eager", "together", "--compile", "--backend", "eager"]
        assert bench.main([*QUICK, *options, "--out", str(out)]) == 0
        assert bench.main([*QUICK, "--dtype", "fp8", "--parts", "together", "--out", str(out)]) == 0
    return out.parent


@pytest.fixture(scope="module")
def written(folder):
    return json.loads((folder / "cpu.json").read_text())


def test_it_measures_every_form(written):
    first, second = written.values()
    assert [name.split(" ", 1)[1] for name in written] == ["smoke 32 fp32 1 layers", "smoke 32 fp8 1 layers"]
    assert set(first["runs"]) == {"2x2 eager", "2x2 qkv+attention+compile", "2x1 qkv+attention+compile"}
    assert set(second["runs"]) == {"2x1 qkv+attention", "2x1 qkv+attention+fp8"}
    for result in written.values():
        assert result["missing"] == {} and sum(result["profile"].values()) == pytest.approx(1, abs=1e-4) and result["profile"]["matrix products"] > 0
        for label, run in result["runs"].items():
            assert label == f"{run['chunk']}x{run['steps']} {run['form']}"
            assert 0 < run["ms_p50"] <= run["ms_p95"] and run["n"] >= 2 and run["first_chunk_ms"] > 0 and run["grown_bytes"] == 0
            assert run["mfu"] == pytest.approx(run["tflops"] / result["machine"]["matmul_tflops"], rel=1e-4)
            assert run["mfu_sustained"] == pytest.approx(run["tflops"] / result["machine"]["matmul_sustained_tflops"], rel=1e-4)
            assert run["tflops"] == pytest.approx(run["tflop"] / run["ms_p50"] * 1e3, rel=1e-4)
            assert run["dit_fps"] == pytest.approx(8000 / run["ms_p50"], rel=1e-4)


def test_it_reports_errors_against_float32(written):
    first, second = written.values()
    assert first["runs"]["2x2 eager"]["error"] == 0 and all(run["error"] < 1e-4 for run in first["runs"].values())
    errors = {run["form"]: run["error"] for run in second["runs"].values()}
    assert 0 < errors["qkv+attention"] < 0.05 and errors["qkv+attention"] < errors["qkv+attention+fp8"] < stand_in.BOUNDS[fast.E4M3]


def test_it_says_where_and_how(written):
    for result in written.values():
        assert result["torch"] == torch.__version__ and result["date"].endswith("+00:00") and result["device"]
        assert result["options"]["variant"] == "smoke" and "commit" in result and "out" not in result["options"]
        assert result["attention_ms"][result["attention_kernel"]] > 0 and isinstance(result["attention_ms"]["cudnn"], str)
        assert result["machine"]["copy_gb_per_s"] > 0
    first, second = written.values()
    model = plan.build("smoke", num_layers=1)
    assert first["runs"]["2x2 eager"]["tflop"] == pytest.approx(plan.total(plan.chunk_flops(model.config, 2, 4, 2)) / 1e12, rel=1e-5)
    assert first["planned_gb"]["2x2 bf16"] == pytest.approx(sum(plan.streaming_memory(model, 2, 4, 2).values()) / 1e9, rel=1e-5)
    assert second["machine"]["matmul_fp8_rowwise_tflops"] > 0 and first["options"]["settings"] == ["2x2", "2x1"]


def test_the_report_reads_what_it_writes(folder):
    rows = measured.rows(folder)
    assert [(row["setting"], row["variant"], row["error"] < 1e-4) for row in rows if row["form"] == "eager"] == [("2 x 2", "smoke", True)]
    assert len(rows) == 5 and all(row["ms_p50"] > 0 and row["layers"] == 1 for row in rows)


# The decoder

@needs_diffusers
def test_it_decodes_beside_the_model(written):
    first, second = written.values()
    assert set(first["vae"]) == {"eager", *DECODERS} and set(second["vae"]) == {*DECODERS}
    for vae in (first["vae"], second["vae"]):
        assert all(form["ms_p50"] > 0 for form in vae.values()) and next(iter(vae.values()))["base_dim"] == 8
    assert all(form["error"] < 1e-4 for form in first["vae"].values()) and all(0 < form["error"] < 0.1 for form in second["vae"].values())
    assert first["vae_form"] == min(DECODERS, key=lambda form: first["vae"][form]["ms_p50"])
    for run in (first["runs"]["2x2 eager"], first["runs"]["2x1 qkv+attention+compile"], second["runs"]["2x1 qkv+attention+fp8"]):
        assert run["serial_fps"] == pytest.approx(8000 / run["serial_ms"], rel=1e-4) and run["first_frames_ms"] > 0 and run["serial_grown_bytes"] == 0
    assert first["runs"]["2x2 eager"]["runtime_fps"] > 0 < first["runs"]["2x2 eager"]["picture_to_frames_ms"] and first["runs"]["2x2 eager"]["picture_to_frames_cold_ms"] > 0
    assert [name for name, run in first["runs"].items() if "runtime_fps" in run] == ["2x2 eager", "2x2 qkv+attention+compile"]          # the first setting's


def test_all_forms_of_the_decoder_are_tried():
    args = bench.arguments().parse_args([*QUICK, "--compile"])
    together, by_frames, channels_last, autotune, compiled = bench.DECODER
    assert bench.decoders(args) == {"eager": [()], "alone": [(switch,) for switch in bench.DECODER], "together": [
        (together, channels_last, compiled), (together, by_frames, channels_last, compiled), (together, channels_last, autotune, compiled), bench.DECODER]}
    args.compile = False
    assert bench.decoders(args)["together"][-1] == bench.DECODER[:-1] and (compiled,) not in bench.decoders(args)["alone"]


@needs_diffusers
def test_it_times_the_rivals(written):
    found = next(iter(written.values()))
    assert found["no_cache"] > 0 and found["diffusers"]["step_ms_p50"] > 0 and found["diffusers"]["difference"] < 1e-4


def test_without_diffusers_it_times_the_model_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.main([*QUICK, "--parts", "eager", "--out", str(tmp_path / "a.json")]) == 0
    (result,) = json.loads((tmp_path / "a.json").read_text()).values()
    assert result["missing"] == {"diffusers": bench.ALONE} and result["vae"] == {} and "no_cache" in result and "diffusers" not in result
    assert result["runs"]["2x1 eager"]["ms_p50"] > 0 and "serial_fps" not in result["runs"]["2x1 eager"]


# Nothing wrong is timed, nothing known is lost

@pytest.mark.parametrize("spoil,words", [(torch.nan, "not finite"), (torch.inf, "not finite"), (0.0, "constant")])
def test_zeros_and_nan_are_never_timed(monkeypatch, spoil, words):
    made = stand_in.random_dit

    def spoiled(*how, **more):
        dit = made(*how, **more)
        dit.proj_out.weight.fill_(spoil), dit.proj_out.bias.fill_(spoil)
        return dit
    monkeypatch.setattr(stand_in, "random_dit", spoiled)
    monkeypatch.setattr(stand_in.flow, "few_step", lambda model, noise, ts, *_, **__: model(0, noise(0)))      # the velocity itself
    with pytest.raises(UserError, match=words):
        bench.bench(bench.arguments().parse_args(QUICK), CPU)


def test_a_wrong_form_is_reported_and_the_others_measured(monkeypatch, tmp_path):
    def wrong(dit):
        dit.blocks[0].attn1.to_q.weight.neg_()
        return dit

    def broken(kernel):
        raise RuntimeError("no such kernel\nand much more")
    monkeypatch.setattr(fast, "fuse_qkv", wrong)
    monkeypatch.setattr(fast, "compile_blocks", lambda dit, persistent, backend: broken(backend))
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.main([*QUICK, "--parts", "alone", "--compile", "--backend", "eager", "--out", str(tmp_path / "a.json")]) == 1
    (result,) = json.loads((tmp_path / "a.json").read_text()).values()
    assert set(result["runs"]) == {"2x1 attention"} and "serial_fps" not in result["runs"]["2x1 attention"]
    assert "wrong, not rounded" in result["missing"]["qkv"] and result["missing"]["compile"] == "RuntimeError: no such kernel and much more"


def test_a_form_that_cannot_be_recorded_runs_without(monkeypatch):
    """Graphs are the one switch that may fail for all: the others together are then measured without them."""
    def unable(dit):
        raise RuntimeError("capture failed")
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "forms", lambda args, device: {"together": [("qkv", "graphs")]})
    monkeypatch.setattr(fast, "Graphed", type("Unable", (), {"__new__": lambda cls, dit: unable(dit)}))
    result = bench.bench(bench.arguments().parse_args([*QUICK, "--parts", "together"]), CPU)
    assert set(result["runs"]) == {"2x1 qkv"} and result["missing"]["qkv+graphs"] == "RuntimeError: capture failed"


def test_what_fails_with_all_layers_is_tried_with_less(monkeypatch):
    """A form may pass its check of a few layers and still fail: so does its first setting, and other switches are tried."""
    def unable(played, *how):
        if isinstance(played.dit.blocks[0].attn1, fast.FusedSelfAttention):
            raise RuntimeError("recompile limit")
        return real(played, *how)
    real = timing.stream
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(timing, "stream", unable)
    monkeypatch.setattr(bench, "forms", lambda args, device: {"together": [("qkv", "attention")]})
    monkeypatch.setattr(bench, "WITHOUT", ((), ("qkv",)))
    result = bench.bench(bench.arguments().parse_args([*QUICK, "--parts", "together"]), CPU)
    assert set(result["runs"]) == {"2x1 attention"} and result["missing"]["2x1 qkv+attention"] == result["missing"]["qkv+attention"].replace("RuntimeError: RuntimeError", "RuntimeError")


def test_what_fails_together_is_tried_with_less():
    tried, session = [], bench.Session.__new__(bench.Session)
    session.attempt = lambda what, do: tried.append(what) or what == "qkv+graphs"
    session.try_all(("qkv", "compile", "graphs"), [])
    session.try_all(("compile",), [], bench.WITHOUT[:1])
    assert tried == ["qkv+compile+graphs", "qkv+compile", "qkv+graphs", "compile"]


def test_fp8_comes_first(monkeypatch):
    """It is what the hardest goal needs. Where its product fails, its forms are not tried."""
    args = bench.arguments().parse_args([*QUICK, "--dtype", "fp8", "--compile"])
    assert bench.forms(args, torch.device("cuda"))["together"] == [bench.SWITCHES, bench.SWITCHES[:-1]] and ("compile", "persistent") in bench.forms(args, torch.device("cuda"))["alone"]
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    quick = ["--dtype", "fp8", "--parts", "together", "--settings", "2x1", "3x1"]
    result = bench.bench(bench.arguments().parse_args([*QUICK, *quick]), CPU)
    assert list(result["runs"]) == ["2x1 qkv+attention+fp8", "3x1 qkv+attention+fp8", "2x1 qkv+attention", "3x1 qkv+attention"]
    monkeypatch.setattr(fast, "scaled_product", lambda *_: 1 / 0)
    result = bench.bench(bench.arguments().parse_args([*QUICK, *quick]), CPU)
    assert list(result["runs"]) == ["2x1 qkv+attention", "3x1 qkv+attention"] and "ZeroDivisionError" in result["missing"]["fp8 product"]


def test_a_new_kind_is_charged_a_guess_and_one_that_was_left_out_teaches_nothing():
    session = bench.Session.__new__(bench.Session)
    session.args, session.longest, session.result, session.save = SimpleNamespace(budget_minutes=1), {"others": 1000.0}, {"missing": {}}, lambda result: None
    session.began = time.monotonic() - 60 + bench.SHORT_S + 10
    assert session.attempt("in time", lambda: None) and not session.attempt("broken", lambda: 1 / 0)
    assert not session.result["missing"]["broken"].startswith(bench.OVER) and "in time" not in session.result["missing"]
    session.began -= 20
    assert session.attempt("late", lambda: 1 / 0) and session.result["missing"]["late"] == bench.OVER and "late" not in session.longest
    session.began += 20
    assert session.attempt("broken", lambda: None) and set(session.result["missing"]) == {"late"}      # what fails and then works is not missing


def test_without_a_compiler_the_rest_is_measured(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C compiler")
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench.torch, "compile", broken)
    result = bench.bench(bench.arguments().parse_args([*QUICK, "--compile", "--parts", "together"]), CPU)
    assert set(result["runs"]) == {"2x1 qkv+attention"} and result["missing"]["compile"] == "RuntimeError: no C compiler"


def test_without_an_fp8_product_the_rest_is_measured(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("row-wise scaling is not supported")
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(fast, "scaled_product", broken)
    result = bench.bench(bench.arguments().parse_args([*QUICK, "--dtype", "fp8", "--parts", "eager"]), CPU)
    assert result["missing"]["fp8 product"] == "RuntimeError: row-wise scaling is not supported" and set(result["runs"]) == {"2x1 eager"}
    assert result["machine"]["matmul_tflops"] > 0 and "matmul_fp8_rowwise_tflops" not in result["machine"]


def test_a_spent_budget_leaves_what_there_is():
    saved = []
    result = bench.bench(bench.arguments().parse_args([*QUICK, "--budget-minutes", "1e-9"]), CPU, lambda r: saved.append(json.dumps(r)))
    assert result["runs"] == {} and len(saved) - 2 == list(result["missing"].values()).count(bench.OVER) > 3


@needs_diffusers
def test_what_does_not_fit_beside_the_model_takes_nothing_away(monkeypatch, tmp_path):
    def full(*_):
        yield {"serial_ms": 500.0, "serial_fps": 16.0}
        raise torch.OutOfMemoryError("no room for a second stream")
    monkeypatch.setattr(bench, "DECODER", DECODERS)
    monkeypatch.setattr(timing, "placements", full)
    assert bench.main([*QUICK, "--parts", "together", "--out", str(tmp_path / "a.json")]) == 1
    (result,) = json.loads((tmp_path / "a.json").read_text()).values()
    (run,) = result["runs"].values()
    assert run["ms_p50"] > 0 and run["first_chunk_ms"] > 0 and run["serial_fps"] == 16 and "first_frames_ms" not in run
    assert result["missing"] == {"2x1 qkv+attention and decoder": "OutOfMemoryError: no room for a second stream"}


def test_a_killed_call_leaves_a_valid_file(monkeypatch, tmp_path):
    """Killed while it measures the second form: the first is there, and so is what earlier calls wrote."""
    out, real = tmp_path / "a.json", timing.stream
    out.write_text('{"earlier": {"runs": {}}}')
    monkeypatch.setattr(bench, "find_spec", lambda name: None)

    def killed(dit, *how):
        if (tmp_path / "a.json").read_text().count('"form"'):
            raise KeyboardInterrupt
        return real(dit, *how)
    monkeypatch.setattr(timing, "stream", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*QUICK, "--out", str(out)])
    earlier, mine = json.loads(out.read_text()).values()
    assert earlier == {"runs": {}} or mine == {"runs": {}}
    assert [set(r["runs"]) for r in (earlier, mine)].count({"2x1 qkv+attention"}) == 1


def test_it_writes_beside_the_data_by_default(root):
    assert bench.main([*QUICK, "--repeats", "1", "--budget-minutes", "1e-9"]) == 0
    (file,) = (config.SCRATCH / "measured").iterdir()
    assert file.suffix == ".json" and file.name == file.name.lower()


@pytest.mark.parametrize("argv,words", [(["--variant", "huge"], "huge.*unknown"), (["--size", "33"], "size 33"), (["--settings", "8x2"], "8x2.*21"),
                                        (["--settings", "3x0"], "3x0.*3x2"), (["--settings", "three"], "three"), (["--budget-minutes", "0"], "--budget-minutes")])
def test_bad_input_gets_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        bench.main([*QUICK, *argv])


def test_a_mistake_ends_the_command(python):
    done = python("-m", "tmlib.bench", "--variant", "huge")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
