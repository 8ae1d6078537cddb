"""Where things are, what the parameters say, and how a run is made repeatable.

Special here:
- every path hangs off ROOT, never off the current folder, so that notebooks, tests and the command line agree;
- values live once, in params.yaml: a stage loads one section by name, merged over `common`;
- light on purpose: torch, numpy and ruamel are imported inside functions. Every stage depends on this file, so what no
  stage needs lives elsewhere (`scales`, `notebook`, `doctor`).
"""

import errno
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(os.environ.get("TM_ROOT") or Path(__file__).resolve().parents[1]).resolve()
DATA = ROOT / "data"
MODELS = DATA / "models"
SCRATCH = DATA / "scratch"          # resume state and failed runs: ignored by git and by DVC
REPORTS = ROOT / "reports"
METRICS = REPORTS / "metrics"
RATE, FPS, STRIDE = 16_000, 16, 4      # samples of sound a second, frames of video a second, frames per latent frame: everywhere
FRAME = RATE // FPS                 # samples per frame of video
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("TM_RANK", 0), ("TM_WORLD", 1)))    # of a stage's processes: see `ranks`


class UserError(Exception):
    """One clear line for people: what is wrong, where, and the fix."""


def one_line(error, most: int | None = None) -> str:
    """What an error, or any text, says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


# ---------------------------------------------------------------------------------------------------- parameters
def read_params(root: Path | None = None) -> dict:
    """All of params.yaml, as YAML 1.2 (so that 1e-3 is a number, as it is for DVC)."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = (root or ROOT) / "params.yaml"
    try:
        params = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from a complete checkout of the workbook") from None
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(params, dict):
        raise UserError(f"{path}: expected sections such as `common:`; the file holds {type(params).__name__}")
    return params


def load(section: str, overrides: dict | None = None) -> SimpleNamespace:
    """Parameters of one stage, as attributes: `section` of params.yaml over `common`, then `overrides` over both.

    section: "teacher", or dotted into a nested section: "ablations.longer". Nested dicts stay dicts.
    Raises UserError for an unknown section, an unknown override (naming the known ones) or a value of another kind.
    """
    params = read_params()
    values = params
    for depth, name in enumerate(section.split(".")):
        if not isinstance(values, dict) or name not in values:
            known = ", ".join(sorted(map(str, values))) if isinstance(values, dict) else "none"
            inside = ".".join(section.split(".")[:depth]) or "params.yaml"
            raise UserError(f"params.yaml: no section `{section}`; {inside} has: {known}")
        values = values[name]
    if values is not None and not isinstance(values, dict):
        raise UserError(f"params.yaml: `{section}` is a value, not a section")
    merged = {**(params.get("common") or {}), **(values or {})}
    return SimpleNamespace(**overlay(merged, overrides or {}, section))


def overlay(base: dict, changes: dict, where: str, none_removes: bool = False) -> dict:
    """A copy of `base` with `changes` written over it, deeply. Unknown keys and values of another kind -> UserError."""
    merged = dict(base)
    for key, value in changes.items():
        if key not in base:
            raise UserError(f"{where}: unknown parameter `{key}`; known: {', '.join(sorted(map(str, base)))}")
        if isinstance(base[key], dict) and isinstance(value, dict):
            merged[key] = overlay(base[key], value, f"{where}.{key}", none_removes)
        elif value is None and none_removes:
            del merged[key]
        elif None not in (base[key], value) and _kind(base[key]) != _kind(value):
            raise UserError(f"{where}.{key}: expected {_kind(base[key])} such as {base[key]!r}, got {value!r}")
        else:
            merged[key] = value
    return merged


def _kind(value) -> str:
    kinds = ((bool, "true or false"), ((int, float), "a number"), (str, "text"), ((list, tuple), "a list"), (dict, "a section"))
    return next((name for types, name in kinds if isinstance(value, types)), type(value).__name__)


def seed_everything(seed: int, threads: int) -> None:
    """Seed python, numpy and torch; ask for deterministic kernels; set torch's threads (0 leaves them alone).

    Threads are part of the seed: sums split over another number of threads round differently.
    """
    import random

    import numpy
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if threads > 0:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")          # TF32: several times faster there
    # Some CUDA kernels have no deterministic form: warn there; on a CPU insist.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False


# --------------------------------------------------------------------------------------------------------- files
HALF = re.compile(r"\..+\.\d+\.part(\.[^.]+)?")        # names that `atomic` gives to what is half-written


@contextmanager
def atomic(path, every_rank: bool = False):
    """Yield a temporary path beside `path` (same suffix); rename it on success, remove it on failure.

    Makes parent folders. The temporary may be made a file or a folder. Of several processes of a stage rank 0's is kept, the others'
    are removed, unless every rank writes a path of its own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")      # as HALF
    _remove(temporary)
    try:
        yield temporary
        if RANK and not every_rank:
            return
        if temporary.is_dir():
            _remove(path)                       # a folder cannot be renamed over a full folder
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_json(path, values: dict) -> None:
    """Write a dict atomically: sorted keys, floats to 6 significant digits. NaN or infinity -> UserError naming the key."""
    text = json.dumps(_plain(values, Path(path).name), indent=1, sort_keys=True, ensure_ascii=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value, where: str):
    """JSON-ready copy: numpy and torch scalars and arrays become numbers and lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{where} is {value}; a metric must be a finite number, or null with a reason")
        return float(f"{value:.6g}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise UserError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def load_json(path, fix: str | None = None) -> dict:
    """Read a JSON file; missing or corrupt -> UserError that names the file and the fix: how to make it again, if none is given."""
    path = Path(path)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    make = f"make it with `make repro` (or `dvc repro {path.stem}` where that is the stage)"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{shown}: not there yet; {fix or make}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{shown}: cannot be read ({error}); {fix or f'delete it and {make}'}") from None


def resumable(folder: Path) -> Path:
    """The same folder, of what a stage resumes from. If it is new, and others of its stage are left by other parameters, code or inputs, a line says so."""
    stage = folder.name.rpartition("-")[0]
    others = [] if folder.exists() else sorted(folder.parent.glob(f"{stage}-{12 * '[0-9a-f]'}"))
    if others:
        note(f"{stage} begins at the beginning; other parameters, code or inputs left {', '.join(f'{other} ({far(other)})' for other in others)}. To go "
             f"on from one that fits all the same, stop this run, then `rm -rf {folder}; mv OLD {folder}`, and run again; else delete it")
    return folder


def far(folder: Path) -> str:
    """How far a stage got, and what it takes, by the names and sizes of its files."""
    steps = {path.parent: path.stem.split("-") for path in sorted(folder.rglob("state-*-0-of-*.pt"))}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    said = [f"{'' if at == folder else f'{at.name} at '}step {step} of {world} process{'es' * (world != '1')}" for at, (_, step, _, _, world) in steps.items()]
    return ", ".join([*said, *(f"{path.stem} whole" for path in sorted(folder.glob("*.safetensors"))), f"{size / 1e9:.2g} GB"])


# ------------------------------------------------------------------------------------------------------ terminal
def cli(main) -> None:
    """Run main() as a command: UserError, or a full disk -> `error: <line>` on stderr and status 2; Ctrl-C -> 130; SIGTERM cleans up -> 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'disk'}: no space left; make some, then run again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


NOTE = "note: "


def note(line: str) -> None:
    """Say something about this run alone, once: `notebook` leaves it out of the executed copy."""
    if not RANK:
        print(f"{NOTE}{line}", flush=True)


class Progress:
    """Prints at most every `every_s` seconds one plain line, which reads well in a terminal and in a notebook's log:

    teacher  312/1200  26 %  loss 0.183  0.34 s/step  5 min 03 s left

    `start`: steps done before this process (a resumed run). These lines tell the time, so `notebook` leaves them out of
    the executed copy: they always hold UNIT.
    """

    UNIT = " s/step  "

    def __init__(self, total: int, what: str, every_s: float = 5, start: int = 0):
        self.total, self.what, self.every_s = total, what, every_s
        self.done = self.first = start
        self.began = self.printed = time.monotonic()

    def step(self, n: int = 1, **numbers) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.printed >= self.every_s or (self.done >= self.total and self.printed > self.began):
            self.printed = now
            print(self.line(now - self.began, numbers), flush=True)

    def line(self, seconds: float, numbers: dict) -> str:
        per_step = seconds / max(self.done - self.first, 1)
        left = per_step * max(self.total - self.done, 0)
        shown = "".join(f"{name} {float(value):.3g}  " for name, value in numbers.items())
        percent = 100 * self.done // max(self.total, 1)
        end = f"{minutes(left)} left" if self.done < self.total else f"{minutes(seconds)} in all"
        return f"{self.what}  {self.done}/{self.total}  {percent} %  {shown}{per_step:.2g}{self.UNIT}{end}"


def minutes(seconds: float) -> str:
    """303 -> "5 min 03 s"."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest:02d} s" if whole else f"{rest} s"
