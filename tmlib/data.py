"""Clips: procedural talking faces with exact truth.

What is special
- Every clip is a pure function of its `Spec`; splits are disjoint in sentences, voices and identities by construction.
- Four kinds: `speaking` (sentences with pauses), `listening` (silence: closed mouth, nods), `ending` (the last moment of speech, then
  silence: a mouth that shuts) and `generic` (random motion, no speech: what the base model is pretrained on).
"""
import errno
import json
import math
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import avatar, recited, speech
from .avatar import STYLES
from .config import RATE, Progress, UserError, atomic

ZOOM, LOOK_UP = 1.25, 0.65                       # framing: the share of the drawing shown, and how much of its top is cut
CUT_S = 3.0                                      # a clip begins anywhere in this stretch of the talk
ENDING_S = (0.15, 0.45)                          # of speech that is left, where a clip begins as it ends
QUIET = 0.001                                    # room noise in silence: -60 dBFS
OFFSETS = {"train": 0, "valid": 1_000_000, "test": 2_000_000, "natural": 3_000_000}        # of identities: none is in two splits


# ---------------------------------------------------------------------------------------------------------- clips
@dataclass(frozen=True)
class Spec:
    """All that determines one clip."""
    seed: int                                    # motion, timing, choice of sentences
    split: str                                   # which sentences and voices: speech.SPLITS
    kind: str                                    # speaking | listening | ending | generic
    style: str
    identity: int                                # seed of the looks; splits use disjoint ranges
    frames: int = 81
    fps: int = 16
    size: int = 64


@dataclass
class Clip:
    frames: np.ndarray                           # uint8 (T, H, W, 3)
    wave: np.ndarray                             # float32 (n,), 16 kHz
    truth: np.ndarray                            # float32 (T, 3): opening, width, rounding
    speaking: np.ndarray                         # bool (T,)
    mouth: np.ndarray                            # float32 (T, 4): x0, y0, x1, y1 in pixels
    face: np.ndarray                             # float32 (T, 4)
    phones: list[tuple[str, float, float]]
    voice: str


def specs(split: str, n: int, kinds: dict[str, float], identities: int, seed: int, **shape) -> list[Spec]:
    """n clips, styles in turn, identities in turn; within each style the kinds stand in the given proportions, spread evenly."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    offset = OFFSETS[split]
    return [Spec(int(rng.integers(2**31)), split, kind_of(i // 3, kinds), STYLES[i % 3], offset + i // 3 % max(identities // 3, 1), **shape)
            for i in range(n)]


def kind_of(m: int, kinds: dict[str, float]) -> str:
    """Kind of a style's m-th clip: each share's clips spread evenly, the first kind fills the rest."""
    first, *others = kinds
    share = sum(kinds[kind] for kind in others)
    before, after = (math.floor(i * share + 1e-9) for i in (m, m + 1))
    return first if after == before else kind_of(before, {kind: kinds[kind] / share for kind in others})


@lru_cache
def word_list(split: str) -> tuple[list, list]:
    """Voices and sentences of a split, read once. To train belong the reciters too, who can say any of its sentences."""
    voices, sentences = speech.load_voices()[split], speech.load_sentences()[split]
    if split == "train":
        voices = voices + [v for v in speech.reciters() if any(recited.able(v, s) for s in sentences)]
    return voices, sentences


def talk(rng, words: tuple[list, list], seconds: float) -> tuple[np.ndarray, list[speech.Phone], str]:
    """A cut from anywhere in one voice's sentences and pauses: (wave (n,), phones, voice name). words: voices and sentences.

    Clips that all began in silence would correlate with one another, and with anybody's speech.
    """
    voices, sentences = words
    voice = voices[rng.integers(len(voices))]
    able = [s for s in sentences if recited.able(voice, s)]
    before = rng.uniform(0, CUT_S)
    wave = np.zeros(int(round((before + seconds) * RATE)), np.float32)
    t, phones = 0.0, []
    while t < before + seconds - 0.1:
        said = speech.synthesise(able[rng.integers(len(able))], voice)
        lo = int(t * RATE)
        part = said.wave[:len(wave) - lo]
        wave[lo:lo + len(part)] += part
        phones += [speech.Phone(p.symbol, p.start + lo / RATE, p.end + lo / RATE) for p in said.phones]
        end, t = t + len(said.wave) / RATE, t + len(said.wave) / RATE + rng.uniform(0.3, 0.9)
        phones.append(speech.Phone("sil", end, t))
    phones = [speech.Phone(p.symbol, max(p.start - before, 0.0), p.end - before) for p in phones if p.end > before]
    return wave[-int(round(seconds * RATE)):], phones, voice.name


def make_clip(spec: Spec, words: tuple[list, list] | None = None) -> Clip:
    """Speech, motion and picture of one clip; words: voices and sentences, those of its split if none are given."""
    rng = np.random.default_rng(spec.seed)
    seconds = spec.frames / spec.fps
    wave, phones, voice = np.zeros(int(round(seconds * RATE)), np.float32), [], ""
    if spec.kind == "speaking":
        wave, phones, voice = talk(rng, words or word_list(spec.split), seconds)
    elif spec.kind == "ending":
        left = rng.uniform(*ENDING_S)
        said, phones, voice = talk(rng, words or word_list(spec.split), left)
        wave[:len(said)] = said * np.minimum(np.arange(len(said), 0, -1) / (0.02 * RATE), 1)          # no click
        phones = [speech.Phone(p.symbol, p.start, min(p.end, left)) for p in phones if p.start < left]
    wave += (QUIET * rng.uniform(0.1, 1.0) * rng.standard_normal(len(wave))).astype(np.float32)
    track = avatar.make_track(rng, phones, spec.frames, spec.fps)
    if spec.kind == "generic":
        track.mouth[:] = babble(rng, spec.frames)
    return face_clip(spec.identity, spec.style, track, spec.size, wave, voice, [(p.symbol, p.start, p.end) for p in phones])


def face_clip(identity: int, style: str, track, size: int, wave: np.ndarray, voice: str, phones: list) -> Clip:
    """The clip of a face that moves as `track` (avatar.Track) says."""
    who = avatar.sample_identity(np.random.default_rng([7, identity]), style)
    frames, mouth, face = portrait(who, track, size)
    return Clip(frames, wave, track.mouth.astype(np.float32), track.speaking, mouth, face, phones, voice)


def portrait(identity, track, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames uint8 (T, size, size, 3), mouth boxes and face boxes (T, 4), framed closer than the drawing: lips need pixels."""
    full = int(size * ZOOM)
    x, y = (full - size) // 2, int((full - size) * LOOK_UP)
    move = lambda box: np.clip(box - np.float32([x, y, x, y]), 0, size)
    frames = avatar.render(identity, track, full)[:, y:y + size, x:x + size]
    return frames, move(avatar.mouth_box(identity, track, full)), move(avatar.face_box(identity, track, full))


def babble(rng, frames: int) -> np.ndarray:
    """Mouth motion that belongs to no speech: smooth random openings, widths and roundings (T, 3) in [0, 1]."""
    noise = rng.standard_normal((frames + 4, 3))
    smooth = sum(noise[i:i + frames] for i in range(5)) / np.sqrt(5)
    return np.clip(0.35 + 0.35 * smooth, 0, 1)


def write_split(folder: Path, name: str, todo: list[Spec], workers: int) -> dict:
    """Renders `todo` into `folder/name/`, see `save_split`."""
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(make_clip, todo, chunksize=4)
        return save_split(folder, name, len(todo), ((clip, asdict(spec)) for clip, spec in zip(made, todo)))


def save_split(folder: Path, name: str, n: int, made: Iterable[tuple[Clip, dict]]) -> dict:
    """Writes n clips, each with what it is made from: frames.npy (n, T, H, W, 3) uint8, wave.npy (n, samples) int16, truth.npz,
    clips.json. One clip's frames and sound are in memory at a time. Returns how much it is."""
    progress = Progress(n, f"clips {name}")
    with atomic(Path(folder) / name) as tmp:
        tmp.mkdir()
        frames, wave, rest, meta = None, None, {k: [] for k in ("truth", "speaking", "mouth", "face")}, []
        for i, (clip, source) in enumerate(made):
            if frames is None:
                frames, wave = room(tmp / "frames.npy", np.uint8, (n, *clip.frames.shape)), room(tmp / "wave.npy", np.int16, (n, *clip.wave.shape))
            frames[i], wave[i] = clip.frames, (np.clip(clip.wave, -1, 1) * 32767).astype(np.int16)
            for k, v in rest.items():
                v.append(getattr(clip, k))
            meta.append({**source, "voice": clip.voice, "phones": clip.phones})
            progress.step()
        frames.flush(), wave.flush()
        np.savez(tmp / "truth.npz", **{k: np.stack(v) for k, v in rest.items()})
        (tmp / "clips.json").write_text(json.dumps(meta))
    return {"clips": n, "seconds": sum(len(s) / m["fps"] for s, m in zip(rest["speaking"], meta)),
            "silence_fraction": round(1 - float(np.mean(np.stack(rest["speaking"]))), 4)}


def room(path: Path, dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file as an array, with all its place on the disk taken: a mapped file that finds the disk full later kills its process (SIGBUS)."""
    made = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except AttributeError:                   # not on macOS
            pass
        except OSError as error:                 # nor on some file systems
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{path.parents[1]}: no space left for the {made.nbytes / 1e9:.3g} GB of {path.name}; make some, or take fewer clips "
                                "(data.most in params.yaml), then run again") from None
    return made


class Clips:
    """One split as written by `write_split`, memory-mapped: index it for frames, waves and truth."""

    def __init__(self, folder: Path, name: str):
        path = Path(folder) / name
        if not (path / "clips.json").exists():
            raise UserError(f"{path} holds no clips: run `make repro` (stage data)")
        self.frames = np.load(path / "frames.npy", mmap_mode="r")             # uint8 (n, T, H, W, 3)
        self._wave = np.load(path / "wave.npy", mmap_mode="r")
        truth = np.load(path / "truth.npz")
        self.truth, self.speaking, self.mouth, self.face = (truth[k] for k in ("truth", "speaking", "mouth", "face"))
        self.meta = json.loads((path / "clips.json").read_text())

    def __len__(self) -> int:
        return len(self.meta)

    def wave(self, i: int) -> np.ndarray:
        """float32 (n,), 16 kHz."""
        return self._wave[i].astype(np.float32) / 32767

    def phones(self, i: int) -> list[speech.Phone]:
        return [speech.Phone(*p) for p in self.meta[i]["phones"]]

    def where(self, **wanted) -> np.ndarray:
        """Indices of the clips whose meta agrees: `clips.where(kind="speaking", style="flat")`."""
        return np.array([i for i, m in enumerate(self.meta) if all(m[k] == v for k, v in wanted.items())], int)

    def first(self, n: int) -> "Clips":
        """The first n clips; of drawn ones, styles and kinds keep their shares."""
        part = copy(self)
        for name in ("frames", "_wave", "truth", "speaking", "mouth", "face", "meta"):
            setattr(part, name, getattr(self, name)[:n])
        return part

    def examples(self, each: int = 1) -> list[int]:
        """Speaking clips to look at, so many of each style, of another face each; of clips without styles, as real ones are, the first that speak."""
        styles, n = [self.where(style=style, kind="speaking") for style in STYLES], each * len(STYLES)
        if not all(map(len, styles)):
            return self.where(kind="speaking")[:n].tolist()
        of = [styles[k % len(STYLES)] for k in range(n)]
        return list(dict.fromkeys(int(some[min(k, len(some) - 1)]) for k, some in enumerate(of)))

    def labels(self, rows: Iterable[int]) -> list[str]:
        """Each row's style, or of a real clip its number: what it was cut from stands in clips.json."""
        return [self.meta[i]["style"] or f"clip {i}" for i in rows]


def to_float(frames) -> Tensor:
    """uint8 (..., T, H, W, 3), an array or, where it is to stay, a tensor -> float32 (..., 3, T, H, W) in [-1, 1]."""
    return (frames if torch.is_tensor(frames) else torch.from_numpy(np.array(frames))).movedim(-1, -4).float().div_(127.5).sub_(1)


def to_uint8(video: Tensor) -> np.ndarray:
    """float (..., 3, T, H, W) in [-1, 1] -> uint8 (..., T, H, W, 3)."""
    return ((video.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-4, -1).cpu().numpy()


def box_map(boxes: np.ndarray, size: int, cells: int) -> np.ndarray:
    """Boxes (..., 4) in pixels of a `size` picture -> float32 (..., cells, cells), 1 where a cell touches the box."""
    edge = np.arange(cells) * size / cells
    x0, y0, x1, y1 = (boxes[..., i, None] for i in range(4))
    inside = lambda lo, hi: (edge < hi) & (edge + size / cells > lo)          # (..., cells)
    return (inside(y0, y1)[..., :, None] & inside(x0, x1)[..., None, :]).astype(np.float32)


def eye_box(face: np.ndarray) -> np.ndarray:
    """The band in which the eyes of faces are, boxes (..., 4), as boxes."""
    x0, y0, x1, y1 = np.moveaxis(face, -1, 0)
    return np.stack([x0, y0 + 0.28 * (y1 - y0), x1, y0 + 0.5 * (y1 - y0)], -1)


def per_latent(x: np.ndarray) -> np.ndarray:
    """Largest value in each latent frame's window: (n, T, ...) -> (n, F, ...), windows [0, 1) and [4k - 3, 4k + 1)."""
    rest = x[:, 1:].reshape(x.shape[0], -1, 4, *x.shape[2:]).max(2)
    return np.concatenate([x[:, :1], rest], 1)
