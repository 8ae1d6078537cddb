"""Generated video against the truth: one `score` for teacher, student and every ablation.

Lips are read from pixels by the `LipReader`; beside them stand the codec's ceiling (the same reader on encoded and decoded
truth), the shuffled control (somebody else's speech), the offset, and what the reader itself gets wrong on closed mouths.
"""
from dataclasses import dataclass

import numpy as np
import torch

from . import config, flow, metrics, ranks
from .config import Progress
from .data import STYLES, Clips, eye_box, to_float, to_uint8
from .figures import shown
from .latents import Latents
from .readers import load_readers
from .sampling import at_speed, clip_noise, denoiser
from .wan_vae import load_codec


SHUFFLES = 16                                    # everybody's lips against so many other people's speech


@dataclass
class Bench:
    """A held-out split with the networks that judge it."""
    clips: Clips
    latents: Latents
    vae: torch.nn.Module
    lips: torch.nn.Module
    face: torch.nn.Module

    def videos(self, make, batch_size: int, what: str) -> np.ndarray:
        """make(batch as deployed, indices) -> latents, over the split; returns uint8 (n, T, H, W, 3)."""
        one = lambda mine: torch.from_numpy(to_uint8(self.vae.decode(make(self.latents.batch(mine).deployed(), mine.tolist()))[0]))
        progress, out = Progress(len(self.latents), what), []
        for lo in range(0, len(self.latents), batch_size):
            index = torch.arange(lo, min(lo + batch_size, len(self.latents)))
            with torch.no_grad():
                out.append(ranks.spread(index, one).numpy())
            progress.step(len(index))
        return np.concatenate(out)

    def read(self, video: np.ndarray) -> np.ndarray:
        """Mouth opening, width, rounding read from uint8 video (n, T, H, W, 3): (n, T, 3)."""
        return np.concatenate([self.lips.read(to_float(v[None])).numpy() for v in video])

    def features(self, video: np.ndarray, every: int = 4) -> np.ndarray:
        """Face features of every fourth frame behind the first, (n, T // 4, dim): in turn of each of the four that a codec draws from a latent."""
        with torch.no_grad():
            return np.stack([self.face.features(to_float(v[1 + i % every::every]).movedim(1, 0)).numpy() for i, v in enumerate(video)])

    def pictures(self) -> np.ndarray:
        """Face features of the clips' first frames: (n, dim)."""
        with torch.no_grad():
            return np.stack([self.face.features(to_float(v[:1]).movedim(1, 0))[0].numpy() for v in self.clips.frames])

    def distances(self, made: np.ndarray, real: np.ndarray) -> dict:
        """Fréchet distance of face features (n, t, dim), and what it is without each of the faces in turn."""
        flat = lambda x, some: x[some].reshape(-1, x.shape[-1])
        distance = lambda some: metrics.frechet(flat(made, some), flat(real, some))
        return {"frechet": distance(np.arange(len(made))), "frechet_left_out": metrics.left_out(distance, [m["identity"] for m in self.clips.meta])}


def load_bench(split: str, device: str = "cpu", n: int | None = None, condition: str | None = None, like: Bench | None = None) -> Bench:
    """A split of data/, with the codec (on `device`) and the readers of data/models, or those of `like`. n: its first clips alone; condition: what latents tell of the picture, see `Latents.told`."""
    clips, latents = Clips(config.DATA / "clips", split), Latents(config.DATA / "latents" / f"{split}.safetensors")
    if n is not None:
        clips, latents = clips.first(n), latents.first(n)
    networks = (like.vae, like.lips, like.face) if like else (load_codec(config.MODELS, device), *load_readers(config.MODELS))
    return Bench(clips, latents.told(condition) if condition else latents, *networks)


def speakers(clips, rows) -> list:
    """Who is heard in each of these clips: a voice or, in real ones, a person."""
    return [clips.meta[i]["voice"] or clips.meta[i]["identity"] for i in rows]


def lip_scores(read: np.ndarray, bench: Bench) -> tuple[dict, np.ndarray]:
    """Lip correlation on speaking clips, per style too, with its controls; also the per-clip values."""
    clips = bench.clips
    speaking = clips.where(kind="speaking")
    got, truth = read[speaking, :, 0], clips.truth[speaking, :, 0]
    r = metrics.lip_r(got, truth)
    who = np.array(speakers(clips, speaking))
    out = metrics.interval("lip_r", r, who)
    others = range(1, min(len(truth), 1 + SHUFFLES))
    out["lip_r_shuffled"] = float(np.mean([metrics.lip_r(got, np.roll(truth, k, axis=0)).mean() for k in others]))
    out["lip_r_shuffled_truth"] = float(np.mean([metrics.lip_r(truth, np.roll(truth, k, axis=0)).mean() for k in others]))
    out["lip_offset_frames"] = metrics.lip_offset(got, truth)
    out["lip_width_r"] = float(metrics.lip_r(read[speaking, :, 1], clips.truth[speaking, :, 1]).mean())
    out["lip_opening_mae"] = float(np.abs(got - truth).mean())
    for style in STYLES:
        of_style = np.isin(speaking, clips.where(style=style))
        absent = {f"lip_r_{style}": None, f"lip_r_{style}_reason": "no clip of this style"}              # real ones have none
        out |= metrics.interval(f"lip_r_{style}", r[of_style], who[of_style]) if of_style.any() else absent
    return out, r


def silence_scores(read: np.ndarray, bench: Bench, moved: tuple[np.ndarray, np.ndarray], eyes: tuple[np.ndarray, np.ndarray]) -> dict:
    """Mean opening, movement (made, real: (n,)) and eyes (made, real: (n, T - 1)) while listening, beside the speaking mean and the reader's own error on closed mouths."""
    clips = bench.clips
    listening, speaking = clips.where(kind="listening"), clips.where(kind="speaking")
    if not len(listening):
        return {"listening_opening_mean": None, "listening_opening_mean_reason": "nobody listens in this split"}
    bias = float(bench.read(clips.frames[listening])[..., 0].mean())
    quiet, loud = float(read[listening, :, 0].mean()), float(read[speaking, :, 0].mean())
    faces = [clips.meta[i]["identity"] for i in listening]
    quick, true_quick = (metrics.eye_moves(each[listening]) for each in eyes)
    return {"listening_opening_mean": quiet, "speaking_opening_mean": loud, "reader_closed_bias": bias, "listening_excess": (quiet - bias) / loud,
            **metrics.named("listening_movement", metrics.ratio(*(each[listening] for each in moved), faces)),
            **metrics.interval("listening_eye_moves_per_s", quick, faces), "listening_eye_moves_per_s_real": float(true_quick.mean())}


def score(video: np.ndarray, bench: Bench, chunk: int) -> tuple[dict, dict, np.ndarray]:
    """All numbers of generated video uint8 (n, T, H, W, 3): (flat dict; what later stages compare it by; read mouths (n, T, 3)).

    The second: lip_r and voice of each clip in which somebody speaks, ssim, movement and face of each clip, frechet and frechet_left_out.
    """
    clips = bench.clips
    read = bench.read(video)
    out, r = lip_scores(read, bench)
    moves, true_moves = (metrics.movement(frames, clips.face) for frames in (video, clips.frames))
    eyes, true_eyes = (metrics.eye_change(frames, eye_box(clips.face), clips.face) for frames in (video, clips.frames))
    out |= silence_scores(read, bench, (moves, true_moves), (eyes, true_eyes))
    faces = [m["identity"] for m in clips.meta]
    alike = np.array([metrics.ssim(*both) for both in zip(video, clips.frames)])
    real, made = bench.features(clips.frames), bench.features(video)
    moved = metrics.cosine_distance(made, bench.pictures()[:, None]).mean(1)
    blinked = np.array([metrics.pearson(*both) for both in zip(eyes, true_eyes)])
    for name, values in (("border_ratio", metrics.border_ratio(video, chunk)), ("seam_ratio", metrics.seam_ratio(video, chunk)), ("ssim", alike),
                         ("identity_distance", moved), ("eye_moves_per_s", metrics.eye_moves(eyes)), ("eye_r", blinked)):
        out |= metrics.interval(name, values, faces)
    out["border_ratio_real"] = float(metrics.border_ratio(clips.frames, chunk).mean())
    out["seam_ratio_real"] = float(metrics.seam_ratio(clips.frames, chunk).mean())
    out["eye_moves_per_s_real"] = float(metrics.eye_moves(true_eyes).mean())
    out |= metrics.named("movement", metrics.ratio(moves, true_moves, faces))
    out["psnr_db"] = float(metrics.psnr(video, clips.frames).mean())
    far = bench.distances(made, real)
    out |= metrics.jackknife("frechet", far["frechet"], far["frechet_left_out"])
    out["n"] = len(video)
    return out, {"lip_r": r, "voice": speakers(clips, clips.where(kind="speaking")), "ssim": alike, "movement": moves, "face": faces, **far}, read


def natural_scores(video: np.ndarray, bench: Bench) -> dict:
    """Lip r of clips that the natural voice speaks, with its interval."""
    found, _ = lip_scores(bench.read(video), bench)
    return {f"lip_r_natural{end}": found[f"lip_r{end}"] for end in ("", "_lo", "_hi")}


def table(rows: dict[str, dict]) -> str:
    """What `score` found of several models, to be printed: a line each, with the interval of lip r."""
    columns = {"lip_r": "lip r", "ssim": "SSIM", "frechet": "Fréchet", "movement": "movement", "listening_movement": "listening", "eye_moves_per_s": "eyes / s", "eye_r": "eyes' r", "seam_ratio": "seams", "seam_ratio_real": "real"}
    def cell(row: dict, key: str) -> str:
        ends = [row.get(f"{key}_{end}") for end in ("lo", "hi")]
        return shown(row.get(key)) + (f" ({shown(ends[0])} to {shown(ends[1])})" if key == "lip_r" and None not in ends else "")
    grid = [["", *columns.values()], *([name, *(cell(row, key) for key in columns)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*grid)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in grid)


def still_scores(bench: Bench, chunk: int) -> dict:
    """What the clips' first pictures reach, standing still, so far as it is about pictures: SSIM likes it."""
    frames = bench.clips.frames
    found = score(np.broadcast_to(frames[:, :1], frames.shape), bench, chunk)[0]
    return {f"{key}{end}": found[f"{key}{end}"] for key in ("ssim", "psnr_db", "frechet", "movement", "identity_distance") for end in ("", "_lo", "_hi") if f"{key}{end}" in found}


@torch.no_grad()
def flow_loss(dit, latents: Latents, sound: bool, levels: tuple[float, ...] = (100, 300, 500, 700, 900), batch_size: int = 16) -> np.ndarray:
    """Flow-matching loss of every clip on a fixed grid of noise levels with fixed noise: (n,). Compare models on the same split."""
    def one(index: torch.Tensor) -> torch.Tensor:
        batch = latents.batch(index).to(dit.device)
        batch = batch if sound else batch.silent()
        v = denoiser(dit, batch)
        total = 0.0
        for t in levels:
            eps = clip_noise([1000 * int(i) + int(t) for i in index], batch.z.shape[1:]).to(dit.device)
            t = torch.full((len(index),), float(t), device=dit.device)
            with at_speed(dit):
                made = v(flow.add_noise(batch.z, eps, t), t)
            error = (made - flow.velocity(batch.z, eps)).square() * batch.weight
            total = total + error.mean((1, 2, 3, 4)) / batch.weight.mean((1, 2, 3, 4))
        return (total / len(levels)).cpu()
    progress, out = Progress(len(latents), "flow loss"), []
    for index in torch.arange(len(latents)).split(batch_size):
        out.append(ranks.spread(index, one))
        progress.step(len(index))
    return torch.cat(out).numpy()
