"""The command that made data/recited: seven voices recite the training sentences, and some each of the dialogue's questions.

    apt install flite festival festvox-kdlpc16k
    pip install pocketsphinx ttspico
    python -m tmlib.recite

flite and festival say when they say which sound; pico does not, so its words are aligned (recordings.align).
"""
import argparse
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile

from . import config, dialogue, recordings, speech
from .config import RATE, UserError, atomic
from .recited import FOLDER, RECITERS

MORE = {"pau": "sil", "ax": "ə", "axr": "ɜː"}   # sounds of flite and festival that the CMU dictionary has not
FLITE = {"awb": "awb", "kal": "kal16", "rms": "rms", "slt": "slt"}                              # its names of the reciters
PICO = {"pico_gb": "en-GB", "pico_us": "en-US"}
ASKED_BY = 2                                    # reciters of each of the dialogue's questions


def flite(reciter: str, some: list[str], folder: Path):
    """Yields (samples, rate, [(sound, its end in seconds)]) for each text."""
    for text in some:
        said = run("flite", "-voice", FLITE[reciter], "-psdur", "-t", text, "-o", str(folder / "flite.wav"))
        yield *soundfile.read(folder / "flite.wav"), [(ipa(name), float(end)) for name, end in (pair.rsplit(":", 1) for pair in said.split())]


def festival(reciter: str, some: list[str], folder: Path):
    """As `flite`."""
    said = [f'(set! u (SynthText "{text}")) (utt.save.segs u "{folder}/{i}.lab") (utt.save.wave u "{folder}/{i}.wav" (quote riff))' for i, text in enumerate(some)]
    (folder / "all.scm").write_text("\n".join([f"(voice_{reciter}_diphone)", *said]))
    run("festival", "-b", str(folder / "all.scm"))
    for i in range(len(some)):
        lines = [line.split() for line in (folder / f"{i}.lab").read_text().splitlines()[1:] if line]
        yield *soundfile.read(folder / f"{i}.wav"), [(ipa(name), float(end)) for end, _, name in lines]


def pico(reciter: str, some: list[str], folder: Path):
    """As `flite`, but by forced alignment: pico does not say when it says what. No sounds where the words cannot be aligned."""
    try:
        import pocketsphinx  # noqa: F401
        from ttspico import TtsEngine
    except ImportError:
        raise UserError("pico's voices need pip install pocketsphinx ttspico") from None
    engine = TtsEngine(PICO[reciter])
    for text in some:
        wave = np.frombuffer(engine.speak(text), np.int16) / 32768
        try:
            yield wave, RATE, [(p.symbol, p.end) for p in recordings.align(wave.astype(np.float32), text)]
        except recordings.Unaligned:
            yield wave, RATE, []


def ipa(name: str) -> str:
    """flite's and festival's name of a sound -> ours."""
    return MORE.get(name) or recordings.ARPABET[name.upper()]


def run(*command: str) -> str:
    """What a program prints. UserError where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{command[0]}: {error}: apt install flite festival festvox-kdlpc16k") from None


def make(reciter: str, some: list[str]) -> tuple[int, float]:
    """Writes a reciter's two files; returns how many texts that are, and minutes."""
    speak = flite if reciter in FLITE else pico if reciter in PICO else festival
    waves, lines, at = [], [], 0
    with TemporaryDirectory() as folder:
        for text, (samples, rate, sounds) in zip(some, speak(reciter, some, Path(folder))):
            if sounds:
                wave, starts = speech.normalise(speech.resample(samples, rate, RATE)), [0.0, *(end for _, end in sounds)]
                lines.append(f"{at}\t{at + len(wave)}\t{text}\t" + " ".join(f"{sound} {start:.3f}" for (sound, _), start in zip(sounds, starts)) + "\n")
                waves.append(wave)
                at += len(wave)
    with atomic(config.DATA / FOLDER / f"{reciter}.tsv") as tmp:
        tmp.write_text("".join(lines), encoding="utf-8")
    with atomic(config.DATA / FOLDER / f"{reciter}.opus") as tmp:
        soundfile.write(tmp, np.concatenate(waves), RATE, format="OGG", subtype="OPUS", compression_level=0.96)                     # 16 kbit/s
    return len(lines), at / RATE / 60


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tmlib.recite", description="Make data/recited again, from data/sentences.txt and data/dialogue.yaml.")
    parser.parse_args(argv)
    sentences, questions = speech.load_sentences()["train"], list(dict.fromkeys(dialogue.Book().questions("train")))
    for k, reciter in enumerate(RECITERS):
        texts, minutes = make(reciter, sentences + [q for i, q in enumerate(questions) if (k - i) % len(RECITERS) < ASKED_BY])
        print(f"{reciter}: {texts} texts, {minutes:.1f} minutes", flush=True)
    return 0


if __name__ == "__main__":
    config.cli(main)
