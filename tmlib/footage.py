"""One real video of somebody who talks becomes clips: shots, the face, its lips and its speech are found.

What is special
- Two passes, frame by frame: a small one finds shot cuts and faces and plans what to cut out, a second one cuts just that at
  full resolution. So memory holds one clip's pictures, however long the video is, and its sound.
- What cannot be used, the whole or a stretch, is named with the reason: a talking-head model learns from what it is shown.
- ffmpeg's own filters resample the rate and find the cuts; faces are MediaPipe's (`faces`), speech is silero's.

Names: k counts frames at the clips' rate from the video's time zero; T frames of a clip; boxes are x0, y0, x1, y1.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path

import av
import numpy as np
from PIL import Image

from . import faces, media
from .config import RATE, UserError
from .data import Clip

LONGEST_S = 7200.0                               # a video: its sound is held in memory
SMALL, LOOK = 640, 256                           # pixels: longer side in the first pass; least side in which lips are measured
BLACK = 40                                       # a picture without any brighter value
MISSING = 0.1                                    # share of looks that may miss the face


@dataclass(frozen=True)
class Settings:
    """What a clip is, and what is good enough for one. A face's size is the side of the detector's box."""
    frames: int                                  # of a clip, 4 (F - 1) + 1
    fps: int
    size: int                                    # pixels
    framing: float = 2.2                         # side of the square that is cut out, in faces: head and shoulders
    least_face: float = 0.25                     # smallest face, in sizes: below it a clip would be blurred
    rival: float = 0.5                           # a second face of this share of the first's size is a second person
    cut: float = 10.0                            # ffmpeg's scdet score of a shot cut
    every: int = 4                               # frames from look to look in the first pass
    speech: float = 0.2                          # share of frames with speech from which on a clip is `speaking`
    still: float = 0.02                          # deviation of the lips' opening below which somebody else is speaking


class Unusable(Exception):
    """Why a video, or a stretch of it, gives no clip."""


# -------------------------------------------------------------------------------------------------------- reading
def at_rate(path: Path, fps: int, *filters: tuple[str, str]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(k, frame) of a video at a constant rate, whatever its own, through more of ffmpeg's filters (name, arguments)."""
    try:
        with path.open("rb") as file, av.open(file, options={"format_whitelist": media.CONTAINERS}) as container:
            stream, graph = container.streams.video[0], av.filter.Graph()
            stream.codec_context.thread_count = 1                             # workers are processes
            filters = [graph.add(*f) for f in (("fps", str(fps)), *filters)]
            steps = [graph.add_buffer(template=stream), *filters, graph.add("buffersink")]
            for a, b in pairwise(steps):
                a.link_to(b)
            graph.configure()
            for frame in chain(container.decode(stream), [None]):
                graph.push(frame)
                yield from ((out.pts, out) for out in ready(graph) if out.pts >= 0)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise Unusable(f"damaged ({error.__class__.__name__})") from error


def ready(graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def probe(path: Path) -> tuple[int, float, float]:
    """Pixels of the longer side; when the sound begins, and how long the pictures last, in seconds."""
    try:
        with path.open("rb") as file, av.open(file, options={"format_whitelist": media.CONTAINERS}) as container:
            pictures, sounds = container.streams.video, container.streams.audio
            if not pictures or not sounds:
                raise Unusable("no picture" if not pictures else "no sound")
            if pictures[0].codec_context is None:
                raise Unusable("its pictures are coded in a way that is not known here")
            if (pictures[0].sample_aspect_ratio or 1) != 1:
                raise Unusable("its pixels are not square")
            clock = lambda value, base: float(value * base) if value is not None else 0.0
            seconds = clock(pictures[0].duration, pictures[0].time_base) or (container.duration or 0) / av.time_base
            if seconds > LONGEST_S:
                raise Unusable(f"longer than {LONGEST_S / 60:g} minutes")
            return max(pictures[0].width, pictures[0].height), clock(sounds[0].start_time, sounds[0].time_base), seconds
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise Unusable("not a video that can be read") from error


def sound(path: Path) -> np.ndarray:
    """All of a video's sound, float32 (n,) at 16 kHz."""
    try:
        return media.read_audio(path, max_s=LONGEST_S)
    except UserError as error:                                                # "file: what is wrong; the fix"
        raise Unusable("sound: " + str(error).removeprefix(f"{path}: ").partition(";")[0]) from error


def speech(wave: np.ndarray) -> np.ndarray:
    """Whether somebody speaks in each sample of wave (n,), bool, by silero's voice activity detector."""
    import torch
    detector, heard = voice_detector(), np.zeros(len(wave), bool)
    from silero_vad import get_speech_timestamps
    for part in get_speech_timestamps(torch.from_numpy(wave), detector, sampling_rate=RATE):
        heard[part["start"]:part["end"]] = True
    return heard


@lru_cache
def voice_detector():
    import torch
    threads = torch.get_num_threads()
    try:
        from silero_vad import load_silero_vad
    except ImportError:
        raise UserError("speech in real videos needs one more package: pip install silero-vad") from None
    model = load_silero_vad()
    torch.set_num_threads(threads)               # importing it sets one thread for everybody
    return model


def upright(frame: av.VideoFrame) -> np.ndarray:
    """The picture as it is meant to be seen, uint8 (H, W, 3): telephones write it lying down, and note by how much."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


# ------------------------------------------------------------------------------------------- first pass: what to cut
@dataclass
class Survey:
    """What the first pass sees; pictures are `height` x `width`, SMALL on their longer side."""
    shots: list[int]                             # where shots begin; the last one is the end
    looks: dict[int, list[faces.Face] | None]    # k -> the faces there, None if all is black
    height: int
    width: int


def survey(path: Path, s: Settings) -> Survey:
    out, k = Survey([], {}, 0, 0), -1
    small = ("scale", f"{SMALL}:{SMALL}:force_original_aspect_ratio=decrease")
    for k, frame in at_rate(path, s.fps, small, ("scdet", f"threshold={s.cut}")):
        if not out.shots or "lavfi.scd.time" in frame.metadata:
            out.shots.append(k)
        if k % s.every == 0:
            picture = np.ascontiguousarray(upright(frame))
            out.looks[k] = faces.find(picture) if picture.max() > BLACK else None
            out.height, out.width = picture.shape[:2]
    out.shots.append(k + 1)
    return out


def framing(looks: list[list[faces.Face] | None], height: float, width: float, scale: float, s: Settings) -> np.ndarray:
    """The square (3,) x, y, side that holds one person's head and shoulders in all looks, in pixels of a height x width picture.

    scale: its pixels per pixel of the looks. Raises Unusable.
    """
    share = lambda found: np.mean([bool(x) for x in found])
    if share(look is None for look in looks) > MISSING:
        raise Unusable("black picture")
    if share(not look for look in looks) > MISSING:
        raise Unusable("no face")
    if share(look and len(look) > 1 and look[1].side >= s.rival * look[0].side for look in looks) > MISSING:
        raise Unusable("more than one face")
    boxes = np.stack([look[0].box for look in looks if look]) * scale
    face = float(np.median((boxes[:, 2:] - boxes[:, :2]).max(1)))
    if face < s.least_face * s.size:
        raise Unusable(f"face of {face:.0f} pixels, at least {s.least_face * s.size:.0f} are needed")
    side = min(s.framing * face, height, width)
    corner = np.clip(np.median((boxes[:, :2] + boxes[:, 2:]) / 2, 0) - side / 2, 0, np.array([width, height]) - side)
    if (boxes[:, :2] < corner - face / 4).any() or (boxes[:, 2:] > corner + side + face / 4).any():
        raise Unusable("the face leaves the picture")
    return np.array([*corner, side])


def plan(path: Path, s: Settings, reasons: list[dict]) -> dict[int, np.ndarray]:
    """{k: framing} of the clips to cut, one behind the other in each shot; why others cannot be is added to `reasons`."""
    longer, _, seconds = probe(path)
    seen = survey(path, s)
    if seen.shots[-1] / s.fps < 0.95 * seconds - 0.5:
        raise Unusable(f"cut off: {seconds:.1f} s promised, {seen.shots[-1] / s.fps:.1f} s there")
    starts = [k for a, b in pairwise(seen.shots) for k in range(a, b - s.frames + 1, s.frames)]
    if not starts:
        raise Unusable(f"no shot of {s.frames / s.fps:.1f} s, the length of a clip")
    planned, scale = {}, longer / SMALL
    for k in starts:
        with noted(reasons, k / s.fps):
            looks = [found for j, found in seen.looks.items() if k <= j < k + s.frames]
            planned[k] = framing(looks, seen.height * scale, seen.width * scale, scale, s)
    return planned


@contextmanager
def noted(reasons: list[dict], at_s: float | None = None):
    """What is unusable in this block is added to `reasons` (at_s: where in the video; None: all of it), and the work goes on."""
    try:
        yield
    except Unusable as why:
        reasons.append({"at_s": at_s, "reason": str(why)})


# ------------------------------------------------------------------------------------------------ second pass: clips
def cut(path: Path, planned: dict[int, np.ndarray], s: Settings) -> Iterator[tuple[int, np.ndarray]]:
    """(k, frames uint8 (T, side, side, 3)) of each planned clip; side: s.size, or LOOK if that is larger."""
    side, frames, todo = max(s.size, LOOK), [], sorted(planned)
    for k, frame in at_rate(path, s.fps):
        if not todo:
            return
        if todo[0] <= k:
            x, y, edge = planned[todo[0]]
            picture = Image.fromarray(np.ascontiguousarray(upright(frame)))
            square = (x, y, min(x + edge, picture.width), min(y + edge, picture.height))
            frames.append(np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS, square)))
        if len(frames) == s.frames:
            yield todo.pop(0), np.stack(frames)
            frames = []


def lips(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth (T, 3), mouth and face boxes (T, 4) of frames (T, H, W, 3), in their pixels; a few missing ones are filled in."""
    rows = np.full((len(frames), 11), np.nan, np.float32)
    for row, frame in zip(rows, frames):
        found = faces.find(frame)
        points = faces.mesh(frame, found[0]) if found else None
        if points is not None:
            row[:] = np.concatenate([*faces.mouth(points), faces.around(points, 0.05)])
    gone = np.isnan(rows[:, 0])
    if gone.mean() > MISSING:
        raise Unusable(f"lips seen in {100 * (1 - gone.mean()):.0f} % of the frames only")
    for column in rows.T:
        column[gone] = np.interp(np.flatnonzero(gone), np.flatnonzero(~gone), column[~gone])
    return rows[:, :3], rows[:, 3:7], rows[:, 7:]


def measured(frames: np.ndarray, wave: np.ndarray, heard: np.ndarray, s: Settings) -> tuple[Clip, str]:
    """A clip from its frames (T, side, side, 3), its sound (n,) and where in it somebody speaks (n,); and its kind."""
    truth, mouth, face = lips(frames)
    speaking = heard[((np.arange(s.frames) + 0.5) / s.fps * RATE).astype(int)]
    if speaking.mean() >= s.speech and truth[speaking, 0].std() < s.still:
        raise Unusable("speech, but the lips stand still: somebody else speaks")
    kind = "speaking" if speaking.mean() >= s.speech else "listening"
    pixels = lambda box: np.clip(box * s.size / frames.shape[1], 0, s.size)
    return Clip(shrunk(frames, s.size), wave, truth, speaking, pixels(mouth), pixels(face), [], ""), kind


def shrunk(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8 (T, H, H, 3) -> (T, size, size, 3)."""
    if frames.shape[1] == size:
        return frames
    return np.stack([np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.LANCZOS)) for f in frames])


def clips(path: Path, s: Settings, reasons: list[dict]) -> Iterator[tuple[Clip, dict]]:
    """All clips of a video, in time, with their kind, where they begin and the square cut out; why not, goes to `reasons`."""
    with noted(reasons):
        if not (planned := plan(path, s, reasons)):
            return
        wave, (_, begins, _), n = sound(path), probe(path), round(s.frames / s.fps * RATE)
        heard = speech(wave)
        for k, frames in cut(path, planned, s):
            with noted(reasons, k / s.fps):
                lo = round((k / s.fps - begins) * RATE)
                if lo < 0 or lo + n > len(wave) + RATE // 10:                 # the last packet of sound may end before the last frame
                    raise Unusable("the sound is shorter than the picture")
                part = [np.pad(x[lo:lo + n], (0, n - len(x[lo:lo + n]))) for x in (wave, heard)]
                clip, kind = measured(frames, *part, s)
                yield clip, {"kind": kind, "at_s": k / s.fps, "square": planned[k].round(1).tolist()}
