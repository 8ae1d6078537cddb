"""robustness: the same faces and timbres in harder company, and nothing of it left behind."""
from dataclasses import replace

import numpy as np
import pytest

from tmlib import avatar, data, recordings, robustness
from tmlib.robustness import Split, babble, foreign, sayable


@pytest.fixture(scope="module")
def plain():
    voices, sentences = data.word_list("test")
    return robustness.clips(5, voices, sentences[:6])


def test_foreign_voices_keep_all_but_the_language():
    voices = data.word_list("test")[0]
    abroad = foreign(voices, ["it", "sv"])
    assert [v.language for v in abroad[:3]] == [f"{accent}+{v.language.partition('+')[2]}" for accent, v in zip(("it", "sv", "it"), voices)]
    assert [(v.rate, v.pitch, v.range) for v in abroad] == [(v.rate, v.pitch, v.range) for v in voices]


def test_sentences_that_somebody_cannot_say_are_left_out():
    voices, sentences = data.word_list("test")
    assert sayable(sentences[:4], voices) == sentences[:4]
    some = sayable(sentences, foreign(voices, ["nl", "pl"]))
    assert 0 < len(some) < len(sentences) and set(some) < set(sentences)


def test_faces_are_the_same_for_every_kind(plain):
    voices, sentences = data.word_list("test")
    abroad = robustness.clips(5, foreign(voices, ["sv"]), sayable(sentences, foreign(voices, ["sv"])))
    for a, b in zip(plain, abroad):
        assert not np.array_equal(a.wave, b.wave) and a.voice == b.voice
        assert np.median(np.abs(a.frames[0].astype(int) - b.frames[0])) < 12       # the same person, moved


def test_what_people_read_is_cut_one_behind_the_other(plain):
    """Their sound as it is, mouths from their own times, on the same faces."""
    readers = recordings.load()
    clips = robustness.aloud(readers, 99, 81, 16, 64)
    of = {r.name: [c for c in clips if c.voice == r.name] for r in readers}
    assert len(clips) > 10 and {name: len(some) for name, some in of.items()} == {r.name: len(r.wave) // 81000 for r in readers}
    for r in readers:
        assert np.array_equal(np.concatenate([c.wave for c in of[r.name]]), r.wave[:len(of[r.name]) * 81000])
        assert np.abs(np.concatenate([c.truth for c in of[r.name][:2]]) - avatar.mouth_track(r.phones, 2 * 81, 16)).max() < 1e-5
    assert [c.voice for c in robustness.aloud(readers, 3, 81, 16, 64)] == [readers[k].name for k in (0, 1, 0)]
    assert all(np.median(np.abs(a.frames[0].astype(int) - b.frames[0])) < 12 for a, b in zip(plain, clips))


def test_babble_is_as_loud_as_asked_and_is_other_people(plain):
    who = [c.voice for c in plain]
    mixed = babble(plain, 10.0, who)
    for clip, wave in zip(plain, mixed):
        crowd = wave - clip.wave
        assert 10 * np.log10(np.mean(clip.wave ** 2) / np.mean(crowd ** 2)) == pytest.approx(10, abs=0.05)
        assert abs(np.corrcoef(crowd, clip.wave)[0, 1]) < 0.1
    tones = [replace(plain[0], wave=np.sin(2 * np.pi * f * np.arange(16000) / 16000).astype(np.float32)) for f in (100, 200, 300, 400, 500, 600)]
    heard = [np.flatnonzero(np.abs(np.fft.rfft(w - t.wave)) > 100) for w, t in zip(babble(tones, 10.0, list("aabbcd")), tones)]
    assert [set(x) for x in heard] == [{400, 500, 600}] * 2 + [{200, 500, 600}] * 2 + [{200, 400, 600}, {200, 400, 500}]            # one of each, never oneself



def test_split_stands_for_one_on_disk(plain):
    split = Split(plain)
    assert len(split) == 5 and np.array_equal(split.wave(2), plain[2].wave) and split.frames.shape == (5, 81, 64, 64, 3)
    assert Split(plain, ["a"] * 5).wave(1) == "a" and {m["kind"] for m in split.meta} == {"speaking"}


def test_real_clips_that_speak_are_taken_as_they_are(plain, tmp_path):
    """Their sound is not silenced or said anew; their style is not one of ours."""
    kinds = ("listening", "speaking", "speaking", "listening", "speaking")
    real = (replace(c, voice="", phones=[]) for c in plain)
    data.save_split(tmp_path, "test", 5, ((c, {"kind": kind, "style": None, "fps": 16, "identity": f"person {k}"}) for k, (c, kind) in enumerate(zip(real, kinds))))
    clips = data.Clips(tmp_path, "test")
    some, who = robustness.recorded(clips, 2)
    split = Split(some)
    assert who == ["person 1", "person 2"]
    assert len(split) == 2 and {m["style"] for m in split.meta} == {None}
    for i, k in enumerate((1, 2)):
        assert np.array_equal(split.frames[i], plain[k].frames) and np.array_equal(split.wave(i), clips.wave(k))
        assert all(np.array_equal(getattr(split, name)[i], getattr(plain[k], name)) for name in ("truth", "mouth", "face"))
    assert len(robustness.recorded(clips, 9)[0]) == 3
    assert [m["style"] for m in Split(plain).meta] == ["flat", "line", "soft3d", "flat", "line"]
