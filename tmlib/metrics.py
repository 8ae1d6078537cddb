"""What is measured, as plain functions of arrays: lips, silence, borders, drift, fidelity, latency.

Every number is per clip first, then averaged (pooling flatters). Intervals are of 95 %, over what a number is about: of lips the voices that were never heard, of
pictures the faces that were never seen, each with all of its clips, which resemble one another. They are few, so the intervals are Student's t, not a bootstrap's,
which of eight voices would hold the truth in 88 of 100 cases; a Fréchet distance has a jackknife over faces.
"""
import math
from functools import lru_cache

import numpy as np


# ----------------------------------------------------------------------------------------------------------- lips
def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two traces (T,); 0 when either stands still."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 1e-9 else 0.0


def lip_r(read: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Per-clip correlation of mouth openings: read and truth (n, T) -> (n,)."""
    return np.array([pearson(r, t) for r, t in zip(read, truth)])


def lip_offset(read: np.ndarray, truth: np.ndarray, reach: int = 5) -> int:
    """Shift in frames at which the clips' mean correlation peaks; positive: the picture is late."""
    T = truth.shape[1]
    mean = lambda s: np.mean([pearson(r[max(s, 0):T + min(s, 0)], t[max(-s, 0):T - max(s, 0)]) for r, t in zip(read, truth)])
    shifts = range(-reach, reach + 1)
    return int(max(shifts, key=mean))


@lru_cache
def student_t(df: int) -> float:
    """The 97.5 % point of Student's t: what 1.96 is with so few degrees of freedom. From its density, summed."""
    x = np.linspace(0, 13, 130_001)                                                       # one degree of freedom: 12.7
    density = np.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi) * (1 + x * x / df) ** (-(df + 1) / 2)
    below = 0.5 + np.concatenate([[0], np.cumsum(density[1:] + density[:-1]) / 2 * (x[1] - x[0])])
    return float(np.interp(0.975, below, x))


def average(values: np.ndarray, groups=None) -> tuple[float, float, float]:
    """Mean of per-clip values (n,) and its 95 % interval (mean, lo, hi); groups: see `ratio`. Of truths and falsehoods, a share: it stays within 0 and 1."""
    found = ratio(np.asarray(values, float), np.ones(len(values)), groups)
    return tuple(min(max(x, 0.0), 1.0) for x in found) if np.asarray(values).dtype == bool else found


def ratio(top: np.ndarray, bottom: np.ndarray, groups=None) -> tuple[float, float, float]:
    """Ratio of means over the same clips (n,), with its 95 % interval by Student's t. groups (n,): whoever clips have in common, each of whom
    counts once, with all that is wrong in all his clips (a cluster-robust variance, of the linearised ratio). Of a single group: over its clips."""
    r = top.sum() / bottom.sum()
    which = np.unique(groups, return_inverse=True)[1] if groups is not None and len(set(groups)) > 1 else np.arange(len(top))
    wrong, count = np.bincount(which, top - r * bottom), which.max() + 1
    half = student_t(count - 1) * math.sqrt(count / (count - 1) * (wrong ** 2).sum()) / abs(bottom.sum()) if count > 1 else 0.0
    return float(r), float(r - half), float(r + half)


def interval(name: str, values: np.ndarray, groups=None) -> dict[str, float]:
    """{name, name_lo, name_hi} of per-clip values."""
    return named(name, average(values, groups))


def named(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    """(value, lo, hi) as {name, name_lo, name_hi}."""
    return dict(zip((name, f"{name}_lo", f"{name}_hi"), found))


def left_out(statistic, groups) -> np.ndarray:
    """`statistic` (of indices of clips) without each group in turn: (groups,), in the order of their names."""
    groups = np.asarray(groups)
    return np.array([statistic(np.flatnonzero(groups != g)) for g in np.unique(groups) if not (groups == g).all()])


def jackknife(name: str, whole: float, left: np.ndarray) -> dict[str, float]:
    """{name, name_lo, name_hi}: a number and its 95 % interval, from what it is without each group (`left_out`). For what has no `ratio`, as a
    Fréchet distance, which is no mean over clips."""
    half = student_t(len(left) - 1) * np.sqrt((len(left) - 1) * np.mean((left - np.mean(left)) ** 2)) if len(left) > 1 else 0.0
    return named(name, (float(whole), float(whole - half), float(whole + half)))


# --------------------------------------------------------------------------------------------------------- motion
def frame_difference(video: np.ndarray) -> np.ndarray:
    """Mean absolute change from frame to frame: uint8 (n, T, H, W, 3) -> (n, T - 1)."""
    return np.stack([np.abs(np.diff(v.astype(np.int16), axis=0)).mean((1, 2, 3)) for v in video])


def displacement(video: np.ndarray, face: np.ndarray, apart: int = 16) -> np.ndarray:
    """How far the head has moved between frames t and t + apart, t >= 1: (n, T - 1 - apart, 2), x and y, in 64ths of the picture's height.

    video: uint8 (n, T, H, W, 3); face: boxes (n, T, 4) in pixels. The shift that explains the change best, by least squares over the upper part of the face's mean box (Lucas and Kanade 1981),
    so lips do not count, and a codec's flicker, noise and blotches hardly: they have no direction. A change from frame to frame sees little else.
    """
    out = []
    for clip, boxes in zip(video, face):
        each = max(1, clip.shape[1] // 64)
        x0, y0, x1, y1 = (boxes.mean(0) / each).round().astype(int)
        grey = blurred(shrunk(clip.astype(np.float32) @ np.float32([0.299, 0.587, 0.114]), each))[1:, max(y0, 2):y0 + round(0.6 * (y1 - y0)), max(x0, 2):x1 - 1]
        a, b = grey[:-apart], grey[apart:]
        slope = np.stack(np.gradient((a + b) / 2, axis=(2, 1)), -1).reshape(len(a), -1, 2)                  # (t, pixels, 2)
        change = (b - a).reshape(len(a), -1)
        out.append(np.linalg.solve(np.einsum("tpi,tpj->tij", slope, slope) + 1e-3 * np.eye(2), -np.einsum("tpi,tp->ti", slope, change)[..., None])[..., 0])
    return np.stack(out)


def shrunk(grey: np.ndarray, each: int) -> np.ndarray:
    """Means of each x each pixels: (T, H, W) -> (T, H / each, W / each)."""
    T, H, W = grey.shape
    return grey[:, :H // each * each, :W // each * each].reshape(T, H // each, each, W // each, each).mean((2, 4))


def blurred(grey: np.ndarray) -> np.ndarray:
    """A blur of five pixels, (T, H, W), around at the edges: slopes of single pixels are no slopes."""
    for axis in (1, 2, 1, 2):
        grey = (np.roll(grey, 1, axis) + 2 * grey + np.roll(grey, -1, axis)) / 4
    return grey


def movement(video: np.ndarray, face: np.ndarray) -> np.ndarray:
    """How far the head moves in a second, on average, (n,); see `displacement`."""
    return np.linalg.norm(displacement(video, face), axis=-1).mean(1)


def eye_change(video: np.ndarray, eyes: np.ndarray, face: np.ndarray) -> np.ndarray:
    """How much more the boxes of eyes (n, T, 4), in pixels, change from frame to frame than the face's median pixel, in grey levels: (n, T - 1)."""
    out = []
    for clip, *boxes in zip(video, *(boxes.mean(1).round().astype(int) for boxes in (eyes, face))):
        change = np.abs(np.diff(clip.astype(np.int16), axis=0)).mean(-1)                              # (T - 1, H, W)
        band, whole = (change[:, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes)
        out.append(band.mean((1, 2)) - np.median(whole, (1, 2)))
    return np.stack(out)


def quick_moves(change: np.ndarray, fps: int = 16, jump: float = 8.0) -> list[np.ndarray]:
    """The frames in which blinks and quick glances begin, of each clip of `eye_change` (n, T - 1): it goes above `jump`, a blink's opening being part of its closing.
    Sway stays below that, blinks of the drawn faces do not."""
    above = [np.flatnonzero(c > jump) for c in change]
    return [at[np.diff(at, prepend=-fps) > fps // 4] for at in above]


def eye_moves(change: np.ndarray, fps: int = 16) -> np.ndarray:
    """Blinks and quick glances a second, (n,)."""
    return np.array([len(at) for at in quick_moves(change, fps)]) * fps / (change.shape[1] + 1)


def borders(frames: int, chunk: int) -> np.ndarray:
    """Indices d such that frames d and d + 1 belong to different chunks (chunk 0: 1 + 4 (chunk - 1) frames)."""
    return np.arange(4 * (chunk - 1), frames - 1, 4 * chunk)


def border_ratio(video: np.ndarray, chunk: int) -> np.ndarray:
    """Per clip: mean frame difference across chunk borders over that inside chunks; (n,)."""
    d = frame_difference(video)
    at = np.zeros(d.shape[1], bool)
    at[borders(video.shape[1], chunk)] = True
    return d[:, at].mean(1) / np.maximum(d[:, ~at].mean(1), 1e-6)


def seam_ratio(video: np.ndarray, chunk: int) -> np.ndarray:
    """Per clip: mean frame difference across chunk borders over that across the other latent frames' borders; (n,).

    A codec draws four frames from a latent, and may jump at each next one; what chunks add to that shows here, and nothing else.
    """
    d = frame_difference(video)
    seams = borders(video.shape[1], chunk)
    others = np.setdiff1d(np.arange(0, d.shape[1], 4), seams) if chunk > 1 else seams     # with chunks of one there are no others: 1
    return d[:, seams].mean(1) / np.maximum(d[:, others].mean(1), 1e-6)


# ------------------------------------------------------------------------------------------------------- fidelity
def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """dB per clip, of uint8 videos (n, T, H, W, 3)."""
    mse = np.array([((x.astype(np.float32) - y) ** 2).mean() for x, y in zip(a, b)])
    return 10 * np.log10(255.0 ** 2 / np.maximum(mse, 1e-6))


def ssim(a: np.ndarray, b: np.ndarray, window: int = 8) -> float:
    """Structural similarity (Wang et al. 2004) on grey block windows of uint8 frames (N, H, W, 3)."""
    grey = lambda x: (x.astype(np.float32) @ np.float32([0.299, 0.587, 0.114]))
    def blocks(x):
        N, H, W = x.shape
        return x[:, :H // window * window, :W // window * window].reshape(N, H // window, window, W // window, window).transpose(0, 1, 3, 2, 4).reshape(N, -1, window ** 2)
    x, y = blocks(grey(a)), blocks(grey(b))
    mx, my = x.mean(-1), y.mean(-1)
    cov = (x * y).mean(-1) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    s = (2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (x.var(-1) + y.var(-1) + c2))
    return float(s.mean())


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two Gaussians fitted to features (n, d) and (m, d) of our own face encoder (not FID)."""
    mean = a.mean(0) - b.mean(0)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    w, u = np.linalg.eigh(ca)
    root = (u * np.sqrt(np.maximum(w, 0))) @ u.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cb @ root), 0)).sum()
    return float(mean @ mean + np.trace(ca) + np.trace(cb) - 2 * cross)


# ---------------------------------------------------------------------------------------------------------- drift
def lab(frames: np.ndarray) -> np.ndarray:
    """Mean CIE Lab colour of uint8 frames (N, H, W, 3): (N, 3); of large ones, of as many pixels as a small one has."""
    each = max(1, frames.shape[1] // 64)
    x = frames[:, ::each, ::each].reshape(len(frames), -1, 3).astype(np.float64) / 255
    x = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = x @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1).mean(1)


def sharpness(frames: np.ndarray) -> np.ndarray:
    """Mean absolute Laplacian of grey frames uint8 (N, H, W, 3): (N,)."""
    g = frames.astype(np.float32).mean(-1)
    return np.abs(4 * g[:, 1:-1, 1:-1] - g[:, :-2, 1:-1] - g[:, 2:, 1:-1] - g[:, 1:-1, :-2] - g[:, 1:-1, 2:]).mean((1, 2))


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - cos of features (..., d), of shapes that broadcast: (...)."""
    return 1 - (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-9)


# -------------------------------------------------------------------------------------------------------- latency
def latency(seconds: list[float], name: str) -> dict[str, float]:
    """Milliseconds at the 50th and 95th percentile of timed runs, warm-up already excluded."""
    p50, p95 = np.percentile(np.asarray(seconds) * 1e3, [50, 95])
    return {f"{name}_ms_p50": float(p50), f"{name}_ms_p95": float(p95)}


def paired(name: str, top: np.ndarray, bottom: np.ndarray, n: int = 2000, seed: int = 0) -> dict[str, float]:
    """{name, name_lo, name_hi}: median of top / bottom, each pair (n,) timed in one turn, and its 95 % bootstrap interval."""
    ratio = np.asarray(top, float) / np.asarray(bottom, float)
    draws = np.random.default_rng(seed).integers(len(ratio), size=(n, len(ratio)))
    lo, hi = np.percentile(np.median(ratio[draws], 1), [2.5, 97.5])
    return named(name, (float(np.median(ratio)), float(lo), float(hi)))
