"""What is timed where the public weights are not at hand: networks, conditions and streams of the exact shape, and the proof that a form is right.

- Speed does not depend on the values of weights, as long as none are zero: zeros run faster than real data. All is drawn on the
  device, tensor by tensor, from seeds: 18 B parameters never exist twice, and never on the host.
- A form is a network with some switches of `fast` on. Before it is timed, what a few of its layers make of a whole window, or a decoder of
  two chunks, is held against the same weights in float32.
"""

import gc
import math

import torch

from . import attention as att
from . import fast, flow, kernels, plan, weights
from .chain import Chain, bare
from .config import UserError
from .dit import WanDiT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1, fast.E4M3: 0.5}       # relative error above which a form is wrong, not rounded
LAYERS_CHECKED = 2
SHIFT = 5.0


# Networks

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


def random_vae(device, dtype, seed=0, encoder=False, **shape):
    """Wan's codec, a `wan_vae.WanVAE`, without its encoder unless asked for. Raises ImportError without diffusers. shape: of AutoencoderKLWan, by default Wan2.1's."""
    from diffusers import AutoencoderKLWan

    from .wan_vae import WanVAE
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(seed)
        net = AutoencoderKLWan(**shape)
    net.encoder = net.encoder if encoder else None
    return WanVAE(torch.nn.Module.to(net, dtype)).eval().requires_grad_(False)


def of_diffusers(dit: WanDiT):
    """diffusers' WanTransformer3DModel on the very tensors of `dit`, its audio path left out. Raises ImportError without diffusers."""
    from diffusers import WanTransformer3DModel
    c = dit.config
    shape = {k: getattr(c, k) for k in ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "in_channels", "out_channels",
                                        "text_dim", "image_dim", "freq_dim", "patch_size", "eps")}
    with torch.device("meta"):
        net = WanTransformer3DModel(**shape, added_kv_proj_dim=c.dim if c.image_dim else None)
    net.rope = type(net.rope)(c.attention_head_dim, c.patch_size, 1024).to(dit.device)           # tables, not weights
    net.load_state_dict({name: p for name, p in dit.state_dict().items() if "audio" not in name}, assign=True)
    return net.eval().requires_grad_(False)


# Streams

class Scene:
    """Random conditions of `frames` latent frames at a time, on the device: fixed picture, words and face; sound and noise always anew.

    c: a DiTConfig; place: rows and columns of tokens.
    """

    def __init__(self, c, place, frames, device, seed=1):
        self.generator, (rows, columns) = torch.Generator(device).manual_seed(seed), place
        self.shape = (1, 16, frames, rows * c.patch_size[1], columns * c.patch_size[2])
        self.cond = self.randn(1, c.in_channels - 16, att.WINDOW, *self.shape[3:])
        self.text, self.image = self.randn(1, plan.TEXT, c.text_dim), self.randn(1, plan.IMAGE, c.image_dim) if c.image_dim else None
        self.sound = (1, frames, c.audio_tokens, c.audio_dim) if c.audio_dim else None
        self.face = torch.rand(1, frames, rows, columns, device=device, generator=self.generator) if c.audio_dim else None

    def randn(self, *shape):
        return torch.randn(shape, device=self.generator.device, generator=self.generator)

    def conditions(self) -> dict:
        return {"text": self.text, "image": self.image, "audio": self.randn(*self.sound) if self.sound else None, "audio_mask": self.face}


class Ears:
    """In the place of a speech encoder: random tokens, others for every chunk."""

    lookahead_samples = history_samples = 0

    def __init__(self, scene: Scene):
        self.scene = scene

    def tokens(self, wave, first, n, start=0):
        return self.scene.randn(*self.scene.sound)[0]                   # (n, tokens, D)


class Stream:
    """A chain in a scene of its own. setting: chunk and steps."""

    def __init__(self, dit, setting, place, device):
        self.dit, self.setting = dit, setting
        self.scene = Scene(bare(dit).config, place, setting.chunk, device)
        self.restart()

    def restart(self):
        self.chain = None                                               # before the next one: large chunks' caches fit once
        if isinstance(self.dit, fast.Graphed):
            self.dit.forget()
        self.chain = Chain(self.dit, self.scene.cond, flow.timesteps(self.setting.steps, SHIFT), chunk=self.setting.chunk)

    def next(self):
        """x_0 (1, 16, chunk, H, W) of the next chunk."""
        return self.chain.next(lambda step: self.scene.randn(*self.scene.shape), **self.scene.conditions())

    def to_steady_state(self):
        """Chunks until positions are pinned, and two more: graphs run once as they are and are then recorded. The last one's x_0."""
        for _ in range(math.ceil(att.WINDOW / self.setting.chunk) + 2):
            x_0 = self.next()
        return x_0


# Forms, and their proof

def named(switches) -> str:
    return "+".join(switches) or "eager"


def form(args, switches, device, kernel="auto", layers=None):
    """The model with its switches on. The order matters: attention is settled before compilation."""
    gc.collect(), torch.cuda.empty_cache()                              # the form before this one must not be there any more
    torch._dynamo.reset()                                               # and compiled graphs have its attention kernel baked in
    kernels.use_attention(kernel if "attention" in switches else "auto")
    dit = random_dit(args.variant, device, DTYPES[args.dtype], args.seed, chunk=args.settings[0].chunk,
                     **({} if layers is None else {"num_layers": layers}))
    return fast.model(dit, switches, args.backend)


def shallow_latents(args, switches, kernel, place, device, exact=False):
    """Latents of a chunk that a form of a few layers makes after a whole window; exact: in float32."""
    dit = form(args, switches, device, kernel, layers=min(LAYERS_CHECKED, args.layers or LAYERS_CHECKED))
    stream = Stream(dit.float() if exact else dit, args.settings[0], place, device)         # the same weights, rounded as they are at speed
    return alive(stream.to_steady_state(), f"the check of {named(switches)}")


def two_chunks(vae, chunk: int, device, cells=4):
    """A decoder's video of two chunks of a small picture, the second from the first's cache."""
    z = torch.randn(1, 16, 2 * chunk, cells, cells, generator=torch.Generator(device).manual_seed(2), device=device)
    first, past = vae.decode(z[:, :, :chunk])
    return torch.cat([first, vae.decode(z[:, :, chunk:], past)[0]], 2)


def alive(x, what):
    wrong = "not finite" if not x.isfinite().all() else "constant" if x.float().std() == 0 else None
    if wrong:
        raise UserError(f"bench: {what} gave numbers that are {wrong}: nothing to time")
    return x


def bounded_error(made, exact, dtype, what: str) -> float:
    """Relative error of what was made in `dtype`. UserError: it is more than rounding."""
    error = float((made - exact).norm() / exact.norm())
    if not error <= BOUNDS[dtype]:
        raise UserError(f"bench: {what} is {error:.3g} away from its reference: wrong, not rounded")
    return error
