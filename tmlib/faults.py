"""How soon does each failure end a stream, and in which state? `python -m tmlib.faults` breaks a real one again and again, and says.

    decoder_killed   SIGKILL to the decoder's process          until the consumer has its UserError; then `resume` goes on
    dit_killed       SIGKILL to the process of DiT and sound   until the decoder's process has ended too
    sound_gone       the source of the sound raises            until the consumer has its UserError; then `resume` goes on
    out_of_memory    the decoder asks for 2^60 bytes           until the consumer, who waits for that chunk, has its UserError
    given_up         a slow consumer closes the stream         until both stages are at rest; then the next stream begins

Each may take ONE second; chunks on their way are taken without delay. All frames, before and after, must be those of an unbroken
stream. A command and no test, for what it gives are times. Writes a JSON file.
"""
import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import config, talk
from .config import FRAME, Progress, UserError
from .latency import scene

ONE, GOOD = 1.0, 3                               # seconds allowed; chunks taken before something breaks
PATIENCE = 60                                    # seconds until a process that does not end is given up


class Stage:
    """Streams of one picture and one endless noise, and the first frames that each of them must give."""

    def __init__(self, folder):
        self.folder, self.models, rng = folder, talk.load_models(folder), np.random.default_rng(0)
        side = self.models.how["size"]
        self.picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        self.piece = 0.05 * rng.standard_normal(4 * self.models.how["chunk"] * FRAME).astype(np.float32)
        self.expected = list(itertools.islice(self.begin(talk.make_streamer(self.models)), 2 * GOOD))

    def streamer(self, **changed):
        return talk.make_streamer(replace(self.models, **changed), placement="two_process", resumable=True)

    def begin(self, streamer, sound=None):
        return streamer.stream(self.picture, self.sound() if sound is None else sound, **scene(streamer.dit, self.picture.shape[0] // 8))

    def sound(self):
        return itertools.repeat(self.piece)

    def check(self, frames):
        if not all(np.array_equal(a, b) for a, b in zip(frames, self.expected)):
            raise UserError("frames differ from those of an unbroken stream")

    def go_on(self, streamer, frames, sound=None):
        more = streamer.resume(sound)
        self.check([*frames, *(chunk.frames for chunk in itertools.islice(more, 2 * GOOD - len(frames)))])
        more.close()


def until_told(stream, frames: list) -> float:
    """When the stream raised its UserError; `frames` gets what it still delivered."""
    try:
        frames.extend(stream)
    except UserError:
        return time.perf_counter()
    raise UserError("a broken stream ended as if nothing had happened")


def decoder_killed(stage: Stage) -> float:
    with stage.streamer() as streamer:
        stream = stage.begin(streamer)
        frames = list(itertools.islice(stream, GOOD))
        began = time.perf_counter()
        os.kill(streamer.worker.process.pid, signal.SIGKILL)
        took = until_told(stream, frames) - began
        stage.go_on(streamer, frames)
    return took


def sound_gone(stage: Stage) -> float:
    began = []

    def dying():
        yield from itertools.islice(stage.sound(), GOOD)
        began.append(time.perf_counter())
        raise ConnectionError("the line is dead")

    with stage.streamer() as streamer:
        frames = []
        took = until_told(stage.begin(streamer, dying()), frames) - began[0]
        stage.go_on(streamer, frames, stage.sound())
    return took


class Hungry(torch.nn.Module):
    """A codec whose decoder needs more memory than there is, after GOOD chunks."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.left = vae, GOOD

    def encode(self, video):
        return self.vae.encode(video)

    def decode(self, z, cache=None):
        self.left -= 1
        return self.vae.decode(z if self.left >= 0 else torch.empty(1 << 60, dtype=torch.uint8), cache)


def out_of_memory(stage: Stage) -> float:
    with stage.streamer(vae=Hungry(stage.models.vae)) as streamer:
        stream = stage.begin(streamer)
        frames = list(itertools.islice(stream, GOOD))
        began = time.perf_counter()
        took = until_told(stream, frames) - began
        stage.check(frames)
    return took


def given_up(stage: Stage) -> float:
    with stage.streamer() as streamer:
        stream = stage.begin(streamer)
        stage.check(itertools.islice(stream, GOOD))
        time.sleep(0.5)                                      # by now all queues are full
        began = time.perf_counter()
        stream.close()
        took = time.perf_counter() - began
        again = stage.begin(streamer)
        stage.check(itertools.islice(again, GOOD))
        again.close()
    return took


def dit_killed(stage: Stage) -> float:
    command = [sys.executable, "-m", "tmlib.faults", "--models", str(stage.folder), "--victim"]
    return killed(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))


def killed(process: subprocess.Popen) -> float:
    """Seconds from the death of a `victim` until its decoder's process has ended too."""
    try:
        if not (told := process.stdout.readline()):
            raise UserError(f"the process that was to be killed ended by itself (status {process.wait()}); what it said stands above")
        decoder, began = int(told), time.perf_counter()
        process.kill()
        while not gone(decoder):
            if time.perf_counter() - began > PATIENCE:
                raise UserError(f"the decoder's process {decoder} still runs {PATIENCE} s after the other was killed; end it by hand")
            time.sleep(0.002)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def victim(stage: Stage):
    """A stream without end that tells the number of its decoder's process, and waits to be killed."""
    with stage.streamer() as streamer:
        for i, _ in enumerate(stage.begin(streamer)):
            if i == GOOD:
                print(streamer.worker.process.pid, flush=True)


def gone(pid: int) -> bool:
    """Whether a process has ended, perhaps not yet buried."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


FAULTS = (decoder_killed, dit_killed, sound_gone, out_of_memory, given_up)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tmlib.faults", description="Break streams, and time how soon they end clearly.")
    add = parser.add_argument
    add("--times", type=int, default=10, metavar="N", help="how often each (default 10)")
    add("--models", metavar="FOLDER", help="trained models (default: data/models after `make repro`, else data/demo)")
    add("--out", metavar="FILE", help="default: data/scratch/faults.json")
    add("--victim", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Status 1 if any failure took longer than ONE second."""
    args = arguments().parse_args(argv)
    if args.times < 1:
        raise UserError(f"--times {args.times}: give at least 1")
    torch.set_num_threads(1)                     # one device is one core
    stage = Stage(talk.models_folder(args.models))
    if args.victim:
        return victim(stage)
    progress, took = Progress(args.times * len(FAULTS), "faults"), {fault.__name__: [] for fault in FAULTS}
    for _ in range(args.times):
        for fault in FAULTS:
            took[fault.__name__].append(1e3 * fault(stage))
            progress.step()
    found = {name: {"ms_p50": float(np.median(ms)), "ms_max": max(ms), "n": args.times} for name, ms in took.items()}
    config.save_json(out := Path(args.out or config.SCRATCH / "faults.json"), found)
    for name, row in found.items():
        print(f"{name:15s} {row['ms_p50']:6.0f} ms, at most {row['ms_max']:6.0f} ms")
    print(out)
    return int(max(row["ms_max"] for row in found.values()) > 1e3 * ONE)


if __name__ == "__main__":
    config.cli(main)
