"""Clocks, and what a machine can do at most: the ceilings that a measured model is held against."""

import gc
import re
import time

import torch

from . import attention as att
from . import fast


def measure(run, n: int, device) -> list[float]:
    """Milliseconds of each of n calls: events on a GPU, without waiting in between; the clock elsewhere."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:])]
    marks = [time.perf_counter()]
    for _ in range(n):
        run()
        marks.append(time.perf_counter())
    return [1000 * (b - a) for a, b in zip(marks, marks[1:])]


def typical(ms: list[float]) -> dict[str, float]:
    p50, p95 = torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return {"ms_p50": p50, "ms_p95": p95, "n": len(ms)}


def median(run, n, device, warm=3) -> float:
    measure(run, warm, device)
    return typical(measure(run, n, device))["ms_p50"]


def held(device) -> int:
    """Bytes of tensors that are alive: on a GPU as its allocator counts them, elsewhere those that Python can reach."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)
    gc.collect()
    alive = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device == device]
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())


def ceilings(dtype, device, fp8=False) -> dict:
    """TFLOP/s of a large square matrix product of random numbers, GB/s of a copy (bytes read and written)."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    rate = 2 * n ** 3 / median(lambda: a @ b, 20, device) / 1e9
    found = {"matmul_tflops": rate, "matmul_n": n, "matmul_dtype": str(dtype).removeprefix("torch.")}
    if fp8:
        (a, scale_a), (b, scale_b), bias = fast.quantise(a), fast.quantise(b), torch.zeros(n, device=device)
        product = lambda: fast.scaled_product(a, b, scale_a, scale_b.T.contiguous(), bias, dtype)
        found["matmul_fp8_rowwise_tflops"] = 2 * n ** 3 / median(product, 20, device) / 1e9
    source = torch.randn(2 ** (30 if device.type == "cuda" else 20) // 4, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = 2 * source.nbytes / median(lambda: target.copy_(source), 20, device) / 1e6
    return found


def attention_kernels(heads, head_dim, shapes, dtype, device) -> dict[str, float | str]:
    """Milliseconds of one layer's attentions together, by kernel; a line of why for one that cannot do them all.

    shapes: (batch, queries, keys) of self-attention and of every source of the cross-attention.
    """
    randn, found = lambda *shape: torch.randn(*shape, head_dim, device=device).to(dtype), {}
    inputs = [(randn(batch, heads, q), randn(batch, heads, k), randn(batch, heads, k)) for batch, q, k in shapes]
    for kernel in fast.ATTENTIONS[:-1] if device.type == "cuda" else fast.ATTENTIONS:      # "math" would hold all scores
        fast.use_attention(kernel)
        try:
            found[kernel] = median(lambda: [att.attention(*qkv) for qkv in inputs], 20, device)
        except RuntimeError as error:
            found[kernel] = str(error).splitlines()[0][:120]
    fast.use_attention("auto")
    return found


KINDS = {"fused elementwise": "triton", "attention": "flash|fmha|sdpa|attention", "matrix products": "gemm|nvjet|cutlass|xmma|mm|linear",
         "copies": "copy|memcpy|memset|cat"}


def where_time_goes(run, device) -> dict[str, float]:
    """Share of run()'s device time by kind of kernel, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile
    spent = {}
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as prof:
        run()
    for event in prof.key_averages():
        kind = next((k for k, words in KINDS.items() if re.search(words, event.key.lower())), "the rest")
        spent[kind] = spent.get(kind, 0) + (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
    return {kind: us / sum(spent.values()) for kind, us in sorted(spent.items())}
