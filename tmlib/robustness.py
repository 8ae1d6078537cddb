"""Harder company for a trained student: foreign accents, other rates of speech, a crowd behind the speaker (N1), and people."""
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from . import avatar, data, evaluate, metrics, sampling, speech
from .config import UserError
from .data import STYLES, Clip
from .latents import Latents, encode_split


class Split:
    """Clips in memory in the place of a split on disk; `waves`: what is heard instead of their own sound."""

    def __init__(self, clips: list[Clip], waves: list[np.ndarray] | None = None):
        for name in ("frames", "truth", "mouth", "face"):
            setattr(self, name, np.stack([getattr(c, name) for c in clips]))
        self.waves = waves or [c.wave for c in clips]
        self.meta = [{"style": STYLES[i % 3] if c.voice else None, "kind": "speaking", "voice": c.voice} for i, c in enumerate(clips)]

    def __len__(self) -> int:
        return len(self.meta)

    def wave(self, i: int) -> np.ndarray:
        return self.waves[i]


def foreign(voices: list, accents: list[str]) -> list:
    """The voices' timbres (espeak-ng's variants), rates and pitches, reading as speakers of other languages would."""
    return [replace(v, language=f"{accents[i % len(accents)]}+{v.language.partition('+')[2]}") for i, v in enumerate(voices)]


def sayable(sentences: list[str], voices: list) -> list[str]:
    """The sentences that every voice can say in sounds that the miniature knows."""
    def known(sentence: str) -> bool:
        try:
            return all(len(speech.synthesise(sentence, v).wave) for v in voices)
        except UserError:
            return False
    return [s for s in sentences if known(s)]


def clips(n: int, voices: list, sentences: list[str], **shape) -> list[Clip]:
    """n clips on faces that nothing else uses, always the same ones, spoken by these voices; shape: frames, fps, size of `data.Spec`."""
    return [data.make_clip(data.Spec(900_000 + i, "test", "speaking", STYLES[i % 3], 10_000_000 + i, **shape), (voices, sentences)) for i in range(n)]


def aloud(readers: list, n: int, frames: int, fps: int, size: int) -> list[Clip]:
    """At most n clips, on the faces of `clips`, of what people read (recordings.Recording): one cut behind the other, of each reader in turn."""
    length = round(frames / fps * data.RATE)
    cuts = sorted(((lo, k) for k, who in enumerate(readers) for lo in range(0, len(who.wave) - length + 1, length)))[:n]
    out = []
    for i, (lo, k) in enumerate(cuts):
        who = readers[k]
        track = avatar.make_track(np.random.default_rng(900_000 + i), who.phones, frames, fps, lo / data.RATE)
        out.append(data.face_clip(10_000_000 + i, STYLES[i % 3], track, size, who.wave[lo:lo + length], who.name, []))
    return out


def recorded(split: data.Clips, n: int) -> tuple[list[Clip], list[str]]:
    """The first n of a split of real videos in which somebody speaks, and who that is."""
    some = split.where(kind="speaking")[:n]
    return [Clip(split.frames[i], split.wave(i), split.truth[i], split.speaking[i], split.mouth[i], split.face[i], [], "") for i in some], evaluate.speakers(split, some)


def babble(some: list[Clip], snr_db: float, who: list) -> list[np.ndarray]:
    """Each clip's sound with other people talking behind it, three if there are as many, together `snr_db` below the speaker. who: the speaker of each, at least two."""
    rms = lambda w: np.sqrt(np.mean(w ** 2)) + 1e-9
    def crowd(i: int) -> np.ndarray:
        others = {who[j]: some[j].wave for k in range(1, len(some)) if who[j := (i + k) % len(some)] != who[i]}
        return sum(list(others.values())[:3])
    crowds = [crowd(i) for i in range(len(some))]
    return [(c.wave + crowd * rms(c.wave) / rms(crowd) * 10 ** (-snr_db / 20)).astype(np.float32) for c, crowd in zip(some, crowds)]


def lip_r(split: Split, student, models, p, how, what: str, together: int) -> np.ndarray:
    """Lip r of the streamed student on every clip (n,). models: (vae, speech encoder, conditions, lip reader, face encoder);
    p: the student's steps, shift, chunk, cache; how: the parameters of `encode_split`; together: clips that stream at once."""
    vae, encoder, told, lips, face = models
    with TemporaryDirectory() as folder:
        encode_split(split, vae, encoder, told, how, path := Path(folder) / f"{what}.safetensors")
        bench = evaluate.Bench(split, Latents(path), vae, lips, face)
    video = bench.videos(lambda batch, index: sampling.student(student, batch, index, p), together, what)
    return metrics.lip_r(bench.read(video)[..., 0], split.truth[..., 0])
