"""VideoUNet: a teacher of another architecture, for the question whether the distillation needs a transformer (N2).

Convolutions alone, over space and over time by turns (Ho et al. 2022, Video Diffusion Models), at two resolutions; no attention, no tokens.
What is known about a clip reaches every block as a scale and shift per latent frame. Called as `WanDiT` is, it takes the DiT's place
in training, sampling and distillation; it only knows whole clips, so it cannot stream.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import flow
from .config import UserError
from .layers import FeedForward, TwoLinear, sinusoid
from .vae import ChannelNorm


@dataclass(frozen=True)
class UNetConfig:
    text_dim: int
    image_dim: int
    audio_dim: int                               # width of one audio feature
    audio_tokens: int                            # per latent frame
    prior_std: tuple | None = None               # as WanDiT's
    widths: tuple[int, int] = (64, 128)          # channels at the latents' resolution and at half of it
    blocks: int = 2                              # on the way down and up; as many again at half resolution
    known: int = 192                             # width of what is known about a latent frame
    in_channels: int = 36                        # noisy 16 | mask 4 | image latents 16
    out_channels: int = 16

    def __post_init__(self):
        if self.prior_std is not None:
            object.__setattr__(self, "prior_std", tuple(map(tuple, self.prior_std)))          # hashable, and as JSON gives it


class ConvBlock(nn.Module):
    """Residual: space, then scale and shift, then time."""

    def __init__(self, c_in: int, c: int, known: int):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(c_in), ChannelNorm(c)
        self.space = nn.Conv3d(c_in, c, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0))
        self.film = nn.Linear(known, 2 * c)
        self.skip = nn.Conv3d(c_in, c, 1) if c_in != c else nn.Identity()

    def forward(self, x: Tensor, known: Tensor) -> Tensor:                    # (B, C, F, H, W), (B, F, known)
        scale, shift = self.film(F.silu(known)).mT[..., None, None].chunk(2, dim=1)          # (B, c, F, 1, 1)
        h = self.space(F.silu(self.norm1(x)))
        return self.skip(x) + self.time(F.silu(self.norm2(h) * (1 + scale) + shift))


class VideoUNet(nn.Module):
    """The velocity v(x, t | text, image, audio), bidirectional."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        c, (a, b), n, k = cfg, cfg.widths, cfg.blocks, cfg.known
        self.cfg = cfg
        self.time = TwoLinear(256, k, nn.SiLU())
        self.text, self.image = nn.Linear(c.text_dim, k), nn.Linear(c.image_dim, k)
        self.audio = FeedForward(c.audio_tokens * c.audio_dim, 2 * k, k)
        self.inp = nn.Conv3d(c.in_channels + 1, a, (1, 3, 3), padding=(0, 1, 1))
        widths = [(a, a)] * n + [(a, b)] + [(b, b)] * (2 * n - 1) + [(a + b, a)] + [(a, a)] * (n - 1)
        self.blocks = nn.ModuleList(ConvBlock(i, o, k) for i, o in widths)
        self.norm = ChannelNorm(a)
        self.out = nn.Conv3d(a, c.out_channels, (1, 3, 3), padding=(0, 1, 1))
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    @property
    def device(self):
        return self.inp.weight.device

    def forward(self, x: Tensor, t: Tensor, *, text: Tensor, image: Tensor, audio: Tensor, audio_mask: Tensor, mask: str = "bidirectional") -> Tensor:
        """Velocity (B, 16, F, H, W) in x's dtype; arguments as of `WanDiT.forward`, all of them needed, no other mask."""
        if mask != "bidirectional":
            raise UserError(f"VideoUNet sees whole clips only: mask {mask!r} must be 'bidirectional'")
        plain = self.cfg.prior_std is None
        seen, guess, spread = (x[:, :16], 0, 1) if plain else flow.reference_prior(x[:, :16], x[:, -16:], self.std_at(x), t)
        given = (c.to(self.inp.weight.dtype) for c in (text, image, audio))                  # full-size encoders speak bfloat16
        known = self.known(t, *given)                                                        # (B, F, known)
        face = F.interpolate(audio_mask[:, None].to(x), size=x.shape[2:], mode="nearest")    # (B, 1, F, H, W)
        h, n = self.inp(torch.cat([seen, x[:, 16:], face], 1)), self.cfg.blocks
        for block in self.blocks[:n]:
            h = block(h, known)
        fine, h = h, F.avg_pool3d(h, (1, 2, 2))
        for block in self.blocks[n:3 * n]:
            h = block(h, known)
        h = torch.cat([F.interpolate(h, size=fine.shape[2:], mode="nearest"), fine], 1)
        for block in self.blocks[3 * n:]:
            h = block(h, known)
        return guess + spread * self.out(F.silu(self.norm(h))).to(x.dtype)

    def known(self, t: Tensor, text: Tensor, image: Tensor, audio: Tensor) -> Tensor:
        """What a latent frame is told, (B, F, known): the time, words and picture in the mean, its window of sound in order."""
        clip = self.time(sinusoid(t.reshape(len(audio), -1), 256)) + (self.text(text.mean(1)) + self.image(image.mean(1)))[:, None]
        return clip + self.audio(audio.flatten(2))

    def std_at(self, x: Tensor) -> Tensor:
        return flow.std_map(self.cfg.prior_std, *x.shape[-2:], x.device)

    def loss_weight(self, x: Tensor, t: Tensor) -> Tensor | float:
        """As `WanDiT.loss_weight`."""
        return 1.0 if self.cfg.prior_std is None else flow.prior_variance(x, self.std_at(x), t)
