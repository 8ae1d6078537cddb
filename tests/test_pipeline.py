"""The whole pipeline at scale `smoke`, from nothing, in a copy of the tree: what `make repro SCALE=smoke` does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

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


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the tree as a fresh clone would have it, its smoke mirror, and the pipeline run there once."""
    copy = tmp_path_factory.mktemp("clone")
    for name in scales.sources(config.ROOT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(config.ROOT / name, copy / name)
    for name in ("params.yaml", ".dvc/config"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy2(config.ROOT / name, copy / name)
    folder = scales.mirror("smoke", copy)
    said(dvc(folder, "repro"))
    return folder


@pytest.mark.slow
def test_every_claim_has_a_row_with_its_number_or_its_reason(house):
    rows = json.loads((house / "reports" / "claims.json").read_text())
    assert sorted(rows) == sorted(CLAIMS)
    for name, row in rows.items():
        assert row["scale"] in ("smoke", None) and row["claim"], name
        assert (row["holds"] is None and row["value"] is None and row["reason"]) or isinstance(row["holds"], bool), name
    assert {n for n, r in rows.items() if r["holds"] is not None} >= {"C1", "C2", "C4"}


@pytest.mark.slow
def test_metrics_say_where_they_come_from(house):
    for path in (house / "reports" / "metrics").rglob("*.json"):
        values = json.loads(path.read_text())
        assert "per_clip" in path.parts or values["scale"] == "smoke", path
    page = (house / "reports" / "index.html").read_text()
    assert "C11" in page and "student_flat.mp4" in page


@pytest.mark.slow
def test_second_run_does_nothing(house):
    began = time.monotonic()
    out = said(dvc(house, "repro"))
    assert "Running stage" not in out and "up to date" in out and time.monotonic() - began < 30


@pytest.mark.slow
def test_one_parameter_reruns_only_what_depends_on_it(house):
    params = house / "params.yaml"
    before = params.read_text()
    try:
        params.write_text(before.replace("chunks: 6", "chunks: 7"))              # latency's, at smoke
        assert params.read_text() != before
        changed = json.loads(said(dvc(house, "status", "--json")))
        assert set(changed) == {"latency"}
        out = said(dvc(house, "repro"))
        assert re.findall(r"Running stage '(\w+)'", out) == ["latency", "report"]
    finally:
        params.write_text(before)


@pytest.mark.slow
def test_killed_training_goes_on(house):
    """kill -9 in the middle of a stage: the next run takes up its saved state and ends with the same weights as an unbroken one."""
    params = house / "params.yaml"
    before = params.read_text()
    lines = before.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("speech:"))
    steps = next(i for i in range(at, len(lines)) if lines[i].strip().startswith("steps:"))
    lines[steps] = "  steps: 60"
    try:
        params.write_text("\n".join(lines) + "\n")
        first = dvc(house, "repro", "--single-item", "speech")
        scratch = house / "data" / "scratch"
        deadline = time.monotonic() + 120
        while not list(scratch.glob("speech-*/state.pt")):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        out = said(dvc(house, "repro", "--single-item", "speech"))
        assert "going on from step" in out
        interrupted = (house / "data" / "models" / "speech.safetensors").read_bytes()
        said(dvc(house, "repro", "--single-item", "--force", "--no-run-cache", "speech"))
        assert (house / "data" / "models" / "speech.safetensors").read_bytes() == interrupted
    finally:
        params.write_text(before)
