"""Generated faces, looked at more closely than a table of quality does: do lips close where they must, do eyes blink when the true ones do, are no two takes alike, and
what could be heard at all."""
from collections.abc import Iterable
from itertools import combinations

import numpy as np

from . import metrics
from .drift import OPEN, SPEAKS

LIPS = "pbm"                                     # sounds for which lips must meet
SHUT = OPEN / 3                                  # and have met, where the opening is below it
NEAR, REACH = 1, 4                               # frames by which a closure may be early or late; in which a mouth must be open for it to close


def closures(opening: np.ndarray, clips, rows: Iterable[int]) -> dict:
    """How many of the closures for p, b and m are there: {closures, _lo, _hi, closures_by_chance, closures_nearly, closures_n}; opening (n, T) of clips[rows], as the lip reader sees it.

    A closure counts where the true mouth is below SHUT in the middle of the sound, and open shortly before or after. It is there if the mouth too is below SHUT within
    a frame of it, and above SPEAKS shortly before or after; nearly: if it is below OPEN; by chance: if another clip's mouth is below SHUT, at the same frame. Intervals are over voices. Real clips have no phones: None, with the reason.
    """
    made, nearly, chance, voices = [], [], [], []
    for k, i in enumerate(rows):
        truth, fps = clips.truth[i, :, 0], clips.meta[i]["fps"]
        for phone in (x for x in clips.phones(i) if x.symbol in LIPS):
            at = round((phone.start + phone.end) / 2 * fps)
            if not REACH <= at < len(truth) - REACH or truth[at - NEAR:at + NEAR + 1].min() > SHUT or truth[at - REACH:at + REACH + 1].max() < SPEAKS:
                continue
            least, opens = opening[:, at - NEAR:at + NEAR + 1].min(1), opening[:, at - REACH:at + REACH + 1].max(1) > SPEAKS           # (n,) each
            there = (least < SHUT) & opens
            made.append(there[k])
            nearly.append(least[k] < OPEN and opens[k])
            chance.append(np.delete(there, k).mean())
            voices.append(clips.meta[i]["voice"])
    if not made:
        return {"closures": None, "closures_reason": "no p, b or m is known in these clips"}
    return metrics.interval("closures", np.array(made), voices) | {"closures_by_chance": float(np.mean(chance)), "closures_nearly": float(np.mean(nearly)), "closures_n": len(made)}


def blinks(change: np.ndarray, truth: np.ndarray, late: int = 3) -> dict[str, float]:
    """Quick moves of the eyes in made clips and in true ones, both `metrics.eye_change` (n, T - 1): how many of the made ones come within `late` frames of a true one
    (precision), how many of the true ones are met (recall), and both by chance, against the next clips' eyes."""
    def met(some: list, others: list) -> float:
        each = [np.abs(others[i] - at).min() <= late if len(others[i]) else False for i, of_clip in enumerate(some) for at in of_clip]
        return float(np.mean(each)) if each else 0.0
    made, true = metrics.quick_moves(change), metrics.quick_moves(truth)
    turned = [true[k:] + true[:k] for k in range(1, min(len(true), 17))]
    return {"eyes_precision": met(made, true), "eyes_recall": met(true, made), "eyes_precision_by_chance": float(np.mean([met(made, other) for other in turned])),
            "eyes_r_by_chance": float(np.mean([metrics.pearson(c, t) for k in range(1, len(turned) + 1) for c, t in zip(change, np.roll(truth, -k, 0))]))}


def spread(takes: np.ndarray) -> float:
    """Mean difference in grey levels between any two takes of the same clip: uint8 (takes, n, T, H, W, 3)."""
    return float(np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in combinations(takes, 2)]))


def by_chunk(values: np.ndarray, chunk: int) -> list[float]:
    """Means over clips and frames, chunk by chunk, of numbers (n, T) of every frame: the first chunk has 4 chunk - 3 frames, the others 4 chunk."""
    ends = np.arange(4 * chunk - 3, values.shape[1], 4 * chunk)
    return [float(part.mean()) for part in np.split(values, ends, axis=1)]


def linear_ear(audio: np.ndarray, truth: np.ndarray, heard: np.ndarray, penalty: float = 1e-2) -> np.ndarray:
    """What a straight line makes of the sound: mouth openings (m, T - 1), of all frames but the first, from `heard`'s tokens, by ridge regression from tokens
    (n, F, tokens, D) to openings (n, T) of other clips. It says how much of the lips can be had from the speech encoder without any face."""
    flat = lambda x: np.concatenate([x[:, 1:].reshape(len(x), x.shape[1] - 1, -1), np.ones((len(x), x.shape[1] - 1, 1))], -1).astype(np.float64)
    x, y = flat(audio), truth[:, 1:].reshape(len(truth), -1, 4)                                # latent frame k shows four frames
    X, Y = x.reshape(-1, x.shape[-1]), y.reshape(-1, 4)
    scale = X.std(0) + 1e-6
    scale[-1] = 1
    gram = (X / scale).T @ (X / scale) / len(X)
    weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), (X / scale).T @ Y / len(X)) / scale[:, None]
    return (flat(heard) @ weights).reshape(len(heard), -1)
