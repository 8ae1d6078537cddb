"""What a measurement runs on where the public weights are not at hand: networks and conditions of the exact shape, all random.

Speed does not depend on the values of weights, as long as none are zero: zeros run faster than real data. Everything is drawn on
the device, tensor by tensor, from seeds: 18 B parameters never exist twice, and never on the host.
"""

import torch

from . import attention as att
from . import plan, weights
from .dit import WanDiT


def random_dit(variant: str, device, dtype, seed=0, **overrides) -> WanDiT:
    """The variant with every weight alive, in the precisions of `WanDiT.from_pretrained`; layer i is the same at any depth."""
    with torch.device("meta"):
        dit = WanDiT.from_variant(variant, **overrides)
    generator, wanted = torch.Generator(device).manual_seed(seed), dict(dit.named_parameters())
    for name, p in wanted.items():
        scale = 0.02 if p.ndim == 1 else p.shape[-1] ** -0.5 if "table" in name else p[0].numel() ** -0.5
        drawn = torch.randn(p.shape, generator=generator, device=device) * scale
        weights.put(dit, wanted, name, drawn + 1 if p.ndim == 1 and name.endswith("weight") else drawn, dtype, variant)
    return dit.eval().requires_grad_(False)


def random_vae(device, dtype, seed=0, **shape):
    """Wan's codec, a `wan_vae.WanVAE` without its encoder. Raises ImportError without diffusers. shape: of AutoencoderKLWan, by default Wan2.1's."""
    from diffusers import AutoencoderKLWan

    from .wan_vae import WanVAE
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(seed)
        net = AutoencoderKLWan(**shape)
    net.encoder = None
    return WanVAE(torch.nn.Module.to(net, dtype)).eval().requires_grad_(False)


class Scene:
    """Random conditions of one stream, on the device: fixed picture, words and face; sound and noise anew for every chunk."""

    def __init__(self, c, rows, columns, chunk, device, seed=1):
        self.generator, self.chunk = torch.Generator(device).manual_seed(seed), chunk
        self.shape = (1, 16, chunk, rows * c.patch_size[1], columns * c.patch_size[2])
        self.cond = self.randn(1, c.in_channels - 16, att.WINDOW, *self.shape[3:])
        self.text, self.image = self.randn(1, plan.TEXT, c.text_dim), self.randn(1, plan.IMAGE, c.image_dim) if c.image_dim else None
        self.sound = (1, chunk, c.audio_tokens, c.audio_dim) if c.audio_dim else None
        self.mask = torch.rand(1, chunk, rows, columns, device=device, generator=self.generator) if c.audio_dim else None

    def randn(self, *shape):
        return torch.randn(shape, device=self.generator.device, generator=self.generator)

    def next(self, chain):
        """x_0 (1, 16, chunk, H, W) of the chain's next chunk."""
        audio = self.randn(*self.sound) if self.sound else None
        return chain.next(lambda step: self.randn(*self.shape), text=self.text, image=self.image, audio=audio, audio_mask=self.mask)
