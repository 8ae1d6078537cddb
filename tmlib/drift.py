"""A long stream, measured while it flows by: lips, colour, sharpness, identity, and how much frames differ. A few numbers a chunk are kept.

`talk` makes what it is to say, with exact truth all along, and `again` repeats it; `watch` streams it; `series`, `near` and `trend` say what has become of the picture.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from . import avatar, data, metrics
from .config import FPS, FRAME, RATE, STRIDE
from .speech import Phone

OPEN, SPEAKS = 0.15, 0.3                         # a mouth is open above the one; above the other the truth is sure to be
PATIENCE = 36                                    # frames that a change may take at most: three chunks
AHEAD = 2                                        # by which a mouth opens before its sound begins, rounded up (`avatar.LEAD_S`)


@dataclass
class Talk:
    """wave float32 (n,) at 16 kHz; the mouth's opening in every frame, truth (frames,); turns: [(begins, in seconds; whether somebody speaks)]."""
    wave: np.ndarray
    truth: np.ndarray
    turns: list[tuple[float, bool]]


def talk(rng, words, frames: int, speak_s, listen_s) -> Talk:
    """Turns of speech and of listening in alternation, for so many frames; words: `data.word_list` of a split; their lengths are drawn between two seconds."""
    waves, phones, turns, t = [], [], [], 0.0
    while t < frames / FPS:
        speaks = len(turns) % 2 == 0
        seconds = float(rng.uniform(*(speak_s if speaks else listen_s)))
        n = int(seconds * RATE)
        wave, said = data.talk(rng, words, seconds)[:2] if speaks else (np.zeros(n, np.float32), [Phone("sil", 0.0, seconds)])
        turns.append((t, speaks))
        waves.append(wave[:n])
        phones += [Phone(x.symbol, x.start + t, min(x.end, n / RATE) + t) for x in said if x.start < n / RATE]
        t += n / RATE
    return Talk(np.concatenate(waves)[:frames * RATE // FPS], avatar.mouth_track(phones, frames, FPS)[:, 0], turns)


def again(passage: Talk, frames: int) -> Talk:
    """The same words again and again, for so many frames: what changes from one time to the next is the stream, not what it says."""
    n = len(passage.truth)
    turns = [(begins + k * n / FPS, speaks) for k in range(-(-frames // n)) for begins, speaks in passage.turns]
    return Talk(np.resize(passage.wave, frames * RATE // FPS), np.resize(passage.truth, frames), [turn for turn in turns if turn[0] < frames / FPS])


@dataclass
class Watched:
    """What a stream showed. Per frame: opening, as the lip reader sees it. Per chunk: Lab colour, sharpness, face features, mean picture change
    inside it, and across its beginning. kept: {chunk: its last picture}."""
    opening: list[float] = field(default_factory=list)
    colour: list[np.ndarray] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    face: list[np.ndarray] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    border: list[float] = field(default_factory=list)
    kept: dict[int, np.ndarray] = field(default_factory=dict)

    def border_ratio(self) -> float:
        """Picture change across chunk borders over that inside chunks, as `metrics.border_ratio`."""
        return float(np.mean(self.border) / np.mean(self.inside))


def watch(streamer, talk: Talk, clips, index: int, told, lips, face, keep=(), step: Callable = lambda: None) -> Watched:
    """The first picture of clip `index` of `clips` says `talk`, told to listen in chunks of silence, as in a call. told: prompts and image tokens (`conditions`); lips, face: `readers`; keep: chunks, from 1."""
    picture, dim = clips.frames[index][0], streamer.dit.config.text_dim
    speaking, listening = (told.prompt(clips.meta[index]["style"], mode, dim)[None] for mode in ("speaking", "listening"))
    region = torch.from_numpy(data.box_map(clips.face[index][:1], picture.shape[0], picture.shape[0] // 16))
    latent = STRIDE * FRAME                      # samples
    waves = (talk.wave[i:i + latent] for i in range(0, len(talk.wave), latent))
    seen, last = Watched(), None
    for k, out in enumerate(streamer.stream(picture, waves, text=speaking, listening=listening, image_tokens=told.tokens(first(picture)), audio_mask=region), 1):
        video = data.to_float(out[None])
        seen.opening += lips.read(video)[0, :, 0].tolist()
        seen.colour.append(metrics.lab(out).mean(0))
        seen.sharpness.append(metrics.sharpness(out).mean())
        seen.face.append(face.features(video[0].movedim(1, 0)).mean(0).numpy())
        seen.inside.append(np.abs(np.diff(out.astype(np.int16), axis=0)).mean())
        if last is not None:
            seen.border.append(np.abs(out[0].astype(np.int16) - last).mean())
        last = out[-1]
        if k in keep:
            seen.kept[k] = last
        step()
    return seen


def first(picture: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float (1, 3, H, W)."""
    return data.to_float(picture[None])[None, :, 0]


def series(seen: Watched, picture: np.ndarray, face) -> dict[str, np.ndarray]:
    """Distance to the picture chunk by chunk, (chunks,) each: in colour (Lab) and in face features; and sharpness as a share of its own."""
    colour, sharpness, who = metrics.lab(picture[None])[0], metrics.sharpness(picture[None])[0], face.features(first(picture))[0].numpy()
    return {"drift_color": np.linalg.norm(np.array(seen.colour) - colour, axis=1), "drift_sharpness": np.array(seen.sharpness) / sharpness,
            "drift_identity": metrics.cosine_distance(np.array(seen.face), who)}


def toggles(opening: np.ndarray, truth: np.ndarray, turns: list[tuple[float, bool]]) -> dict[str, float]:
    """Frames until the mouth follows a change, in the mean over turns; opening, truth (n,). See also what the truth itself has: toggles(truth, truth, turns).

    toggle_close_frames: from the end of speech until the mouth is shut for the rest of the pause, but for its last AHEAD frames; a mouth that moves by itself never is.
    toggle_open_frames: from the first open truth until the mouth opens, where it was shut when the turn began. toggle_latency_frames: the slower of the two.
    toggle_slowest_frames: the slowest turn of all.
    """
    begins = [int(begin * FPS) for begin, _ in turns if int(begin * FPS) < len(opening)]
    closing, opens = [], []
    for begin, end, (_, speaks) in zip(begins, [*begins[1:], len(opening)], turns):
        read, sure = opening[begin:end] > OPEN, np.flatnonzero(truth[begin:end] > SPEAKS)
        if not speaks:
            closing.append(float(np.flatnonzero(read[:-AHEAD] if end < len(opening) else read).max(initial=-1)) + 1)
        elif len(sure) and not read[0]:
            opens.append(float(np.flatnonzero(read[sure[0]:]).min(initial=PATIENCE)))
    numbers = {"toggle_close_frames": float(np.mean(closing or [PATIENCE])), "toggle_open_frames": float(np.mean(opens or [PATIENCE]))}
    return numbers | {"toggle_latency_frames": max(numbers.values()), "toggle_slowest_frames": max([*closing, *opens, 0.0])}


def trend(name: str, parts) -> dict[str, float]:
    """How much a number changes over a stream, given its value in equal parts, one after another, (n,), or those of several streams, (streams, n):
    {name, name_lo, name_hi}.

    It is what a straight line through the streams' mean gains from the first part to the last, by least squares, with its interval. Streams may share
    their words and their noise, so together they count as one.
    """
    y = np.atleast_2d(np.array(parts, float)).mean(0)                         # (n,)
    x, y = np.linspace(-0.5, 0.5, len(y)), y - y.mean()
    wide, free = max((x * x).sum(), 1e-12), len(y) - 2
    gain = float((x * y).sum() / wide)
    half = metrics.student_t(free) * float(np.sqrt(((y - gain * x) ** 2).sum() / free / wide)) if free > 0 else 0.0
    return metrics.named(name, (gain, gain - half, gain + half))


def near(values: np.ndarray, k: int) -> float:
    """Mean of up to ten chunks around chunk k."""
    return float(values[max(0, k - 5):k + 5].mean())
