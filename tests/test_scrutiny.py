"""scrutiny: what is there is counted, what is there by chance is told, and each measure fails what it is for. Clips are made up."""

from types import SimpleNamespace

import numpy as np
import pytest

from tmlib import metrics, scrutiny
from tmlib.speech import Phone

FPS, T = 16, 80


def spoken(at):
    """A mouth that is open, but shut for the three frames around each of `at`, where somebody says b; and a p that nobody would see, in a pause."""
    truth = np.full(T, 0.6)
    for f in at:
        truth[f - 1:f + 2] = 0
    truth[60:] = 0
    phones = [Phone("b", (f - 1) / FPS, (f + 1) / FPS) for f in at] + [Phone("a", 0.1, 0.2), Phone("p", 69 / FPS, 71 / FPS)]
    return truth, phones


@pytest.fixture
def clips():
    made = [spoken(at) for at in ((10, 30), (20, 42), (15, 50))]
    return SimpleNamespace(truth=np.stack([truth for truth, _ in made])[..., None], phones=lambda i: made[i][1],
                           meta=[{"fps": FPS, "voice": voice} for voice in "aab"])


def test_closures_are_counted_where_lips_can_be_seen_to_meet(clips):
    rows = [0, 1, 2]
    true = scrutiny.closures(clips.truth[..., 0], clips, rows)
    assert true["closures"] == 1 and true["closures_n"] == 6 and true["closures_by_chance"] == 0
    assert scrutiny.closures(np.full((3, T), 0.6), clips, rows)["closures"] == 0
    assert scrutiny.closures(np.roll(clips.truth[..., 0], 2, 1), clips, rows)["closures"] == 1               # a frame late is in time
    assert scrutiny.closures(np.roll(clips.truth[..., 0], 4, 1), clips, rows)["closures"] == 0
    assert scrutiny.closures(np.zeros((3, T)), clips, rows)["closures"] == 0                                # a mouth that never opens closes nothing
    fast = scrutiny.closures(np.tile([0.6, 0.0], (3, T // 2)), clips, rows)
    assert fast["closures"] == fast["closures_by_chance"] == 1                                              # and one that always moves does so by chance
    half = clips.truth[..., 0].copy()
    half[2] = 0.6
    found = scrutiny.closures(half, clips, rows)
    assert found["closures"] == pytest.approx(4 / 6) and (found["closures_lo"], found["closures_hi"]) == (0, 1)       # two voices, one of which never closes
    narrow = scrutiny.closures(clips.truth[..., 0] + 0.1, clips, rows)
    assert narrow["closures"] == 0 and narrow["closures_nearly"] == 1                                       # lips that come near have not met
    clips.phones = lambda i: []
    assert scrutiny.closures(half, clips, rows) == {"closures": None, "closures_reason": "no p, b or m is known in these clips"}


def test_blinks_are_met_or_not():
    still = lambda *at: np.bincount(at, minlength=T)[:T] * 20.0
    true = np.stack([still(10, 11, 40), still(25), still(), still(60)])
    same = scrutiny.blinks(true, true)
    assert same["eyes_precision"] == same["eyes_recall"] == 1 and same["eyes_precision_by_chance"] < 0.5 and same["eyes_r_by_chance"] < 0.2
    some = scrutiny.blinks(np.stack([still(12, 70), still(), still(33), still(58)]), true)
    assert some["eyes_precision"] == 2 / 4 and some["eyes_recall"] == 2 / 4
    assert scrutiny.blinks(np.zeros((4, T)), true)["eyes_precision"] == scrutiny.blinks(np.zeros((4, T)), true)["eyes_recall"] == 0


def test_takes_that_are_alike_are_not_apart():
    take = np.random.default_rng(0).integers(0, 200, (2, 5, 4, 4, 3)).astype(np.uint8)
    assert scrutiny.spread(np.stack([take] * 3)) == 0 and scrutiny.spread(np.stack([take, take + 10, take + 20])) == pytest.approx(40 / 3)


def test_chunks_are_those_of_a_stream():
    assert scrutiny.by_chunk(np.stack([np.r_[np.zeros(9), np.ones(12), np.full(12, 2.0)]] * 2), 3) == [0, 1, 2]
    assert len(scrutiny.by_chunk(np.zeros((1, 81)), 3)) == 7 and len(scrutiny.by_chunk(np.zeros((1, 81)), 7)) == 3


def test_what_a_line_can_hear_is_heard():
    rng = np.random.default_rng(1)
    audio, way = rng.standard_normal((12, 21, 3, 4)), rng.standard_normal((12, 4))
    truth = np.concatenate([np.zeros((12, 1)), (0.4 + audio[:, 1:].reshape(12, 20, 12) @ way).reshape(12, 80)], 1)
    line = scrutiny.linear_ear(audio[:9], truth[:9], audio[9:])
    assert line.shape == (3, 80) and metrics.lip_r(line, truth[9:, 1:]).min() > 0.99
    deaf = scrutiny.linear_ear(audio[:9], truth[:9], rng.standard_normal((3, 21, 3, 4)))
    assert abs(metrics.lip_r(deaf, truth[9:, 1:])).max() < 0.5
