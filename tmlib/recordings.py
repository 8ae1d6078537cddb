"""Recordings of people: speech that no synthesiser made, with the mouths that belong to it.

`data/recordings/recordings.yaml` lists them: who reads what, from where, and which sound begins when. The times come from a forced alignment,
by pocketsphinx with its acoustic model of real voices and the CMU dictionary; `--check` prints how well mouths made of that agree with the
true ones, on a voice whose sounds and times are known. To add a recording of your own: put the file there, and the row that this prints:

    pip install pocketsphinx
    python -m tmlib.recordings me.flac "what I say in it"
"""
import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import avatar, config, media, metrics, speech
from .config import DATA, RATE, UserError
from .speech import Phone

LIST = "recordings/recordings.yaml"
ARPABET = {                                      # the CMU dictionary's sounds
    "SIL": "sil", "P": "p", "B": "b", "T": "t", "D": "d", "K": "k", "G": "ɡ", "M": "m", "N": "n", "NG": "ŋ", "F": "f", "V": "v", "TH": "θ", "DH": "ð",
    "S": "s", "Z": "z", "SH": "ʃ", "ZH": "ʒ", "CH": "tʃ", "JH": "dʒ", "HH": "h", "W": "w", "Y": "j", "L": "l", "R": "ɹ", "IY": "iː", "IH": "ɪ", "EH": "ɛ",
    "AE": "æ", "AA": "ɑː", "AO": "ɔː", "UH": "ʊ", "UW": "uː", "AH": "ʌ", "ER": "ɜː", "EY": "eɪ", "AY": "aɪ", "OY": "ɔɪ", "AW": "aʊ", "OW": "oʊ",
}


class Unaligned(UserError):
    """These words do not fit this sound, or the dictionary lacks one of them."""


@dataclass(frozen=True)
class Recording:
    """wave: float32 (n,) at 16 kHz; phones: tuple of speech.Phone, in order and without gaps from 0 to its end."""
    name: str
    wave: np.ndarray
    phones: tuple


def load(folder=None) -> list[Recording]:
    """All that are listed. UserError names a row that lacks something, and a file that cannot be read."""
    from ruamel.yaml import YAML, YAMLError
    path, out = (folder or DATA) / LIST, []
    try:
        rows = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        for row in rows:
            wave = speech.normalise(media.read_audio(path.parent / row["file"]))
            out.append(Recording(row["file"].rpartition(".")[0], wave, parse(row["phones"], len(wave) / RATE)))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, YAMLError) as error:
        raise UserError(f"{path}: write a list of file and phones, as `python -m tmlib.recordings` prints them ({config.one_line(error)})") from None
    return out


def parse(text: str, end: float) -> tuple[Phone, ...]:
    """"sil 0 h .12 ə .2" -> sounds of speech.PHONEMES from these seconds on, each until the next begins. ValueError where it is not that."""
    words = text.split()
    symbols, starts = words[::2], [*map(float, words[1::2]), end]
    if len(symbols) != len(starts) - 1 or starts[0] != 0 or np.any(np.diff(starts) <= 0) or set(symbols) - set(speech.PHONEMES):
        raise ValueError(f"phones {text[:40]!r}...: sounds of speech.PHONEMES, each with its rising start in seconds, the first at 0")
    return tuple(map(Phone, symbols, starts, starts[1:]))


def written(phones) -> str:
    """What `parse` reads."""
    return " ".join(f"{p.symbol} {p.start:.2f}".rstrip("0").rstrip(".") for p in phones)


# --------------------------------------------------------------------------------------------------------------- alignment
def words_of(text: str) -> list[str]:
    """The words as the dictionary writes them. UserError for what it cannot have: digits, letters of other languages."""
    text = text.lower().replace("’", "'")
    if odd := re.findall(r"[^\W_a-z]+", text):
        raise UserError(f"{', '.join(odd)}: write numbers out, and all words in the letters a to z")
    return [w for w in (w.strip("'") for w in re.findall(r"[a-z']+", text)) if w]


def align(wave: np.ndarray, text: str, extra: dict[str, str] | None = None) -> tuple[Phone, ...]:
    """Which sound of `text` begins when in wave (n,) at 16 kHz, to 10 ms, without gaps. extra: {word: its sounds, as "F IY D Z"} that the dictionary lacks."""
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise UserError("the alignment needs pocketsphinx: pip install pocketsphinx") from None
    decoder, words, loud = Decoder(lm=None, loglevel="FATAL"), words_of(text), np.abs(wave).max(initial=0)
    for word, sounds in (extra or {}).items():
        decoder.add_word(word.lower(), sounds, True)
    if unknown := [w for w in words if decoder.lookup_word(w) is None]:
        raise Unaligned(f"the dictionary lacks {', '.join(unknown)}: say how they sound, as --word \"{unknown[0]}=F IY D Z\"")
    if not words or not loud:
        raise UserError("nothing to align: give a recording that can be heard, and its words")
    samples = (wave / loud * 0.6 * 32767).astype(np.int16).tobytes()
    decoder.set_align_text(" ".join(words))
    try:
        hear(decoder, samples)
        decoder.set_alignment()                                               # of the sounds within the words, now that these are known
        hear(decoder, samples)
    except RuntimeError:
        raise Unaligned(f"nobody says {text[:40]!r}... in it: give the words of the whole recording, and nothing else") from None
    out = [Phone(ARPABET.get(sound.name, "sil"), sound.start / 100, (sound.start + sound.duration) / 100)          # a cough is silence
           for word in decoder.get_alignment() for sound in word]
    ends = max((p.end for p in out if p.symbol != "sil"), default=0), np.flatnonzero(np.abs(wave) > 0.1 * loud)[-1] / RATE
    if ends[0] < ends[1] - 1:
        raise Unaligned(f"these words end at {ends[0]:.1f} s, the sound at {ends[1]:.1f} s: give all that is said in the recording, and nothing else")
    return parse(written(p for i, p in enumerate(out) if not i or p.symbol != "sil" or out[i - 1].symbol != "sil"), len(wave) / RATE)


def hear(decoder, samples: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(samples, full_utt=True)
    decoder.end_utt()


def check(fps: int = 16) -> tuple[np.ndarray, list[str]]:
    """Correlation of the natural voice's mouth opening with that of the alignment, for every sentence that can be aligned, and why others cannot."""
    voice, r, without = speech.load_voices()["natural"][0], [], []
    for sentence in speech.load_sentences()["natural"]:
        said = speech.synthesise(sentence, voice)
        try:
            phones = align(said.wave, sentence)
        except Unaligned as error:
            without.append(str(error))
            continue
        n = int(len(said.wave) / RATE * fps)
        r.append(metrics.pearson(*(avatar.mouth_track(some, n, fps)[:, 0] for some in (phones, said.phones))))
    return np.array(r), without


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tmlib.recordings", description="Which sound begins when in a recording: a row for data/recordings/recordings.yaml.")
    parser.add_argument("file", nargs="?", help="a recording of somebody who speaks, ten minutes at most")
    parser.add_argument("text", nargs="?", help="all that is said in it, in English")
    parser.add_argument("--word", action="append", default=[], metavar="WORD=SOUNDS", help="how a word sounds that the dictionary lacks, in ARPAbet: \"mak'st=M EY K S T\"")
    parser.add_argument("--check", action="store_true", help="measure the alignment itself, on a voice whose times are known")
    args = parser.parse_args(argv)
    if args.check:
        r, without = check()
        print("\n".join(f"left out: {why}" for why in without))
        print("mouth opening from an alignment, against the true one: r {:.3f} ({:.3f} to {:.3f}),".format(*metrics.average(r)), f"{len(r)} sentences of the natural voice")
        return 0
    if not args.file or not args.text or not all("=" in word for word in args.word):
        parser.error("give a recording and its words, or --check; --word as WORD=SOUNDS")
    phones = align(media.read_audio(args.file), args.text, dict(word.split("=", 1) for word in args.word))
    quoted = lambda x: json.dumps(x, ensure_ascii=False)
    print(f"- file: {quoted(Path(args.file).name)}\n  text: {quoted(args.text)}\n  phones: {written(phones)}")
    return 0


if __name__ == "__main__":
    config.cli(main)
