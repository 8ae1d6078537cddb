"""The picture tells the truth: what the track says of the mouth is what the pixels show, in every style, at any size."""
import dataclasses

import numpy as np
import pytest

from tmlib import avatar, puppet
from tmlib.avatar import STYLES, Track, make_track, mouth_track, render, sample_identity
from tmlib.speech import PHONEMES, Phone

FPS = 16


def still(T):
    """A Track where nothing happens."""
    zero = np.zeros(T, np.float32)
    mouth = np.tile(np.float32([0, .5, 0]), (T, 1))
    return Track(mouth, zero, np.zeros((T, 2), np.float32), np.zeros((T, 3), np.float32), zero.copy(), np.zeros(T, bool))


def faces(n, style):
    return [sample_identity(np.random.default_rng([n, k]), style) for k in range(n)]


def phones(*spans):
    """("m", .1), ... -> [Phone] one after the other."""
    out, at = [], 0.0
    for symbol, seconds in spans:
        out.append(Phone(symbol, at, at + seconds))
        at += seconds
    return out


TALK = phones(("sil", .5), ("m", .09), ("aɪ", .15), ("b", .08), ("ɒ", .15), ("s", .1), ("ɪ", .07), ("z", .1), ("sil", .05), ("b", .07),
              ("ɑː", .18), ("p", .08), ("uː", .16), ("sil", .8), ("w", .1), ("iː", .2), ("p", .06), ("sil", .6))


# ---- the mouth's truth -------------------------------------------------------------------------

def test_every_phoneme_has_a_mouth():
    assert set(avatar.TARGET) == set(PHONEMES)
    assert all((0 <= v).all() and (v <= 1).all() for v in avatar.TARGET.values())


def test_track_is_bounded_and_smooth():
    fine = mouth_track(TALK, 800, 200)
    assert fine.dtype == np.float32 and fine.shape == (800, 3) and fine.min() >= 0 and fine.max() <= 1
    assert np.abs(np.diff(fine, axis=0)).max() < .12                     # in 5 ms
    assert np.allclose(fine[::2], mouth_track(TALK, 400, 100), atol=.2)   # the frame rate only samples it
    assert fine[:, 0].max() > .8 and fine[:, 2].max() > .6 and fine[:, 1].max() > .75


def test_silence_is_closed():
    t, mouth = np.arange(64) / FPS, mouth_track(TALK, 64, FPS)
    for p in TALK:
        if p.symbol == "sil" and p.end - p.start > .3:
            rest = mouth[(t > p.start + .12) & (t < p.end - .12)]
            assert len(rest) and np.allclose(rest, avatar.NEUTRAL, atol=1e-6)
    assert np.allclose(mouth_track([], 5, FPS), avatar.NEUTRAL, atol=1e-6)
    assert np.allclose(mouth_track(TALK, 90, FPS)[-8:], avatar.NEUTRAL, atol=1e-6)      # after the last phone


def test_neighbouring_silences_are_one():
    split = phones(("sil", .05), ("sil", .05), ("sil", .05), ("ɑː", .2), ("sil", .06), ("sil", .3))
    whole = phones(("sil", .15), ("ɑː", .2), ("sil", .36))
    assert np.allclose(mouth_track(split, 16, FPS), mouth_track(whole, 16, FPS), atol=1e-6)


@pytest.mark.parametrize("phase", np.arange(0, 1 / FPS, .0125))
def test_lips_meet_at_bilabials_wherever_frames_fall(phase):
    spans = phones(("sil", .3 + phase), ("ɑː", .15), ("b", .05), ("ɑː", .15), ("p", .08), ("æ", .15), ("m", .03), ("æ", .15), ("sil", .3))
    mouth = mouth_track(spans, 24, FPS)
    for p in spans:
        if p.symbol in "pbm":
            nearest = round((p.start + p.end) / 2 * FPS)
            assert mouth[nearest, 0] <= .08
    assert (mouth[:, 0] > .5).sum() >= 4


def test_rounding_and_spreading():
    mouth = mouth_track(phones(("sil", .2), ("iː", .4), ("uː", .4), ("sil", .2)), 20, FPS)
    spread, pursed = mouth[6], mouth[13]
    assert spread[1] > .85 and spread[2] < .05 and pursed[1] < .15 and pursed[2] > .9


def test_start_shifts_the_track():
    whole = make_track(np.random.default_rng(0), TALK, 64, FPS)
    late = make_track(np.random.default_rng(0), TALK, 32, FPS, start_s=1.0)
    assert np.allclose(whole.mouth[16:48], late.mouth, atol=1e-6) and np.array_equal(whole.speaking[16:48], late.speaking)


def test_life_is_small_smooth_and_repeatable():
    a, b = (make_track(np.random.default_rng(3), TALK, 400, FPS) for _ in range(2))
    for field in dataclasses.fields(Track):
        assert np.array_equal(getattr(a, field.name), getattr(b, field.name)) and len(getattr(a, field.name)) == 400
    assert np.abs(a.pose[:, 0]).max() <= 1.2 and np.abs(a.pose[:, 1]).max() <= 2.5 and np.abs(a.pose[:, 2]).max() < .05
    assert np.abs(np.diff(a.pose[:, :2], axis=0)).max() < .8
    assert a.blink.max() == 1 and .02 < (a.blink > .3).mean() < .25
    assert a.speaking.any() and not a.speaking[:7].any() and not a.speaking[-300:].any()
    assert a.mouth[~a.speaking][8:, 0].mean() < .05


def test_most_pauses_begin_with_a_blink():
    pause = .4 + .09 + .15 + .08                                         # seconds until the silence in the middle
    said = phones(("sil", .4), ("m", .09), ("aɪ", .15), ("b", .08), ("sil", .3), ("sil", .3), ("w", .1), ("iː", .2), ("sil", .05), ("w", .1))
    shut = np.array([make_track(np.random.default_rng(i), said, 32, FPS).blink for i in range(200)])
    at = round((pause + .1) * FPS)
    assert .8 < (shut[:, at:at + 2].max(1) == 1).mean() < .98            # two silences in a row are one pause
    assert (shut[:, at - 5] == 1).mean() < .1 and (shut[:, at + 8] == 1).mean() < .1 and not shut[:, 0].any()
    silent = np.array([make_track(np.random.default_rng(i), [], 480, FPS).blink for i in range(20)])
    assert 3 < (silent == 1).sum(1).mean() < 8                           # in half a minute


# ---- pictures ----------------------------------------------------------------------------------

@pytest.mark.parametrize("style", STYLES)
def test_render_is_a_function_of_each_frame(style):
    who, track = faces(1, style)[0], make_track(np.random.default_rng(0), TALK, 40, FPS)
    frames = render(who, track)
    assert frames.dtype == np.uint8 and frames.shape == (40, 64, 64, 3)
    assert np.array_equal(frames, render(who, track)) and np.array_equal(frames[17:23], render(who, track[17:23]))


@pytest.mark.parametrize("style", STYLES)
def test_opening_is_what_you_see(style):
    """The dark area between the lips, and all that changes, grow with the truth (r > 0.95), whatever the skin."""
    track = still(21)
    track.mouth[:, 0] = np.linspace(0, 1, 21)
    for who in faces(12, style):
        frames = render(who, track)[:, 37:55, 20:44].astype(float)
        change = np.abs(frames - frames[0]).max(-1)
        dark = np.clip(1.5 - np.abs(frames - 255 * np.array(puppet.INSIDE)).max(-1) / 40, 0, 1) * np.clip(change / 25, 0, 1)
        for area in (dark.sum((1, 2)), change.sum((1, 2))):
            assert np.corrcoef(area, track.mouth[:, 0])[0, 1] > .95 and np.diff(area).min() > -.06 * area.max(), who


@pytest.mark.parametrize("style", STYLES)
def test_all_three_truths_can_be_read_from_pixels(style):
    rng, track = np.random.default_rng(5), still(500)
    track.mouth = rng.uniform(0, 1, (500, 3)).astype(np.float32)
    track.mouth[:, 0] = .15 + .85 * track.mouth[:, 0]
    pixels = render(faces(1, style)[0], track)[:, 34:58, 16:48].reshape(500, -1) / 255.
    a, b, mean = pixels[:350], pixels[350:], track.mouth[:350].mean(0)
    a, b = a - pixels[:350].mean(0), b - pixels[:350].mean(0)
    kernel = lambda p, q: (1 + p @ q.T / 40) ** 2                        # quadratic ridge regression
    read = kernel(b, a) @ np.linalg.solve(kernel(a, a) + .01 * np.eye(350), track.mouth[:350] - mean) + mean
    error = np.abs(read - track.mouth[350:]).mean(0)
    assert (error < (.03, .08, .08)).all(), error


@pytest.mark.parametrize("style", STYLES)
def test_lips_show_on_every_skin(style):
    """Even a closed mouth stands out from the skin beside it."""
    for who in faces(20, style):
        frame = render(who, still(1))[0].astype(float)
        lips, cheek = frame[42:47, 28:36], np.median(frame[38:48, [20, 21, 42, 43]].reshape(-1, 3), 0)
        assert np.abs(lips - cheek).max(-1).max() > 30, who


@pytest.mark.parametrize("style", STYLES)
def test_identities_differ(style):
    pictures = np.stack([render(who, still(1))[0] for who in faces(12, style)]).astype(float)
    apart = np.abs(pictures[:, None] - pictures[None]).mean((2, 3, 4)) + 1e3 * np.eye(12)
    assert apart.min() > 8


@pytest.mark.parametrize("style", STYLES)
def test_size_does_not_matter(style):
    track = make_track(np.random.default_rng(1), TALK, 24, FPS)
    for who in faces(3, style):
        small, large = render(who, track, 64).astype(float), render(who, track, 128).astype(float)
        halved = large.reshape(24, 64, 2, 64, 2, 3).mean((2, 4))
        assert np.abs(halved - small).mean() < 2.5
    assert render(who, track[:1], 256).shape == (1, 256, 256, 3)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [64, 128])
def test_mouth_box_holds_all_that_the_mouth_moves(style, size):
    talking = make_track(np.random.default_rng(2), TALK, 48, FPS)
    silent = dataclasses.replace(talking, mouth=still(48).mouth)
    for who in faces(3, style):
        changed = np.abs(render(who, talking, size).astype(int) - render(who, silent, size)).max(-1) > 3
        boxes = avatar.mouth_box(who, talking, size)
        assert boxes.shape == (48, 4) and boxes.dtype == np.float32
        for seen, (x0, y0, x1, y1) in zip(changed, boxes):
            ys, xs = np.nonzero(seen)
            if len(ys):
                assert x0 <= xs.min() and xs.max() + 1 <= x1 and y0 <= ys.min() and ys.max() + 1 <= y1, who
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert area.max() < .2 * size * size


def test_boxes_follow_the_sway():
    who, track = faces(1, "flat")[0], still(2)
    track.pose[1, :2] = 1, 2
    for box in (avatar.mouth_box, avatar.face_box):
        a, b = box(who, track, 128)
        assert np.allclose(b - a, (2, 4, 2, 4), atol=1e-4) and a[0] < a[2] and a[1] < a[3]
    mouth, face = avatar.mouth_box(who, track)[0], avatar.face_box(who, track)[0]
    assert face[0] < mouth[0] and mouth[2] < face[2] and face[1] < mouth[1]


def test_blinks_and_gaze_show():
    track = still(3)
    track.blink[1], track.gaze[2, 0] = 1, 1
    for style in STYLES:
        open_, shut, aside = render(faces(1, style)[0], track).astype(float)[:, 24:35, 16:48]
        assert shut.max(-1).mean() < open_.max(-1).mean() + 60 and np.abs(shut - open_).mean() > 6 and np.abs(aside - open_).mean() > 3


def test_unknown_style():
    with pytest.raises(ValueError, match="oil"):
        sample_identity(np.random.default_rng(0), "oil")
