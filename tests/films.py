"""Small real videos for tests: drawn people who speak, as mp4, whole and broken in every way that folders of videos are."""
from fractions import Fraction

import av
import numpy as np

from tmlib import data, media, speakers, speech

RATE, SIDE = data.RATE, 96
VOICES, SENTENCES = speech.load_voices()["train"], speech.load_sentences()["train"]
WORDS = VOICES[:-speakers.COUNT], SENTENCES      # without the drawn speakers, not all of whom a detector of people's voices hears


def person(identity=1, frames=14, fps=16, kind="speaking", style="soft3d", seed=0, side=SIDE):
    """One drawn person: frames uint8 (T, side, side, 3), sound (n,), and the truth of the lips (T, 3)."""
    clip = data.make_clip(data.Spec(seed, "train", kind, style, identity, frames, fps, side), WORDS)
    return clip.frames, clip.wave, clip.truth


def scene(*people, height=160, width=240, seed=0, at=((20, 30), (130, 30)), frames=1):
    """People side by side before a wall: frames (T, height, width, 3)."""
    rng = np.random.default_rng(seed)
    frames = len(people[0]) if people else frames
    wall = np.clip(90 + 40 * np.sin(np.arange(width) / 37 + rng.uniform(0, 6)) + rng.uniform(-20, 20, (height, 1)), 0, 255)
    out = np.repeat(wall[None, :, :, None], 3, -1).astype(np.uint8).repeat(frames, 0)
    for face, (x, y) in zip(people, at):
        room = out[:, y:y + face.shape[1], x:x + face.shape[2]]
        room[:] = face[:, :room.shape[1], :room.shape[2]]                # what is outside, is not seen
    return out


def write(path, frames, wave, fps=16, rate=RATE):
    """An mp4 with its sound; wave None: without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if wave is not None and rate != RATE:
        wave = np.interp(np.arange(len(wave) * rate // RATE) * RATE / rate, np.arange(len(wave)), wave).astype(np.float32)
    with media.VideoWriter(path, fps, frames.shape[1:3], rate) as video:
        video.write(frames, wave)
    return path


def good(path, identity=1, frames=14, fps=16, rate=RATE, **how):
    face, wave, truth = person(identity, frames, fps, **how)
    write(path, scene(face, seed=identity), wave, fps, rate)
    return truth


# Broken in every way, for clips of CLIP frames at 16 per second.

CLIP = 9


def truncated(path):
    good(path, frames=32)
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])


def silent(path):
    write(path, scene(person()[0]), None)


def nobody(path):
    write(path, scene(frames=14), person()[1])


def two(path):
    write(path, scene(person(1)[0], person(2)[0]), person()[1])


def short(path):
    good(path, frames=CLIP - 1)


def letter(path):
    path.write_text("Dear Sir or Madam, this is not a video.")


def empty(path):
    path.write_bytes(b"")


def black(path):
    write(path, np.zeros((14, 160, 240, 3), np.uint8), person()[1])


def cut(path):
    a, b = person(1, 7)[0], person(2, 7, style="flat")[0]
    write(path, np.concatenate([scene(a), 255 - scene(b, seed=5, at=((110, 40),))]), person()[1])


def dubbed(path):
    face, _, _ = person(kind="listening")
    write(path, scene(face[:1].repeat(14, 0)), person()[1])


def ends(path):
    write(path, scene(person()[0]), person()[1][:RATE // 4])


def squeezed(path):
    """Pixels wider than high, as in old television."""
    good(path)
    frames = scene(person()[0])
    with av.open(str(path)) as old, av.open(str(path.with_suffix(".mkv")), "w") as new:
        pictures, sound = new.add_stream("libx264", rate=16), new.add_stream_from_template(old.streams.audio[0])
        pictures.height, pictures.width = frames.shape[1:3]
        pictures.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for packet in (p for frame in frames for p in pictures.encode(av.VideoFrame.from_ndarray(frame))):
            new.mux(packet)
        new.mux(pictures.encode(None))
        for packet in old.demux(audio=0):
            if packet.dts is not None:
                packet.stream = sound
                new.mux(packet)
    path.with_suffix(".mkv").replace(path)


BROKEN = {truncated: "cut off: 2.0 s promised", silent: "no sound", nobody: "no face", two: "more than one face", short: "no shot of 0.6 s",
          letter: "not a video that can be read", empty: "not a video that can be read", black: "black picture", cut: "no shot of 0.6 s",
          dubbed: "somebody else speaks", ends: "the sound is shorter than the picture", squeezed: "its pixels are not square"}
