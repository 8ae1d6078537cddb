"""Wan2.1's video codec at full size: diffusers' AutoencoderKLWan with the methods of the miniature's `vae.VideoVAE`.

What is special
- `encode` and `decode` speak normalised latents, by the configuration's `latents_mean` and `latents_std`, in float32 whatever the
  network's dtype, in the very order of operations of diffusers' pipeline, and give them where their input was.
- diffusers keeps the decoder's past inside the module and forgets it after each clip; here the caller owns it, a plain list of
  tensors: one module serves any number of streams, and a stream may go on in another process.
- Exact: one latent frame at a time is how diffusers decodes a whole clip too. `together` latents a call are fewer, larger
  kernels for as much more memory, equal up to rounding.

Shapes: video (B, 3, T, H, W) in [-1, 1], T = 4(F - 1) + 1; latents (B, 16, F, H/8, W/8).
"""
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import UserError
from .hub import find_part, linked, load_part, read_json
from .vae import Cache, VideoVAE, load_vae

FIXED = {"z_dim": 16, "patch_size": None, "is_residual": False, "in_channels": 3, "out_channels": 3}      # Wan2.1, not 2.2
FIRST = "Rep"                                    # diffusers' note in an upsampler's slot: latent 0 went through, as one frame


class WanVAE(nn.Module):
    """Wraps an AutoencoderKLWan. together: latent frames per call of the decoder, after a stream's first."""

    def __init__(self, net, together: int = 1):
        super().__init__()
        self.net, self.together = net, together
        self.slots = sum(isinstance(m, nn.Conv3d) for m in net.decoder.modules())        # an upper bound: shortcuts keep no past
        per_channel = lambda values: torch.tensor(values, dtype=torch.float32, device=net.device).view(1, -1, 1, 1, 1)
        self.register_buffer("mean", per_channel(net.config.latents_mean), persistent=False)
        self.register_buffer("scale", 1 / per_channel(net.config.latents_std), persistent=False)
        self.register_buffer("cost", torch.ones(1, device=net.device), persistent=False)         # all channels count alike, as Wan2.1 was trained

    def encode(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> normalised latents (B, 16, F, H/8, W/8), the posterior's mode, float32."""
        T, H, W = video.shape[2:]
        if T % 4 != 1 or H % 8 or W % 8:         # diffusers would leave frames out, silently
            raise ValueError(f"video of {T} frames, {H}x{W}: frames must be 4k + 1 and sides multiples of 8")
        raw = self.net.encode(video.to(self.net.device, self.net.dtype)).latent_dist.mode().float()
        return ((raw - self.mean) * self.scale).to(video.device)

    def decode(self, z: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Normalised latents of the next chunk -> its video in [-1, 1], float32, and the cache for the chunk after.

        Without a cache the stream begins here: its first latent gives one frame, every other latent four. The cache given is
        left as it was. Its size is the same from the second latent on; the upsamplers' notes after the first are empty tensors.
        """
        home, z = z.device, z.to(self.net.device)
        z = self.net.post_quant_conv((z.float() / self.scale + self.mean).to(self.net.dtype))
        if cache is None:
            past, parts = [None] * self.slots, [z[:, :, :1], *z[:, :, 1:].split(self.together, 2)]
        else:
            past, parts = [t if t.numel() else FIRST for t in cache], z.split(self.together, 2)
        frames = []
        for i, part in enumerate(p for p in parts if p.shape[2]):
            used = [0]                           # the decoder counts here the slots it has filled
            frames.append(self.net.decoder(part, feat_cache=past, feat_idx=used, first_chunk=cache is None and i == 0))
        new = [z.new_zeros(0) if isinstance(t, str) else t for t in past[:used[0]]]
        return torch.cat(frames, 2).float().clamp(-1, 1).to(home), new                    # (B, 3, 4F or 4F - 3, H, W)


def load_wan_vae(source, dtype=torch.float32, device="cpu") -> WanVAE:
    """The codec of a diffusers folder ("vae/" inside, or itself) or hub id; UserError names the file that is missing or unfit."""
    from diffusers import AutoencoderKLWan
    folder = find_part(source, "vae")
    config = read_json(folder / "config.json")
    if (name := config.get("_class_name")) != "AutoencoderKLWan":
        raise UserError(f"{folder / 'config.json'}: is of {name}, not of AutoencoderKLWan; give Wan2.1's codec")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{folder / 'config.json'}: {name} = {config[name]!r}, Wan2.1's codec has {value!r}; give that one")
    if len(config.get("dim_mult", (1, 2, 4, 4))) != 4 or sum(config.get("temperal_downsample", (0, 1, 1))) != 2:
        raise UserError(f"{folder / 'config.json'}: does not compress 4 times in time and 8 times in space; give Wan2.1's codec")
    net = load_part(AutoencoderKLWan, folder, dtype, device, low_cpu_mem_usage=False)         # else diffusers asks for accelerate
    return WanVAE(net).eval()


def load_codec(folder, device="cpu", dtype=torch.float32) -> VideoVAE | WanVAE:
    """The codec of a folder of models: the miniature's own, always float32, or the pretrained one that its vae.safetensors links to."""
    how = linked(Path(folder) / "vae.safetensors")
    return load_wan_vae(how["source"], dtype, device) if how else load_vae(folder).to(device)
