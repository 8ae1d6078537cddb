"""Causal video codec: 4x in time, 8x in space, 16 latent channels, decodable chunk by chunk for ever.

What is special
- Video frame 0 is repeated three times in front, so every latent frame is exactly one group of four video frames and
  latent 0 holds one (Wan2.1's 1 + 4k rule) without a special case in the network.
- Underneath lies a linear codec, started from principal components; the networks add what it misses, from nothing. It draws a group
  from its own latent and the one before, the networks draw a frame from its own features and those before: what moved goes on moving.
- At 1/8 of the resolution convolutions run on the latents' clock, at finer ones on the frames' (as Wan's): what a mouth looks like
  is learnt once, not once for each frame of a group.
- Time is causal with an explicit cache: `decode(z, cache)` returns the next cache; chunk-wise == whole, bit for bit nearly.
- It trains with noise on its latents instead of a KL term (a sigma-VAE: Sun et al. 2024, LatentLM): what a generator writes is never
  quite right, and a codec that met exact latents alone makes speckles of small errors.
- `decode` and `encode` speak *normalised* latents: zero mean in each channel, unit variance over all of them together. To give every
  channel unit variance would make a small error in the strongest one, the colour of a cell, the worst thing one can see.

Shapes: video (B, 3, T, H, W) in [-1, 1], T = 4(F - 1) + 1; latents (B, 16, F, H/8, W/8).
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import UserError
from .hub import load_own, save_own

Cache = list[Tensor]
TINY = 0.03                                      # errors below it count by their square, larger ones by their size (Huber 1964)
MOTION = 4.0                                     # weight of squared frame differences: a codec that flickers makes every stream flicker
JOINS = 4.0                                      # and of those across two groups, where a codec on the latents' clock flickers most


@dataclass
class VAEConfig:
    z_dim: int = 16
    patch: int = 2                               # pixels per side that become channels at the door
    encoder: tuple[int, ...] = (32, 64, 128)     # widths from 1 / patch down to 1/8 of the resolution
    decoder: tuple[int, ...] = (48, 96, 192)
    moving: int = 6                              # channels that start as motion inside a latent frame's four frames
    blocks: int = 2                              # residual blocks per resolution
    kernel_t: int = 3                            # temporal taps at 1/8 resolution, in latents
    kernel_f: int = 1                            # and at finer ones, in frames

    def __post_init__(self):
        for name in ("encoder", "decoder"):
            widths = getattr(self, name)
            if len(widths) < 2 or self.patch * 2 ** (len(widths) - 1) != 8:
                raise UserError(f"codec.{name}: {len(widths)} widths behind patch {self.patch} do not end at 1/8 of the resolution, or begin there")


class CausalConv3d(nn.Conv3d):
    """Convolution that sees now and the past: the cache's last `kernel_t - 1` inputs, or the first input, as if it had always been."""

    def __init__(self, c_in: int, c_out: int, kernel_t: int = 1, kernel: int = 3):
        super().__init__(c_in, c_out, (kernel_t, kernel, kernel), padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor, past: "Past") -> Tensor:                     # (B, C, F, H, W)
        n = self.kernel_size[0] - 1
        return super().forward(past.extend(x, n) if n else x)


class Past:
    """Walks the caches of all causal convolutions in call order: takes the old state, notes the new one."""

    def __init__(self, old: Cache | None):
        self.old, self.new = (iter(old) if old is not None else None), []

    def extend(self, x: Tensor, n: int) -> Tensor:
        head = next(self.old) if self.old is not None else x[:, :, :1].expand(-1, -1, n, -1, -1)
        x = torch.cat([head, x], dim=2)                                       # (B, C, n + F, H, W)
        self.new.append(x[:, :, -n:].clone())                                 # a view would keep all of x
        return x


class ChannelNorm(nn.Module):
    """RMS over channels at every place: unlike GroupNorm it does not look across time, so chunks stay exact."""

    def __init__(self, c: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight


class ResBlock(nn.Module):
    def __init__(self, c: int, kernel_t: int):
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(c), CausalConv3d(c, c, kernel_t)
        self.norm2, self.conv2 = ChannelNorm(c), CausalConv3d(c, c)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), past)
        return x + self.conv2(F.silu(self.norm2(h)), past)


class Net(nn.Module):
    """Residual blocks at every resolution: at 1/8 on the latents' clock, before (encoder) or behind (decoder) it on the frames'."""

    def __init__(self, c_in: int, widths: tuple[int, ...], c_out: int, cfg: VAEConfig, up: bool):
        super().__init__()
        self.up, steps = up, (widths[::-1] if up else widths)
        last = len(steps) - 1
        taps = [cfg.kernel_t if i == (0 if up else last) else cfg.kernel_f for i in range(last + 1)]
        self.times = [4 if i == (0 if up else last - 1) else 1 for i in range(last)]                  # frames that a move joins or parts
        self.inp = CausalConv3d(c_in, steps[0], taps[0])
        self.stages = nn.ModuleList(nn.ModuleList(ResBlock(c, k) for _ in range(cfg.blocks)) for c, k in zip(steps, taps))
        self.moves = nn.ModuleList(CausalConv3d(a, 4 * t * b, kernel=1) if up else CausalConv3d(4 * t * a, b, kernel=1)
                                   for a, b, t in zip(steps, steps[1:], self.times))
        self.norm = ChannelNorm(steps[-1])
        self.out = CausalConv3d(steps[-1], c_out, 2, kernel=1) if up else CausalConv3d(steps[-1], c_out)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.inp(x, past)
        for i, blocks in enumerate(self.stages):
            for block in blocks:
                x = block(x, past)
            if i < len(self.moves):
                t = self.times[i]
                x = unfold(self.moves[i](x, past), t, 2) if self.up else self.moves[i](fold(x, t, 2), past)
        return self.out(F.silu(self.norm(x)), past)


def components(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n principal directions of x (m, ...), flattened: (d, n) orthonormal or zero, and their deviations (n,)."""
    x = x.flatten(1) - x.flatten(1).mean(0)
    values, vectors = (e[..., -n:] for e in torch.linalg.eigh(x.T @ x / len(x)))
    return vectors * (values > 1e-9), values.clamp_min(1e-6).sqrt()           # a direction without content listens to nothing


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (a, b) and bias (b,) that predict y (n, b) from x (n, a) best; directions without content get no weight."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    gram = x.T @ x / len(x)
    ridge = (1e-8 * gram.trace() / len(gram) + 1e-12) * torch.eye(len(gram)).to(gram)
    weight = torch.linalg.solve(gram + ridge, x.T @ (y - mean_y) / len(x))
    return weight, mean_y - mean_x @ weight


def fold(x: Tensor, t: int, p: int) -> Tensor:
    """t frames and p x p places become channels: (B, C, t F, p H, p W) -> (B, C t p p, F, H, W)."""
    return rearrange(x, "B C (F t) (H p) (W q) -> B (C t p q) F H W", t=t, p=p, q=p)


def unfold(x: Tensor, t: int, p: int) -> Tensor:
    """Inverse of `fold`."""
    return rearrange(x, "B (C t p q) F H W -> B C (F t) (H p) (W q)", t=t, p=p, q=p)


def whole_groups(video: Tensor) -> Tensor:
    """Frame 0 three times more in front: (B, 3, 4k + 1, H, W) -> (B, 3, 4(k + 1), H, W)."""
    B, C, T, H, W = video.shape
    if T % 4 != 1 or H % 8 or W % 8:
        raise ValueError(f"video of {T} frames, {H}x{W}: frames must be 4k + 1 and sides multiples of 8")
    return torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], dim=2)


class VideoVAE(nn.Module):
    """The miniature's codec; `wan_vae.WanVAE` gives full-size Wan weights the same methods."""

    def __init__(self, cfg: VAEConfig = VAEConfig()):
        super().__init__()
        self.cfg = cfg
        pixels = 3 * cfg.patch ** 2
        self.analysis = nn.Conv3d(768, cfg.z_dim, 1)                          # the linear codec under the networks:
        self.synthesis = CausalConv3d(cfg.z_dim, 768, kernel_t=2, kernel=1)   # principal components of 4 x 8 x 8 pixels
        self.encoder = Net(pixels, tuple(cfg.encoder), cfg.z_dim, cfg, up=False)
        self.decoder = Net(cfg.z_dim, tuple(cfg.decoder), pixels, cfg, up=True)
        for net in (self.encoder, self.decoder):                              # the networks begin as nothing at all
            nn.init.zeros_(net.out.weight), nn.init.zeros_(net.out.bias)
        self.register_buffer("mean", torch.zeros(1, cfg.z_dim, 1, 1, 1))
        self.register_buffer("std", torch.ones(1, cfg.z_dim, 1, 1, 1))
        self.register_buffer("cost", torch.ones(cfg.z_dim))                   # see `costs`

    def analyse(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) -> unnormalised latents (B, 16, F, H/8, W/8)."""
        video = whole_groups(video)
        return self.analysis(fold(video, 4, 8)) + self.encoder(fold(video, 1, self.cfg.patch), Past(None))

    def synthesise(self, z: Tensor, past: Past) -> Tensor:
        """Unnormalised latents (B, 16, F, h, w) -> video (B, 3, 4F, 8h, 8w)."""
        return unfold(self.synthesis(z, past), 4, 8) + unfold(self.decoder(z, past), 1, self.cfg.patch)

    def encode(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> normalised latents (B, 16, F, H/8, W/8), where the video is."""
        return ((self.analyse(video.to(self.mean.device)) - self.mean) / self.std).to(video.device)

    def decode(self, z: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Normalised latents of the next chunk -> its video in [-1, 1], where they are, and the cache for the chunk after.

        Without a cache the stream begins here: its first latent gives one frame, every other latent four.
        """
        past = Past(cache)
        video = self.synthesise(z.to(self.mean.device) * self.std + self.mean, past)
        return (video if cache is not None else video[:, :, 3:]).clamp(-1, 1).to(z.device), past.new

    @torch.no_grad()
    def start_linear(self, video: Tensor) -> None:
        """Begin as a good linear codec of these clips (n, 3, T, H, W): minutes of training saved.

        Principal components of a group's mean picture, and separately of what moves inside the group: one PCA for both would
        spend every channel on the standing picture, and the lips would move at 4 frames per second.
        """
        groups = fold(whole_groups(video), 4, 8)
        x = rearrange(groups.double(), "B (C t s) F h w -> (B F h w) C t s", t=4, s=64)
        still, moving = x.mean(2, keepdim=True).expand_as(x), x - x.mean(2, keepdim=True)
        n = self.cfg.moving
        (top, scale), (top_m, scale_m) = components(still, self.cfg.z_dim - n), components(moving, n)
        centre, top, scale = x.mean(0).flatten(), torch.cat([top, top_m], 1), torch.cat([scale, scale_m])
        scale = scale.sqrt()                                                  # half-whitened: strong components stay strong
        self.analysis.weight.copy_((top / scale).T.view_as(self.analysis.weight)), self.analysis.bias.copy_(-(centre @ top) / scale)
        z = Past(None).extend(self.analysis(groups), 1)                       # (B, 16, 1 + F, h, w)
        known = rearrange([z[:, :, :-1], z[:, :, 1:]], "k B D F h w -> (B F h w) (D k)").double()
        weight, bias = least_squares(known, x.flatten(1))                     # the best drawing from these latents
        self.synthesis.weight.copy_(weight.T.view_as(self.synthesis.weight)), self.synthesis.bias.copy_(bias)

    @torch.no_grad()
    def set_statistics(self, latents: Tensor) -> None:
        """Means per channel and one deviation for all, of raw latents (n, 16, F, h, w): what `encode` takes away; and `costs`."""
        self.mean.copy_(latents.mean((0, 2, 3, 4)).view_as(self.mean))
        self.std.fill_((latents - self.mean).std())
        self.cost.copy_(self.costs((latents[:4] - self.mean) / self.std))

    @torch.no_grad()
    def costs(self, z: Tensor, error: float = 0.1) -> Tensor:
        """What a small error in each channel of normalised z costs: the mean squared change of the picture, (16,), over their mean.

        Twenty times more in a channel that holds the colours of a cell than in one that holds motion.
        """
        g, before, change = torch.Generator().manual_seed(0), self.decode(z)[0], []
        for k in range(z.shape[1]):
            moved = z.clone()
            moved[:, k] += error * torch.randn(z[:, k].shape, generator=g).to(z)
            change.append((self.decode(moved)[0] - before).square().mean())
        return torch.stack(change) / torch.stack(change).mean()

    def loss(self, video: Tensor, weight: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Weighted Huber loss of frames and of their differences in space and time, squared differences in time again; weight (B, 1, T, H, W).

        noise (B, 16, F, h, w) is added to the latents in units of their deviation, so that larger latents do not make it any smaller.
        Not L1, which pulls at thousands of pixels that are nearly right as hard as at those of a wrong mouth. In time both: a sway of half
        a pixel is small everywhere, and L1's best answer to many small doubtful motions is to stand still; to the square, flicker is nothing.
        """
        z = self.analyse(video)
        std = (z - z.mean((0, 2, 3, 4), keepdim=True)).std()                  # as in `set_statistics`
        out = self.synthesise(z + noise * std, Past(None))[:, :, 3:]
        huber = lambda a, b, w: (F.smooth_l1_loss(a.float(), b.float(), reduction="none", beta=TINY) * w).mean()
        d = lambda x, dim: x.diff(dim=dim)
        edges = sum(huber(d(out, k), d(video, k), weight.narrow(k, 1, weight.shape[k] - 1)) for k in (2, 3, 4))
        joins = torch.ones(video.shape[2] - 1).index_fill_(0, torch.arange(0, video.shape[2] - 1, 4), JOINS).to(video)
        motion = ((d(out, 2) - d(video, 2)).square() * weight[:, :, 1:] * joins[:, None, None]).mean()
        pixel = huber(out, video, weight)
        return {"loss": pixel + 0.5 * edges + MOTION * motion, "pixel": pixel, "motion": motion}


def i2v_condition(vae, image: Tensor, frames: int, fill: str) -> Tensor:
    """The 20 condition channels [mask 4 | image latents 16] of a picture (B, 3, 1, H, W): (B, 20, frames, h, w).

    fill: what stands behind the picture. "grey": the latents of [image, grey, grey, ...], as Wan2.1 was trained; "repeat": the
    image's own latents in every frame, so that a small model need not fetch the looks from frame 0 by attention; "zero": nothing.
    The mask is 1 on latent frame 0, whose content is given, and 0 on all that must be made.
    """
    if fill == "grey":
        latents = vae.encode(torch.cat([image, image.new_zeros(*image.shape[:2], 4 * (frames - 1), *image.shape[3:])], dim=2))
    elif fill == "repeat":
        latents = vae.encode(image).expand(-1, -1, frames, -1, -1)
    elif fill == "zero":
        latents = F.pad(vae.encode(image), (0, 0, 0, 0, 0, frames - 1))
    else:
        raise UserError(f'condition {fill!r} is unknown; choose "grey", "repeat" or "zero"')
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], 1)


def save_vae(vae: VideoVAE, folder: Path) -> None:
    """Writes `vae.safetensors`, see `hub.save_own`."""
    save_own(Path(folder) / "vae.safetensors", vae.state_dict(), vae.cfg)


def load_vae(folder: Path) -> VideoVAE:
    """Reads what `save_vae` wrote, see `hub.load_own`."""
    return load_own(Path(folder) / "vae.safetensors", lambda **cfg: VideoVAE(VAEConfig(**cfg)), "codec")
