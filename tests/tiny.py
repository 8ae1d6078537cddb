"""Tiny networks and data for tests: the real classes, a few numbers wide, with nothing left at zero."""
from types import SimpleNamespace

import torch

from tmlib.dit import WanDiT
from tmlib.latents import Latents

WAN_VAE = dict(base_dim=8, num_res_blocks=0)                # an AutoencoderKLWan, as shallow as it can be


def stir(net, scale=0.05, seed=0):
    """Random weights everywhere: fresh networks end in zeros, which would prove nothing."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return net


def make_dit(seed=0, **overrides):
    torch.manual_seed(seed)
    return stir(WanDiT.from_variant("smoke", text_dim=10, image_dim=12, audio_dim=6, audio_width=16, audio_hidden=24, freq_dim=32,
                                    ffn_dim=48, attention_head_dim=16, **overrides), seed=seed)


def make_latents(folder, n=4, frames=6, side=4, seed=0):
    """A split of n clips of random latents and conditions, as `encode_split` writes it."""
    from safetensors.torch import save_file
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=g)
    store = {"z": randn(n, 16, frames, side, side), "cond": randn(n, 20, frames, side, side), "audio": randn(n, frames, 4, 6),
             "image": randn(n, 3, 12), "text": randn(n, 3, 10), "prompt": torch.arange(n), "face": torch.rand(n, frames, side // 2, side // 2, generator=g),
             "weight": 1 + 3 * torch.rand(n, 1, frames, side, side, generator=g)}
    store["sway"] = torch.linalg.qr(randn(n, 16 * side * side, 2))[0].mT.reshape(n, 2, 16, side, side)
    save_file(store, folder / "latents.safetensors")
    return Latents(folder / "latents.safetensors")


def distillation(**changes):
    """Parameters of the distillation, as params.yaml has them, small."""
    p = dict(cache="per_step", rolled=False, steps=2, shift=3.0, pairs=5, pair_steps=2, pair_shift=4.0, guidance=2.0, batch=2, at_once=None, border_weight=1.0, critic_steps=3,
             regression_weight=1.0, real_ratio=0.5, chunk=3, seed=0)
    return SimpleNamespace(**{**p, **changes})
