"""A folder of real videos of people who talk becomes clips: `python -m tmlib.videos FOLDER --out data/clips`.

What is special
- A video's clips depend on that video alone (`footage`). They are written whole, or not at all, and never made twice: a run that
  was killed goes on where it was, and any number of workers gives the same bytes.
- What cannot be used, whole videos or stretches, stands with its reason in unusable.json beside the splits.
- The splits are those of `data.save_split`. No person is in two of them, if each person's videos lie in a folder of their own;
  a video at the top counts as a person.
"""
import argparse
import hashlib
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from . import config, faces, footage
from .config import FPS, Progress, UserError, atomic
from .data import STYLES, Clip, save_split
from .footage import Settings

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
ARRAYS = ("frames", "wave", "truth", "speaking", "mouth", "face")


def collect(folder, out, s: Settings, shares: dict[str, float], workers: int, scratch, judged: tuple[str, ...] = (),
            most: dict[str, int | None] | None = None) -> dict[str, dict]:
    """Clips of all videos below `folder`, as splits below `out`, and out/unusable.json; returns how much each split holds.

    shares: split -> share of the people. scratch: where finished videos wait for the others, until `finish`.
    judged: splits on which lips are scored, and which must hold some that speak; too few, and UserError, with nothing lost.
    most: split -> clips that it keeps at most (see `first`); without a number, all.
    """
    folder, out, scratch, most = Path(folder).expanduser(), Path(out), Path(scratch), most or {}
    for each, n in most.items():
        if each not in shares or n is not None and n < 1:
            raise UserError(f"params.yaml: data.most: {each}: {n}; give splits of data.shares ({', '.join(shares)}) a number of clips above 0, or null for all")
    parts = places(folder, s, scratch)
    names = list(parts)
    for each in shares:
        replaceable(out / each)
    sweep(scratch), sweep(out)
    todo = [(folder / name, part, s) for name, part in parts.items() if not (part / "part.json").exists()]
    if len(todo) < len(names):
        print(f"videos: going on after {len(names) - len(todo)} of {len(names)}", flush=True)
    progress = Progress(len(names), "videos", start=len(names) - len(todo))
    for _ in done(todo, workers):
        progress.step()
    found = {name: json.loads((part / "part.json").read_text()) for name, part in parts.items()}
    reasons = [{"video": name, **why} for name in names for why in found[name]["unusable"]]
    config.save_json(out / "unusable.json", {"unusable": reasons})
    split = divide(sorted({person(name) for name in names if found[name]["clips"]}), shares, folder)
    orders = {each: first(most.get(each), mixed((name, i) for name in names if split.get(person(name)) == each for i in range(len(found[name]["clips"]))))
              for each in shares}
    for each in judged:
        enough([found[name]["clips"][i] for name, i in orders[each]], each, folder)
    numbers = {}
    for each, order in orders.items():
        made = (stored(parts[name], i, found[name]["clips"][i], name, each, s) for name, i in order)
        numbers[each] = save_split(out, each, len(order), made)
    return numbers


def places(folder: Path, s: Settings, scratch: Path) -> dict[str, Path]:
    """Where what is cut from each video waits for the others."""
    return {name: scratch / key(folder / name, name, s) for name in listing(folder)}


def finish(folder, s: Settings, scratch) -> None:
    """The splits are written and checked: what `collect` kept to make them may go."""
    for part in places(Path(folder).expanduser(), s, Path(scratch)).values():
        (part / "part.json").unlink(missing_ok=True)         # first, for what is removed by halves must not count as done
        shutil.rmtree(part, ignore_errors=True)


def settings(p) -> Settings:
    """Those of the section `data` of params.yaml."""
    try:
        return Settings(p.frames, FPS, p.size, **(p.videos or {}))
    except TypeError as error:
        raise UserError(f"params.yaml: data.videos: {error}; known are the fields of footage.Settings") from None


def listing(folder: Path) -> list[str]:
    """Paths of all files that are called videos, relative to the folder, in an order that does not depend on the disk."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with videos of people who talk (data.folder in params.yaml)")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not names:
        raise UserError(f"{folder}: no videos in it ({', '.join(SUFFIXES)}); put some there, or give another folder")
    return names


def person(name: str) -> str:
    """Who is in a video: the folder that it lies in, or it alone."""
    return name.rpartition("/")[0] or name


def number(person: str) -> int:
    """A person's identity: 48 bits, which JSON and sums in float64 hold exactly; thousands of people have different ones."""
    return int(hashlib.sha256(person.encode()).hexdigest()[:12], 16)


def divide(people: list[str], shares: dict[str, float], folder: Path) -> dict[str, str]:
    """Who goes into which split: in an order that depends on the names alone, cut by the shares, one person each at least."""
    if len(people) < len(shares):
        raise UserError(f"{folder}: clips of {len(people)} people, but {len(shares)} splits ({', '.join(shares)}) need one each; add "
                        "videos, see why others are in unusable.json, or take fewer splits (data.shares, --only)")
    order = sorted(people, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    before = np.arange(len(shares))
    ends = np.round(np.cumsum(list(shares.values())) / sum(shares.values()) * len(order)).astype(int)
    ends = np.clip(np.maximum.accumulate(ends - before), 1, len(order) - before[-1]) + before
    return {name: split for split, lo, hi in zip(shares, [0, *ends], ends) for name in order[lo:hi]}


def mixed(clips: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """(video, clip) in an order of chance that depends on the names alone: neighbours are different people, who talk behind one another in training (`audio.degrade`), and the first few are some of everybody."""
    return sorted(clips, key=lambda clip: hashlib.sha256(repr(clip).encode()).hexdigest())


def first(n: int | None, order: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """n clips of these (None: all), in their order: everybody's first before anybody's second, so that few clips are of many people."""
    met, turn = Counter(), {}
    for clip in order:
        turn[clip] = met[person(clip[0])]
        met[person(clip[0])] += 1
    kept = set(sorted(order, key=turn.get)[:n])
    return [clip for clip in order if clip in kept]


def enough(metas: list[dict], split: str, folder: Path) -> None:
    speak = sum(meta["kind"] == "speaking" for meta in metas)
    if speak < len(STYLES):                                                   # as many are shown, and scored with intervals
        raise UserError(f"{folder}: the split {split} needs {len(STYLES)} clips in which somebody speaks, and has {speak}; add videos, or give "
                        "it more (data.shares, data.most in params.yaml); what is cut already is kept")


# ---------------------------------------------------------------------------------------------------- video by video
def key(path: Path, name: str, s: Settings) -> str:
    """Changes with the file, the settings and the code that makes clips."""
    status = path.stat()
    code = [Path(module.__file__).read_text() for module in (footage, faces)]
    return hashlib.sha256(repr((name, status.st_size, status.st_mtime_ns, asdict(s), code)).encode()).hexdigest()[:24]


def make_part(job: tuple[Path, Path, Settings]) -> None:
    """All that one video gives: a folder with an .npz a clip, and part.json that lists them and what is unusable."""
    path, part, s = job
    made, reasons = [], []
    with atomic(part) as temporary:
        temporary.mkdir()
        for clip, meta in footage.clips(path, s, reasons):
            np.savez(temporary / f"{len(made)}.npz", **{name: getattr(clip, name) for name in ARRAYS})
            made.append(meta)
        (temporary / "part.json").write_text(json.dumps({"clips": made, "unusable": reasons}))


def stored(part: Path, i: int, meta: dict, name: str, split: str, s: Settings) -> tuple[Clip, dict]:
    """A clip that `make_part` wrote, as `save_split` takes it."""
    shape = {"split": split, "style": None, "frames": s.frames, "fps": s.fps, "size": s.size}
    with np.load(part / f"{i}.npz") as arrays:
        clip = Clip(**{name: arrays[name] for name in ARRAYS}, phones=[], voice="")
    return clip, {**shape, **meta, "identity": number(person(name)), "source": name}


def done(todo: list, workers: int) -> Iterator[None]:
    """Makes all parts, in this process or in `workers` others, which are fresh: threads of torch do not survive a fork."""
    if workers <= 1:
        yield from map(make_part, todo)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=follow) as pool:
        try:
            yield from pool.map(make_part, todo)
        except BrokenProcessPool:
            raise UserError("a worker was killed, for lack of memory perhaps; run again, with fewer --workers if need be: it goes on where "
                            "it was") from None
        except BaseException:                    # Ctrl-C above all: a job may be a video of two hours, and nothing half-made is kept
            for worker in list((pool._processes or {}).values()):
                worker.kill()
            raise


def follow() -> None:
    """A worker uses one thread, leaves Ctrl-C to the process that started it, and ends when that one was killed."""
    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written, and nothing else: the folder may be anybody's."""
    for half in folder.glob(".*.part*") if folder.is_dir() else ():
        if config.HALF.fullmatch(half.name):
            shutil.rmtree(half) if half.is_dir() else half.unlink()


def replaceable(split: Path) -> None:
    """UserError for a folder that the new split would replace and that is none."""
    if split.exists() and not (split / "clips.json").exists() and not (split.is_dir() and not any(split.iterdir())):
        raise UserError(f"{split}: is there already and holds no clips, and the split would replace it; give another --out, or move it away")


# ---------------------------------------------------------------------------------------------------------- command
def main(argv: list[str] | None = None) -> int:
    p = config.load("data")
    parser = argparse.ArgumentParser(prog="python -m tmlib.videos", description="Cut clips of talking people from a folder of videos.")
    add = parser.add_argument
    add("folder", help=f"videos ({', '.join(SUFFIXES)}), in folders below it too: one folder a person")
    add("--out", default=config.DATA / "clips", metavar="FOLDER", help="where the splits and unusable.json go (default: data/clips)")
    for name, what in (("size", "pixels of a side"), ("frames", "frames of a clip"), ("workers", "processes")):
        add(f"--{name}", type=int, default=getattr(p, name), metavar="N", help=f"{what} (default: {getattr(p, name)}, of params.yaml)")
    add("--only", metavar="SPLIT", help="put everybody into this split (default: data.shares of params.yaml)")
    args = parser.parse_args(argv)
    if args.frames % 4 != 1 or args.size % 16 or min(args.frames, args.size, args.workers) < 1:
        raise UserError(f"--frames {args.frames} must be 4 k + 1, --size {args.size} a multiple of 16, --workers at least 1")
    p.frames, p.size = args.frames, args.size
    shares = {args.only: 1.0} if args.only else p.shares
    numbers = collect(args.folder, args.out, settings(p), shares, args.workers, config.SCRATCH / "videos", most=None if args.only else p.most)
    finish(args.folder, settings(p), config.SCRATCH / "videos")
    unusable = config.load_json(Path(args.out) / "unusable.json")["unusable"]
    each = ", ".join(f"{split} {n['clips']}" for split, n in numbers.items())
    print(f"{args.out}: {sum(n['clips'] for n in numbers.values())} clips ({each}), {len(unusable)} videos or stretches unusable")
    for reason, n in Counter(u["reason"] for u in unusable).most_common():
        print(f"{n:6d}  {reason}")
    return 0


if __name__ == "__main__":
    config.cli(main)
