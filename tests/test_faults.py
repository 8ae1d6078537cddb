"""faults: what it breaks really breaks, frames are really compared, and the command says what it found. No time is judged here."""
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from fakes import IMAGE, PROMPT, make_streamer, until

from tmlib import faults
from tmlib.config import UserError


class Fakes(faults.Stage):
    """Streams of the smallest models."""

    def __init__(self, folder=None):
        self.picture, self.piece = IMAGE, np.random.default_rng(0).standard_normal(12_000).astype(np.float32)
        self.expected = list(itertools.islice(self.begin(make_streamer()), 2 * faults.GOOD))

    def streamer(self, placement="two_process", vae=None):
        return make_streamer(vae, placement, resumable=True)

    def begin(self, streamer, sound=None):
        return streamer.stream(self.picture, self.sound() if sound is None else sound, **PROMPT)


def test_killed_deaf_and_given_up_are_timed_and_checked():
    stage = Fakes()
    assert all(0 < fault(stage) < 60 for fault in (faults.decoder_killed, faults.given_up))
    stage.expected[faults.GOOD] = stage.expected[faults.GOOD] + 1        # the first frames after the break
    with pytest.raises(UserError, match="frames differ"):
        faults.sound_gone(stage)


def test_a_stream_must_break():
    with pytest.raises(UserError, match="as if nothing had happened"):
        faults.until_told(iter([1, 2]), [])


def python(code):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_process_is_gone_before_it_is_buried():
    process = python("import time; time.sleep(60)")
    assert not faults.gone(process.pid)
    process.kill()
    assert process.stdout.read() == "" and until(lambda: faults.gone(process.pid))      # a zombie: nobody has waited for it
    process.wait()
    assert faults.gone(process.pid)


def test_a_victim_that_fails_and_a_decoder_that_lives_on_are_told(monkeypatch):
    with pytest.raises(UserError, match=r"ended by itself \(status 3\)"):
        faults.killed(python("raise SystemExit(3)"))
    decoder = python("import time; time.sleep(60)")
    victim = lambda: python(f"import time; print({decoder.pid}, flush=True); time.sleep(60)")
    monkeypatch.setattr(faults, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=f"process {decoder.pid} still runs"):
        faults.killed(victim())
    decoder.kill()
    decoder.wait()
    assert faults.killed(victim()) < 60


def test_the_command_says_what_took_too_long(tmp_path, monkeypatch, capsys):
    def quick(stage):
        return 0.2

    def slow(stage):
        return 1.5

    monkeypatch.setattr(faults, "Stage", Fakes)
    monkeypatch.setattr(faults, "FAULTS", (quick,))
    out = tmp_path / "faults.json"
    assert faults.main(["--times", "3", "--out", str(out)]) == 0
    monkeypatch.setattr(faults, "FAULTS", (quick, slow))
    assert faults.main(["--times", "2", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["slow"] == {"ms_p50": 1500.0, "ms_max": 1500.0, "n": 2}
    assert "slow" in capsys.readouterr().out
    with pytest.raises(UserError, match="--times 0: give at least 1"):
        faults.main(["--times", "0"])
