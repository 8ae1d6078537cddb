"""Faster forms of a WanDiT, and of Wan's decoder: functions that take the eager model and give back one with the same outputs.

- `fuse_qkv`: one matrix product for queries, keys and values; `compile_blocks`, `compile_step`: elementwise work fused by torch.compile;
  `to_fp8`: the large linears in e4m3, the only change whose outputs differ beyond rounding order;
  `Graphed`: steady-state passes of a stream replayed as CUDA graphs; `decoder`: the decoder's own switches;
  `autotune`: cuDNN's choice, in the whole process, as `kernels` is for attention; `model`: several of these in the order that works.
- All but `Graphed`, a wrapper, change the model in place and return it: 18 B parameters do not fit a card twice.
- Names of parameters change, so a fast model is for running, not for saving.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .kernels import E4M3, E4M3_MAX, any_attention
from .layers import SelfAttention

# Linears of a block that take e4m3. Others stay: keys and values of text and image are made once per stream, the sound's linears
# move the lips, which are the purpose; embedders, modulation and head are few FLOPs and sensitive (LongLive2 keeps them).
FP8_LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0",
              "ffn.net.0.proj", "ffn.net.2")
SERVED = ("qkv", "compile", "graphs"), ("together", "channels_last", "compile")       # switches of model and decoder in a stream for people: `talk.load_models`
PROMPTS = 3                                       # sets of conditions whose recordings a stream keeps: speaking, listening, one more


def model(dit, switches, backend="inductor"):
    """A WanDiT with switches on: "qkv", "fp8", "compile" ("persistent"), "graphs". Linears are joined before they are quantised; graphs wrap it all."""
    dit = fuse_qkv(dit) if "qkv" in switches else dit
    dit = to_fp8(dit) if "fp8" in switches else dit
    dit = compile_blocks(dit, "persistent" in switches, backend=backend) if "compile" in switches else dit
    return Graphed(dit) if "graphs" in switches else dit


# One product for queries, keys and values

class FusedSelfAttention(SelfAttention):
    """Self-attention with to_q, to_k and to_v as one: x is read once, and a wide product fills the chip better."""

    def __init__(self, plain: SelfAttention):
        nn.Module.__init__(self)                            # the parts come from `plain`: none is made here
        parts = plain.to_q, plain.to_k, plain.to_v
        with torch.device("meta"):
            self.to_qkv = nn.Linear(plain.to_q.in_features, sum(p.out_features for p in parts))
        for name in ("weight", "bias"):
            joined = torch.cat([getattr(p, name).detach() for p in parts])
            setattr(self.to_qkv, name, nn.Parameter(joined, requires_grad=plain.to_q.weight.requires_grad))
        self.heads, self.to_out, self.norm_q, self.norm_k = plain.heads, plain.to_out, plain.norm_q, plain.norm_k

    def qkv(self, x):
        return self.to_qkv(x).chunk(3, dim=-1)


def fuse_qkv(dit):
    """Block by block, so that never more than one block's weights exist twice."""
    for block in dit.blocks:
        block.attn1 = FusedSelfAttention(block.attn1)
    return dit


# Compilation

def steady(h, past) -> bool:
    """Whether a stream's context is of two chunks, as it stays. Compiled code is for this; a stream's first two chunks run as they are, for theirs would take as long to compile."""
    return past is not None and past[0][0][0].shape[2] == 2 * h.shape[1] * h.shape[2]


def compile_blocks(dit, persistent=False, **how):
    """torch.compile of the block, and of the cache's writes, once for all: layers share the graph. See `steady`. persistent: by inductor, which then also tries kernels that hold
    whole rows, of 5120 numbers and more, and keeps the faster ones."""
    trunk, how = dit.trunk, {"fullgraph": True, "dynamic": False, **({"options": {"triton.multi_kernel": 1}} if persistent else {}), **how}
    for block in dit.blocks:
        block.compile(**how)
    dit.store = torch.compile(dit.store, **how)

    def either(h, temb, mod, ctx, past=None):
        with nullcontext() if steady(h, past) else torch.compiler.set_stance("force_eager"):
            return trunk(h, temb, mod, ctx, past)

    dit.trunk = either
    return dit


def compile_step(dit, **how):
    """torch.compile of a stream's whole denoising step, K/V writes inside. See `steady`.

    For models of few layers, whose time goes into small operations: it saves the calls between blocks too, and compiles every block anew.
    """
    eager = dit.trunk
    compiled = torch.compile(eager, **{"fullgraph": True, "dynamic": False, **how})
    dit.trunk = lambda h, temb, mod, ctx, past=None: (compiled if steady(h, past) else eager)(h, temb, mod, ctx, past)
    return dit


def compiler() -> str | None:
    """The C++ compiler that torch.compile uses on a CPU, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


# FP8

def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (..., D) in e4m3, each scaled so that its largest entry is 448, and the scales (..., 1) that undo it."""
    most = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12)
    return (x.float() * (E4M3_MAX / most)).to(E4M3), most / E4M3_MAX                     # few instructions, for which these kernels wait on a GPU


class Float8Linear(nn.Module):
    """x W^T + b with operands in e4m3: one scale per token, found on the fly, and one per output channel."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)                                           # (out, in)
        self.register_buffer("scale", scale.T.contiguous())                              # (1, out)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x):
        rows, scale = quantise(x.flatten(0, -2))                                         # (L, in), (L, 1)
        return scaled_product(rows, self.weight, scale, self.scale, self.bias, x.dtype).unflatten(0, x.shape[:-1])


def scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor, dtype) -> Tensor:
    """(a scale_a) (b scale_b^T)^T + bias for a (L, in), b (out, in) in e4m3. Elsewhere than on CUDA the same sums in float32."""
    if a.is_cuda:
        bfloat = torch.bfloat16                             # what row-wise scaling gives back, whatever the model computes in
        return torch._scaled_mm(a, b.t(), scale_a, scale_b, bias.to(bfloat), out_dtype=bfloat, use_fast_accum=True).to(dtype)
    return ((a.float() @ b.float().T) * scale_a * scale_b + bias.float()).to(dtype)


def fp8_layers(block: nn.Module) -> list[str]:
    """Linears of a block that `to_fp8` replaces: those of FP8_LAYERS whose sides are multiples of 16, as the kernel wants them."""
    return [name for name, m in block.named_modules() if name in FP8_LAYERS and not (m.in_features % 16 or m.out_features % 16)]


def to_fp8(dit):
    """Large linears of the blocks in e4m3; the rest keeps its precision."""
    for block in dit.blocks:
        for name in fp8_layers(block):
            block.set_submodule(name, Float8Linear(block.get_submodule(name)))
    return dit


# CUDA graphs

def cuda_graph(run, pool):
    """Record run() without executing it: (its static output, replay, the memory pool); pool: of an earlier recording, or None."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):       # another thread may be decoding
            out = run()
    except BaseException:
        torch.cuda.set_stream(stream)                                                     # a recording that failed may leave its own behind
        raise
    return out, graph.replay, graph.pool()


class Recording(NamedTuple):
    fixed: tuple                                            # what it depends on, known by identity as long as it is held
    out: Tensor | None = None
    replay: Callable | None = None                          # None: not recorded yet, run once as it is
    held: tuple = ()                                        # results in the recordings' memory that others read


class Graphed:
    """A WanDiT for one stream whose steady-state passes are single launches.

    Once positions are pinned at the window's end, a denoising step does the same on the same buffers for ever: it is run
    once more as it is, then recorded, then replayed. What stays fixed in a recording is known by identity, as in
    `KVCache.remember`: cache, time, text, image tokens, face mask; for new ones it is recorded anew, and the recordings for the last
    PROMPTS of them are kept, whole sets of steps: the chunk's sound is embedded in the recording of the first step, from whose memory
    the other steps read its keys and values. The result of a step is overwritten by the same step of the next chunk. record: see `cuda_graph`.
    """

    def __init__(self, dit, record=cuda_graph):
        self.module, self.record = dit, record
        self.forget()

    def __getattr__(self, name):
        if name == "module":                                # not set yet, as in a copy
            raise AttributeError(name)
        return getattr(self.module, name)                   # config, chunk, device: all that a stream asks of a model

    def forget(self):
        """Free recordings, and with them the caches they write to: before another stream begins."""
        self.shapes = self.x = self.sound = self.heard = self.alias = self.pool = None
        self.recordings: dict[tuple, dict[tuple, Recording]] = {}                        # of each set of conditions, of each step

    def __call__(self, x, t, *, cache=None, audio=None, **given):
        if cache is None or cache.filled < 2 or cache.filled * cache.chunk < cache.window - cache.chunk:
            return self.module(x, t, cache=cache, audio=audio, **given)
        self.take(x, audio)
        fixed = (cache, cache.writes_to, t, *given.values())
        told, key = tuple(map(id, given.values())), tuple(map(id, fixed))
        steps = self.recordings[told] = self.recordings.pop(told, {})                       # the last used is the last to go
        while len(self.recordings) > PROMPTS:
            del self.recordings[next(iter(self.recordings))]
        known = steps.get(key)
        if known is None:
            steps[key] = Recording(fixed)                                                   # kernels load and tables fill in a first run
            return self.module(x, t, cache=cache, audio=audio, **given)
        if known.replay is None:
            pool = self.pool if any(r.replay for each in self.recordings.values() for r in each.values()) else None      # one whose graphs are gone cannot be used again
            run = lambda: self.module(self.x, t, cache=cache, audio=self.alias, **given)
            out, replay, self.pool = self.record(run, pool)
            known = steps[key] = Recording(fixed, out, replay, tuple(entries[-1] for entries in cache.memo.values()))
        else:
            cache.advance()                                                             # recording did this itself
        known.replay()
        return known.out

    def take(self, x, audio):
        """Copy the inputs to where recordings read them; other shapes start anew."""
        shapes = x.shape, audio is not None and audio.shape
        if shapes != self.shapes:
            self.shapes, self.recordings = shapes, {}
            self.x, self.sound, self.heard = torch.empty_like(x), None if audio is None else torch.empty_like(audio), None
        self.x.copy_(x)
        if audio is not self.heard:
            self.heard = audio
            self.sound.copy_(audio)
            # An object that no memo has met: a recording made now embeds the sound, those of the chunk's later steps find it done.
            self.alias = self.sound.view_as(self.sound)


# The video decoder

def decoder(vae, switches, chunk: int, backend="inductor"):
    """A `wan_vae.WanVAE` with switches on. together: all latents of a chunk in one call; by_frames: 2D convolutions for 3D ones;
    channels_last: the layout of tensor cores, and no way through float32; compile: norms fused with what follows (not in a copy, and so not in another process). For "autotune" see `autotune`."""
    vae.together = chunk if "together" in switches else 1
    for m in vae.net.decoder.modules():
        if isinstance(m, nn.Conv3d) and {"by_frames", "channels_last"} & set(switches):
            m.forward = partial(causal_conv, m, "by_frames" in switches)
        if isinstance(m, nn.Upsample) and "channels_last" in switches:
            m.forward = partial(nn.Upsample.forward, m)                                      # diffusers' goes through float32
        if isinstance(m, (nn.Conv2d, nn.Conv3d)) and "channels_last" in switches:
            m.weight.data = m.weight.data.to(memory_format=torch.channels_last if m.weight.ndim == 4 else torch.channels_last_3d)
    if "compile" in switches:
        fuse_norms(vae.net.decoder, backend)
    vae.encode, vae.decode = (partial(by_any_attention, vae, name) for name in ("encode", "decode"))         # their one head is 384 wide: neither flash nor cuDNN takes it
    return vae


def by_any_attention(vae, name, *given, **how):
    """A method of the vae's class. A function with a name, so that the vae can be sent to another process."""
    with any_attention():
        return getattr(type(vae), name)(vae, *given, **how)


class NormSiLU(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return F.silu(self.norm(x))


def fuse_norms(decoder, backend="inductor") -> None:
    """Each norm and the SiLU behind it in one kernel: 22 passes over the pictures become 3. Not the whole decoder: it breaks at the slots of
    its upsamplers, block by block and shape by shape, and takes minutes to compile."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)       # widths, sizes and layouts share the code
    for module in [m for m in decoder.modules() if hasattr(m, "nonlinearity")]:
        for name in ("norm1", "norm2", "norm_out"):
            if hasattr(module, name):
                setattr(module, name, NormSiLU(getattr(module, name)))
                getattr(module, name).compile(backend=backend, fullgraph=True, dynamic=True)
        module.nonlinearity = nn.Identity()


def causal_conv(conv, by_frames: bool, x, past=None):
    """diffusers' WanCausalConv3d, stride 1, without its copy of the whole input to put zeros around: x (B, C, T, H, W) -> (B, D, T, H, W).
    past: the frames before, as many as are known, at most those that the kernel sees.

    by_frames: as one 2D convolution over k stacked frames, for which cuDNN has more and faster kernels; some of its versions have none for
    bfloat16 in 3D. Channels last from end to end: a copy into another layout costs as much as the convolution of a narrow layer.
    """
    T, k, (side, _, above, _, before, _) = x.shape[2], conv.kernel_size[0], conv._padding
    if past is not None and before:
        x = torch.cat([past.to(x.device), x], 2)
    if x.shape[2] < T + before:                                                          # the stream begins here
        x = F.pad(x, (0, 0, 0, 0, T + before - x.shape[2], 0))
    if not by_frames:
        return F.conv3d(x, conv.weight, conv.bias, padding=(0, above, side))
    x = x.permute(0, 2, 3, 4, 1)                                                         # (B, T + k - 1, H, W, C)
    x = torch.cat([x[:, i : i + T] for i in range(k)], -1) if k > 1 else x               # (B, T, H, W, k C)
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last),
                 conv.weight.movedim(2, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last), conv.bias, padding=(above, side))
    return y.unflatten(0, (-1, T)).movedim(1, 2)                                         # (B, D, T, H, W)


def autotune(on: bool) -> None:
    """Let cuDNN try its convolutions, and keep the fastest for each shape."""
    torch.backends.cudnn.benchmark = on
