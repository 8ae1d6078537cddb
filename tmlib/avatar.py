"""A talking head that knows its own mouth: phonemes -> mouth truth -> frames.

- The mouth has three truths per frame in [0, 1]: opening, width, rounding. Frame f shows the instant f / fps.
- `mouth_track` blends viseme targets with overlapping dominance (Cohen & Massaro 1993), then shuts lips and silences for good.
- `make_track` adds what a listener sees besides: blinks, gaze, sway, nods, brows. `render` is in puppet.py, looks in portrait.py.
"""
from dataclasses import dataclass, fields

import numpy as np

from .identity import STYLES, Identity, sample_identity
from .portrait import smooth
from .puppet import face_box, mouth_box, render
from .speech import Phone

__all__ = ["STYLES", "Identity", "Track", "face_box", "make_track", "mouth_box", "mouth_track", "render", "sample_identity"]

NEUTRAL = (0.0, 0.5, 0.0)                      # the closed mouth of silence
# phonemes: opening, width, rounding, and how much of the mouth they insist on (h takes the shape of what is near it)
VISEMES = {
    "p b m": (.00, .45, .10, 2.0), "f v": (.10, .50, .05, 1.6), "w": (.18, .12, .95, 1.5), "ɹ": (.25, .30, .50, .8),
    "θ ð": (.22, .52, .00, .8), "t d n": (.18, .55, .00, .5), "l": (.30, .52, .00, .6), "s z": (.12, .70, .00, .8),
    "ʃ ʒ tʃ dʒ": (.20, .25, .65, 1.1), "k ɡ ŋ": (.28, .50, .00, .4), "h": (.35, .50, .00, .2), "j": (.20, .75, .00, .6),
    "iː": (.25, .95, .00, 1.0), "ɪ": (.32, .75, .00, .8), "ɛ": (.55, .75, .00, 1.0), "æ": (.80, .85, .00, 1.0),
    "ɑː": (1.0, .55, .00, 1.0), "ɒ": (.80, .35, .40, 1.0), "ɔː": (.70, .20, .70, 1.0), "ʊ": (.35, .25, .65, .9),
    "uː": (.25, .08, 1.0, 1.1), "ʌ": (.65, .55, .00, .9), "ə": (.40, .50, .05, .6), "ɜː": (.45, .35, .35, .9),
    "eɪ": (.48, .85, .00, 1.0), "aɪ": (.80, .70, .00, 1.0), "ɔɪ": (.60, .35, .50, 1.0), "aʊ": (.85, .40, .35, 1.0),
    "oʊ": (.52, .18, .80, 1.0), "sil": (*NEUTRAL, 1.0),
}
TARGET = {p: np.array(v[:3]) for ps, v in VISEMES.items() for p in ps.split()}
WEIGHT = {p: v[3] for ps, v in VISEMES.items() for p in ps.split()}
GLIDES = {"eɪ": "ɪ", "aɪ": "ɪ", "ɔɪ": "ɪ", "aʊ": "ʊ", "oʊ": "ʊ"}          # diphthongs end here
LEAD_S, LAG_S = 0.075, 0.095                   # a mouth prepares a sound for less long than it keeps its trace
PAUSE_S, LISTEN_S = 0.12, 0.35                 # shorter silences do not close the mouth; longer ones are listening
BLINK_S, LIDS = 0.10, (.6, 1.0, .8, .3)        # a blink comes so long after a pause begins; lids fall faster than they rise


@dataclass
class Track:
    """What moves, frame by frame: float32, and bool for speaking.

    mouth (T, 3) opening, width, rounding in [0, 1]; blink (T,) 1 = shut; gaze (T, 2) right and down in [-1, 1];
    pose (T, 3) x, y in 64ths of the picture's side and roll in radians; brow (T,) 0 .. 1 = raised; speaking (T,).
    """
    mouth: np.ndarray
    blink: np.ndarray
    gaze: np.ndarray
    pose: np.ndarray
    brow: np.ndarray
    speaking: np.ndarray

    def __len__(self):
        return len(self.mouth)

    def __getitem__(self, frames):
        """The same for a slice or an index array of frames."""
        return Track(**{f.name: getattr(self, f.name)[frames] for f in fields(self)})


# ---- the mouth's truth -------------------------------------------------------------------------

def mouth_track(phones, T, fps):
    """phones ([Phone], seconds) -> float32 (T, 3): opening, width, rounding in [0, 1] at times f / fps.

    Silence of PAUSE_S or more comes to rest at NEUTRAL; p, b and m reach opening 0 in the frame nearest to their middle.
    After Cohen & Massaro (1993), Modeling coarticulation in synthetic visual speech.
    """
    t = np.arange(T) / fps
    sounds = _sounds(phones)
    start, end = (np.array([[getattr(s, k)] for s in sounds]) for k in ("start", "end"))           # (P, 1)
    target = np.stack([TARGET[s.symbol] for s in sounds])                                          # (P, 3)
    strength = np.array([[WEIGHT[s.symbol]] for s in sounds])
    strength[[s.symbol == "sil" and s.end - s.start < PAUSE_S for s in sounds]] *= .3
    lead, lag = np.minimum(LEAD_S, .04 + (end - start) / 2), np.minimum(LAG_S, .05 + (end - start) / 2)
    rise, fall = smooth(t, start - lead, start + lead / 2), 1 - smooth(t, end - lag / 2, end + lag)
    weight = strength * rise * fall + 1e-9                                                         # (P, T)
    mouth = weight.T @ target / weight.sum(0)[:, None]                                             # (T, 3)
    for s in sounds:
        if s.symbol in ("p", "b", "m"):
            mouth[:, 0] *= 1 - _plateau(t, s.start, s.end, .5 / fps, .05)
        elif s.symbol == "sil" and s.end - s.start >= PAUSE_S:
            rest = _plateau(t, s.start + .05, s.end - .06, .01, .06)[:, None]
            mouth += rest * (np.array(NEUTRAL) - mouth)
    return np.clip(mouth, 0, 1).astype(np.float32)


def _sounds(phones):
    """Phones with diphthongs split in two (2/3 + 1/3), neighbouring silences joined, and silence for ever before and after."""
    first, last = (phones[0].start, phones[-1].end) if len(phones) else (0.0, 0.0)
    out = [Phone("sil", first - 60, first)]
    for p in [*phones, Phone("sil", last, last + 3600)]:
        if p.symbol in GLIDES:
            cut = p.end - (p.end - p.start) / 3
            out += [Phone(p.symbol, p.start, cut), Phone(GLIDES[p.symbol], cut, p.end)]
        elif p.symbol == out[-1].symbol == "sil":
            out[-1] = Phone("sil", out[-1].start, p.end)
        elif p.end > p.start:
            out.append(p)
    return out


def _plateau(t, start, end, least, skirt):
    """1 from start to end, and at least `least` seconds either side of the middle; smooth to 0 over `skirt` seconds."""
    half = max((end - start) / 2 - .015, least) + 1e-6
    return 1 - smooth(np.abs(t - (start + end) / 2), half, half + skirt)


# ---- life --------------------------------------------------------------------------------------

def make_track(rng, phones, T, fps, start_s=0.0):
    """A Track of T frames from `start_s` seconds into `phones`: in speech mouth, brows and head move; in silence it listens.

    rng: numpy Generator; phones: [Phone] in seconds; before the first and after the last there is silence.
    """
    phones = [Phone(p.symbol, p.start - start_s, p.end - start_s) for p in phones]
    t = np.arange(T) / fps
    mouth, speaking = mouth_track(phones, T, fps), _speaking(phones, t)
    listening = ~speaking
    pose = _sway(rng, t)
    nods = _bumps(rng, t, 1.4, .30) * _soft(listening, 3)
    beats, brow = _accents(rng, phones, t)
    pose[:, 1] += 1.0 * nods + .4 * beats
    pose[:, 2] += .01 * beats * rng.choice((-1, 1))
    gaze = _gaze(rng, t, listening)
    brow = np.clip(brow + .5 * _bumps(rng, t, 3.5, .5) * listening, 0, 1)
    return Track(mouth, _blinks(rng, phones, T, fps), gaze, pose.astype(np.float32), brow.astype(np.float32), speaking)


def _speaking(phones, t):
    """bool (T,): inside speech; pauses shorter than LISTEN_S belong to it."""
    quiet = [(p.start, p.end) for p in phones if p.symbol == "sil" and p.end - p.start >= LISTEN_S]
    spoken = [p for p in phones if p.symbol != "sil"]
    if not spoken:
        return np.zeros(len(t), bool)
    inside = (t >= spoken[0].start) & (t < spoken[-1].end)
    for a, b in quiet:
        inside &= ~((t >= a) & (t < b))
    return inside


def _sway(rng, t):
    """Slow drift of the head, (T, 3): at most 0.7 units sideways, 0.45 up and down, 1.4 degrees."""
    f, phase = rng.uniform(.08, .45, (3, 3, 1)), rng.uniform(0, 2 * np.pi, (3, 3, 1))
    waves = np.sin(2 * np.pi * f * t + phase)                             # (channel, wave, T)
    return (waves * np.array([[[.5], [.3], [.2]]])).sum(1).T * np.array([.7, .45, .025])


def _bumps(rng, t, every_s, width_s):
    """Smooth bumps of height 1 at random times, (T,)."""
    out, at = np.zeros(len(t)), rng.exponential(every_s)
    while len(t) and at < t[-1]:
        out = np.maximum(out, 1 - smooth(np.abs(t - at), 0, width_s))
        at += 2 * width_s + rng.exponential(every_s)
    return out


def _soft(flag, frames):
    """bool (T,) -> float (T,), edges spread over some frames."""
    kernel = np.ones(2 * frames + 1) / (2 * frames + 1)
    return np.convolve(np.pad(flag.astype(float), frames, mode="edge"), kernel, "valid")


def _accents(rng, phones, t):
    """Head beats and raised brows on some of the long vowels: (T,), (T,)."""
    beats, brow = np.zeros(len(t)), np.zeros(len(t))
    for p in phones:
        if p.symbol != "sil" and TARGET[p.symbol][0] >= .4 and p.end - p.start > .09 and rng.random() < .5:
            bump = 1 - smooth(np.abs(t - (p.start + p.end) / 2), 0, .22)
            beats = np.maximum(beats, bump)
            brow = np.maximum(brow, bump * (rng.random() < .4))
    return beats, brow


def _gaze(rng, t, listening):
    """Looks held for a while, at the viewer mostly, wandering more while listening; jumps last one frame. float32 (T, 2)."""
    out, f = np.zeros((len(t), 2)), 0
    while f < len(t):
        hold = int(rng.integers(8, 36))
        away = rng.random() < (.55 if listening[f] else .25)
        out[f:f + hold] = rng.uniform(-1, 1, 2) * (.9, .4) if away else rng.uniform(-.12, .12, 2)
        f += hold
    out[1:] = .75 * out[1:] + .25 * out[:-1]
    return out.astype(np.float32)


def _blinks(rng, phones, T, fps):
    """How far the eyes are shut, float32 (T,): most longer pauses begin with a blink, and every six seconds or so there is another; none at frame 0.

    People blink at the ends of what they say: Nakano & Kitazawa (2010), Eyeblink entrainment at breakpoints of speech.
    """
    times = [s.start + BLINK_S for s in _sounds(phones) if s.symbol == "sil" and s.end - s.start >= LISTEN_S and rng.random() < .85]
    at = rng.exponential(3)
    while at < T / fps:
        times.append(at)
        at += .8 + rng.exponential(5)
    out = np.zeros(T + len(LIDS), np.float32)
    for f in (round(at * fps) for at in times):
        if 0 < f < T:
            out[f:f + len(LIDS)] = np.maximum(out[f:f + len(LIDS)], LIDS)
    return out[:T]


