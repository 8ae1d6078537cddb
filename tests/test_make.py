"""The Makefile on a toy pipeline of one notebook: the real recipes, ignore files and DVC settings, in throwaway trees."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_notebook import write

from tmlib import config

REPOSITORY = Path(config.__file__).resolve().parents[1]
HOUSE = ["Makefile", ".gitignore", ".gitattributes", ".dvcignore", ".dvc/config", ".dvc/.gitignore",
         "tmlib/__init__.py", "tmlib/config.py", "tmlib/notebook.py", "tmlib/scales.py"]
PARAMS = "common: {scale: mini, seed: 0}\ntoy: {steps: 100}\nscales:\n  smoke: {toy: {steps: 3}}\n"
DVC = """\
stages:
  toy:
    cmd: python -m tmlib.notebook notebooks/10_toy.ipynb reports/nb/10_toy.ipynb
    deps: [notebooks/10_toy.ipynb, tmlib/config.py]
    params: [common, toy]
    outs: [reports/nb/10_toy.ipynb: {cache: false}, data/clips]
    metrics:
      - reports/metrics/toy.json: {cache: false}
"""
CELL = """\
import tmlib
(config.DATA / "clips").mkdir(parents=True)
(config.DATA / "clips" / "0.txt").write_text(str(p.steps))
config.save_json(config.METRICS / "toy.json", {"steps": p.steps, "scale": p.scale})
print("code", tmlib.__file__)"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy's tree, its notebook stripped by the real recipe."""
    root = tmp_path_factory.mktemp("toy")
    for name in HOUSE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    write(root / "notebooks" / "10_toy.ipynb", CELL, first='section = "toy"\noverrides = {}')
    (root / "params.yaml").write_text(PARAMS)
    (root / "dvc.yaml").write_text(DVC)
    assert make(root, "strip").returncode == 0
    return root


@pytest.fixture
def tree(toy, tmp_path):
    """A copy of it, in a folder with a space: people's folders have them."""
    return Path(shutil.copytree(toy, tmp_path / "a tree"))


def make(root, *arguments):
    """make as in the conda environment: the Python on the path has everything, nothing is installed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "CONDA_DEFAULT_ENV": "talkingmachines", "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "ARGS", "SCALE", "TM_ROOT", "PYTHONPATH"):
        env.pop(name, None)
    return subprocess.run(["make", *arguments], cwd=root, env=env, capture_output=True, text=True)


def metric(root):
    return config.load_json(root / "reports" / "metrics" / "toy.json")


@pytest.mark.slow
def test_repro_at_two_scales_leaves_git_as_it_should_be(tree, git):
    git(tree, "init")
    git(tree, "add", "-A")
    git(tree, "commit", "-m", "all")

    done = make(tree, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the report: reports/index.html" in done.stdout and metric(tree) == {"scale": "mini", "steps": 100}
    assert f"code {tree / 'tmlib'}" in done.stdout
    assert sorted(git(tree, "status", "--porcelain", "-uall").split("\n")) == ["", "?? reports/metrics/toy.json", "?? reports/nb/10_toy.ipynb", "A  dvc.lock"]
    git(tree, "add", "-A")
    git(tree, "commit", "-m", "results")

    smoke = tree / ".scales" / "smoke"
    done = make(tree, "repro", "SCALE=smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert metric(smoke) == {"scale": "smoke", "steps": 3} and (smoke / "data/clips/0.txt").read_text() == "3"
    assert f"code {smoke / 'tmlib'}" in done.stdout, "the mirror runs its own copy of the code"
    assert metric(tree)["steps"] == 100 and git(tree, "status", "--porcelain") == ""

    for arguments in ([], ["SCALE=smoke"]):         # and neither runs anything again
        done = make(tree, "repro", *arguments)
        assert "Data and pipelines are up to date" in done.stdout + done.stderr
    assert git(tree, "status", "--porcelain") == ""


@pytest.mark.slow
def test_repro_from_an_archive_without_git(tree):
    done = make(tree, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert metric(tree)["steps"] == 100 and (tree / "dvc.lock").exists()
    assert "No such" not in done.stderr


def test_a_notebook_run_by_hand_stops_repro_and_strip_restores_it(tree):
    import nbformat

    source = tree / "notebooks" / "10_toy.ipynb"
    clean = source.read_bytes()
    played = nbformat.read(source, as_version=4)
    played.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
    played.cells[2].outputs, played.cells[2].execution_count = [nbformat.v4.new_output("stream", text="1")], 4
    nbformat.write(played, source)
    done = make(tree, "repro")
    assert done.returncode and "error: notebooks/10_toy.ipynb was run by hand" in done.stderr
    assert make(tree, "strip").returncode == 0 and source.read_bytes() == clean


def test_plan_and_bench_run_their_modules(tree):
    for name in ("plan", "bench"):
        (tree / "tmlib" / f"{name}.py").write_text(f"import sys\nprint('{name}', sys.argv[1:])\n")
    assert make(tree, "plan").stdout == "plan ['talkingmachines-18b']\n"
    assert make(tree, "plan", "VARIANT=smoke", "ARGS=--gpus 2").stdout == "plan ['smoke', '--gpus', '2']\n"
    assert make(tree, "bench").stdout == "bench []\n" and make(tree, "bench", "ARGS=--layers 2").stdout == "bench ['--layers', '2']\n"


def test_clean_scratch_is_of_one_scale(tree):
    places = [tree / "data" / "scratch", tree / ".scales" / "smoke" / "data" / "scratch"]
    for scale, kept in (("smoke", [True, False]), ("mini", [False, True])):
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        assert make(tree, "clean-scratch", f"SCALE={scale}").returncode == 0
        assert [place.exists() for place in places] == kept


def test_help_and_clear_errors(tree):
    done = make(tree)
    assert all(f"make {target}" in done.stdout for target in ("env", "test", "repro", "lab", "plan", "bench", "talk", "clean-scratch", "strip"))
    done = make(tree, "repro", "SCALE=huge")
    assert done.returncode and "no scale `huge`; known: mini, smoke" in done.stderr
    assert "usage: make talk FACE=" in make(tree, "talk").stderr
    (tree / "pyproject.toml").touch()
    done = make(tree, "env", "CONDA_DEFAULT_ENV=", "PYTHON=no-such-python")
    assert done.returncode and "older than 3.11" in done.stderr and not (tree / ".venv").exists()
