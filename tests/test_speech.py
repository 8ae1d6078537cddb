"""The same words give the same samples, times are exact and complete, and nothing that is tested was trained on."""
import re
import time

import numpy as np
import pytest

from tmlib import speakers, speech
from tmlib.config import UserError
from tmlib.speech import PHONEMES, Phone, Voice, synthesise

WORDS = "Please bring the purple jug, my mother thought about it."
ADA = Voice("ada", "espeak", "en-us+f1", 160, 58, 60)


@pytest.fixture(scope="module")
def said():
    return synthesise(WORDS, ADA)


@pytest.fixture(scope="module")
def natural():
    return synthesise("My baby sat.", speech.load_voices()["natural"][0])


def loudness(utterance, start, end):
    """RMS in dB of a stretch of the wave."""
    part = utterance.wave[round(start * speech.RATE):round(end * speech.RATE)]
    return 10 * np.log10(np.mean(part ** 2) + 1e-9)


@pytest.mark.parametrize("language", ["en-us+f1", "en-us+klatt", "en-gb-scotland+m2", "en-029+m7", "en-gb-x-gbcwmd+steph"])
def test_what_was_said_before_does_not_matter(language):
    voice = Voice("v", "espeak", language, 160, 50, 50)
    first = synthesise(WORDS, voice)
    synthesise("Something quite different.", Voice("w", "espeak", "en+m3", 190, 20, 80))
    again = synthesise(WORDS, voice)
    assert np.array_equal(first.wave, again.wave) and first.phones == again.phones


def test_the_clock_does_not_matter():
    """espeak-ng seeds breath and noise from the time, in whole seconds, unless told otherwise."""
    voices = [v for split in ("train", "valid", "test") for v in speech.load_voices()[split]]
    first = [synthesise("Say it again.", v).wave for v in voices]
    time.sleep(1.1)
    assert all(np.array_equal(a, synthesise("Say it again.", v).wave) for a, v in zip(first, voices))


def test_the_natural_voice_is_a_function_too(natural):
    voice = speech.load_voices()["natural"][0]
    synthesise("Something else.", voice)
    again = synthesise("My baby sat.", voice)
    assert np.array_equal(natural.wave, again.wave) and natural.phones == again.phones


@pytest.mark.parametrize("which", ["said", "natural"])
def test_phones_cover_the_wave_without_gaps(which, request):
    u = request.getfixturevalue(which)
    assert u.wave.dtype == np.float32 and u.wave.ndim == 1
    assert u.phones[0].start == 0 and u.phones[-1].end == pytest.approx(len(u.wave) / speech.RATE)
    assert all(a.end == b.start for a, b in zip(u.phones, u.phones[1:]))
    assert all(p.end > p.start and p.symbol in PHONEMES for p in u.phones)
    assert all(not a.symbol == b.symbol == "sil" for a, b in zip(u.phones, u.phones[1:]))


def test_both_engines_spell_the_same_words_alike(natural):
    spoken = [p.symbol for p in natural.phones if p.symbol != "sil"]
    assert spoken == ["m", "aɪ", "b", "eɪ", "b", "iː", "s", "æ", "t"]
    assert spoken == [p.symbol for p in synthesise("My baby sat.", ADA).phones if p.symbol != "sil"]


@pytest.mark.parametrize("which", ["said", "natural"])
def test_times_fit_the_sound(which, request):
    """Vowels are loud, and closures of stops quiet, in the very stretch the phones name."""
    u = request.getfixturevalue(which)
    vowels = [loudness(u, p.start, p.end) for p in u.phones if p.symbol in PHONEMES[25:]]
    stops = [loudness(u, p.start, p.start + .02) for a, p in zip(u.phones, u.phones[1:]) if p.symbol in "ptb" and a.symbol != "sil"]
    silence = [loudness(u, p.start + .01, p.end - .01) for p in u.phones if p.symbol == "sil" and p.end - p.start > .05]
    assert min(vowels) > -32 and np.median(vowels) - np.median(stops) > 12 and max(silence) < -40


def test_loudness_is_even():
    for voice in (v for split in ("valid", "test") for v in speech.load_voices()[split]):
        wave = synthesise(WORDS, voice).wave
        heard = wave[np.abs(wave) > 0.02 * np.abs(wave).max()]
        assert np.abs(wave).max() <= speech.PEAK + 1e-6
        assert .06 < np.sqrt(np.mean(heard ** 2)) < .101


def test_rate_changes_the_pace():
    slow, fast = (len(synthesise(WORDS, Voice("v", "espeak", "en-us", rate, 50, 50)).wave) for rate in (120, 200))
    assert slow > 1.4 * fast


def test_splits_share_no_sentence_voice_or_variant():
    sentences, voices = speech.load_sentences(), speech.load_voices()
    plain = {s: {re.sub(r"\W+", " ", line.lower()).strip() for line in lines} for s, lines in sentences.items()}
    assert [len(plain[s]) == len(sentences[s]) for s in speech.SPLITS] == [True] * 4
    assert len(plain["train"]) >= 200 and min(len(plain["test"]), len(plain["valid"])) >= 40 and len(plain["natural"]) >= 20
    assert len(set.union(*plain.values())) == sum(map(len, plain.values()))
    runs = {s: {tuple(line.split()[k:k + 3]) for line in lines for k in range(len(line.split()) - 2)} for s, lines in plain.items()}
    assert not runs["test"] & (runs["train"] | runs["valid"]) and not runs["natural"] & (runs["train"] | runs["valid"] | runs["test"]), "three words in a row"
    names = [v.name for split in voices.values() for v in split]
    assert len(set(names)) == len(names) and (len(voices["train"]), len(voices["valid"]), len(voices["test"])) == (62 + speakers.COUNT, 12, 8)
    variants = {s: {v.language.partition("+")[2].lower() for v in voices[s]} for s in ("train", "valid", "test")}
    assert "" not in set.union(*variants.values()) and len(set.union(*variants.values())) == sum(map(len, variants.values()))
    assert {v.engine for v in voices["natural"]} == {"piper"} and {v.engine for s in variants for v in voices[s]} == {"espeak"}


def test_sentences_are_short_and_cover_every_sound():
    sentences, voices, heard = speech.load_sentences(), speech.load_voices(), {"train": set(), "valid": set(), "test": set()}
    assert all(4 <= len(line.split()) <= 12 or line.endswith("?") for lines in sentences.values() for line in lines)
    for split, every in (("train", 2), ("valid", 1), ("test", 1)):
        for k, line in enumerate(sentences[split][::every]):
            heard[split] |= {p.symbol for p in synthesise(line, voices[split][k % len(voices[split])]).phones}
    assert heard["train"] == set(PHONEMES) and max(len(set(PHONEMES) - heard[split]) for split in ("valid", "test")) <= 2


def test_every_voice_speaks():
    for voice in (v for split in ("train", "valid", "test") for v in speech.load_voices()[split]):
        assert len(synthesise("The purple fish jumped.", voice).wave) > speech.RATE / 2


def test_inventory():
    assert PHONEMES[0] == "sil" and len(set(PHONEMES)) == len(PHONEMES) <= 45
    assert all(sound in PHONEMES for sounds in speech.SPELLINGS.values() for sound in sounds)


def test_spelling_shares_time_and_keeps_order():
    assert speech.spell([("ˈaɪ", 0.0, .3)]) == [Phone("aɪ", 0.0, .3)]
    assert [p.symbol for p in speech.spell([("t", 0, .1), ("ʃ", .1, .2), ("", .2, .3), ("t", .3, .4)])] == ["tʃ", "sil", "t"]
    assert speech.spell([("əl", 1.0, 1.2)]) == [Phone("ə", 1.0, 1.1), Phone("l", 1.1, 1.2)]
    assert speech.spell([("s", 0, .1), ("ˈ", .1, .2), ("æ", .2, .3)]) == [Phone("s", 0, .1), Phone("æ", .1, .3)]
    with pytest.raises(UserError, match="ʘ"):
        speech.spell([("ʘ", 0, 1)])


def test_phone_ids_read_the_middle_of_each_frame(said):
    ids = speech.phone_ids(said, 100, 400)
    assert ids.dtype == np.int64 and ids.shape == (400,)
    for k in (0, 37, 120, 250):
        assert PHONEMES[ids[k]] == next(p.symbol for p in said.phones if p.start <= (k + .5) / 100 < p.end)
    assert not ids[int(len(said.wave) / 160) + 1:].any()


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_tones_in_place(rate):
    t, u = np.arange(rate) / rate, np.arange(16_000) / 16_000
    out = speech.resample(np.sin(2 * np.pi * 1000 * t), rate, 16_000)
    assert len(out) == 16_000 and np.abs(out - np.sin(2 * np.pi * 1000 * u))[500:-500].max() < 1e-3


def test_resampling_lets_no_alias_through():
    out = speech.resample(np.sin(2 * np.pi * 9500 * np.arange(22_050) / 22_050), 22_050, 16_000)
    assert np.abs(out[500:-500]).max() < 1e-3


@pytest.mark.parametrize("text, voice, says", [
    ("", ADA, "at least one word"), (" ?! ", ADA, "at least one word"),
    ("Hello.", Voice("x", "festival", "en", 160, 50, 50), "festival"),
    ("Hello.", Voice("x", "espeak", "atlantis", 160, 50, 50), "atlantis"),
    ("Hello.", Voice("x", "espeak", "en-us+zzz", 160, 50, 50), "zzz"),
])
def test_bad_requests_say_what_is_wrong(text, voice, says):
    with pytest.raises(UserError, match=says) as error:
        synthesise(text, voice)
    assert "\n" not in str(error.value)


def test_bad_lists_say_where(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "DATA", tmp_path)
    with pytest.raises(UserError, match="voices.yaml is missing"):
        speech.load_voices()
    (tmp_path / "voices.yaml").write_text("train: [{name: a, engine: espeak}]\nvalid: []\ntest: []\nnatural: []\n")
    with pytest.raises(UserError, match="voices.yaml"):
        speech.load_voices()
    (tmp_path / "sentences.txt").write_text("Nobody knows where I belong.\n")
    with pytest.raises(UserError, match="line 1"):
        speech.load_sentences()
