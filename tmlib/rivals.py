"""Two systems' videos of the same clips, for `study` to compare: this workbook's student and a baseline, or anybody's from two folders.

Special here:
- both systems get the same sound, and none may gain by it: from folders only the same speech at the same time is accepted;
- real videos are large, so they are read one pair at a time, when it is written.
"""
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from . import config, media
from .config import Progress, UserError

HEIGHT = 512                                    # pixels: videos from folders are shown at most so high
LONGEST_S, FPS = 12.0, 25                       # and last at most so long, at so many frames a second
LAG_S, ALIKE = 0.03, 0.6                        # two sounds are the same speech: at most so far apart, loudness at least so correlated


@dataclass(frozen=True)
class Item:
    """A clip. films: () -> frames uint8 (T, H, W, 3), of one system or of both; called late, for real ones are large."""
    name: str
    wave: np.ndarray                            # float32 (n,) at 16 kHz
    films: Callable


# ------------------------------------------------------------------------------------------------- this workbook's
def rendered(pairs: int, checks: int, against: str) -> tuple[list[Item], list[Item], int, str]:
    """Held-out speaking clips, as the student streams them and as the baseline makes them: (items, spare real clips, frames per second, scale)."""
    import torch

    from . import sampling
    from .data import Clips, to_uint8
    from .dit import WanDiT
    from .latents import Latents
    from .wan_vae import load_codec
    p, q, clips = config.load("distillation"), config.load("teacher"), Clips(config.DATA / "clips", "test")
    config.seed_everything(p.seed, p.threads)
    latents, rows = Latents(config.DATA / "latents" / "test.safetensors"), in_turns(clips)
    if len(rows) < pairs + checks:
        raise UserError(f"--clips {pairs}: with {checks} checks more than the {len(rows)} speaking clips of data/clips/test; give fewer")
    codec, how = load_codec(config.MODELS, p.device), SimpleNamespace(**config.load_json(config.MODELS / "student" / "stream.json"))
    load = lambda name: WanDiT.from_pretrained(config.MODELS / name, device=p.device).eval().requires_grad_(False)
    student, teacher = load("student"), load("teacher")
    makers = {"ours": lambda *given: sampling.student(student, *given, how), "undistilled": lambda *given: sampling.student(teacher, *given, how),
              "teacher": lambda *given: sampling.teacher(teacher, *given, q.sample_steps, q.sample_shift, q.guidance)}
    progress, films = Progress(2 * pairs, "render"), {}
    for who in ("ours", against):
        for i in rows[:pairs]:                                  # as deployed: the face is where the first picture has it
            with torch.no_grad():
                films[who, i] = to_uint8(codec.decode(makers[who](latents.batch([i]).deployed(), [i]))[0])[0]
            progress.step()
    items = [Item(f"test {i}", clips.wave(i), lambda i=i: (films["ours", i], films[against, i])) for i in rows[:pairs]]
    spare = [Item(f"test {i}", clips.wave(i), lambda i=i: np.asarray(clips.frames[i])) for i in rows[pairs:]]
    return items, spare, clips.meta[rows[0]]["fps"], p.scale


def in_turns(clips) -> list[int]:
    """Indices of the speaking clips, styles in turn."""
    seen, rank = Counter(), {}
    for i in clips.where(kind="speaking").tolist():
        rank[i] = seen[style := clips.meta[i]["style"]]
        seen[style] += 1
    return sorted(rank, key=lambda i: (rank[i], i))


# ---------------------------------------------------------------------------------------------- videos from folders
def from_folders(ours, theirs, real=None) -> tuple[list[Item], list[Item], int]:
    """Two folders of equally named .mp4, anybody's: (items, spare, frames per second). All get 25 frames a second and one height.

    real: a folder of true recordings for the checks; else they are taken from both in turn. The sound of a pair is that of `ours`.
    Raises UserError for names in one folder alone, and for pairs of different length, speech or timing.
    """
    ours, theirs = Path(ours), Path(theirs)
    mine, others = listing(ours), listing(theirs)
    for here, there, names in ((ours, theirs, mine - others), (theirs, ours, others - mine)):
        if names:
            raise UserError(f"{here / min(names)}: not in {there} ({len(names)} such names); both folders must hold the same names")
    items, spare = [], []
    for n, name in enumerate(sorted(mine)):
        a, b = sound(ours / name), sound(theirs / name)
        same_speech(theirs / name, a, b, ours / name)
        items.append(Item(name, a, lambda name=name: both(ours / name, theirs / name)))
        spare.append(Item(name, *((a, lambda name=name: film(ours / name)) if n % 2 else (b, lambda name=name: film(theirs / name)))))
    if real:
        spare = [Item(name, sound(Path(real) / name), lambda name=name: film(Path(real) / name)) for name in sorted(listing(Path(real)))]
    return items, spare, FPS


def listing(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one of .mp4 files")
    if not (names := {path.name for path in folder.glob("*.mp4") if path.is_file()}):
        raise UserError(f"{folder}: holds no .mp4 files; give another folder")
    return names


def sound(path: Path) -> np.ndarray:
    """A video's sound (n,), beginning where its pictures do."""
    from . import footage
    try:
        _, start, seconds = footage.probe(path)
    except footage.Unusable as why:
        raise UserError(f"{path}: {why}; export it again as H.264 with sound") from None
    if seconds > LONGEST_S:
        raise UserError(f"{path}: lasts {seconds:.0f} s, more than the {LONGEST_S:.0f} s that people compare well; cut it")
    return np.pad(media.read_audio(path), (max(0, round(start * media.RATE)), 0))


def same_speech(path: Path, a: np.ndarray, b: np.ndarray, other: Path) -> None:
    """UserError unless both sounds are the same speech at the same time: one is heard with both videos, and the other's lips would seem late."""
    if abs(len(a) - len(b)) > media.RATE // 2:
        raise UserError(f"{path}: {len(b) / media.RATE:.1f} s of sound, {other} has {len(a) / media.RATE:.1f} s; cut both to the same length")
    x, y = loudness(a), loudness(b)
    fit = np.correlate(y, x, "full") / max(np.sqrt((x * x).sum() * (y * y).sum()), 1e-12)
    lag = (int(fit.argmax()) - len(x) + 1) / 100                # seconds
    if fit.max() < ALIKE or abs(lag) > LAG_S:
        told = f"comes {1000 * lag:.0f} ms after" if fit.max() >= ALIKE else "is not"
        raise UserError(f"{path}: its sound {told} that of {other}; make both videos from the same recording, pictures and sound beginning together")


def loudness(wave: np.ndarray, step: int = media.RATE // 100) -> np.ndarray:
    """Root mean square of every 10 ms, less its mean: (n // step,)."""
    parts = wave[:len(wave) // step * step].reshape(-1, step)
    level = np.sqrt(np.square(parts).mean(1))
    return level - level.mean()


def film(path: Path, height: int | None = None) -> np.ndarray:
    """Frames uint8 (T, H, W, 3) at 25 a second, `height` pixels high; by default their own height, at most HEIGHT. Even sides."""
    from PIL import Image

    from . import footage
    frames = []
    try:
        for _, frame in footage.at_rate(path, FPS):
            picture = Image.fromarray(footage.upright(frame))
            height = height or min(HEIGHT, picture.height)
            size = (2 * round(picture.width * height / picture.height / 2), height // 2 * 2)
            frames.append(np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)))
    except footage.Unusable as why:
        raise UserError(f"{path}: {why}; export it again as H.264") from None
    if not frames:
        raise UserError(f"{path}: holds no pictures; export it again")
    return np.stack(frames)


def both(ours: Path, theirs: Path) -> tuple[np.ndarray, np.ndarray]:
    """Two films of one height, the larger of theirs: enlarging is what a screen would do."""
    a, b = film(ours), film(theirs)
    if a.shape[1] != b.shape[1]:
        a, b = (film(path, max(a.shape[1], b.shape[1])) for path in (ours, theirs))
    if abs(len(a) - len(b)) > FPS // 2:
        raise UserError(f"{theirs}: {len(b) / FPS:.1f} s of pictures, {ours} has {len(a) / FPS:.1f} s; cut both to the same length")
    return a, b
