"""The parts of WanDiT: embedders, audio module, the two attentions and the block, with diffusers' parameter names.

Tokens travel as (B, F, S, D): S tokens in each of F latent frames. So per-frame modulation is a broadcast, and audio
attention, where each frame sees its own window only, is a reshape.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import attention as att


# Small parts, named as in diffusers

class LayerNorm32(nn.LayerNorm):
    """LayerNorm computed in float32 whatever comes in."""

    def forward(self, x):
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class RMSNorm(nn.RMSNorm):
    """RMSNorm, inside in float32, that takes its weight to x's precision (autocast, mixed checkpoints)."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).type_as(x)          # autocast on CUDA gives float32


class TwoLinear(nn.Module):
    """linear_1, activation, linear_2: time and text embedders."""

    def __init__(self, width_in, dim, act):
        super().__init__()
        self.linear_1, self.linear_2, self.act = nn.Linear(width_in, dim), nn.Linear(dim, dim), act

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x)))


class GELU(nn.Module):
    def __init__(self, width_in, width_out, approximate):
        super().__init__()
        self.proj, self.approximate = nn.Linear(width_in, width_out), approximate

    def forward(self, x):
        x = self.proj(x)
        if self.approximate == "tanh" and x.is_cuda and torch.compiler.is_compiling():  # the same curve, in half as many instructions as compilers make of it
            wide = x.float()
            return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide ** 3))).type_as(x)
        return F.gelu(x, approximate=self.approximate)


class FeedForward(nn.Module):
    """net.0.proj, GELU, net.2; diffusers has a dropout at net.1."""

    def __init__(self, width_in, hidden, width_out, approximate="tanh"):
        super().__init__()
        self.net = nn.ModuleList([GELU(width_in, hidden, approximate), nn.Identity(), nn.Linear(hidden, width_out)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class ImageEmbedder(nn.Module):
    """CLIP tokens (B, 257, image_dim) -> (B, 257, D). Exact GELU here, the tanh form everywhere else."""

    def __init__(self, image_dim, dim):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm32(image_dim), LayerNorm32(dim)
        self.ff = FeedForward(image_dim, image_dim, dim, approximate="none")

    def forward(self, x):
        return self.norm2(self.ff(self.norm1(x)))


class ConditionEmbedder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.freq_dim = c.freq_dim
        self.time_embedder = TwoLinear(c.freq_dim, c.dim, nn.SiLU())
        self.time_proj = nn.Linear(c.dim, 6 * c.dim)
        self.text_embedder = TwoLinear(c.text_dim, c.dim, nn.GELU("tanh"))
        self.image_embedder = ImageEmbedder(c.image_dim, c.dim) if c.image_dim else None

    def time(self, t, dtype):
        """t (B, 1 | F) -> temb (B, 1 | F, D) and the blocks' modulation (B, 1 | F, 6, D). The time itself never in bfloat16, as Wan2.1."""
        w = self.time_embedder.linear_1.weight
        with torch.autocast("cuda" if w.is_cuda else "cpu", enabled=False):
            temb = self.time_embedder(sinusoid(t, self.freq_dim).to(w.dtype)).to(dtype)
        return temb, self.time_proj(F.silu(temb)).unflatten(-1, (6, -1))


def sinusoid(t, width):
    """Cosines, then sines, of t at width / 2 frequencies from 1 down to 1e-4: (B, ...) -> (B, ..., width)."""
    i = torch.arange(width // 2, dtype=torch.float32, device=t.device)
    angles = t[..., None].float() * torch.exp(-math.log(10000) * i / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class AudioModule(nn.Module):
    """Audio features (B, F, tokens, audio_dim) -> audio tokens (B, F, tokens, audio_width).

    Null audio is all-zero *features*; silence is sound, whose features are not zero, so the two stay distinct.
    """

    def __init__(self, c):
        super().__init__()
        self.norm_in, self.norm_out = LayerNorm32(c.audio_dim), LayerNorm32(c.audio_width)
        self.proj = FeedForward(c.audio_dim, c.audio_hidden, c.audio_width)
        self.position = nn.Parameter(torch.zeros(c.audio_tokens, c.audio_width))         # place inside the window
        self.norms = nn.ModuleList(LayerNorm32(c.audio_width) for _ in range(c.audio_depth))
        self.mlps = nn.ModuleList(FeedForward(c.audio_width, c.audio_hidden, c.audio_width) for _ in range(c.audio_depth))

    def forward(self, x):
        h = self.proj(self.norm_in(x)) + self.position[: x.shape[2]]
        for norm, mlp in zip(self.norms, self.mlps):
            h = h + mlp(norm(h))
        return self.norm_out(h)


# Attention layers and the block

class Context(NamedTuple):
    """What every block of one forward pass shares."""

    rope_q: Tensor                                  # (2, L, D / 2) of the queries
    rope_k: Tensor                                  # (2, L', D / 2) of the keys: context first, then the queries' own
    text: Tensor | None                             # (B, tokens, dim)
    image: Tensor | None                            # (B, tokens, dim)
    audio: Tensor | None                            # (B, F, tokens, audio_width)
    audio_mask: Tensor | None                       # (B, F, S, 1)
    mask: str
    chunk: int


class Attention(nn.Module):
    """Projections with query and key RMS-normalised over the full width, before the heads are split."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(c.dim, c.dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c.dim, c.dim)])
        self.norm_q, self.norm_k = (RMSNorm(c.dim, eps=c.eps) for _ in range(2))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)                       # (..., L, D) -> (..., N, L, Dh)


class SelfAttention(Attention):
    def forward(self, x, ctx, past=None):
        """x (B, F, S, D) -> (B, F, S, D), and x's own keys before RoPE and values, for a cache.

        past: keys and values of the context (B, N, L', Dh), all of which x may see; None: x is a sequence under ctx.mask.
        """
        B, frames, S, D = x.shape
        q, k, v = self.qkv(x.flatten(1, 2))                                              # (B, L, D) each
        q = att.apply_rope(self.split(self.norm_q(q)), ctx.rope_q)                       # (B, N, L, Dh)
        k, v = self.split(self.norm_k(k)), self.split(v)
        if past is None:
            o = att.masked_attention(q, att.apply_rope(k, ctx.rope_k), v, ctx.mask, frames, ctx.chunk)
        else:
            k_all, v_all = torch.cat([past[0].to(k.dtype), k], dim=2), torch.cat([past[1].to(v.dtype), v], dim=2)
            o = att.attention(q, att.apply_rope(k_all, ctx.rope_k), v_all)
        return self.to_out[0](o.transpose(1, 2).reshape(B, frames, S, D)), k, v

    def qkv(self, x):
        """x (B, L, D) -> queries, keys and values of the same shape, before norms: `fast.fuse_qkv` makes them one product."""
        return self.to_q(x), self.to_k(x), self.to_v(x)


class CrossAttention(Attention):
    """One query, up to three sources: text + image through to_out, audio through its own projection and mask."""

    def __init__(self, c, has_audio):
        super().__init__(c)
        self.has_audio = has_audio
        if c.image_dim:
            self.add_k_proj, self.add_v_proj = nn.Linear(c.dim, c.dim), nn.Linear(c.dim, c.dim)
            self.norm_added_k = RMSNorm(c.dim, eps=c.eps)
        if has_audio:
            self.audio_k, self.audio_v = nn.Linear(c.audio_width, c.dim), nn.Linear(c.audio_width, c.dim)
            self.audio_norm_k = RMSNorm(c.dim, eps=c.eps)
            self.audio_out = nn.Linear(c.dim, c.dim)

    def forward(self, x, ctx, known=None):
        """x (B, F, S, D) -> (B, F, S, D). known: what `sources` gave for the same conditions before."""
        text, image, audio = known or self.sources(ctx)
        q = self.norm_q(self.to_q(x))                                                    # (B, F, S, D)
        y = torch.zeros_like(x)                              # no source, no contribution: not even to_out's bias
        if text or image:
            q_all = self.split(q.flatten(1, 2))                                          # (B, N, L, Dh)
            each = [att.attention(q_all, *kv).transpose(1, 2).reshape(x.shape) for kv in (text, image) if kv]     # joined before they are added: fewer copies
            y = self.to_out[0](sum(each[1:], each[0]))
        if audio:
            o = att.attention(self.split(q.flatten(0, 1)), *audio)                       # (B F, N, S, Dh): own frame only
            a = self.audio_out(o.transpose(1, 2).reshape(x.shape))
            y = y + (a if ctx.audio_mask is None else a * ctx.audio_mask.to(a.dtype))   # under autocast the mask would turn all that follows to float32
        return y

    def sources(self, ctx, remember=lambda name, tokens, compute: compute(tokens)):
        """Keys and values of text, image and audio, each (k, v) or None."""
        given = [("text", ctx.text, self.text_kv), ("image", ctx.image, self.image_kv),
                 ("audio", ctx.audio if self.has_audio else None, self.audio_kv)]
        return tuple(None if tokens is None else remember(name, tokens, kv) for name, tokens, kv in given)

    def text_kv(self, x):
        return self.split(self.norm_k(self.to_k(x))), self.split(self.to_v(x))           # (B, N, tokens, Dh) each

    def image_kv(self, x):
        return self.split(self.norm_added_k(self.add_k_proj(x))), self.split(self.add_v_proj(x))

    def audio_kv(self, x):
        x = x.flatten(0, 1)                                                              # (B F, tokens, audio_width)
        return self.split(self.audio_norm_k(self.audio_k(x))), self.split(self.audio_v(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.norm1, self.norm3 = (LayerNorm32(c.dim, c.eps, elementwise_affine=False) for _ in range(2))
        self.norm2 = LayerNorm32(c.dim, c.eps)
        self.attn1, self.attn2 = SelfAttention(c), CrossAttention(c, c.audio_dim is not None and layer % c.audio_every == 0)
        self.ffn = FeedForward(c.dim, c.ffn_dim, c.dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, c.dim))

    def forward(self, h, mod, ctx, past=None, known=None):
        """h (B, F, S, D), mod (B, 1 | F, 6, D) -> h, and the keys and values of its self-attention. Tensors in, tensors out."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table.float() + mod.float()).chunk(6, dim=2)
        # 1. self-attention
        x = torch.addcmul(shift1, self.norm1(h.float()), 1 + scale1).type_as(h)
        x, k, v = self.attn1(x, ctx, past)
        h = torch.addcmul(h.float(), x.float(), gate1).type_as(h)
        # 2. cross-attention: text, image, audio
        h = h + self.attn2(self.norm2(h.float()).type_as(h), ctx, known)
        # 3. feed-forward
        x = torch.addcmul(shift2, self.norm3(h.float()), 1 + scale2).type_as(h)
        return torch.addcmul(h.float(), self.ffn(x).float(), gate2).type_as(h), k, v
