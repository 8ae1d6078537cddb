"""The other processes of a stage:  python -m tmlib.shadow SOURCE [--injected JSON]     (`tmlib.notebook` starts them)

A shadow runs the code cells of a notebook in order, as rank 0's kernel does, but keeps nothing: its part is the share of the work
that the library deals to it (`ranks`). What it prints goes to its log.
"""
import argparse
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from . import config


def cells(source, injected: dict) -> list[str]:
    """The notebook's code, a text per cell, `injected` parameters after the cell that holds their defaults."""
    out = []
    for cell in json.loads(Path(source).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            out.append("".join(cell["source"]))
            if injected and "parameters" in cell["metadata"].get("tags", ()):
                out.append("\n".join(f"{name} = {value!r}" for name, value in injected.items()))
    return out


def start(source, injected: dict, processes: int, meet: str, logs: Path) -> dict[Path, subprocess.Popen]:
    """Start ranks 1 and up, {log: process}; children that are started later, so the kernel, are rank 0. A GPU each, where there are any.

    meet: a folder in which they find each other.
    """
    for name in ("TM_RANK", "TM_WORLD", "TM_MEET"):
        os.environ.pop(name, None)
    if processes == 1:
        return {}
    import torch

    started, visible = {}, [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus = visible or list(map(str, range(torch.cuda.device_count() or processes)))       # without any they share the cores
    if processes > len(gpus):
        raise config.UserError(f"{source}: {processes} processes, but {len(gpus)} GPUs that this one may see; lower `processes` in params.yaml")
    for rank in reversed(range(processes)):
        os.environ |= {"TM_RANK": str(rank), "TM_WORLD": str(processes), "TM_MEET": str(Path(meet) / "ranks"), "CUDA_VISIBLE_DEVICES": gpus[rank]}
        if rank:
            log = logs / f"{Path(source).stem}-{rank}.log"
            command = [sys.executable, "-m", "tmlib.shadow", source, "--injected", json.dumps(injected)]
            with open(log, "w") as file:
                started[log] = subprocess.Popen(command, stdout=file, stderr=file, cwd=config.ROOT)
    return started


def check(others: dict[Path, subprocess.Popen], kernel: threading.Thread, patience: float | None = None) -> None:
    """UserError if one of them failed; rank 0, which mostly fails for the same reason, has five seconds to say it better.

    patience: seconds to wait for their end, with which their logs go.
    """
    for log, process in others.items():
        if patience is not None:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                raise config.UserError(f"{log.stem}: this process did not end with the others; see {log}") from None
        if process.poll():
            kernel.join(5)
            if kernel.is_alive() or patience is not None:
                lines = log.read_text(errors="replace").strip().splitlines() or [f"exit {process.returncode}"]
                raise config.UserError(f"{lines[-1].removeprefix('error: ')} (in process {log.stem}, log: {log})")
        if patience is not None:
            log.unlink()


def follow_parent() -> None:
    """End at once when the process that started this one is gone: the others would be waited for, for hours."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tmlib.shadow", description="Run a notebook's cells beside rank 0.")
    parser.add_argument("source")
    parser.add_argument("--injected", type=json.loads, default={}, metavar="JSON", help="parameters of the notebook, as rank 0's kernel has them")
    args = parser.parse_args()
    follow_parent()
    names = {"__name__": "__main__", "display": lambda *_: None}
    for index, code in enumerate(cells(args.source, args.injected)):
        try:
            exec(compile(code, f"{args.source}, code cell {index}", "exec"), names)
        except config.UserError:
            raise
        except BaseException as error:
            traceback.print_exc()
            print(f"{args.source}, code cell {index}: {type(error).__name__}: {config.one_line(error, 300)}", file=sys.stderr, flush=True)
            os._exit(1)                                      # at once: the ranks that wait for this one must hear of it
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)                                              # gloo's threads do not always survive the interpreter's own way out


if __name__ == "__main__":
    config.cli(main)
