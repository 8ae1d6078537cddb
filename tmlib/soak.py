"""Does a stream stay as fast and as small as it began? `python -m tmlib.soak --chunks 10000` streams for so long, and says.

Two hours of video at chunk 3; a quarter of an hour or less on a laptop, which is why it is a command and no stage of the
pipeline. Writes a JSON file: the median time of the first and of the last hundred chunks after the warm-up, and the resident
memory of all its processes then and at the end. Machines change their speed within minutes, so a new stream is begun right
behind the old one: what its hundred chunks take less is what age costs.
"""
import argparse
import itertools
import os
import sys
import time
from pathlib import Path

import numpy as np

from . import config
from .config import Progress, UserError
from .latency import scene
from .placement import PLACEMENTS
from .sound import FRAME

EACH, WARMUP = 100, 100                          # chunks compared at either end; chunks before the first of them


def resident(*pids) -> int:
    """Bytes of memory that processes hold at this moment; 0 where the system does not say."""
    pages = [Path(f"/proc/{pid}/statm") for pid in pids]
    return os.sysconf("SC_PAGE_SIZE") * sum(int(page.read_text().split()[1]) for page in pages if page.exists())


def soak(streamer, picture: np.ndarray, chunks: int, progress=None) -> dict[str, float]:
    """Numbers of a stream of `chunks` chunks of a noise that never ends. chunks: at least WARMUP + 2 EACH."""
    piece = 0.05 * np.random.default_rng(0).standard_normal(4 * streamer.chunk * FRAME).astype(np.float32)
    pids = ["self", *([streamer.worker.process.pid] if streamer.worker else [])]

    def timed(n: int):
        """Seconds of each of the first n chunks of a stream, and its memory after the first hundred and at the end."""
        seconds, memory, began = np.zeros(n), {}, time.perf_counter()
        stream = streamer.stream(picture, itertools.repeat(piece), **scene(streamer.dit, picture.shape[0] // 8))
        for i, _ in zip(range(n), stream):
            now = time.perf_counter()
            seconds[i], began = now - began, now
            if i in (WARMUP + EACH - 1, n - 1):
                memory[i] = resident(*pids)
            if progress is not None:
                progress.step()
        stream.close()
        return seconds, list(memory.values())

    seconds, (before, after) = timed(chunks)
    fresh, _ = timed(WARMUP + EACH)
    first, last, new = (1e3 * float(np.median(part)) for part in (seconds[WARMUP:WARMUP + EACH], seconds[-EACH:], fresh[-EACH:]))
    return {"chunks": chunks, "placement": streamer.placement, "first_ms_p50": first, "last_ms_p50": last, "fresh_ms_p50": new,
            "slower": last / first - 1, "slower_than_fresh": last / new - 1,
            "thousands_ms_p50": [1e3 * float(np.median(part)) for part in np.array_split(seconds[WARMUP:], max(1, chunks // 1000))],
            "resident_mb_first": before / 1e6, "resident_mb_last": after / 1e6, "grown": after / before - 1 if before else None,
            "real_time_factor": 4 * streamer.chunk * (chunks - WARMUP) / 16 / float(seconds[WARMUP:].sum())}


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
    models = talk.load_models(Path(args.models) if args.models else talk.default_models())
    size = models.how["size"]
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    with talk.make_streamer(models, placement=args.placement) as streamer:
        found = soak(streamer, picture, args.chunks, Progress(args.chunks + WARMUP + EACH, "soak"))
    out = Path(args.out or config.SCRATCH / "soak.json")
    config.save_json(out, {**found, "torch": torch.__version__, "threads": 1, "platform": sys.platform})
    print(f"{out}: chunk {found['first_ms_p50']:.1f} ms at first, {found['last_ms_p50']:.1f} ms at last, "
          f"{found['fresh_ms_p50']:.1f} ms in a new stream behind it; "
          f"memory {found['resident_mb_first']:.0f} MB, then {found['resident_mb_last']:.0f} MB")
    return 0


if __name__ == "__main__":
    config.cli(main)
