"""Speakers who do not exist: espeak-ng has too few kinds of voices to learn hearing from, so training hears drawn ones too.

- A speaker is a *variant* of espeak-ng: a throat (the formants), a pitch, breath, roughness, a microphone (the tone). Those that come with it
  are a hundred; `variant` draws others, further apart (domain randomisation, Tobin et al. 2017).
- espeak-ng reads variants from its data folder alone, and there no more than 350 voices and languages: `folder` is a copy of its English with the drawn
  speakers in place of its own.
"""
import hashlib
import os
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import config

COUNT = 144
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc", "en-gb-x-gbclan")            # those of the training voices
THROAT, PITCH_HZ = (0.8, 1.45), (60, 240)      # formants over those of espeak-ng's man: long throats to children's; the lowest pitch


def drawn(k: int) -> dict:
    """Speaker k as a row of data/voices.yaml."""
    rng = np.random.default_rng([k, 1])
    return {"name": f"drawn{k}", "engine": "espeak", "language": f"{ACCENTS[rng.integers(len(ACCENTS))]}+drawn{k}",
            "rate": int(rng.integers(130, 190)), "pitch": int(rng.integers(25, 70)), "range": int(rng.integers(40, 76))}


def variant(k: int) -> str:
    """Speaker k as an espeak-ng variant file; what the rows mean stands in espeak-ng's docs/voices.md."""
    rng = np.random.default_rng([k, 0])
    u, often = rng.uniform, lambda share: rng.uniform() < share
    several = lambda lo, hi, n: " ".join(f"{x:.0f}" for x in u(lo, hi, n))
    throat, pitch = (np.exp(u(*np.log(limits))) for limits in (THROAT, PITCH_HZ))
    rows = ["language variant", f"name drawn{k}", f"pitch {pitch:.0f} {pitch * u(1.05, 1.7):.0f}"]
    for n in range(9):                                                        # 0 is the voice itself, 1 to 3 make the vowels, the others colour
        frequency = u(0.9, 1.1) if n == 0 else throat * np.exp(rng.normal(0, 0.08))
        strength, width = np.exp(rng.normal(0, 0.3, 2))
        if n >= 3 and often(0.2):
            strength *= u(0, 0.3)
        rows.append(f"formant {n} {100 * frequency:.0f} {100 * min(strength, 2):.0f} {100 * np.clip(width, 0.4, 2):.0f}")
    rows += [f"voicing {u(30, 150):.0f}", f"consonants {several(20, 130, 2)}", f"roughness {rng.integers(6)}", f"flutter {rng.integers(12)}"]
    some = [(0.25, f"klatt {rng.integers(1, 7)}"), (0.25, f"breath {several(0, 8, 8)}"), (0.2, f"echo {u(10, 130):.0f} {u(5, 25):.0f}"),
            (0.4, "tone " + " ".join(f"{hz:.0f} {gain:.0f}" for hz, gain in zip(np.sort(u(100, 5000, 4)), u(60, 255, 4)))),
            (0.3, f"intonation {rng.integers(1, 5)}"), (0.3, f"stressAmp {several(12, 30, 8)}"), (0.3, f"stressAdd {several(-30, 150, 8)}")]
    return "\n".join(rows + [row for share, row in some if often(share)]) + "\n"


@lru_cache
def folder() -> Path:
    """espeak-ng's data with the drawn speakers in the place of its own variants; made once, by whichever process comes first."""
    import espeakng_loader
    texts = [variant(k) for k in range(COUNT)]
    place = config.SCRATCH / f"speakers-{hashlib.sha256(''.join(texts).encode()).hexdigest()[:12]}"
    if not place.exists():
        unneeded = lambda _, names: [n for n in names if n == "!v" or n.endswith("_dict") and n != "en_dict"]
        temporary = place.with_name(f".{place.name}.{os.getpid()}.part")
        shutil.copytree(espeakng_loader.get_data_path(), temporary, ignore=unneeded)
        (temporary / "voices" / "!v").mkdir(parents=True)
        for k, text in enumerate(texts):
            (temporary / "voices" / "!v" / f"drawn{k}").write_text(text)
        try:
            os.rename(temporary, place)
        except OSError:                                                       # another process was first
            shutil.rmtree(temporary)
    return place
