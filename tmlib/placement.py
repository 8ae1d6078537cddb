"""Where the two stages of a stream run: the DiT, which denoises a chunk, and the VAE, which decodes it.

    serial        one device: denoise, then decode, when the next chunk is asked for
    overlap       one device, two threads and CUDA streams: chunk i is decoded while chunk i + 1 is denoised
    two_device    the same, with the VAE on another device of this process
    two_process   the VAE in a process of its own, see `two_process`

- Stages are plain iterators of `Chunk`s. `ahead` lets one run in a thread of its own, a bounded number of chunks in advance:
  a slow consumer stops the decoder, and a waiting decoder stops the DiT. Nothing piles up and nothing is dropped.
- Between CUDA streams a chunk travels with an event: the next stage's stream waits for it, the host never does.
- All placements make the same frames, bit for bit, given the same kernels and as many threads for each of torch's operations.
- `by_latent` gives a chunk away in parts, for those who cannot wait for the whole: the same frames, but for how convolutions of another length round.
"""

import threading
import time
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from .config import FRAME, STRIDE, UserError

PLACEMENTS = ("serial", "overlap", "two_device", "two_process")


@dataclass
class Chunk:
    """A chunk on its way. Sound and picture stay together by `frame`, a whole number: frame / 16 seconds into the stream."""
    index: int                                  # in the stream
    frame: int                                  # the stream's number of its first video frame
    opens: bool                                 # the first of a picture: the decoder begins anew
    last: bool = True                           # of its chunk's parts, see `by_latent`
    listening: bool = False                     # made with the listening prompt
    wave: np.ndarray | None = None              # (1000 t,) its own sound, with the silence that stands for what came late
    latents: Tensor | None = None               # (1, 16, chunk, H, W) until decoded
    ready: torch.cuda.Event | None = None       # when the latents are, on a GPU
    frames: np.ndarray | None = None            # uint8 (t, H, W, 3) once decoded
    state: object = None                        # of the DiT's stage after it, in a resumable stream
    past: list | None = None                    # the decoder's cache after it, likewise
    marks: dict[str, tuple[float, float]] = field(default_factory=dict)     # stage -> began, ended: time.perf_counter()


@contextmanager
def mark(chunk: Chunk, stage: str):
    """Notes when a stage began and ended. On a GPU: when the host had handed the work over."""
    began = time.perf_counter()
    yield
    chunk.marks[stage] = began, time.perf_counter()


def ahead(items, depth: int = 1, device=None, stage: str = "dit"):
    """Iterate `items` in a thread of its own, at most `depth` of them made before they are asked for.

    What `items` raises is raised here, behind what came before it. Closing this generator closes `items`, after the one in
    the making. device: a GPU, on which the thread has the CUDA stream of this stage.
    """
    done, room, stopped = SimpleQueue(), threading.Semaphore(depth), threading.Event()

    def work():
        try:
            with own_stream(device, stage):
                while room.acquire() and not stopped.is_set():
                    done.put((next(items), None))
                items.close()
        except BaseException as error:                       # StopIteration too: the end is told like any error
            done.put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = done.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        thread.join(0.5)


def by_latent(chunks):
    """Chunks of latents -> the same, one latent frame at a time: each can be decoded and shown before the next. What is known after a chunk stays with its last part."""
    with closing(chunks):
        for chunk in chunks:
            count, frame = chunk.latents.shape[2], chunk.frame
            for k in range(count):
                opens, last = chunk.opens and k == 0, k == count - 1
                begin, frame = frame, frame + (1 if opens else STRIDE)
                yield replace(chunk, frame=begin, opens=opens, last=last, latents=chunk.latents[:, :, k:k + 1], state=chunk.state if last else None,
                              wave=chunk.wave[(begin - chunk.frame) * FRAME:(frame - chunk.frame) * FRAME], marks=dict(chunk.marks))


def own_stream(device, stage: str):
    if device is None or torch.device(device).type != "cuda":
        return nullcontext()
    stream = cuda_stream(torch.device(device), stage)
    stream.wait_stream(torch.cuda.default_stream(device))    # weights may still be on their way
    return torch.cuda.stream(stream)


@lru_cache
def cuda_stream(device: torch.device, stage: str) -> torch.cuda.Stream:
    """One for each stage and device, for good: torch keeps freed memory for each stream that ever used it, and a call takes back its answers, in a new thread each time."""
    return torch.cuda.Stream(device)


def ready(tensor: Tensor) -> torch.cuda.Event | None:
    """An event after all that this thread's CUDA stream was given so far; None for a tensor elsewhere."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


def received(chunk: Chunk, device) -> Tensor:
    """A chunk's latents on `device`, for this thread's CUDA stream: it waits for them, the host does not."""
    if chunk.ready is not None:
        stream = torch.cuda.current_stream(chunk.latents.device)
        stream.wait_event(chunk.ready)
        chunk.latents.record_stream(stream)                  # or its memory could be given away too early
    return chunk.latents.to(device, non_blocking=torch.device(device).type == "cuda")      # onto a CPU the host must wait: it reads them at once


@torch.no_grad()
def decoded(chunks, vae, save: bool = False, past=None):
    """Chunks of latents -> the same with frames. past: the decoder's cache to begin with; save: keep it with each chunk."""
    device = device_of(vae)
    with closing(chunks):                                    # a failure here ends the stage before at once
        for chunk in chunks:
            with clearly(f"decoding chunk {chunk.index}"), mark(chunk, "vae"):
                video, past = vae.decode(received(chunk, device), None if chunk.opens else past)
                chunk.frames, chunk.latents = to_frames(video), None
            if save and chunk.last:
                chunk.past = past                            # decoders never change a cache that they gave
            yield chunk


@contextmanager
def clearly(doing: str, mend: str = "take a smaller picture or chunk, or another placement; all frames delivered before are valid"):
    """No memory left -> UserError that says what could not be done, and what may mend it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:             # torch.OutOfMemoryError is a RuntimeError; on a CPU it has no class
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise UserError(f"out of memory when {doing}: {mend}") from error


def device_of(vae) -> torch.device:
    parameters = getattr(vae, "parameters", lambda: iter(()))()
    return next((p.device for p in parameters), torch.device("cpu"))


def to_frames(video: Tensor) -> np.ndarray:
    """float (1, 3, T, H, W) in [-1, 1] -> uint8 numpy (T, H, W, 3)."""
    return ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
