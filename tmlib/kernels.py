"""Which kernel attends, in the whole process: torch's own, or FlashAttention-3.

- A choice is made before compilation, which settles it.
- torch's kernels are held against one another by `timing.attention_kernels`; FlashAttention-3 is for Hopper, and comes with a package of its own, fa3-fwd.
  It has a form in e4m3, which only the forms of a model that have e4m3 anyway should take.
"""

import math
import threading
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention as att
from .config import UserError

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max                  # 448
ATTENTIONS = ("flash", "cudnn", "mem_efficient", "math")                              # of torch
FLASH3 = ("flash3", "flash3_fp8")                 # FlashAttention-3, for Hopper, from a package of its own: bfloat16, and with operands in e4m3


def use_attention(name: str) -> None:
    """Let scaled dot-product attention choose this kernel only ("auto": any). Before compilation, which settles the choice."""
    if name not in (*ATTENTIONS, *FLASH3, "auto"):
        raise UserError(f"attention kernel {name!r} is unknown; choose one of auto, {', '.join(ATTENTIONS + FLASH3)}")
    if name in FLASH3 and find_spec("fa3_fwd") is None:
        raise UserError(f"attention kernel {name!r} needs the package fa3-fwd: pip install fa3-fwd")
    _enable([name] if name in ATTENTIONS else ATTENTIONS)
    att.long_attention = partial(flash3, low=name.endswith("fp8")) if name in FLASH3 else None


@contextmanager
def any_attention():
    """All kernels for a while, whatever `use_attention` chose; of several threads at a time the last to leave goes back to that."""
    global _inside, _chosen
    with _lock:
        if not _inside:
            _chosen = [getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")() for kernel in ATTENTIONS]
            _enable(ATTENTIONS)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _enable([kernel for kernel, on in zip(ATTENTIONS, _chosen) if on])


_lock, _inside, _chosen = threading.Lock(), 0, ()


def _enable(kernels) -> None:
    for kernel in ATTENTIONS:
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(kernel in kernels)


@contextmanager
def low_attention(keys: int):
    """For a while, attention to more keys than that is `e4m3_attention`: to see what it costs."""
    before = att.long_attention, att.LONG
    att.long_attention, att.LONG = e4m3_attention, keys
    try:
        yield
    finally:
        att.long_attention, att.LONG = before


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def e4m3_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention (B, N, L, D) rounded as FlashAttention-3 rounds it in e4m3, in plain steps and summed in float32: queries, keys and values, and the
    weights of the sum, of which the largest is 256."""
    low = lambda x: x.float().clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float()
    s = low(q) @ low(k).mT / math.sqrt(q.shape[-1])                                      # (B, N, L, L')
    p = 256 * (s - s.amax(-1, keepdim=True)).exp()
    o = low(p) @ low(v) / p.sum(-1, keepdim=True)
    return o if q.dtype == E4M3 else o.type_as(q)


def flash3(q: Tensor, k: Tensor, v: Tensor, low: bool = False) -> Tensor:
    """Attention of many queries (B, N, L, D) to many keys (B, N, L', D) by FlashAttention-3. low: in e4m3 as they are, without scales: queries and keys are
    RMS-normalised, and values of a network's inside are far from 448."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                     # (B, L, N, D), as the kernel has it
    if low:
        return _flash3(*(x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3) for x in (q, k, v))).to(q.dtype).transpose(1, 2)
    return _flash3(q, k, v).transpose(1, 2)


@torch.library.custom_op("tmlib::flash3", mutates_args=())
def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel, (B, L, N, D) -> (B, L, N, D), bfloat16 for e4m3: opaque to compilers. Elsewhere than on CUDA the same in plain steps."""
    if q.is_cuda:
        import fa3_fwd._C  # noqa: F401  its operators are torch's from here on
        return torch.ops.fa3_fwd.fwd(q, k, v, num_splits=1)[0]
    plain = e4m3_attention if q.dtype == E4M3 else F.scaled_dot_product_attention
    o = plain(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return o.to(torch.bfloat16 if q.dtype == E4M3 else q.dtype).contiguous()


@_flash3.register_fake
def _(q, k, v):
    return torch.empty(q.shape, dtype=torch.bfloat16 if q.dtype == E4M3 else q.dtype, device=q.device)
