"""WanDiT: Wan2.1's video transformer, parameter for parameter, with an audio path grown into its cross-attention.

- Names and maths are those of diffusers' `WanTransformer3DModel` (T2V, and I2V with image tokens): weights go both ways.
- t is per clip (B,) or per latent frame (B, F); norms and modulation in float32, RoPE tables in float64.
- Text, image and audio share the query of the cross-attention. Each latent frame sees the audio tokens of its own time
  window only; the audio result has its own zero-initialised projection and a face mask. Without audio it *is* Wan.
- A full sequence runs under a mask; a stream runs chunk by chunk with a `KVCache`. Both give the same numbers.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from . import attention as att
from . import flow, hub, ranks, weights
from .config import UserError
from .layers import AudioModule, Block, ConditionEmbedder, Context, LayerNorm32


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a WanDiT. What is in OUR_DEFAULTS goes to tm_config.json, the rest is diffusers' config.json."""

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    in_channels: int                                # 36 for I2V: noisy 16 | mask 4 | image latents 16
    out_channels: int
    text_dim: int
    image_dim: int | None                           # None: a T2V model, without image tokens
    freq_dim: int
    audio_dim: int | None                           # width of one audio feature; None: no audio path, plain Wan
    audio_tokens: int                               # most audio tokens per latent frame
    audio_width: int                                # width of a projected audio token
    audio_hidden: int                               # width of the MLPs that project them
    audio_depth: int                                # how many residual MLPs follow the first
    audio_every: int                                # audio layers in blocks 0, n, 2n, ...
    chunk: int = 3                                  # latent frames per chunk, for the causal masks
    mask: str = "sparse_causal"                     # what a chunk of a stream sees of those before, see `attention.MASKS`
    condition: str = "grey"                         # how it takes the picture, see `vae.i2v_condition`
    prior_std: tuple | None = None                  # (rows, columns) of x_0 about the reference picture; None: plain Wan
    patch_size: tuple = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self):
        if self.prior_std is not None:
            object.__setattr__(self, "prior_std", tuple(map(tuple, self.prior_std)))     # hashable, and as JSON gives it
        if self.prior_std is not None and self.condition != "repeat":
            raise UserError(f"prior_std needs the picture on every frame: condition {self.condition!r} must be 'repeat'")
        if self.patch_size[0] != 1:
            raise UserError(f"patch_size {self.patch_size}: a patch must span one latent frame, so that audio has its own frames")
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise UserError(f"attention_head_dim {self.attention_head_dim}: RoPE needs an even number of at least 6")

    @property
    def dim(self):
        return self.num_attention_heads * self.attention_head_dim


class WanDiT(nn.Module):
    """The velocity v(x, t | text, image, audio), see `forward`. Build with `from_variant` or `from_pretrained`."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        c = self.config = config
        self.chunk = c.chunk
        self.gradient_checkpointing = False
        self.patch_embedding = nn.Conv3d(c.in_channels, c.dim, c.patch_size, c.patch_size)
        self.condition_embedder = ConditionEmbedder(c)
        self.audio_embedder = AudioModule(c) if c.audio_dim else None
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.num_layers))
        self.norm_out = LayerNorm32(c.dim, c.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(c.dim, c.out_channels * math.prod(c.patch_size))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, c.dim))
        if self.proj_out.weight.device.type != "meta":
            init_weights(self)

    def forward(self, x, t, *, text=None, image=None, audio=None, audio_mask=None, positions=None,
                mask="bidirectional", cache=None):
        """Velocity (B, out_channels, F, H, W), in x's dtype.

        x (B, in_channels, F, H, W) = [noisy 16 | mask 4 | image latents 16]; t (B,) or (B, F) in [0, 1000];
        text (B, <= 512, text_dim); image (B, 257, image_dim); audio (B, F, tokens, audio_dim), zeros = null condition;
        audio_mask (B, F, h, w), face region in token units. A source that is None is skipped.
        positions: (F,) latent frame indices for RoPE, by default 0.. or what the cache says.
        mask: one of `attention.MASKS` over chunks of `self.chunk` frames, for a full sequence.
        cache: x is the next single chunk of a stream; it attends to the cached context and itself.
        """
        self.check(x, t, text, image, audio, audio_mask, positions, cache)
        B, _, frames, H, W = x.shape
        rows, columns = H // self.config.patch_size[1], W // self.config.patch_size[2]
        if positions is None:
            positions = range(frames) if cache is None else cache.positions()
        ctx = self.context(text, image, audio, audio_mask, positions, rows, columns, mask, cache, x.device)

        seen, guess, spread = self.prior(x, t)
        if guess is not None:
            x = torch.cat([seen, x[:, 16:]], dim=1)
        h = self.patchify(x.to(self.dtype))                                              # (B, F, S, D)
        temb, mod = self.remember(cache, "time", t, lambda t: self.condition_embedder.time(t.reshape(B, -1), h.dtype), 64)
        layers = range(len(self.blocks))
        past = None if cache is None else [(cache.read(i), self.known(i, ctx, cache), cache.room(i)) for i in layers]
        h = self.trunk(h, temb, mod, ctx, past)                                          # (B, F, S, ph pw C)
        if cache is not None:
            cache.advance()
        v = self.unpatchify(h, rows, columns).to(x.dtype)                                # (B, 16, F, H, W)
        return v if guess is None else guess + spread * v

    store = staticmethod(att.store)                                                      # `fast.compile_blocks` has a faster one

    def trunk(self, h, temb, mod, ctx, past=None):
        """Blocks and head, (B, F, S, D) -> (B, F, S, ph pw C): tensors in, tensors out, so that `fast.compile_step` can take it whole.

        past, in a stream, for each block: the context's keys and values, those of text, image and audio, and where its own go.
        """
        for i, block in enumerate(self.blocks):
            if past is not None:
                context, known, room = past[i]
                h, k, v = block(h, mod, ctx, context, known)
                self.store(room, k, v)
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, mod, ctx, use_reentrant=False)[0]
            else:
                h = block(h, mod, ctx)[0]
        shift, scale = (self.scale_shift_table.float() + temb.float()[:, :, None]).chunk(2, dim=2)    # (B, 1 | F, 1, D)
        return self.proj_out(torch.addcmul(shift, self.norm_out(h.float()), 1 + scale).type_as(h))

    def prior(self, x, t):
        """See `flow.reference_prior`; the reference stands in the image channels, the last 16, of every latent frame."""
        return (None, None, None) if self.config.prior_std is None else flow.reference_prior(x[:, :16], x[:, -16:], self.std_at(x), t)

    def std_at(self, x):
        return flow.std_map(self.config.prior_std, *x.shape[-2:], x.device)

    def loss_weight(self, x, t):
        """Weight of a loss on velocities of x (B, C, F, H, W) that makes all noise levels count alike: see `flow.reference_prior`."""
        return 1.0 if self.config.prior_std is None else flow.prior_variance(x, self.std_at(x), t)

    def context(self, text, image, audio, audio_mask, positions, rows, columns, mask, cache, device):
        """Embed the conditions and place the tokens: what all blocks share."""
        def embed(name, tokens, module):
            return None if tokens is None else self.remember(cache, name, tokens, lambda x: module(x.to(self.dtype)))

        places = positions.tolist() if isinstance(positions, torch.Tensor) else list(positions)
        before = [] if cache is None else cache.context_positions(places)
        tables = [att.rope_table(p, rows, columns, self.config.attention_head_dim, device) for p in (places, before + places)]
        parts = self.condition_embedder
        tokens = [embed("text", text, parts.text_embedder), embed("image", image, parts.image_embedder),
                  embed("audio", audio, self.audio_embedder)]
        if audio_mask is not None:
            audio_mask = audio_mask.flatten(2)[..., None].to(self.dtype)                 # (B, F, S, 1)
        return Context(*tables, *tokens, audio_mask, mask, self.chunk)

    def known(self, layer, ctx, cache):
        """A block's cross-attention keys and values, computed once for each of its sources. Not in training, nor where a block must gather its weights."""
        if torch.is_grad_enabled() or ranks.WORLD > 1:
            return None
        return self.blocks[layer].attn2.sources(ctx, lambda name, tokens, kv: cache.remember((name, layer), tokens, kv))

    @staticmethod
    def remember(cache, key, source, compute, keep=1):
        return compute(source) if cache is None else cache.remember(key, source, compute, keep)

    def patchify(self, x):
        """(B, C, F, H, W) -> (B, F, S, D): the patch convolution as a matrix product, which CPUs do much faster."""
        _, ph, pw = self.config.patch_size
        x = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).permute(0, 2, 3, 5, 1, 4, 6)  # (B, F, h, w, C, ph, pw)
        return F.linear(x.flatten(4).flatten(2, 3), self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def unpatchify(self, x, rows, columns):
        """(B, F, S, ph pw C) -> (B, C, F, H, W)."""
        _, ph, pw = self.config.patch_size
        x = x.unflatten(3, (ph, pw, -1)).unflatten(2, (rows, columns))                   # (B, F, h, w, ph, pw, C)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def check(self, x, t, text, image, audio, audio_mask, positions, cache):
        """Wrong shapes get one line that names the argument."""
        c, (_, ph, pw) = self.config, self.config.patch_size
        B, C, frames, H, W = x.shape if x.ndim == 5 else (0,) * 5
        wrong = [
            (C != c.in_channels, f"x is {tuple(x.shape)}, expected (B, {c.in_channels}, F, H, W)"),
            (C and (H % ph or W % pw), f"latents of {H}x{W} do not divide into patches of {ph}x{pw}"),
            (tuple(t.shape) not in ((B,), (B, frames)), f"t is {tuple(t.shape)}, expected ({B},) or ({B}, {frames})"),
            (image is not None and not c.image_dim, "image tokens given to a model without an image embedder (image_dim None)"),
            (audio is not None and not c.audio_dim, "audio given to a model without an audio path (audio_dim None)"),
            *((s is not None and (s.ndim != 3 or s.shape[0] != B or s.shape[2] != d),
               f"{n} is {s is not None and tuple(s.shape)}, expected ({B}, tokens, {d})")
              for n, s, d in (("text", text, c.text_dim), ("image", image, c.image_dim))),
            (audio is not None and (audio.ndim != 4 or audio.shape[::3] != (B, c.audio_dim) or audio.shape[1] != frames
                                    or audio.shape[2] > c.audio_tokens),
             f"audio is {audio is not None and tuple(audio.shape)}, expected ({B}, {frames}, <= {c.audio_tokens}, {c.audio_dim})"),
            (audio_mask is not None and tuple(audio_mask.shape) != (B, frames, H // ph, W // pw),
             f"audio_mask is {audio_mask is not None and tuple(audio_mask.shape)}, expected {(B, frames, H // ph, W // pw)}"),
            (positions is not None and len(positions) != frames,
             f"{positions is not None and len(positions)} positions given for {frames} latent frames"),
            (cache is not None and not cache.fits(B, frames * (H // ph) * (W // pw)),
             f"x is {tuple(x.shape)}, but the cache is for another batch, picture size or chunk: make a new cache with new_cache"),
        ]
        for bad, line in wrong:
            if bad:
                raise UserError(f"WanDiT: {line}")

    # Streaming, building, files

    @property
    def dtype(self):
        return self.patch_embedding.weight.dtype

    @property
    def device(self):
        return self.patch_embedding.weight.device

    def new_cache(self, batch, height, width, chunk=None, memo=None):
        """An empty K/V cache for chunks of `chunk` (self.chunk) latent frames of height x width latent cells."""
        c, chunk = self.config, chunk or self.chunk
        tokens = chunk * (height // c.patch_size[1]) * (width // c.patch_size[2])
        return att.KVCache(c.num_layers, batch, c.num_attention_heads, tokens, c.attention_head_dim, chunk,
                           device=self.device, dtype=self.cache_dtype(), memo=memo, mask=c.mask)

    def cache_dtype(self):
        """That of keys and values: the weights', but under autocast on a GPU what its products give, in half the memory."""
        cuda = self.device.type == "cuda" and torch.is_autocast_enabled("cuda")
        return torch.get_autocast_dtype("cuda") if cuda else self.dtype

    @classmethod
    def from_variant(cls, name, **overrides):
        """A freshly initialised model of VARIANTS[name], fields replaced by `overrides` (DiTConfig's names); whole, see `ranks.shard`."""
        if name not in VARIANTS:
            raise UserError(f"model variant {name!r} is unknown; choose one of {', '.join(VARIANTS)}")
        return cls(weights.replace(DiTConfig(**VARIANTS[name]), overrides))

    def save_pretrained(self, folder, max_shard_bytes=weights.SHARD):
        """Write a folder that `from_pretrained` and diffusers read: config.json, tm_config.json and safetensors."""
        ours = {f: v for f, v in dataclasses.asdict(self.config).items() if f in OUR_DEFAULTS}
        wan = {f: v for f, v in dataclasses.asdict(self.config).items() if f not in OUR_DEFAULTS}
        wan["added_kv_proj_dim"] = self.config.dim if self.config.image_dim else None
        weights.write_folder(folder, wan, ours, self.state_dict(), max_shard_bytes)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu", **overrides):
        """Read a folder of diffusers' layout or of Wan2.1's own, or a hub id. overrides: our own fields, to grow audio onto a bare Wan.

        Only audio weights may be missing, and are then initialised; other missing or unexpected names -> UserError.
        dtype: of the weights, but norms, time embedder and modulation stay float32, as in diffusers. In a stage of several processes
        each holds its piece of every weight, in float32: see `ranks.shard`.
        """
        folder = hub.find_part(folder, "transformer")
        config = weights.replace(weights.read_config(folder, DiTConfig, OUR_DEFAULTS), overrides)
        with torch.device("meta"):
            model = cls(config)
        if ranks.WORLD > 1:
            model = ranks.shard(model).to_empty(device=device)
        missing = weights.load_into(model, folder, dtype, device, optional="audio")
        init_weights(model, missing)
        return model


def init_weights(model, names=None):
    """All initialisation, in one place; names: only these parameters (None = all).

    | parameter                              | value                             |
    |----------------------------------------|-----------------------------------|
    | biases; proj_out; audio_out            | 0: starts as v = 0, without audio |
    | norm weights                           | 1                                 |
    | time and text embedder                 | N(0, 0.02)                        |
    | audio position                         | N(0, 0.3): the order of sounds in |
    |                                        | a window is learnt twice as fast  |
    |                                        | as from 0.02                      |
    | scale_shift_table                      | N(0, 1 / sqrt(dim))               |
    | every other matrix                     | Xavier uniform, as Wan2.1         |
    """
    for name, param in model.named_parameters():
        if names is not None and name not in names:
            continue
        with torch.no_grad():
            p = torch.empty(param.shape, dtype=param.dtype, device=param.device)
            if name.endswith("bias") or "proj_out." in name or "audio_out." in name:
                p.zero_()
            elif "scale_shift_table" in name:
                p.normal_(std=p.shape[-1] ** -0.5)
            elif name.endswith("position"):
                p.normal_(std=0.3)
            elif "time_embedder" in name or "text_embedder" in name:
                p.normal_(std=0.02)
            elif p.ndim == 1:
                p.fill_(1.0)
            else:
                nn.init.xavier_uniform_(p.flatten(1))
            param.copy_(ranks.cut(p, param))


# Variants

OUR_DEFAULTS = dict(audio_dim=None, audio_tokens=32, audio_width=384, audio_hidden=1536, audio_depth=2, audio_every=1, chunk=3,
                    mask="sparse_causal", condition="grey", prior_std=None)
_WAN = dict(in_channels=36, out_channels=16, text_dim=4096, image_dim=1280, freq_dim=256, **OUR_DEFAULTS)
_MINI = {**_WAN, "text_dim": 32, "image_dim": 64, "audio_dim": 64, "audio_width": 128, "audio_hidden": 256, "audio_depth": 1}

VARIANTS = {
    "smoke": dict(_MINI, num_attention_heads=2, attention_head_dim=32, num_layers=2, ffn_dim=256),
    "mini": dict(_MINI, num_attention_heads=4, attention_head_dim=32, num_layers=4, ffn_dim=512),               # 1.7 M
    "small": dict(_MINI, num_attention_heads=12, attention_head_dim=64, num_layers=12, ffn_dim=3072),           # 0.14 B
    "wan-1.3b-i2v": dict(_WAN, num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960),    # 1.6 B
    "wan-i2v-14b": dict(_WAN, num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824),    # 16.4 B
    "talkingmachines-18b": dict(_WAN, audio_dim=768, num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824),
}
