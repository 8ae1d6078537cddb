"""speakers: drawn voices are the same for everybody, unlike one another, and speak in time."""
import numpy as np
import pytest

from tmlib import config, engines, speakers, speech

WORDS = "Purple fish jump over yellow boats."


def test_a_number_gives_one_speaker():
    assert speakers.drawn(3) == speakers.drawn(3) != speakers.drawn(4)
    assert speakers.variant(3) == speakers.variant(3) != speakers.variant(4)
    assert len({speakers.variant(k) for k in range(speakers.COUNT)}) == speakers.COUNT


def test_train_alone_has_them_and_their_accents_are_train_s():
    voices = speech.load_voices()
    known = {split: [v for v in voices[split] if "+drawn" in v.language] for split in voices}
    assert {split: len(some) for split, some in known.items()} == {"train": speakers.COUNT, "valid": 0, "test": 0, "natural": 0}
    listed = {v.language.partition("+")[0] for v in voices["train"] if v not in known["train"]}
    assert {v.language.partition("+")[0] for v in known["train"]} <= set(speakers.ACCENTS) <= listed


def test_they_speak_unlike_one_another():
    some = [speech.synthesise(WORDS, speech.Voice(**speakers.drawn(k))) for k in range(6)]
    spectrum = [np.abs(np.fft.rfft(u.wave, 2**16)).reshape(-1)[:32768].reshape(64, -1).mean(1) for u in some]
    assert all(np.corrcoef(a, b)[0, 1] < 0.99 for i, a in enumerate(spectrum) for b in spectrum[:i])
    for u in some:
        assert 1 < len(u.wave) / speech.RATE < 5 and [p.symbol for p in u.phones].count("sil") <= 4
    again = speech.synthesise(WORDS, speech.Voice(**speakers.drawn(2)))
    assert np.array_equal(again.wave, some[2].wave)


def test_every_speaker_can_be_heard():
    for k in range(speakers.COUNT):
        said = speech.synthesise("Hello.", speech.Voice(**speakers.drawn(k)))
        assert np.sqrt(np.mean(said.wave ** 2)) > 0.02, speakers.variant(k)


def test_a_scratch_folder_that_is_gone_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "SCRATCH", tmp_path / "deep" / "scratch")
    speakers.folder.cache_clear()
    try:
        place = speakers.folder()
        assert place.parent == tmp_path / "deep" / "scratch" and [p.name for p in place.parent.iterdir()] == [place.name]
        assert len(list((place / "voices" / "!v").iterdir())) == speakers.COUNT and not list(place.glob("de_dict"))
        samples, rate, groups = engines.espeak(WORDS, speech.Voice(**speakers.drawn(0)))
        assert len(samples) > rate and len(groups) > 20
    finally:
        speakers.folder.cache_clear()


def test_a_speaker_beyond_the_count_is_refused():
    with pytest.raises(config.UserError, match="drawn9999"):
        speech.synthesise(WORDS, speech.Voice(**speakers.drawn(9999)))
