"""Networks that look at frames: the lip reader that measures, and the face encoder that conditions and compares.

What is special
- `LipReader` measures the mouth's three truths (opening, width, rounding) from pixels. It is a ruler, trained on renders,
  never shown to any generator; its own error on held-out renders stands beside every number that it produces.
- `FaceEncoder` stands where Wan has CLIP: 16 patch tokens and one pooled token of the reference picture. Its pooled
  feature is also the space of the identity distance and of the Frechet distance (ours; not FID).
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UserError, atomic
from .hub import find_part, link, weight_files

TRUTHS = ("opening", "width", "rounding")


def trunk(widths: tuple[int, ...]) -> nn.Sequential:
    """Stride-2 convolutions: (N, 3, H, W) -> (N, widths[-1], H / 2^n, W / 2^n)."""
    layers, c = [], 3
    for w in widths:
        layers += [nn.Conv2d(c, w, 3, stride=2, padding=1), nn.GroupNorm(8, w), nn.GELU()]
        c = w
    return nn.Sequential(*layers)


class LipReader(nn.Module):
    """Frames (N, 3, 64, 64) in [-1, 1] -> (N, 3) opening, width, rounding."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96)):
        super().__init__()
        self.trunk, self.hidden, self.out = trunk(widths), nn.Linear(widths[-1] * 64, 128), nn.Linear(128, 3)

    def forward(self, frames: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(self.trunk(at_64(frames)).flatten(1))))

    @torch.no_grad()
    def read(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) -> (B, T, 3)."""
        B, _, T = video.shape[:3]
        frames = video.movedim(2, 1).flatten(0, 1)
        return torch.cat([self(f) for f in frames.split(512)]).view(B, T, 3)


class FaceEncoder(nn.Module):
    """Frames (N, 3, 64, 64) in [-1, 1] -> 4x4 patch features and one pooled feature, trained to tell identities apart."""

    def __init__(self, identities: int, dim: int = 64, widths: tuple[int, ...] = (32, 64, 96)):
        super().__init__()
        self.trunk = trunk((*widths, dim))
        self.head = nn.Linear(dim, identities)
        self.register_buffer("world", torch.tensor([-float("inf"), 0.0]))     # the least decibels and contrast of a picture of this world: `set_world`

    def maps(self, frames: Tensor) -> Tensor:
        return self.trunk(at_64(frames))                                      # (N, dim, 4, 4)

    def features(self, frames: Tensor) -> Tensor:
        """Pooled feature (N, dim)."""
        return self.maps(frames).mean((2, 3))

    def forward(self, frames: Tensor) -> Tensor:
        """Identity logits (N, identities)."""
        return self.head(self.features(frames))

    @torch.no_grad()
    def tokens(self, frames: Tensor) -> Tensor:
        """Reference pictures (N, 3, H, W) -> image tokens (N, 17, dim): pooled first, then 16 patches."""
        maps = self.maps(frames)
        return torch.cat([maps.mean((2, 3))[:, None], maps.flatten(2).mT], 1)

    @torch.no_grad()
    def set_world(self, pictures: Tensor, copies: Tensor) -> None:
        """Remembers how well the codec copied training pictures (n, 3, H, W), and how much they hold, for `in_world`: a codec copies badly what it has not learnt."""
        quality, contrast = zip(*(copied(*both) for both in zip(pictures, copies)))
        self.world.copy_(torch.tensor([min(quality) - 1.5, min(contrast) / 2]))

    def in_world(self, picture: Tensor, copy: Tensor) -> bool:
        """Whether a picture (3, H, W) in [-1, 1], given what the codec makes of it, looks like those of the miniature's world."""
        quality, contrast = copied(picture, copy)
        return quality >= float(self.world[0]) and contrast >= float(self.world[1])


def copied(picture: Tensor, copy: Tensor) -> tuple[float, float]:
    """How like a copy is, in dB, and a picture's contrast, the deviation of its numbers."""
    return float(10 * torch.log10(4 / (picture - copy).square().mean())), float(picture.std((1, 2)).mean())


def at_64(frames: Tensor) -> Tensor:
    """Any square size -> 64x64, so that one reader serves every scale."""
    return frames if frames.shape[-1] == 64 else F.interpolate(frames, size=(64, 64), mode="area")


def encoders(source) -> None:
    """UserError if one of a public model's two encoders, UMT5 and CLIP, is not there and whole, before a stage that links to them ends well."""
    for part, beside, needs in (("text_encoder", "tokenizer", "tokenizer.json"), ("image_encoder", "image_processor", "preprocessor_config.json")):
        weight_files(find_part(source, part)), find_part(source, beside, needs)


def save_readers(lips: LipReader, face: FaceEncoder, folder: Path, pretrained: str | None = None) -> None:
    """Writes `readers.safetensors`; pretrained: where the DiT's image and text encoders lie (`conditions.load_conditions`)."""
    from safetensors.torch import save_file
    parts = {f"{name}.{k}": v.contiguous() for name, m in (("lips", lips), ("face", face)) for k, v in m.state_dict().items()}
    path = Path(folder) / "readers.safetensors"
    if pretrained:
        encoders(pretrained)
        return link(path, pretrained, parts)
    with atomic(path) as tmp:
        save_file(parts, tmp)


def load_readers(folder: Path) -> tuple[LipReader, FaceEncoder]:
    """Reads what `save_readers` wrote; UserError names the file that is missing or does not fit."""
    from safetensors import safe_open
    path = Path(folder) / "readers.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing: run `make repro`, or give a folder of trained models")
    try:
        with safe_open(path, "pt") as f:
            identities, dim = f.get_slice("face.head.weight").get_shape()
            nets = {"lips": LipReader(), "face": FaceEncoder(identities, dim)}
            for name, net in nets.items():
                net.load_state_dict({k.split(".", 1)[1]: f.get_tensor(k) for k in f.keys() if k.startswith(name + ".")})
    except Exception as e:
        raise UserError(f"{path} does not hold this project's readers ({type(e).__name__}): delete it and run `make repro`") from e
    return tuple(net.eval().requires_grad_(False) for net in nets.values())
