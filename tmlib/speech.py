"""Text to speech with exact phoneme times, offline.

- `synthesise(text, voice)` is a pure function: the same words and voice give the same samples, whatever was spoken before.
- Two engines (engines.py), one inventory: what either calls a sound is spelled in IPA and mapped to the 42 classes of PHONEMES. A third has its
  words on file (recited.py).
- Voices and sentences are small committed lists in data/, split into train, valid, test and natural; held out by construction. Training hears
  drawn voices beside its list (speakers.py), and `reciters`.
"""
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import engines, recited, speakers
from .config import DATA, RATE, UserError, one_line

SPLITS = ("train", "valid", "test", "natural")
ENGINES = {"espeak": engines.espeak, "piper": engines.piper, "recited": recited.recited}
RMS, PEAK = 0.1, 0.98                          # -20 dBFS while sound is on, and never clipped

PHONEMES = (
    "sil",                                                               # silence: index 0
    "p", "b", "t", "d", "k", "ɡ", "m", "n", "ŋ", "f", "v", "θ", "ð", "s", "z", "ʃ", "ʒ", "tʃ", "dʒ", "h", "w", "j", "l", "ɹ",
    "iː", "ɪ", "ɛ", "æ", "ɑː", "ɒ", "ɔː", "ʊ", "uː", "ʌ", "ə", "ɜː", "eɪ", "aɪ", "ɔɪ", "aʊ", "oʊ",
)
ALIASES = {                                    # other spellings of a class; "a b" counts as two sounds, one after the other
    "g": "ɡ", "r": "ɹ", "ʲ": "j", "ɾ": "d", "ʔ": "t", "x": "k", "ɫ": "l", "ʍ": "w", "ç": "h", "ɲ": "n", "ɬ": "l", "ɚ": "ɜː", "ɝ": "ɜː",
    "ɜ": "ɜː", "i": "iː", "ᵻ": "ɪ", "ɨ": "ɪ", "y": "uː", "e": "ɛ", "eː": "eɪ", "ɛː": "ɛ", "a": "æ", "aː": "ɑː", "a:": "ɑː", "ɑ": "ɑː",
    "ɐ": "ʌ", "ɒː": "ɔː", "ɔ": "ɒ", "o": "oʊ", "oː": "oʊ", "oːɹ": "ɔː ɹ", "əʊ": "oʊ", "ɔʊ": "oʊ", "u": "uː", "ʉ": "uː", "ʉː": "uː",
    "ɵ": "ʊ", "ʌɪ": "aɪ", "ɑɪ": "aɪ", "oɪ": "ɔɪ", "ʌʊ": "aʊ", "æʊ": "aʊ", "æɪ": "eɪ", "ɛɪ": "eɪ", "ɪə": "ɪ ə", "eə": "ɛ ə",
    "ɛə": "ɛ ə", "ʊə": "ʊ ə",
}
SPELLINGS = {p: (p,) for p in PHONEMES[1:]} | {k: tuple(v.split()) for k, v in ALIASES.items()}
STRESS, LONG = "ˈˌ", "ː:"
UNHEARD = re.compile("[ˈˌˑ\u200c\u200d‿]")     # stress, half length, ties: no sound of their own


@dataclass(frozen=True)
class Voice:
    """Who speaks. engine: "espeak", "piper" or "recited"; language: an espeak-ng voice and variant ("en-us+f3"); rate in words a minute;
    pitch and range from 0 to 99. piper heeds the rate alone; of a reciter (`recited.RECITERS`) language is the name, and pitch alone is heeded."""
    name: str
    engine: str
    language: str
    rate: int
    pitch: int
    range: int


@dataclass(frozen=True)
class Phone:
    """One sound of PHONEMES, from `start` to `end` seconds."""
    symbol: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """wave: float32 (n,) at 16 kHz; phones: tuple of Phone, in order and without gaps from 0 to n / 16000 s."""
    wave: np.ndarray
    phones: tuple
    text: str


def synthesise(text, voice):
    """Speak `text` (str) as `voice` (Voice) -> Utterance. UserError on empty text, unknown engines, voices or sounds."""
    if not any(c.isalnum() for c in text):
        raise UserError(f"nothing to say in {text!r}: give at least one word")
    if voice.engine not in ENGINES:
        raise UserError(f"data/voices.yaml: voice {voice.name}: engine {voice.engine!r} is none of {', '.join(ENGINES)}")
    samples, rate, groups = ENGINES[voice.engine](text, voice)
    if not len(samples):
        raise UserError(f"voice {voice.name} said nothing for {text!r}: use words that it can read")
    wave = normalise(resample(samples, rate, RATE))
    return Utterance(wave, _tile([p for g in groups for p in spell(g)], len(wave) / RATE), text)


def phone_ids(utterance, rate_hz, n):
    """The class in the middle of each of n frames of 1 / rate_hz seconds -> int64 (n,); silence (0) after the end."""
    starts = np.array([p.start for p in utterance.phones])
    ids = np.array([PHONEMES.index(p.symbol) for p in utterance.phones])
    middle = (np.arange(n) + 0.5) / rate_hz
    at = np.searchsorted(starts, middle, side="right") - 1
    return np.where(middle < utterance.phones[-1].end, ids[at], 0).astype(np.int64)


# ---- committed lists ---------------------------------------------------------------------------

def load_sentences():
    """data/sentences.txt -> {split of SPLITS: [str]}. UserError on a line with no split above it."""
    out, split = {s: [] for s in SPLITS}, None
    for number, line in enumerate(_read("sentences.txt").splitlines(), 1):
        line = line.strip()
        if line.startswith("["):
            split = line.strip("[]")
        elif line and not line.startswith("#"):
            if split not in out:
                raise UserError(f"data/sentences.txt, line {number}: put sentences under [train], [valid], [test] or [natural]")
            out[split].append(line)
    return out


def load_voices():
    """data/voices.yaml -> {split of SPLITS: [Voice]}, and `speakers` to train; UserError on unknown or missing fields."""
    from ruamel.yaml import YAML, YAMLError
    try:
        rows = YAML(typ="safe", pure=True).load(_read("voices.yaml"))
        rows["train"] += map(speakers.drawn, range(speakers.COUNT))
        return {split: [Voice(**row) for row in rows[split]] for split in SPLITS}
    except (KeyError, TypeError, YAMLError) as error:
        raise UserError("data/voices.yaml: write train, valid, test, natural, each a list of name, engine, language, rate, pitch, range "
                        f"({one_line(error)})") from None


def reciters():
    """[Voice] of those that say what is on file and nothing else, for training."""
    return [Voice(**row) for row in recited.rows()]


def _read(name):
    try:
        return (DATA / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"data/{name} is missing: git checkout data/{name}") from None


# ---- IPA to classes ----------------------------------------------------------------------------

def spell(units):
    """[(ipa, start_s, end_s)] -> [Phone], longest spelling first, across units; "" and " " are silence.

    A unit's letters share its time, and so do the two halves of a sound that counts as two. A stress mark's time is that of the
    sound it stands before.
    """
    letters = _letters(units)
    text, phones, i = "".join(c for c, _, _ in letters), [], 0
    while i < len(text):
        n = next((k for k in (3, 2) if text[i:i + k] in SPELLINGS and i + k <= len(text)), 1)
        sounds, start, end = SPELLINGS.get(text[i:i + n]), letters[i][1], letters[i + n - 1][2]
        if sounds is None and text[i] in LONG and phones:                # a vowel that has no long class of its own
            phones[-1] = Phone(phones[-1].symbol, phones[-1].start, end)
        elif sounds is None and text[i] not in LONG + " ":
            raise UserError(f"the sound {text[i]!r} is none that speech.py knows (PHONEMES, ALIASES): use English words")
        else:
            cuts = np.linspace(start, end, len(sounds or "_") + 1).tolist()
            phones += [Phone(s, a, b) for s, a, b in zip(sounds or ("sil",), cuts, cuts[1:])]
        i += n
    return phones


def _letters(units):
    """(letter, start, end) of all that can be heard in the units."""
    units = [(ipa or " ", a, b) for ipa, a, b in units]
    letters = [(c, a + (b - a) * k / len(s), a + (b - a) * (k + 1) / len(s)) for s, a, b in units for k, c in enumerate(s)]
    for k in range(1, len(letters)):
        if letters[k - 1][0] in STRESS:
            letters[k] = (letters[k][0], letters[k - 1][1], letters[k][2])
    return [u for u in letters if not UNHEARD.match(u[0]) and not unicodedata.combining(u[0])]


def _tile(phones, duration):
    """Cover [0, duration] without gaps: each phone ends where the next starts, silences merge, nothing is empty."""
    out = [Phone("sil", 0.0, duration)]
    for phone in phones:
        start = min(max(phone.start, out[-1].start), duration)
        if phone.symbol == out[-1].symbol == "sil":
            continue
        last = out.pop()
        if start > last.start:
            out.append(Phone(last.symbol, last.start, start))
        out.append(Phone(phone.symbol, start, duration))
    return tuple(out if out[-1].start < duration else out[:-1])


# ---- samples -----------------------------------------------------------------------------------

@lru_cache
def _sinc(up, down, half):
    """Polyphase bank (up, 2 half): a Kaiser-windowed sinc that ends a little below the lower Nyquist frequency."""
    cut = 0.94 * min(1.0, up / down)
    t = np.arange(2 * half) - half + 1 - np.arange(up)[:, None] / up      # (up, taps) from the output, in input samples
    bank = cut * np.sinc(cut * t) * np.i0(10.0 * np.sqrt(np.clip(1 - (t / half) ** 2, 0, None)))
    return bank / bank.sum(1, keepdims=True)


def resample(wave, rate, new_rate, half=48):
    """(n,) at `rate` Hz -> float64 (ceil(n new_rate / rate),) at `new_rate` Hz: band-limited, no delay."""
    wave = np.asarray(wave, np.float64)
    if rate == new_rate or not len(wave):
        return wave
    g = np.gcd(rate, new_rate)
    up, down = int(new_rate // g), int(rate // g)
    n = -(-len(wave) * up // down)
    blocks = -(-n // up)
    padded = np.concatenate([np.zeros(half - 1), wave, np.zeros(blocks * down + 2 * half - len(wave))])
    views = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)
    out, bank = np.empty((blocks, up)), _sinc(up, down, half)
    for k in range(up):                                                  # outputs k, k + up, ... share one filter
        out[:, k] = views[k * down // up::down][:blocks] @ bank[k * down % up]
    return out.ravel()[:n]


def normalise(wave):
    """(n,) -> float32 (n,): its sounding part at -20 dBFS RMS, or less where that would pass the peak."""
    loud = np.abs(wave)
    top = max(loud.max(initial=0), 1e-9)
    heard = wave[loud > 0.02 * top]
    gain = RMS / np.sqrt(np.mean(heard ** 2)) if len(heard) else 0.0
    return (wave * min(gain, PEAK / top)).astype(np.float32)
