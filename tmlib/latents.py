"""What the DiT trains on: latents, conditions and tokens of whole splits, and the batches cut from them."""
import zlib
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Progress, UserError, atomic
from .data import Clips, box_map, per_latent, to_float
from .vae import i2v_condition


# -------------------------------------------------------------------------------------------------------- prompts
def prompt(style: str | None, mode: str | None, dim: int) -> Tensor:
    """The miniature's text encoder: one fixed random vector a word, "face <style> <mode>" -> (3, dim)."""
    words = ["face", style or "any", mode or "any"]
    g = lambda w: torch.Generator().manual_seed(zlib.crc32(w.encode()))
    return torch.stack([torch.randn(dim, generator=g(w)) for w in words])


# -------------------------------------------------------------------------------------------------------- latents
@dataclass
class Batch:
    """What the DiT trains on. B clips, F latent frames; `weight` is the loss weight per latent place."""
    z: Tensor                                    # (B, 16, F, h, w)
    cond: Tensor                                 # (B, 20, F, h, w): mask 4 | image latents 16
    audio: Tensor | None                         # (B, F, tokens, audio_dim); None: the model hears nothing
    face: Tensor                                 # (B, F, h/2, w/2) face region in token units
    weight: Tensor                               # (B, 1, F, h, w)
    text: Tensor                                 # (B, 3, text_dim)
    image: Tensor                                # (B, 17, image_dim)

    def __len__(self) -> int:
        return len(self.z)

    def each(self, fn) -> "Batch":
        return Batch(*(None if v is None else fn(v) for v in (getattr(self, f.name) for f in fields(self))))

    def repeat(self, n: int) -> "Batch":
        return self.each(lambda v: v.repeat_interleave(n, 0))

    def pick(self, index) -> "Batch":
        return self.each(lambda v: v[index])

    def to(self, device) -> "Batch":
        return self.each(lambda v: v.to(device))

    def silent(self) -> "Batch":
        """The same clips for a model that has not met sound."""
        return replace(self, audio=None)

    def keep(self, **clips: Tensor) -> "Batch":
        """Condition dropout for classifier-free guidance: zeros in place of a condition, `keep(audio=(B,) of bools)`."""
        kept = lambda x, some: x * some.to(x).view(-1, *[1] * (x.dim() - 1))
        return replace(self, **{name: kept(getattr(self, name), some) for name, some in clips.items()})

    def conditions(self) -> dict[str, Tensor | None]:
        """Keyword arguments of `WanDiT.forward`."""
        return {"text": self.text, "image": self.image, "audio": self.audio, "audio_mask": self.face}


@torch.no_grad()
def encode_split(clips: Clips, vae, encoder, conditions, p, what: str) -> dict[str, Tensor]:
    """Everything a `Batch` is cut from, for a whole split, once; p: condition (see `vae.i2v_condition`), text_dim, mouth_weight.

    vae, encoder, conditions: the miniature's or the full-size ones (`wan_vae.load_codec`, `wav2vec.load_speech`, `conditions.load_conditions`).
    """
    T, size = clips.frames.shape[1:3]
    n_latent = (T - 1) // 4 + 1
    out = {k: [] for k in ("z", "cond", "audio", "image")}
    progress = Progress(len(clips), f"encode {what}")
    for lo in range(0, len(clips), 8):
        video = to_float(clips.frames[lo:lo + 8])
        out["z"].append(vae.encode(video).cpu())
        out["cond"].append(i2v_condition(vae, video[:, :, :1], n_latent, p.condition).cpu())
        out["image"].append(conditions.tokens(video[:, :, 0]))
        out["audio"] += [encoder.tokens(clips.wave(i), 0, n_latent)[None].cpu() for i in range(lo, min(lo + 8, len(clips)))]
        progress.step(len(video))
    store = {k: torch.cat(v) for k, v in out.items()}
    cells = store["z"].shape[-1]
    store["face"] = torch.from_numpy(per_latent(box_map(clips.face, size, cells // 2)))
    store["weight"] = 1 + (p.mouth_weight - 1) * torch.from_numpy(per_latent(box_map(clips.mouth, size, cells)))[:, None]
    mode = {"speaking": "speaking", "listening": "listening", "generic": None}
    store["text"] = torch.stack([conditions.prompt(m["style"], mode[m["kind"]], p.text_dim) for m in clips.meta])
    return store


def save_latents(store: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file
    with atomic(path) as tmp:
        save_file({k: v.contiguous() for k, v in store.items()}, tmp)


class Latents:
    """One split's latents and tokens in memory; `batch(index)` cuts a `Batch`."""

    def __init__(self, path: Path):
        from safetensors.torch import load_file
        if not Path(path).exists():
            raise UserError(f"{path} is missing: run `make repro` (stage latents)")
        try:
            self.store = load_file(path)
        except Exception as e:
            raise UserError(f"{path} cannot be read ({type(e).__name__}): delete it and run `make repro` (stage latents)") from e

    def __len__(self) -> int:
        return len(self.store["z"])

    def batch(self, index) -> Batch:
        s = {k: v[index] for k, v in self.store.items()}
        return Batch(s["z"], s["cond"], s["audio"], s["face"], s["weight"], s["text"], s["image"])

    def first(self, n: int) -> "Latents":
        part = copy(self)
        part.store = {k: v[:n] for k, v in self.store.items()}
        return part

    def spread(self) -> list[list[float]]:
        """How far latents stray from their reference picture's, place by place (h, w): what `flow.reference_prior` takes as known."""
        std = (self.store["z"] - self.store["cond"][:, 4:]).square().mean((0, 1, 2)).sqrt()
        std = F.avg_pool2d(F.pad(std[None, None], (1,) * 4, mode="replicate"), 3, 1)[0, 0]            # faces elsewhere move elsewhere
        return [[round(v, 3) for v in row] for row in std.clamp_min(0.05).tolist()]

    @property
    def shape(self) -> tuple[int, ...]:
        """(16, F, h, w)"""
        return tuple(self.store["z"].shape[1:])

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        """Indices (n,) of clips, with replacement; a function of the generator's state alone, so that resuming is exact."""
        return torch.randint(len(self), (n,), generator=g)
