"""Recited: what training hears of voices that were made from recordings of people. espeak-ng's are formulas, all of them.

- Seven reciters speak the training sentences of data/sentences.txt, and two of them each of the dialogue's training questions. Most of their
  synthesisers do not come with pip, so what they said is kept: `data/recited/<reciter>.opus`, one text after the other, and `<reciter>.tsv`, a row a
  text: its first sample, one past its last, the text, and its sounds, each with the second it begins at. `python -m tmlib.recite` made them.
- A reciter is many speakers: played faster, a voice is higher and its throat shorter, as a child's.
- Whose voices: awb, rms, slt and kal are Carnegie Mellon's (flite 2.2; the first three from the CMU Arctic recordings), ked is the University of
  Edinburgh's (festvox-kdlpc16k 1.4), pico_gb and pico_us SVOX's (pico, Apache 2.0). All of these licences let everybody use what the voices say.
"""
import csv
from functools import lru_cache

import soundfile

from . import config
from .config import RATE, UserError

FOLDER = "recited"                              # of data/
RECITERS = ("awb", "kal", "ked", "pico_gb", "pico_us", "rms", "slt")
SIZES = range(5, 96, 9)                         # the pitches, from 0 to 99, at which each of them speaks; 50 is the reciter's own


def rows() -> list[dict]:
    """The speakers that these are, as rows of data/voices.yaml."""
    return [{"name": f"{reciter}{size}", "engine": "recited", "language": reciter, "rate": 170, "pitch": size, "range": 50} for reciter in RECITERS for size in SIZES]


@lru_cache
def texts(reciter: str) -> dict[str, tuple[int, int, str]]:
    """What is kept of a reciter: {text: (first sample, one past the last, sounds)}. UserError names a file that is missing or damaged."""
    path = config.DATA / FOLDER / f"{reciter}.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {text: (int(start), int(end), sounds) for start, end, text, sounds in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}: git checkout data/{FOLDER}") from None


def recited(text, voice):
    """The engine `recited` -> float samples (n,), their rate, groups of one sound each. Only `voice.pitch` is heeded. UserError on what is not kept."""
    if not able(voice, text):
        raise UserError(f"data/{FOLDER}: {voice.language} has not recited {text!r}, only what {voice.language}.tsv lists: put it under [train] in data/sentences.txt, then python -m tmlib.recite")
    start, end, sounds = texts(voice.language)[text]
    path = config.DATA / FOLDER / f"{voice.language}.opus"
    try:
        samples, _ = soundfile.read(path, start=start, stop=end)
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{path}: {error}: git checkout data/{FOLDER}") from None
    rate = 50 * round(RATE * 1.25 ** ((voice.pitch - 50) / 50) / 50)
    words = sounds.split()
    times = [*(float(t) * RATE / rate for t in words[1::2]), len(samples) / rate]
    return samples, rate, [[("" if s == "sil" else s, a, b)] for s, a, b in zip(words[::2], times, times[1:])]


def able(voice, text: str) -> bool:
    """Can this voice say it? A reciter only what is kept of him; all others anything."""
    return voice.engine != "recited" or text in texts(voice.language)
