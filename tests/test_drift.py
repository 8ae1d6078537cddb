"""drift: what is said has its truth all along, and every way in which a picture can go astray shows in its own series."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tmlib import data, drift
from test_evaluate import Faces, Mouths

SIDE, TALK_S, LISTEN_S = 16, (1.0, 2.0), (0.5, 1.0)


@pytest.fixture(scope="module")
def talk():
    return drift.talk(np.random.default_rng(0), data.word_list("valid"), 120, TALK_S, LISTEN_S)


def test_turns_alternate_and_silence_is_silent(talk):
    assert len(talk.wave) == 120_000 and talk.truth.shape == (120,)
    begins, speaks = zip(*talk.turns)
    lengths = np.diff(begins)
    assert speaks == tuple(k % 2 == 0 for k in range(len(speaks))) and begins[0] == 0 and begins[-1] < 7.5
    assert all(lo <= x + 1e-4 and x <= hi for x, on in zip(lengths, speaks) for lo, hi in [TALK_S if on else LISTEN_S])
    for begin, end, on in zip(begins, begins[1:], speaks):
        part = talk.wave[round(begin * 16000):round(end * 16000)]
        assert part.any() == on and (talk.truth[round(begin * 16):round(end * 16)].max() > 0.3) == on


def test_again_says_the_same_words_at_the_same_place_of_each_passage(talk):
    long = drift.again(talk, 300)                                             # two and a half times
    assert len(long.wave) == 300_000 and long.truth.shape == (300,)
    for k in range(0, 300, 60):
        assert np.array_equal(long.wave[k * 1000:k * 1000 + 60_000], talk.wave[k % 120 * 1000:k % 120 * 1000 + 60_000])
        assert np.array_equal(long.truth[k:k + 60], talk.truth[k % 120:k % 120 + 60])
    speaks = lambda some, second: [on for begins, on in some.turns if begins <= second][-1]
    assert all(speaks(long, s) == speaks(talk, s % 7.5) for s in np.arange(0.25, 18.75, 0.5)) and max(begins for begins, _ in long.turns) < 18.75
    same = drift.again(talk, 120)
    assert np.array_equal(same.wave, talk.wave) and same.turns == talk.turns


class Streamer:
    """Shows frames that were drawn before, twelve at a time after the first nine."""

    def __init__(self, frames):
        self.frames, self.dit = frames, SimpleNamespace(config=SimpleNamespace(text_dim=4))

    def stream(self, picture, waves, text, listening, image_tokens, audio_mask):
        assert image_tokens.shape == (1, 3, SIDE, SIDE) and audio_mask.shape[-2:] == (1, 1) and (text.item(), listening.item()) == (1, 0)
        self.heard = np.concatenate(list(waves))
        yield from np.split(self.frames, range(9, len(self.frames), 12))


TOLD = SimpleNamespace(prompt=lambda style, mode, dim: torch.tensor(float(mode == "speaking")), tokens=lambda image: image)


def watch(frames, talk, picture, **more):
    clips = SimpleNamespace(frames=picture[None, None], meta=[{"style": "flat"}], face=np.tile([2, 2, 12, 12], (1, 1, 1)))
    streamer = Streamer(frames)
    return streamer, drift.watch(streamer, talk, clips, 0, TOLD, Mouths(), Faces(), **more)


def test_a_still_picture_goes_nowhere_and_every_fault_shows(talk):
    picture = np.random.default_rng(0).integers(40, 200, (SIDE, SIDE, 3)).astype(np.uint8)
    still = np.repeat(picture[None], 117, 0)                                  # ten chunks
    steps = []
    streamer, seen = watch(still, talk, picture, keep=(1, 10), step=lambda: steps.append(1))
    series = drift.series(seen, picture, Faces())
    assert len(steps) == 10 and len(seen.opening) == 117 and np.array_equal(streamer.heard, talk.wave)
    assert series["drift_color"] == pytest.approx(np.zeros(10), abs=1e-4) and series["drift_sharpness"] == pytest.approx(np.ones(10), abs=1e-4)
    assert series["drift_identity"] == pytest.approx(np.zeros(10), abs=1e-5) and not any(seen.inside + seen.border)
    assert list(seen.kept) == [1, 10] and np.array_equal(seen.kept[10], picture)
    late = slice(57, None)                                                    # from the sixth chunk on
    for fault, changed, key in (("pale", still[late] // 2, "drift_color"), ("flat", still[late].mean((1, 2), keepdims=True) + np.zeros((1, SIDE, SIDE, 1)), "drift_sharpness"),
                                ("other", still[late][:, ::-1], "drift_identity")):
        frames = still.copy()
        frames[late] = changed
        values = drift.series(watch(frames, talk, picture)[1], picture, Faces())[key]
        assert values[:5] == pytest.approx(series[key][:5]) and (abs(values[5:] - series[key][5:]) > 0.01).all(), fault
    jumps = (still + 5 * (np.r_[0, 1 + np.arange(116) // 12][:, None, None, None] % 2)).astype(np.uint8)
    seen = watch(np.roll(jumps, 8, 0), talk, picture)[1]
    assert seen.border and max(seen.inside) == 0 < min(seen.border)


TURNS = [(0.0, True), (3.0, False), (6.0, True), (9.0, False)]              # of a stream of twelve seconds


def spoken(late=0):
    """Mouths (192,) that open and shut in speech, and rest between, `late` frames behind."""
    k = np.arange(192)
    truth = np.where((k // 48 % 2 == 0) & (k % 48 > 2), 0.5 + 0.45 * np.sin(k * 1.3), 0.0)
    return truth, np.r_[np.zeros(late), truth[:192 - late]]


@pytest.mark.parametrize("late", [0, 3, 10])
def test_a_mouth_that_follows_is_as_late_as_it_is(late):
    found = drift.toggles(*spoken(late)[::-1], TURNS)
    assert found["toggle_close_frames"] == pytest.approx(late, abs=2) and found["toggle_open_frames"] == pytest.approx(late, abs=2)


def test_a_mouth_may_open_for_what_comes_and_the_slowest_turn_shows():
    truth, opening = spoken()
    opening[94:96] = 0.5                                                      # two frames before the third turn
    assert drift.toggles(opening, truth, TURNS)["toggle_close_frames"] == drift.toggles(truth, truth, TURNS)["toggle_close_frames"]
    opening[92] = 0.5
    found = drift.toggles(opening, truth, TURNS)
    assert found["toggle_slowest_frames"] == 45 > found["toggle_latency_frames"] > 12


@pytest.mark.parametrize("mouth", ["babbling", "shut", "open"])
def test_a_mouth_that_does_not_hear_turns_late(mouth):
    truth, _ = spoken()
    opening = {"babbling": data.babble(np.random.default_rng(0), 192)[:, 0], "shut": np.zeros(192), "open": np.full(192, 0.5)}[mouth]
    assert drift.toggles(opening, truth, TURNS)["toggle_latency_frames"] > 12


def test_a_trend_is_found_and_chance_is_not_taken_for_one():
    noise, line = np.random.default_rng(0).normal(size=25), np.linspace(0, 3, 25)
    still, moved = drift.trend("x", noise), drift.trend("x", list(noise + line))
    assert moved["x"] == pytest.approx(still["x"] + 3) and moved["x"] == pytest.approx(24 * np.polyfit(range(25), noise + line, 1)[0])
    assert still["x_lo"] < 0 < still["x_hi"] and 1 < moved["x_lo"] < moved["x"] < moved["x_hi"] < 5
    both = drift.trend("x", [noise + line, noise[::-1] + 2 * line + 50])      # two streams, however far apart
    steep = [24 * np.polyfit(range(25), y, 1)[0] for y in (noise + line, noise[::-1] + 2 * line)]
    assert both["x"] == pytest.approx(np.mean(steep)) and both["x_lo"] < both["x"] < both["x_hi"]
    many = drift.trend("x", np.random.default_rng(1).normal(size=(9, 25)))
    assert many["x_hi"] - many["x_lo"] < 0.6 * (still["x_hi"] - still["x_lo"])
    assert drift.trend("x", [1.0, 1.0, 1.0])["x"] == pytest.approx(0) and np.isfinite(list(drift.trend("x", [1.0, 2.0]).values())).all()


def test_near_is_a_mean_of_ten_and_stops_at_the_ends():
    values = np.arange(100.0)
    assert [drift.near(values, k) for k in (0, 50, 99)] == [2.0, 49.5, 96.5]
