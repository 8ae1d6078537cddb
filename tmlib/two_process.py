"""The VAE in a process of its own, on its own core or GPU; the DiT, the sound and the consumer stay in this one.

- Latents go by torch.distributed, NCCL between two GPUs, gloo otherwise, in a group of their own beside any other. Sends are
  asynchronous; the worker receives in one thread, decodes in a second and gives frames back in a third.
- Orders and frames go through a pipe: frames end in host memory anyway, and the death of either side shows there at once.
  (On one machine a pipe or shared memory would also carry latents, measured: 0.1 ms against gloo's 0.4 ms. Both are nothing
  beside a chunk, both are hidden by the overlap, and so the code is the same on two GPUs.)
- If the worker ends, whoever waits for it gets a UserError; if this process ends, so does the worker, whatever it is doing.
"""

import copy
import io
import os
import signal
import tempfile
import threading
import time
import weakref
from contextlib import closing, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from .config import UserError
from .placement import ahead, decoded, device_of, ready, received

JOIN_S, SETTLE_S = 600, 10                      # for the processes to meet on a busy machine; to finish what nobody takes


class Decoder:
    """A worker that decodes what `run` sends it. vae: picklable; device: the worker's; source: where latents come from."""

    def __init__(self, vae, device="cpu", source="cpu"):
        self.source, self.nccl = torch.device(source), uses_nccl(source, device)
        self.folder = tempfile.TemporaryDirectory(prefix="tmlib_")
        context = torch.multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.group, self.tag, self.sending, self.failed, self.asking = None, 0, {}, False, threading.Lock()
        how = (theirs, self.folder.name, torch.device(device), self.nccl, torch.get_num_threads())
        vae = copy.deepcopy(vae).cpu() if device_of(vae).type == "cuda" else vae              # not every machine lets processes share a card's memory
        try:
            self.process = context.Process(target=serve, args=(vae, *how), daemon=True)
            self.process.start()
        except (TypeError, AttributeError, OSError) as error:
            raise UserError(f"two_process: the VAE cannot be sent to another process ({error}); define its class in a module") from error
        theirs.close()
        self.close = weakref.finalize(self, end, self.process, self.pipe, self.folder)

    @property
    def alive(self) -> bool:
        return not self.failed and self.close.alive and self.process.is_alive()

    def connect(self):
        """Wait until the worker is there; it has been starting since `__init__`."""
        if self.group is None:
            self.answer(JOIN_S)
            self.group = join(self.folder.name, 0, self.nccl)

    def run(self, chunks, depth: int = 1, save: bool = False, past=None, blocking: bool = False):
        """`placement.decoded`, elsewhere: at most `depth` chunks are under way while one is waited for.

        blocking: the DiT waits until its latents have been received before it goes on (what overlap saves is then seen).
        """
        self.connect()
        try:
            with closing(ahead(self.sent(chunks, save, past, blocking), depth, self.source)) as sent:
                for chunk in sent:
                    yield self.collected(chunk)
        finally:
            self.settle()

    def sent(self, chunks, save, past, blocking):
        """Chunks on their way to the worker. Runs in the DiT's thread."""
        self.tell((save, blocking, packed(past)))
        try:
            for chunk in chunks:
                self.send(chunk, blocking)
                yield chunk
        finally:
            if self.alive:
                self.tell(None)

    def send(self, chunk, blocking):
        z = received(chunk, self.source if self.nccl else "cpu").contiguous()
        if self.source.type == "cuda" and not self.nccl:
            torch.cuda.current_stream(self.source).synchronize()
        self.tag += 1
        self.tell((self.tag, replace(chunk, wave=None, latents=None, ready=None, state=None), z.shape, z.dtype))
        try:
            work = self.group.send([z], 1, self.tag)
            if blocking:
                work = work.wait() and None                  # gloo's second wait for the same send would never end
        except RuntimeError as error:
            raise self.ended() from error
        self.sending[chunk.frame] = work, z                  # z must live until it has arrived
        chunk.latents = None

    def collected(self, chunk):
        """The chunk with its frames, waited for."""
        shape, marks, past = self.answer()
        chunk.frames = self.frames(shape)
        chunk.marks |= {**marks, "frames": (marks["vae"][1], time.perf_counter())}
        chunk.past = past and unpacked(past)
        work, _ = self.sending.pop(chunk.frame)
        if work is not None:
            work.wait()                                      # over long ago
        return chunk

    def frames(self, shape):
        frames = np.empty(shape, np.uint8)
        try:
            self.pipe.recv_bytes_into(frames.reshape(-1))
        except (EOFError, OSError) as error:
            raise self.ended() from error
        return frames

    def settle(self):
        """After a stream: pass over frames that nobody took, so that the next stream finds the pipe empty."""
        with suppress(UserError):
            while self.alive and (left := self.answer(SETTLE_S)) is not None:
                self.frames(left[0])
        self.sending.clear()
        if not self.alive:
            self.close()

    def tell(self, order):
        try:
            self.pipe.send(order)
        except OSError as error:
            raise self.ended() from error

    def answer(self, seconds=None):
        """The worker's next message. UserError with what went wrong there, or as soon as its process has ended."""
        found = wait([self.pipe, self.process.sentinel], seconds)
        try:
            if self.pipe not in found:
                raise EOFError
            message = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self.ended() from error
        if isinstance(message, str):
            self.failed = True
            raise UserError(message)
        return message

    def ended(self) -> UserError:
        self.failed = True
        with self.asking:                                    # both threads may notice; only one can be told how a child ended
            self.process.join(0.5)
            code = self.process.exitcode
        how = "does not answer" if code is None else f"was killed (signal {-code})" if code < 0 else f"ended (status {code})"
        script = "; a script needs `if __name__ == \"__main__\":` around what it starts" if code == 1 and self.group is None else ""
        return UserError(f"the decoder's process {how}{script}; all frames delivered before are valid, and `resume` goes on from there")


def end(process, pipe, folder):
    pipe.close()                                             # the worker's sign to leave
    process.join(0.5)
    if process.is_alive():
        process.kill()
        process.join(0.5)
    folder.cleanup()


def uses_nccl(*devices) -> bool:
    """Whether these are different GPUs; NCCL refuses two processes on one."""
    devices = [torch.device(d) for d in devices]
    return all(d.type == "cuda" for d in devices) and len({d.index or 0 for d in devices}) == len(devices)


def join(folder: str, rank: int, nccl: bool):
    """A process group of two that no other code sees, met in a file: nothing listens but gloo, on the loopback."""
    store = dist.PrefixStore("nccl" if nccl else "gloo", dist.FileStore(str(Path(folder) / "store"), 2))
    if nccl:
        return dist.ProcessGroupNCCL(store, rank, 2)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(days=7)                     # a call may be silent for long; deaths are seen otherwise
    return dist.ProcessGroupGloo(store, rank, 2, options)


def packed(cache) -> bytes | None:
    if cache is None:
        return None
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    return buffer.getvalue()


def unpacked(data: bytes | None, device="cpu"):
    return None if data is None else torch.load(io.BytesIO(data), map_location=device, weights_only=True)


# The worker

def serve(vae, pipe, folder, device, nccl, threads):
    """The worker's life: stream after stream until the pipe closes."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # Ctrl-C is for the parent, whose end is ours
    torch.set_num_threads(threads)
    try:
        vae = vae.to(device) if hasattr(vae, "to") else vae
        if device.type == "cuda":
            torch.cuda.set_device(device)
        pipe.send(())                                        # present
        group = join(folder, 1, nccl)
        while True:
            save, blocking, past = pipe.recv()
            arriving = arrived(pipe, group, device if nccl else torch.device("cpu"))
            arriving = arriving if blocking else ahead(arriving, 1, device, "receive")
            for chunk in ahead(decoded(arriving, vae, save, unpacked(past, device)), 1, device, "vae"):
                give_back(pipe, chunk)
            pipe.send(None)                                  # all of this stream
    except (EOFError, ConnectionError):
        return                                               # the other side has closed the pipe
    except UserError as error:
        pipe.send(str(error))
    except Exception as error:
        pipe.send(f"the decoder's process failed: {type(error).__name__}: {error}")


def leave_with_parent():
    wait([parent_process().sentinel])
    os._exit(1)


def arrived(pipe, group, device):
    """Chunks as they come, until the stream ends."""
    while (order := pipe.recv()) is not None:
        tag, chunk, shape, dtype = order
        chunk.latents = torch.empty(shape, dtype=dtype, device=device)
        group.recv([chunk.latents], 0, tag).wait()
        chunk.marks["latents"], chunk.ready = (chunk.marks["dit"][1], time.perf_counter()), ready(chunk.latents)
        yield chunk


def give_back(pipe, chunk):
    frames = np.ascontiguousarray(chunk.frames)
    marks = {stage: chunk.marks[stage] for stage in ("latents", "vae")}
    pipe.send((frames.shape, marks, packed(chunk.past)))
    pipe.send_bytes(frames.reshape(-1))
