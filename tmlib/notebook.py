"""Run one notebook as a pipeline stage:  python -m tmlib.notebook SOURCE OUTPUT [--section teacher]

papermill does the running; this adds what a pipeline needs (the pitfalls are real and were seen):
- parameter names and the section are checked before a kernel starts: papermill only warns, and runs with the default;
- always this Python's kernel, this tmlib, the repository root as folder: never those of whoever calls;
- what cells print goes to the terminal at once;
- OUTPUT appears only after success, and two runs give the same bytes: no clocks, random ids, memory addresses or folders of this machine;
- a failed or killed run leaves its partial copy in data/scratch/failed/ and one clear line, and no kernel behind;
  neither does it live on when DVC, which runs it, is killed.
"""

import argparse
import ast
import hashlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from . import config, shadow

FAILED = config.SCRATCH / "failed"
ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]{6,}(?=>)")          # <Figure object at 0x7f...>
LIBRARY = re.compile(r"[^\s\"']*/site-packages/")               # where a library that warns is installed


# ------------------------------------------------------------------------------------------------------ checking
def parameters(source) -> dict:
    """Names and default values in the notebook's one cell tagged `parameters`. UserError if it is not so."""
    import nbformat

    try:
        cells = nbformat.read(source, as_version=4).cells
    except FileNotFoundError:
        raise config.UserError(f"{source}: no such notebook") from None
    except Exception as error:                                  # nbformat has no one base class for what a bad file raises
        raise config.UserError(f"{source}: not a notebook ({config.one_line(error, 200)})") from None
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise config.UserError(f"{source}: expected one cell tagged `parameters`, found {len(tagged)}")
    try:
        statements = ast.parse(tagged[0].source).body
        return {node.targets[0].id: ast.literal_eval(node.value) for node in statements}
    except (SyntaxError, ValueError, AttributeError):
        raise config.UserError(f"{source}: its `parameters` cell may only hold lines `name = literal value`") from None


def check(source, injected: dict) -> int:
    """Fail now rather than after a kernel's start: unknown names, an unknown section or parameter. Returns how many processes it wants."""
    known = parameters(source)
    for name in injected:
        if name not in known:
            raise config.UserError(f"{source}: has no parameter `{name}`; known: {', '.join(known)}")
    values = {**known, **injected}
    loaded = config.load(values["section"], values.get("overrides")) if "section" in values else None
    return getattr(loaded, "processes", 1)


def code_of(source) -> str:
    """A hash of the notebook's code: words may change and training still go on where it was."""
    import nbformat

    code = [cell.source for cell in nbformat.read(source, as_version=4).cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- normal form
def normalise(notebook):
    """Take out, in place, all that differs between two runs of one notebook: clocks, random ids, addresses, patch versions."""
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for index, cell in enumerate(notebook.cells):
        cell["id"] = str(index)
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = _normal_outputs(cell.outputs)
    return notebook


def _normal_outputs(outputs: list) -> list:
    """Streams arrive cut at random places, and stdout and stderr in any order: join each between two other outputs."""
    normal, streams = [], {}
    for output in outputs:
        if output.output_type == "stream":
            joined = streams.get(output.name)
            if joined is None:
                streams[output.name] = output
            else:
                joined.text += output.text
        else:
            normal += _close(streams) + [output]
            for kind, text in output.get("data", {}).items():
                if isinstance(text, str) and kind in ("text/plain", "text/html"):
                    output.data[kind] = ADDRESS.sub("0x0", text)
    return normal + _close(streams)


def _close(streams: dict) -> list:
    closed = [streams.pop(name) for name in ("stdout", "stderr") if name in streams]
    for output in closed:
        lines = output.text.splitlines(keepends=True)
        output.text = LIBRARY.sub("", ADDRESS.sub("0x0", "".join(line for line in lines if config.Progress.UNIT not in line and not line.startswith(config.NOTE))))
    return [output for output in closed if output.text]


# ------------------------------------------------------------------------------------------------------- running
def run(source, output, **injected) -> None:
    """Execute `source` with `injected` parameters into `output`. UserError with one line if a cell fails."""
    import nbformat

    source, output = Path(source), Path(output)
    began, processes = time.monotonic(), check(source, injected)
    os.environ["TM_NOTEBOOK"] = code_of(source)                  # losses live in notebooks: `train.state_folder`
    partial = FAILED / output.name
    partial.parent.mkdir(parents=True, exist_ok=True)
    _execute(source, partial, injected, processes)
    notebook = normalise(nbformat.read(partial, as_version=4))
    with config.atomic(output) as temporary:
        nbformat.write(notebook, temporary)
    partial.unlink()
    print(f"{output.stem}: done in {config.minutes(time.monotonic() - began)}", flush=True)


def _execute(source: Path, partial: Path, injected: dict, processes: int) -> None:
    """papermill in a thread, so that signals stay ours: nbclient's own handlers (only set in a main thread) let cells run on.

    Of several processes the kernel is rank 0; `shadow` starts the others.
    """
    import papermill
    from traitlets.config import Config

    outcome: list[BaseException] = []
    logging.getLogger("papermill").setLevel(logging.CRITICAL)   # what it says is said here, in one line

    def work(sockets: str):
        # Talk through files, not through a port; a socket's name may have about 100 characters, jupyter takes 50.
        transport = Config({"KernelManager": {"transport": "ipc" if len(sockets) < 50 else "tcp"}})
        try:
            papermill.execute_notebook(
                source, partial, injected, kernel_name="python3", language="python", progress_bar=False, cwd=config.ROOT,
                stdout_file=sys.stdout, stderr_file=sys.stderr, config=transport,
                extra_arguments=["--IPKernelApp.log_level=50"],         # a kernel stopped after a failure says goodbye in an ERROR line
            )
        except BaseException as error:                          # also what the kernel manager raises while it is being killed
            outcome.append(error)

    with tempfile.TemporaryDirectory(prefix="tm-") as sockets:
        _prepare_environment(sockets)
        others = shadow.start(source, injected, processes, sockets, FAILED)
        worker = threading.Thread(target=work, args=[sockets], daemon=True)
        worker.start()
        dvc = _dvc()
        try:
            while worker.is_alive():
                worker.join(0.2)                                # short: a signal's handler runs between two joins
                if dvc and not _alive(dvc):
                    raise SystemExit("stopped: dvc is gone")    # or this run would meet the next `dvc repro` at its files
                shadow.check(others, worker)
            if not outcome:
                shadow.check(others, worker, patience=60)
        except BaseException:
            kill_children()
            raise
    if outcome:
        kill_children()
        raise config.UserError(_explain(source, partial, outcome[0])) from outcome[0]


def _prepare_environment(sockets: str) -> None:
    """What the kernel inherits: this tmlib, this environment's kernel, no start-up files of the user's, a fixed order of sets."""
    os.environ["JUPYTER_RUNTIME_DIR"] = sockets
    paths = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ["IPYTHONDIR"] = str(config.SCRATCH / "ipython")
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"          # or every kernel prints a debugger's warning
    os.environ["PYTHONHASHSEED"] = "0"
    # Training frees and asks for the same megabytes at every step: glibc would give them back to the system each time, which took
    # about 5 % of a training step. Numbers do not change; other C libraries do not know these names.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def _dvc():
    """The DVC process that runs this as a stage, or None."""
    import psutil

    parents = psutil.Process().parents() if "DVC_STAGE" in os.environ else []
    return next((parent for parent in parents if any("dvc" in word for word in parent.cmdline())), None)


def _alive(process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_children() -> None:
    """End the kernel and whatever it started (the workers of a data loader, the second process of a streamer)."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(children, timeout=3)


def _explain(source: Path, partial: Path, error: BaseException) -> str:
    shown = partial.relative_to(config.ROOT) if partial.is_relative_to(config.ROOT) else partial
    name, text = getattr(error, "ename", type(error).__name__), config.one_line(getattr(error, "evalue", error))
    if name == "UserError":
        return f"{text} ({source}; partial copy: {shown})"
    if name == "DeadKernelError":
        text = "the kernel died; out of memory?"
    cell = f", cell {error.cell_index}" if hasattr(error, "cell_index") else ""
    return f"{source}{cell}: {name}: {text[:500]} (traceback in {shown})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tmlib.notebook", description="Run one notebook as a pipeline stage.")
    parser.add_argument("source", help="notebooks/40_teacher.ipynb")
    parser.add_argument("output", help="reports/nb/40_teacher.ipynb")
    parser.add_argument("--section", help="section of params.yaml, where it is not the notebook's own: ablations.longer")
    args = parser.parse_args()
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    run(args.source, args.output, **({"section": args.section} if args.section else {}))


if __name__ == "__main__":
    config.cli(main)
