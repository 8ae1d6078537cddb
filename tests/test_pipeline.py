"""The whole pipeline at scale `smoke`, from nothing, in a copy of the tree: what `make repro SCALE=smoke` does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from tmlib import config, scales

CLAIMS = [f"C{i}" for i in range(1, 12)] + ["N1", "N2", "N3"]


def dvc(folder, *arguments, **kwargs):
    env = {**os.environ, "TM_ROOT": str(folder), "PYTHONPATH": str(folder), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    return subprocess.Popen([sys.executable, "-m", "dvc", *arguments], cwd=folder, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True, **kwargs)


def said(process, limit=900):
    out, _ = process.communicate(timeout=limit)
    assert process.returncode == 0, out[-3000:]
    return out


def replace(path, old, new):
    """Write the file with `new` for `old`, which stands there once; returns what it said before."""
    before = path.read_text()
    assert before.count(old) == 1
    path.write_text(before.replace(old, new))
    return before


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the tree as a fresh clone would have it, its smoke mirror, and the pipeline run there once.

    The speech encoder takes a few steps more than at `smoke`: the stage that is killed below must last longer than the two seconds
    until its first saved state, and this run, unbroken, is what it must equal.
    """
    copy = tmp_path_factory.mktemp("clone")
    for name in scales.sources(config.ROOT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(config.ROOT / name, copy / name)
    for name in ("params.yaml", ".dvc/config"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy2(config.ROOT / name, copy / name)
    replace(copy / "params.yaml", "{utterances: 8, steps: 4}", "{utterances: 8, steps: 24}")
    folder = scales.mirror("smoke", copy)
    said(dvc(folder, "repro"))
    return folder


@pytest.mark.slow
def test_every_claim_has_a_row_with_its_number_or_its_reason(house):
    rows = json.loads((house / "reports" / "claims.json").read_text())
    assert sorted(rows) == sorted(CLAIMS)
    for name, row in rows.items():
        assert row["scale"] in ("smoke", None) and row["claim"], name
        assert (row["holds"] is None and row["reason"]) or isinstance(row["holds"], bool), name
    assert {n for n, r in rows.items() if r["holds"] is not None} >= {"C1", "C2", "C4"}


@pytest.mark.slow
def test_metrics_say_where_they_come_from(house):
    for path in (house / "reports" / "metrics").rglob("*.json"):
        values = json.loads(path.read_text())
        assert "per_clip" in path.parts or values["scale"] == "smoke", path
    page = (house / "reports" / "index.html").read_text()
    assert "C11" in page and "student_1.mp4" in page


@pytest.mark.slow
def test_second_run_does_nothing(house):
    began = time.monotonic()
    out = said(dvc(house, "repro"))
    assert "Running stage" not in out and "up to date" in out and time.monotonic() - began < 30


@pytest.mark.slow
def test_one_parameter_reruns_only_what_depends_on_it(house):
    params = house / "params.yaml"
    before = replace(params, "regression_steps: 2\n    dmd_steps: 0", "regression_steps: 1\n    dmd_steps: 0")         # one ablation's
    try:
        out = said(dvc(house, "repro"))
    finally:
        params.write_text(before)
    assert re.findall(r"Running stage '([\w@]+)'", out) == ["ablations@clean_pass", "report"]


@pytest.mark.slow
def test_the_tour_writes_its_copy_alone_and_the_same_bytes_again(house, python):
    """Byte for byte what `dvc repro` made of it, and no other file: a person may run it at any time."""
    def files():
        return {path.relative_to(house).as_posix() for path in house.rglob("*") if path.is_file() and "scratch" not in path.parts}

    first, before = house / "reports" / "nb" / "00_tour.ipynb", files()
    again = house / "again.ipynb"
    done = python("-m", "tmlib.notebook", house / "notebooks" / "00_tour.ipynb", again, TM_ROOT=house)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files() == before | {again.name} and again.read_bytes() == first.read_bytes()
    cells = nbformat.read(first, 4).cells
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    printed = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "chunk by chunk equals all at once: True" in printed
    assert "seven chunks through caches equal one masked clip: True" in printed
    kinds = [kind for out in outputs for kind in out.get("data", {})]
    assert kinds.count("image/png") + kinds.count("image/jpeg") >= 6 and kinds.count("text/html") == 2                  # sound and video


@pytest.mark.slow
def test_killed_training_goes_on(house):
    """kill -9 in the middle of a stage: the next run takes up its saved state and ends with the same weights as an unbroken one."""
    weights = house / "data" / "models" / "speech.safetensors"
    unbroken = weights.read_bytes()
    first = dvc(house, "repro", "--single-item", "--force", "--no-run-cache", "speech")
    deadline = time.monotonic() + 120
    while not list((house / "data" / "scratch").glob("speech-*/state-*.pt")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert not weights.exists()
    out = said(dvc(house, "repro", "--single-item", "--no-run-cache", "speech"))
    assert "going on from step" in out and weights.read_bytes() == unbroken
