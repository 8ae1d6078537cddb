"""recited: what is kept fits its sound, is training's alone, and can be made again; recite: what the three synthesisers print becomes sounds of ours."""
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from tmlib import config, data, dialogue, recite, recited, speech
from tmlib.config import UserError

VOWELS = set(speech.PHONEMES[speech.PHONEMES.index("iː"):])


def speaker(reciter, size=50):
    return replace(speech.reciters()[0], name=f"{reciter}{size}", language=reciter, pitch=size)


@pytest.mark.parametrize("reciter", recited.RECITERS)
def test_rows_fit_their_sound(reciter):
    rows = recited.texts(reciter)
    starts, ends, sounds = zip(*rows.values())
    assert starts == (0, *ends[:-1]) and ends[-1] == soundfile.info(config.DATA / recited.FOLDER / f"{reciter}.opus").frames
    for start, end, said in rows.values():
        words = said.split()
        times = [float(t) for t in words[1::2]]
        assert set(words[::2]) <= set(speech.PHONEMES) and times == sorted(times) and times[0] == 0 and times[-1] <= (end - start) / recited.RATE + 1e-3


@pytest.mark.parametrize("reciter", recited.RECITERS)
def test_vowels_are_where_the_sound_is(reciter):
    loud, quiet = [], []
    for text in list(recited.texts(reciter))[::20]:
        said = speech.synthesise(text, speaker(reciter))
        for p in said.phones:
            part = said.wave[int(p.start * speech.RATE):int(p.end * speech.RATE)]
            if p.symbol in VOWELS | {"sil"} and len(part) > 400:
                (loud if p.symbol in VOWELS else quiet).append(np.sqrt(np.mean(part ** 2)))
    assert np.median(loud) > 0.05 > 0.01 > np.median(quiet) and np.mean(np.array(loud) > 0.02) > 0.95


def test_training_alone_hears_them():
    sentences, book = speech.load_sentences(), dialogue.Book()
    kept = set().union(*map(recited.texts, recited.RECITERS))
    assert kept <= set(sentences["train"]) | set(book.questions("train"))
    assert not kept & (set(sentences["test"]) | set(sentences["valid"]) | set(sentences["natural"]))
    for split in ("valid", "test"):
        assert not kept & ({e.question for e in book.facts[split]} | {e.question for some in book.tells[split] for _, e in some})
    assert {split: any(v.engine == "recited" for v in data.word_list(split)[0]) for split in speech.SPLITS} == {"train": True, "valid": False, "test": False, "natural": False}


def test_almost_everything_is_recited_and_almost_each_question_twice():
    sentences, questions = speech.load_sentences()["train"], set(dialogue.Book().questions("train"))
    by = {text: sum(text in recited.texts(r) for r in recited.RECITERS) for text in [*sentences, *questions]}
    assert min(by[s] for s in sentences) >= len(recited.RECITERS) - 2, "where pico's words could not be aligned, it is one or two fewer"
    assert np.mean([by[q] == recite.ASKED_BY for q in questions]) > 0.9 and min(by[q] for q in questions) >= 1


def test_a_reciter_is_speakers_of_many_sizes():
    text = speech.load_sentences()["train"][0]
    small, own, tall = (speech.synthesise(text, speaker("slt", size)) for size in (95, 50, 5))
    assert [p.symbol for p in small.phones] == [p.symbol for p in own.phones] == [p.symbol for p in tall.phones]
    assert len(tall.wave) / len(own.wave) == pytest.approx(1.25 ** 0.9, rel=0.01) == pytest.approx(len(own.wave) / len(small.wave), rel=0.02)
    assert own.phones[5].start / tall.phones[5].start == pytest.approx(1.25 ** -0.9, rel=0.02)
    assert len({v.name for v in speech.reciters()}) == len(speech.reciters()) == len(recited.RECITERS) * len(recited.SIZES)


def test_a_part_of_the_file_is_that_part_of_the_whole():
    whole, _ = soundfile.read(config.DATA / recited.FOLDER / "rms.opus")
    for start, end, _ in list(recited.texts("rms").values())[7::150]:
        part, _ = soundfile.read(config.DATA / recited.FOLDER / "rms.opus", start=start, stop=end)
        assert np.abs(part - whole[start:end]).max() < 0.02


def test_a_clip_speaks_what_its_reciter_has():
    some = speech.load_sentences()
    wave, phones, name = data.talk(np.random.default_rng(0), ([speaker("pico_us")], ["Nobody recites this.", *some["train"][:5]]), 4.0)
    assert name == "pico_us50" and len(wave) == 64000 and len(phones) > 20
    assert recited.able(speech.load_voices()["test"][0], "Anything.") and not recited.able(speaker("awb"), "Anything.")


def test_sentences_that_no_reciter_has_leave_him_out(monkeypatch):
    monkeypatch.setattr(speech, "load_sentences", lambda: dict.fromkeys(speech.SPLITS, ["Nobody recites this."]))
    data.word_list.cache_clear()
    try:
        assert {v.engine for v in data.word_list("train")[0]} == {"espeak"}
    finally:
        data.word_list.cache_clear()


def test_what_is_not_kept_or_lost_says_so(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="awb has not recited 'Anything.'"):
        speech.synthesise("Anything.", speaker("awb"))
    monkeypatch.setattr(config, "DATA", tmp_path)
    recited.texts.cache_clear()
    try:
        with pytest.raises(UserError, match="awb.tsv.*git checkout data/recited"):
            recited.texts("awb")
        (tmp_path / "recited").mkdir()
        (tmp_path / "recited/awb.tsv").write_text("0\t100\tHello.\th 0\n")
        with pytest.raises(UserError, match="awb.opus.*git checkout data/recited"):
            speech.synthesise("Hello.", speaker("awb"))
        recited.texts.cache_clear()
        (tmp_path / "recited/awb.tsv").write_text("no table\n")
        with pytest.raises(UserError, match="awb.tsv"):
            recited.texts("awb")
    finally:
        recited.texts.cache_clear()


# ---------------------------------------------------------------------------------------------------------------- recite
def tone(seconds):
    return 0.2 * np.sin(2 * np.pi * 220 * np.arange(int(seconds * recited.RATE)) / recited.RATE)


def synthesisers(*command):
    """Plays flite and festival: a tone a text, and what they say about it."""
    if command[0] == "flite":
        soundfile.write(command[-1], tone(1.0), recited.RATE)
        return "pau:0.200 hh:0.300 ax:0.500 pau:1.000 "
    for line in open(command[-1]).read().splitlines()[1:]:
        lab, wav = (part.split('"')[1] for part in (line[line.index("save.segs"):], line[line.index("save.wave"):]))
        soundfile.write(wav, tone(0.5), recited.RATE)
        open(lab, "w").write("#\n0.1000 100 pau\n0.3000 100 ow\n0.5000 100 pau\n")
    return ""


@pytest.mark.parametrize("reciter, sounds, seconds", [("kal", ["sil", "h", "ə", "sil"], 1.0), ("ked", ["sil", "oʊ", "sil"], 0.5)])
def test_what_a_synthesiser_says_is_kept(tmp_path, monkeypatch, reciter, sounds, seconds):
    monkeypatch.setattr(recite, "run", synthesisers)
    monkeypatch.setattr(config, "DATA", tmp_path)
    recited.texts.cache_clear()
    try:
        assert recite.make(reciter, ["One.", "Two."]) == (2, pytest.approx(2 * seconds / 60, rel=1e-3))
        said = speech.synthesise("Two.", speaker(reciter))
        assert [p.symbol for p in said.phones] == sounds and len(said.wave) == pytest.approx(seconds * recited.RATE, abs=1)
    finally:
        recited.texts.cache_clear()


def test_a_missing_synthesiser_says_how_to_get_it():
    with pytest.raises(UserError, match="apt install"):
        recite.run("no-such-synthesiser")
