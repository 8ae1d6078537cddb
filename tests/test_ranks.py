"""ranks: a stage on two processes (FSDP over gloo) is the stage on one, killed or not; batches dealt and put together again."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_dit, make_latents

from tmlib import config, latency, ranks
from tmlib.config import ROOT, UserError, atomic
from tmlib.weights import weight_files

JOB = Path(__file__).with_name("ranks_job.py")


def run(folder, out, world, *words):
    """The job on `world` processes; returns their exit codes."""
    started = []
    for rank in range(world):
        env = os.environ | {"TM_RANK": str(rank), "TM_WORLD": str(world), "TM_MEET": str(out) + ".meet", "OMP_NUM_THREADS": "1",
                            "PYTHONPATH": os.pathsep.join([str(ROOT), str(JOB.parent)])}
        started.append(subprocess.Popen([sys.executable, JOB, folder, out, *words], env=env, stderr=subprocess.PIPE, text=True))
    said = [p.communicate(timeout=300)[1] for p in started]
    Path(str(out) + ".meet").unlink(missing_ok=True)
    return [p.returncode for p in started], said


def close(a, b, where=""):
    """The same JSON, numbers to four digits."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            close(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b)):
            close(x, y, f"{where}[{i}]")
    else:
        assert a == pytest.approx(b, rel=1e-3, abs=2e-4), where


def weights(folder):
    return {name: w for path in (*weight_files(folder), *Path(folder).glob("tm_audio.safetensors")) for name, w in load_file(path).items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    latents = make_latents(folder)
    save_file(latents.store | {"weight": torch.ones_like(latents.store["weight"])}, folder / "latents.safetensors")     # parts weigh their own clips
    make_dit().save_pretrained(folder / "start")
    latency.without_sound(make_dit(5)).save_pretrained(folder / "bare")
    codes, said = run(folder, folder / "alone", 1)
    assert codes == [0], said
    return folder


@pytest.fixture(scope="module")
def together(world):
    codes, said = run(world, world / "both", 2)
    assert codes == [0, 0], said
    return world / "both"


def test_two_processes_are_one(world, together):
    """Latents, weights, logs, generated clips and losses; only rank 0's files are there, and no state is left."""
    close(json.loads((together / "numbers.json").read_text()), json.loads((world / "alone" / "numbers.json").read_text()))
    for model in ("one", "two"):
        ours, theirs = weights(together / model), weights(world / "alone" / model)
        assert ours.keys() == theirs.keys()
        for name, w in ours.items():
            torch.testing.assert_close(w, theirs[name], atol=2e-4, rtol=1e-3, msg=lambda m: f"{model} {name}: {m}")
    assert (together / "split.safetensors").read_bytes() == (world / "alone" / "split.safetensors").read_bytes()
    files = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files(together) == files(world / "alone")


def test_something_was_learnt(world):
    start, one = weights(world / "bare"), weights(world / "alone" / "one")
    assert all((one[name] - w).abs().max() > 1e-5 for name, w in start.items() if "norm" not in name and "to_k.bias" not in name)


def test_killed_it_goes_on(world, together):
    """One process dies in the third step, the other hears of it and ends; both go on from step 3 and end with the same bits."""
    codes, _ = run(world, world / "killed", 2, "--die", "3")
    assert codes[1] == 9 and codes[0] != 0
    saved = sorted(p.name for p in (world / "killed" / "state" / "one").iterdir())
    assert saved == ["state-3-0-of-2.pt", "state-3-1-of-2.pt"]
    codes, said = run(world, world / "killed", 2)
    assert codes == [0, 0], said
    assert (world / "killed" / "numbers.json").read_bytes() == (together / "numbers.json").read_bytes()
    for model in ("one", "two"):
        ours, theirs = weights(world / "killed" / model), weights(together / model)
        assert all(torch.equal(w, theirs[name]) for name, w in ours.items())


# ---- alone -------------------------------------------------------------------------------------

def test_parts_of_a_batch():
    assert ranks.parts(6) == [slice(0, None, 1)] and ranks.parts(6, 2) == [slice(i, None, 3) for i in range(3)]
    for batch, at_once in ((6, 4), (3, 4), (5, 2)):
        with pytest.raises(UserError, match=f"a batch of {batch} cannot be dealt to 1 processes, {at_once} clips at once"):
            ranks.parts(batch, at_once)


def test_parts_of_ranks_are_the_batch(monkeypatch):
    monkeypatch.setattr(ranks, "WORLD", 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "RANK", rank)
        seen += [torch.arange(12)[part].tolist() for part in ranks.parts(12, 2)]
    assert sorted(sum(seen, [])) == list(range(12)) and {len(part) for part in seen} == {2}
    with pytest.raises(UserError, match="a batch of 2 cannot be dealt to 3"):
        ranks.parts(2)


def test_only_rank_0_keeps_files(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "RANK", 1)
    for every_rank in (False, True):
        with atomic(tmp_path / "a.txt", every_rank=every_rank) as temporary:
            temporary.write_text("x")
        assert (tmp_path / "a.txt").exists() == every_rank and len(list(tmp_path.iterdir())) == every_rank
