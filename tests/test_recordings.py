"""recordings: what is listed can be used, rows that are wrong say so, and an alignment becomes sounds of ours. pocketsphinx itself is played by `Aligner`."""
import sys
from types import SimpleNamespace as Row

import numpy as np
import pytest

from tmlib import recordings, speech
from tmlib.config import UserError
from tmlib.recordings import align, parse, written
from tmlib.speech import Phone

SAID = [("he", [("HH", 0, 10), ("IY", 10, 15)]), ("<sil>", [("SIL", 25, 20)]), ("[NOISE]", [("+NSN+", 45, 5)]), ("goes", [("G", 50, 10), ("OW", 60, 20), ("Z", 80, 20)])]


class Aligner:
    """A decoder that always hears SAID."""
    refuses = False

    def __init__(self, **_):
        self.known, self.text, self.calls = {"he": "HH IY"}, None, []

    def add_word(self, word, sounds, _):
        self.known[word] = sounds

    def lookup_word(self, word):
        return self.known.get(word)

    def set_align_text(self, text):
        self.text = text

    def set_alignment(self):
        self.calls.append("sounds")

    def start_utt(self):
        self.calls.append("start")

    def process_raw(self, samples, full_utt):
        assert full_utt and isinstance(samples, bytes)

    def end_utt(self):
        if self.refuses:
            raise RuntimeError("no path")

    def get_alignment(self):
        assert self.calls == ["start", "sounds", "start"] and self.text in ("he goes", "he goes he")
        for _, sounds in SAID:
            yield [Row(name=name, start=start, duration=n) for name, start, n in sounds]


@pytest.fixture
def aligner(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", Row(Decoder=Aligner))


def wave(seconds):
    return (0.3 * np.sin(np.arange(int(16000 * seconds)) / 20)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ what is listed
def test_the_recordings_are_whole():
    some = recordings.load()
    assert len({r.name for r in some}) == len(some) == 2
    for r in some:
        assert r.phones[0].start == 0 and r.phones[-1].end == pytest.approx(len(r.wave) / 16000)
        assert all(a.end == b.start for a, b in zip(r.phones, r.phones[1:]))
        loud = np.abs(r.wave).max()
        assert 0.1 < loud <= speech.PEAK + 1e-6 and r.wave.dtype == np.float32


def test_their_times_fit_their_sound():
    """Vowels are louder than silence and closures, by far: a shifted alignment would not show that."""
    for r in recordings.load():
        rms = lambda p, s=0.0: np.sqrt(np.mean(r.wave[int((p.start + s) * 16000):int((p.end + s) * 16000)] ** 2)) + 1e-6
        vowels, shut = ([p for p in r.phones if p.symbol in some and p.end - p.start > 0.04] for some in (speech.PHONEMES[25:], ("sil", "p", "b", "t", "k")))
        contrast = [np.log(np.median([rms(p, s) for p in vowels[3:-3]]) / np.median([rms(p, s) for p in shut[1:-1]])) for s in (0.0, 0.15)]
        assert contrast[0] > 1 and contrast[0] > contrast[1] + 0.3


def test_phones_there_and_back():
    text = "sil 0 h 0.1 iː 0.2 sil 1"
    phones = parse(text, 1.5)
    assert phones == (Phone("sil", 0, 0.1), Phone("h", 0.1, 0.2), Phone("iː", 0.2, 1), Phone("sil", 1, 1.5)) and written(phones) == text


@pytest.mark.parametrize("row", ["- {file: a.flac}", "- {file: austen.flac, phones: sil 0 qq 1}", "- {file: austen.flac, phones: sil 0.5 h 1}", "- {file: austen.flac, phones: sil 0 h 2 t 1}",
                                 "- {file: austen.flac, phones: sil 0 h 99}", "- {file: austen.flac, phones: sil}", "file: [", "- 3"])
def test_a_wrong_row_names_the_list(row, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    (folder / "austen.flac").write_bytes((recordings.DATA / "recordings" / "austen.flac").read_bytes())
    (folder / "recordings.yaml").write_text(row)
    with pytest.raises(UserError, match="recordings.yaml|a.flac") as error:
        recordings.load(tmp_path)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- alignment
def test_an_alignment_becomes_our_sounds(aligner):
    got = align(wave(1.0), "He... goes!", {"goes": "G OW Z"})
    assert [(p.symbol, p.start) for p in got] == [("h", 0), ("iː", 0.1), ("sil", 0.25), ("ɡ", 0.5), ("oʊ", 0.6), ("z", 0.8)]
    assert got[-1].end == 1 and all(a.end == b.start for a, b in zip(got, got[1:])), "a cough belongs to the silence before it"
    assert set(recordings.ARPABET.values()) <= set(speech.PHONEMES) and len(recordings.ARPABET) == 40


def test_what_cannot_be_aligned_says_why(aligner, monkeypatch):
    with pytest.raises(UserError, match="lacks goes"):
        align(wave(1.0), "He goes")
    with pytest.raises(UserError, match="end at 1.0 s, the sound at 4.0 s"):
        align(wave(4.0), "He goes", {"goes": "G OW Z"})
    with pytest.raises(UserError, match="can be heard"):
        align(np.zeros(16000, np.float32), "He goes", {"goes": "G OW Z"})
    monkeypatch.setattr(Aligner, "refuses", True)
    with pytest.raises(UserError, match="nobody says 'He goes'"):
        align(wave(1.0), "He goes", {"goes": "G OW Z"})
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(UserError, match="pip install pocketsphinx"):
        align(wave(1.0), "He goes")


@pytest.mark.parametrize("text, words", [("He said: “Don’t!”", ["he", "said", "don't"]), ("'Hello,' he cried", ["hello", "he", "cried"]), ("the dogs' well-known 'em", ["the", "dogs", "well", "known", "em"])])
def test_words_are_the_dictionarys(text, words):
    assert recordings.words_of(text) == words


@pytest.mark.parametrize("text, odd", [("I have 5 cats", "5"), ("a naïve idea", "ï"), ("the 3rd of May", "3")])
def test_what_the_dictionary_cannot_have_is_refused(text, odd):
    with pytest.raises(UserError, match=f"^{odd}: write numbers out"):
        recordings.words_of(text)


def test_the_check_compares_what_can_be_aligned_and_names_the_rest(aligner, monkeypatch, capsys):
    """With the true sounds in the alignment's place it finds them equal; a sentence that cannot be aligned is not passed over in silence."""
    voice, sentences = speech.load_voices()["natural"][0], speech.load_sentences()["natural"][:3]
    true = {len(said.wave): said.phones for said in (speech.synthesise(s, voice) for s in sentences)}

    def perfect(wave, text):
        if text == sentences[1]:
            raise recordings.Unaligned("the dictionary lacks it")
        return true[len(wave)]
    monkeypatch.setattr(recordings, "align", perfect)
    monkeypatch.setattr(speech, "load_sentences", lambda: {"natural": sentences})
    r, without = recordings.check()
    assert r.tolist() == pytest.approx([1, 1]) and without == ["the dictionary lacks it"]
    assert recordings.main(["--check"]) == 0 and "left out: the dictionary lacks it" in capsys.readouterr().out


def test_the_command_prints_a_row_that_can_be_read(aligner, capsys, tmp_path, monkeypatch):
    import soundfile
    soundfile.write(tmp_path / "me.wav", wave(1.0), 16000)
    assert recordings.main([str(tmp_path / "me.wav"), "He: goes # 'he'", "--word", "Goes=G OW Z"]) == 0
    folder = tmp_path / "recordings"
    folder.mkdir()
    (tmp_path / "me.wav").rename(folder / "me.wav")
    (folder / "recordings.yaml").write_text(capsys.readouterr().out)
    some = recordings.load(tmp_path)
    assert [r.name for r in some] == ["me"] and [p.symbol for p in some[0].phones] == ["h", "iː", "sil", "ɡ", "oʊ", "z"]
    with pytest.raises(SystemExit):
        recordings.main([str(folder / "me.wav")])
