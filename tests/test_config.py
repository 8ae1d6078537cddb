"""Paths, parameters, seeds, files and progress."""

import errno
import json
import signal

import pytest

from tmlib import config

PARAMS = """\
common: {seed: 7, scale: mini, fps: 16}
teacher:   # comments are for people
  lr: 1e-3
  steps: 100
  fps: 8
  optim: {muon: 2.5e-3, warmup: 5}
  text: null
ablations:
  no_dmd: {distill: {dmd: 0}}
  no_audio: {audio: false}
"""


@pytest.fixture
def house(root):
    (root / "params.yaml").write_text(PARAMS)
    return root


# ---------------------------------------------------------------------------------------------------------- paths
def test_paths_hang_off_the_repository_wherever_one_stands(python, tmp_path):
    code = "from tmlib import config; print(config.ROOT, config.METRICS, config.SCRATCH, sep='\\n')"
    root = config.ROOT
    assert python("-c", code, cwd=tmp_path, TM_ROOT="").stdout.split("\n")[:3] == [
        str(root), str(root / "reports" / "metrics"), str(root / "data" / "scratch")]
    assert python("-c", code, TM_ROOT=tmp_path).stdout.split("\n")[0] == str(tmp_path)


def test_import_is_light(python):
    code = "import sys, tmlib.config; print([name for name in ('torch', 'numpy', 'ruamel', 'ruamel.yaml') if name in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------------- parameters
def test_load_merges_section_over_common(house):
    p = config.load("teacher")
    assert (p.seed, p.fps, p.steps, p.text) == (7, 8, 100, None)
    assert p.lr == 0.001 and p.optim == {"muon": 2.5e-3, "warmup": 5}      # YAML 1.2: 1e-3 is a number
    assert config.load("ablations.no_dmd").distill == {"dmd": 0}


def test_load_overrides_deeply_and_only_this_once(house):
    p = config.load("teacher", {"steps": 2, "seed": 1, "optim": {"warmup": 0}, "text": "x"})
    assert (p.steps, p.seed, p.optim, p.text) == (2, 1, {"muon": 2.5e-3, "warmup": 0}, "x")
    assert config.load("teacher").optim["warmup"] == 5
    assert config.load("teacher", {"lr": None}).lr is None


@pytest.mark.parametrize("section, overrides, message", [
    ("teachr", None, r"no section `teachr`; params.yaml has: .*teacher"),
    ("ablations.no_dmf", None, r"no section `ablations.no_dmf`; ablations has: no_audio, no_dmd"),
    ("teacher.steps", None, "is a value"),
    ("teacher", {"stesp": 3}, r"unknown parameter `stesp`; known: fps, lr, optim, .*steps"),
    ("teacher", {"optim": {"moun": 3}}, r"teacher.optim: unknown parameter `moun`; known: muon, warmup"),
    ("teacher", {"steps": "1e3"}, "expected a number such as 100, got '1e3'"),
    ("teacher", {"steps": True}, "expected a number"),
])
def test_load_names_what_is_wrong(house, section, overrides, message):
    with pytest.raises(config.UserError, match=message):
        config.load(section, overrides)


@pytest.mark.parametrize("text, message", [(None, "not found"), ("a: [1", "not valid YAML"), ("- 1\n", "expected sections")])
def test_bad_params_file(root, text, message):
    if text is not None:
        (root / "params.yaml").write_text(text)
    with pytest.raises(config.UserError, match=f"params.yaml: {message}") as caught:
        config.load("teacher")
    assert "\n" not in str(caught.value)


def test_seed_everything_repeats():
    import random

    import numpy
    import torch

    def draw():
        config.seed_everything(3, threads=1)
        return random.random(), numpy.random.rand(), torch.rand(3).tolist()

    threads = torch.get_num_threads()
    try:
        assert draw() == draw()
        assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- files
def test_save_json_is_sorted_rounded_and_plain(tmp_path):
    import numpy
    import torch

    path = tmp_path / "new" / "m.json"
    config.save_json(path, {"b": 0.123456789, "a": numpy.float32(2), "t": torch.tensor([1, 2]), "n": None, "s": 1234567, "y": True})
    assert list(json.loads(path.read_text())) == ["a", "b", "n", "s", "t", "y"]
    assert config.load_json(path) == {"a": 2.0, "b": 0.123457, "t": [1, 2], "n": None, "s": 1234567, "y": True}
    assert [file.name for file in path.parent.iterdir()] == ["m.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": [1.0, float("-inf")]}, object()])
def test_save_json_refuses_and_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "m.json"
    config.save_json(path, {"fine": 1})
    with pytest.raises(config.UserError, match="m.json: psnr"):
        config.save_json(path, {"psnr": value})
    assert config.load_json(path) == {"fine": 1}


def test_load_json_says_how_to_make_it(tmp_path):
    with pytest.raises(config.UserError, match=r"teacher.json: not there yet; make it with `make repro`"):
        config.load_json(tmp_path / "teacher.json")
    (tmp_path / "teacher.json").write_text("{")
    with pytest.raises(config.UserError, match="teacher.json: cannot be read"):
        config.load_json(tmp_path / "teacher.json")


def test_atomic_file_and_folder(tmp_path):
    target = tmp_path / "deep" / "clip.mp4"
    with config.atomic(target) as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == target.parent
        temporary.write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), config.atomic(target) as temporary:
        temporary.write_text("2")
        1 / 0
    assert target.read_text() == "1"

    folder = tmp_path / "model"
    for content in "ab":
        with config.atomic(folder) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [file.name for file in folder.iterdir()] == ["b"]
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["b", "clip.mp4", "deep", "model"]      # no temporaries


# ------------------------------------------------------------------------------------------------------- terminal
@pytest.mark.parametrize("error, status, line", [
    (config.UserError("face.png: too small;\n  use 64 pixels"), 2, "error: face.png: too small; use 64 pixels\n"),
    (OSError(errno.ENOSPC, "No space left on device", "a.npz"), 2, "error: a.npz: no space left; make some, then run again\n"),
    (KeyboardInterrupt(), 130, "stopped\n"),
])
def test_cli_turns_errors_into_a_line_and_a_status(capsys, error, status, line):
    def main():
        raise error

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            config.cli(main)
        with pytest.raises(SystemExit) as fine:
            config.cli(lambda: None)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert caught.value.code == status and capsys.readouterr().err == line
    assert not fine.value.code


def test_progress_line_and_pace(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(config.time, "monotonic", lambda: clock[0])
    progress = config.Progress(1200, "teacher", every_s=5, start=300)
    for _ in range(12):                                  # 12 steps of 0.5 s: the tenth is the first past 5 s
        clock[0] += 0.5
        progress.step(loss=0.18349)
    assert capsys.readouterr().out == "teacher  310/1200  25 %  loss 0.183  0.5 s/step  7 min 25 s left\n"
    clock[0] += 439
    progress.step(888)
    last = capsys.readouterr().out
    assert last.startswith("teacher  1200/1200  100 %") and last.endswith("7 min 25 s in all\n") and config.Progress.UNIT in last


def test_short_work_prints_nothing(capsys):
    progress = config.Progress(3, "quick")
    for _ in range(3):
        progress.step()
    assert capsys.readouterr().out == ""
