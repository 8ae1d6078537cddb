"""The video decoder's share: its forms, each measured alone and together, and where it runs beside the DiT.

A decoder is a `wan_vae.WanVAE`, whose past the caller keeps: one decoder serves every stream measured here.
"""

import time

import torch
import torch.nn.functional as F

from . import stand_in
from .clock import measure, typical

SWITCHES = ("together", "by_frames", "channels_last", "autotune", "compile")


def decoder(switches, device, dtype, chunk=3, backend="inductor", **shape):
    """A random decoder in one of its forms. together: all latents of a chunk in one call; by_frames: 2D convolutions for 3D ones;
    channels_last: the layout of tensor cores; autotune: cuDNN tries its convolutions (for the process: `restore` ends it); compile:
    elementwise work fused."""
    vae = stand_in.random_vae(device, dtype, **shape)
    torch.backends.cudnn.benchmark = "autotune" in switches
    vae.together = chunk if "together" in switches else 1
    for conv in (m for m in vae.net.modules() if isinstance(m, torch.nn.Conv3d)):
        if "by_frames" in switches:
            conv._conv_forward = by_frames
        if "channels_last" in switches:
            conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last_3d)
    if "compile" in switches:
        vae.net.decoder.compile(backend=backend, dynamic=False)
    return vae


def by_frames(x, weight, bias):
    """A 3D convolution of padded x (B, C, T + k - 1, H, W), stride 1, as one 2D convolution over k stacked frames: cuDNN has more and faster
    kernels for these, and some of its versions have none for bfloat16 in 3D."""
    k = weight.shape[2]
    x = x.movedim(1, 2)                                                                  # (B, T + k - 1, C, H, W)
    x = torch.cat([x[:, i : x.shape[1] - k + 1 + i] for i in range(k)], 2)               # (B, T, k C, H, W)
    flat = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(flat, weight.movedim(2, 1).flatten(1, 2), bias)                         # (B T, D, H, W)
    return y.unflatten(0, x.shape[:2]).movedim(1, 2)                                     # (B, D, T, H, W)


def restore() -> None:
    torch.backends.cudnn.benchmark = False


def error(vae, reference, chunk: int, device, cells=4) -> float:
    """Relative error of two chunks of a small picture, the second from the first's cache, against the same weights in float32."""
    z = torch.randn(1, 16, 2 * chunk, cells, cells, generator=torch.Generator(device).manual_seed(2), device=device)
    made = []
    for net in (vae, reference):
        first, past = net.decode(z[:, :, :chunk])
        made.append(torch.cat([first, net.decode(z[:, :, chunk:], past)[0]], 2))
    return float((made[0] - made[1]).norm() / made[1].norm())


def timed(vae, z, n, device) -> dict:
    """Milliseconds of a chunk of latents z (1, 16, chunk, H, W) in the steady state."""
    _, past = vae.decode(z)
    for _ in range(2):
        video, past = vae.decode(z, past)
    if not video.isfinite().all() or video.std() == 0:
        raise RuntimeError("the decoder gave a picture that is constant or not finite: nothing to time")
    return typical(measure(lambda: vae.decode(z, past), n, device))


def decode_on(side, vae, x_0, past):
    """The decoder on a CUDA stream of its own, after x_0 is there; side None: in turn."""
    if side is None:
        return vae.decode(x_0, past)
    side.wait_stream(torch.cuda.current_stream())
    x_0.record_stream(side)
    with torch.cuda.stream(side):
        return vae.decode(x_0, past)


def placements(vae, next_chunk, restart, n, device) -> dict:
    """Milliseconds of a chunk and frames per second of DiT and decoder on this one device: "serial", and on a GPU "overlap", where the
    DiT makes the next chunk meanwhile; then the time to the first frames of a new stream.

    next_chunk: () -> x_0 (1, 16, chunk, H, W) of a stream in its steady state; restart: begins a new stream.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = {}
    for name, side in (("serial", None), *([("overlap", torch.cuda.Stream())] if device.type == "cuda" else [])):
        past = None
        for k in range(n + 2):                                          # two chunks fill the decoder's cache and load its kernels
            if k == 2:
                wait()
                began = time.perf_counter()
            x_0 = next_chunk()
            video, past = decode_on(side, vae, x_0, past)
        wait()
        seconds = (time.perf_counter() - began) / n
        found |= {f"{name}_ms": 1000 * seconds, f"{name}_fps": 4 * x_0.shape[2] / seconds}
    del video, past
    restart()
    return found | {"first_frames_ms": measure(lambda: vae.decode(next_chunk()), 1, device)[0]}
