"""Does a stream stay as fast and as small as it began? `python -m tmlib.soak --chunks 10000` streams for so long, and says.

Two hours of video at chunk 3; a quarter of an hour or less on a laptop, which is why it is a command and no stage of the
pipeline. Writes a JSON file: the median time of the first and of the last hundred chunks after the warm-up, and the resident
memory of all its processes then and at the end.

Machines change their speed within minutes, by more than age could cost. So age is judged by turns: chunk by chunk, the old stream's
next one and a new stream's, same weights, picture and sound. That is exact in `serial`. The other placements make chunks ahead, and
would be asked for what they made while the other stream was waited for: these are taken first, off the clock, so that the chunk
on the clock is made in it, while the other stream's stages are full and rest.
"""
import argparse
import itertools
import os
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from . import config, metrics
from .config import FPS, FRAME, Progress, UserError
from .latency import scene
from .placement import PLACEMENTS

EACH, WARMUP = 100, 100                          # chunks compared at either end; chunks before the first of them
TURNS = 300                                      # in which a chunk of the old stream and one of a new stream are timed
AHEAD = 3                                        # more chunks than any placement makes before they are asked for, at depth 1


def resident(*pids) -> int:
    """Bytes of memory that processes hold at this moment; 0 where the system does not say."""
    pages = [Path(f"/proc/{pid}/statm") for pid in pids]
    return os.sysconf("SC_PAGE_SIZE") * sum(int(page.read_text().split()[1]) for page in pages if page.exists())


def endless(streamer, picture: np.ndarray):
    """Frames of a noise that never ends, chunk by chunk."""
    piece = 0.05 * np.random.default_rng(0).standard_normal(4 * streamer.chunk * FRAME).astype(np.float32)
    return streamer.stream(picture, itertools.repeat(piece), **scene(streamer.dit, picture.shape[0] // 8))


def timed(stream) -> float:
    """Seconds that the next chunk takes."""
    began = time.perf_counter()
    next(stream)
    return time.perf_counter() - began


def in_turns(old, new, turns: int, ahead: int, progress=None) -> np.ndarray:
    """Seconds of a chunk of each stream in every turn, (turns, 2). ahead: chunks to take before, off the clock."""
    def late(stream):
        for _ in range(ahead):
            next(stream)
        return timed(stream)
    seconds = []
    for _ in range(turns):
        seconds.append([late(old), late(new)])
        if progress is not None:
            progress.step()
    return np.array(seconds)


def soak(make, picture: np.ndarray, chunks: int, turns: int = TURNS, told=lambda steps, what: None) -> dict[str, float]:
    """Numbers of a stream of `chunks` chunks, then in turns with a new one. make: () -> Streamer; chunks: at least WARMUP + 2 EACH; told: as `Progress`."""
    with make() as streamer, closing(endless(streamer, picture)) as old:
        pids = ["self", *([streamer.worker.process.pid] if streamer.worker else [])]
        seconds, memory, progress = np.zeros(chunks), {}, told(chunks, "soak")
        for i in range(chunks):
            seconds[i] = timed(old)
            if i in (WARMUP + EACH - 1, chunks - 1):
                memory[i] = resident(*pids)
            if progress is not None:
                progress.step()
        with make() as second, closing(endless(second, picture)) as new:
            for _ in range(WARMUP):
                next(new)
            pairs = in_turns(old, new, turns, 0 if streamer.placement == "serial" else AHEAD, told(turns, "in turns with a new stream"))
    before, after = memory.values()
    ms = lambda s: 1e3 * float(np.median(s))
    first, last = ms(seconds[WARMUP:WARMUP + EACH]), ms(seconds[-EACH:])
    return {"chunks": chunks, "placement": streamer.placement, "turns": turns, **metrics.paired("old_over_new", *pairs.T),
            "old_ms_p50": ms(pairs[:, 0]), "new_ms_p50": ms(pairs[:, 1]),
            "first_ms_p50": first, "last_ms_p50": last, "last_over_first": last / first,
            "thousands_ms_p50": [ms(part) for part in np.array_split(seconds[WARMUP:], max(1, chunks // 1000))],
            "resident_mb_first": before / 1e6, "resident_mb_last": after / 1e6, "grown": after / before - 1 if before else None,
            "real_time_factor": 4 * streamer.chunk * (chunks - WARMUP) / FPS / float(seconds[WARMUP:].sum())}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tmlib.soak", description="Stream for long, and compare the end with the beginning.")
    add = parser.add_argument
    add("--chunks", type=int, default=10_000, metavar="N", help="how many (default 10000: two hours of video at chunk 3)")
    add("--placement", choices=PLACEMENTS, default="two_process", help="see tmlib/placement.py (default two_process)")
    add("--models", metavar="FOLDER", help="trained models (default: data/models after `make repro`, else data/demo)")
    add("--out", metavar="FILE", help="default: data/scratch/soak.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.chunks < WARMUP + 2 * EACH:
        raise UserError(f"--chunks {args.chunks}: give at least {WARMUP + 2 * EACH}")
    import torch

    from . import talk
    torch.set_num_threads(1)                     # one device is one core
    models = talk.load_models(talk.models_folder(args.models))
    size = models.how["size"]
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    make = lambda: talk.make_streamer(models, placement=args.placement)
    found = soak(make, picture, args.chunks, told=Progress)
    out = Path(args.out or config.SCRATCH / "soak.json")
    config.save_json(out, {**found, "torch": torch.__version__, "threads": 1, "platform": sys.platform})
    print(f"{out}: in turns with a new stream, an old chunk takes {found['old_over_new']:.3f} ({found['old_over_new_lo']:.3f} to "
          f"{found['old_over_new_hi']:.3f}) of a new one's time; {found['first_ms_p50']:.1f} ms at first, {found['last_ms_p50']:.1f} ms at "
          f"last; memory {found['resident_mb_first']:.0f} MB, then {found['resident_mb_last']:.0f} MB")
    return 0


if __name__ == "__main__":
    config.cli(main)
