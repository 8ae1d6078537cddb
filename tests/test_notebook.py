"""The runner of notebooks: checks first, streams, repeats byte for byte, fails in one line, and dies with its kernel."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tmlib import config, notebook, shadow

LOAD = "from tmlib import config\np = config.load(section, overrides)"


def write(path, *cells, tag="parameters", first='section = "teacher"\noverrides = {}'):
    """A notebook like ours: a title, the parameters cell, the load cell, then `cells`."""
    parameters = new_code_cell(first, metadata={"tags": [tag]})
    made = new_notebook(cells=[new_markdown_cell("# Toy"), parameters, *map(new_code_cell, [LOAD, *cells])])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(made, path)
    return path


@pytest.fixture
def house(root):
    (root / "params.yaml").write_text("common: {seed: 0}\nteacher: {steps: 5}\nablations: {no_dmd: {steps: 1}}\n")
    return root


# ------------------------------------------------------------------------------------------------------- checking
def test_parameters_and_checks(house):
    source = write(house / "a.ipynb")
    assert notebook.parameters(source) == {"section": "teacher", "overrides": {}}
    notebook.check(source, {"section": "ablations.no_dmd", "overrides": {"steps": 3}})
    with pytest.raises(config.UserError, match="a.ipynb: has no parameter `sections`; known: section, overrides"):
        notebook.check(source, {"sections": "teacher"})
    with pytest.raises(config.UserError, match="no section `techer`"):
        notebook.check(source, {"section": "techer"})
    with pytest.raises(config.UserError, match="unknown parameter `stepz`"):
        notebook.check(source, {"overrides": {"stepz": 3}})


def test_code_is_known_whatever_the_words(house):
    plain = notebook.code_of(write(house / "a.ipynb"))
    page = json.loads((house / "a.ipynb").read_text())
    words = {"cell_type": "markdown", "id": "w", "metadata": {}, "source": "other words"}
    (house / "b.ipynb").write_text(json.dumps({**page, "cells": [words, *page["cells"]]}))
    assert notebook.code_of(house / "b.ipynb") == plain != notebook.code_of(write(house / "c.ipynb", first="section = 'base'"))


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.unlink(), "no such notebook"),
    (lambda path: path.write_text("{"), "not a notebook"),
    (lambda path: write(path, tag="parameter"), "expected one cell tagged `parameters`, found 0"),
    (lambda path: write(path, first="section = open('x')"), "may only hold lines"),
    (lambda path: write(path, first="import os"), "may only hold lines"),
])
def test_bad_notebooks(house, damage, message):
    source = write(house / "a.ipynb")
    damage(source)
    with pytest.raises(config.UserError, match=f"a.ipynb: .*{message}"):
        notebook.run(source, house / "out.ipynb")
    assert not (house / "out.ipynb").exists()


# ---------------------------------------------------------------------------------------------------- normal form
def stream(name, text):
    return new_output("stream", name=name, text=text)


def test_normalise_removes_what_differs_and_keeps_the_rest():
    shown = new_output("display_data", data={"text/plain": "<Figure at 0x7f00deadbeef>", "image/png": "QUJD"})
    progress = f"teacher  3/9  33 %  1{config.Progress.UNIT}6 s left\n{config.NOTE}of this run alone\n"
    outputs = [stream("stdout", "a"), stream("stderr", "/a/lib/python3.11/site-packages/torch/x.py:7: w\n"), stream("stdout", f"b\n{progress}"), shown, stream("stdout", progress)]
    cell = new_code_cell("x", outputs=outputs, metadata={"tags": ["t"], "papermill": {"duration": 1}, "execution": {"iopub": "now"}})
    made = new_notebook(cells=[new_markdown_cell("# t"), cell], metadata={
        "papermill": {"start_time": "now"}, "language_info": {"name": "python", "version": "3.11.7"}})
    made = notebook.normalise(made)
    assert made.metadata == {"language_info": {"name": "python"}}
    assert [c.id for c in made.cells] == ["0", "1"] and made.cells[1].metadata == {"tags": ["t"]}
    assert [(o.get("name"), o.get("text")) for o in made.cells[1].outputs] == [("stdout", "ab\n"), ("stderr", "torch/x.py:7: w\n"), (None, None)]
    assert made.cells[1].outputs[2].data == {"text/plain": "<Figure at 0x0>", "image/png": "QUJD"}
    nbformat.validate(made)
    assert notebook.normalise(made) == made


# -------------------------------------------------------------------------------------------------------- running
def test_two_runs_stream_and_give_the_same_bytes(house, python, tmp_path_factory):
    source = write(
        house / "notebooks" / "40_toy.ipynb",
        "import os, sys, time, tmlib\nprint('cut', end=' ', flush=True); time.sleep(0.3); print('in two', p.steps, p.seed)",
        "print(os.getcwd(), config.ROOT, tmlib.__file__, sep='\\n')\nconfig.save_json(config.METRICS / 'toy.json', {'n': p.steps})",
        "config.Progress(1, 'w', every_s=0).step()\nprint({f'word{n}' for n in range(20)})\nobject()",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
    )
    output = house / "reports" / "nb" / "40_toy.ipynb"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    runs = []
    for _ in range(2):
        done = python("-m", "tmlib.notebook", source, output, cwd=elsewhere, TM_ROOT=house, PYTHONHASHSEED="random")
        assert done.returncode == 0, done.stderr
        assert "cut in two 5 0\n" in done.stdout and config.Progress.UNIT in done.stdout
        runs.append(output.read_bytes())
    assert runs[0].decode().split("\n") == runs[1].decode().split("\n")
    executed = nbformat.read(output, as_version=4)
    lines = executed.cells[4].outputs[0].text.split("\n")
    assert lines[:2] == [str(house)] * 2 and lines[2] == os.path.join(os.path.dirname(config.__file__), "__init__.py")
    assert config.Progress.UNIT not in output.read_text() and "image/png" in output.read_text()
    assert config.load_json(house / "reports/metrics/toy.json") == {"n": 5}
    assert list((house / "data/scratch/failed").iterdir()) == [] and list(output.parent.iterdir()) == [output]
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("cell, line", [
    ("raise config.UserError('face.png: too small;\\nuse 64 pixels')", "error: face.png: too small; use 64 pixels ("),
    ("import os\nos._exit(9)", "DeadKernelError: the kernel died"),
])
def test_failure_is_one_line_and_keeps_the_partial_copy(house, python, cell, line):
    source, output = write(house / "toy.ipynb", cell), house / "reports" / "toy.ipynb"
    output.parent.mkdir()
    output.write_text("the last good one")
    done = python("-m", "tmlib.notebook", source, output, "--section", "ablations.no_dmd", TM_ROOT=house)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1
    assert output.read_text() == "the last good one"
    partial = json.loads((house / "data/scratch/failed/toy.ipynb").read_text())
    assert any("ablations.no_dmd" in "".join(c["source"]) for c in partial["cells"])


def test_an_ordinary_exception_names_its_cell(house):
    from papermill.exceptions import PapermillExecutionError

    error = PapermillExecutionError(3, 2, "{}['lips']", "KeyError", "'lips'", [])
    line = notebook._explain("notebooks/40_toy.ipynb", house / "data/scratch/failed/40_toy.ipynb", error)
    assert line == "notebooks/40_toy.ipynb, cell 3: KeyError: 'lips' (traceback in data/scratch/failed/40_toy.ipynb)"


@pytest.mark.parametrize("how", ["terminated", "dvc killed"])
def test_killing_it_kills_the_kernel_and_its_children(house, how):
    child = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    source = write(house / "toy.ipynb", child, "import os, time\nprint('pids', os.getpid(), child.pid, flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-m", "tmlib.notebook", str(source), str(house / "out.ipynb")]
    if how == "dvc killed":
        command = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[2:])", "dvc", *command]
    env = {**os.environ, "TM_ROOT": str(house), "DVC_STAGE": "toy"}
    repository = os.path.dirname(os.path.dirname(config.__file__))
    runner = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=repository)
    line = next(line for line in runner.stdout if line.startswith("pids"))
    pids = [int(pid) for pid in line.split()[1:]]
    assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
    began = time.monotonic()
    runner.send_signal(signal.SIGTERM if how == "terminated" else signal.SIGKILL)
    _, errors = runner.communicate(timeout=20)              # until the last process that holds the pipe has ended
    assert time.monotonic() - began < 8 and "Traceback" not in errors, errors
    assert runner.returncode == (143 if how == "terminated" else -signal.SIGKILL)
    assert not any(map(psutil.pid_exists, pids)) and not (house / "out.ipynb").exists()
    assert (house / "data/scratch/failed/out.ipynb").exists()


# ---------------------------------------------------------------------------------------------- several processes
@pytest.fixture
def crowd(house):
    (house / "params.yaml").write_text("common: {seed: 0}\nteacher: {steps: 5, processes: 2}\nablations: {no_dmd: {steps: 1, processes: 3}}\n")
    return house


def test_all_ranks_run_the_cells_and_rank_0_is_kept(crowd, python):
    source = write(crowd / "toy.ipynb", "from tmlib import ranks\nfound = ranks.agreed([config.RANK, section])",
                   "config.save_json(config.METRICS / f'toy-{config.RANK}.json', {'n': config.RANK})\nprint('ranks', found)")
    done = python("-m", "tmlib.notebook", source, crowd / "out.ipynb", TM_ROOT=crowd)
    assert done.returncode == 0 and "ranks [[0, 'teacher'], [1, 'teacher']]\n" in done.stdout, done.stderr
    done = python("-m", "tmlib.notebook", source, crowd / "out.ipynb", "--section", "ablations.no_dmd", TM_ROOT=crowd)
    assert "ranks [[0, 'ablations.no_dmd'], [1, 'ablations.no_dmd'], [2, 'ablations.no_dmd']]\n" in done.stdout, done.stderr
    assert [p.name for p in config.METRICS.glob("*")] == ["toy-0.json"] and list((crowd / "data/scratch/failed").iterdir()) == []


def test_all_ranks_get_all_parameters(crowd, python):
    source = write(crowd / "toy.ipynb", "from tmlib import ranks\nprint('ranks', ranks.agreed([p.steps, p.noisy]))")
    (crowd / "params.yaml").write_text("common: {seed: 0}\nteacher: {steps: 5, noisy: false, processes: 2}\n")
    run = f"from tmlib import notebook; notebook.run({str(source)!r}, {str(crowd / 'out.ipynb')!r}, overrides=dict(steps=2, noisy=True))"
    done = python("-c", run, TM_ROOT=crowd)
    assert "ranks [[2, True], [2, True]]\n" in done.stdout, done.stderr


@pytest.mark.parametrize("cell, line", [
    ("if config.RANK == 1: raise ValueError('no\\nway')\nranks.wait()", "code cell 2: ValueError: no way (in process toy-1, log: "),
    ("if config.RANK == 1: os._exit(7)\nranks.wait()", "exit 7 (in process toy-1, log: "),
    ("if config.RANK == 0: raise config.UserError('x.mp4: bad')\nranks.wait()", "error: x.mp4: bad ("),
])
def test_a_rank_that_fails_ends_all_in_one_line(crowd, python, cell, line):
    source = write(crowd / "toy.ipynb", f"import os\nfrom tmlib import ranks\n{cell}")
    began = time.monotonic()
    done = python("-m", "tmlib.notebook", source, crowd / "out.ipynb", TM_ROOT=crowd)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert time.monotonic() - began < 60 and not (crowd / "out.ipynb").exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(source) in (p.info["cmdline"] or ())]


def test_too_few_gpus_are_told(crowd, monkeypatch):
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(config.UserError, match="3 processes, but 2 GPUs"):
        shadow.start("a.ipynb", {}, 3, str(crowd), crowd)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(config.UserError, match="3 processes, but 1 GPUs"):
        shadow.start("a.ipynb", {}, 3, str(crowd), crowd)
    assert shadow.start("a.ipynb", {}, 1, str(crowd), crowd) == {}


def test_shadows_end_with_their_parent(crowd):
    source = write(crowd / "toy.ipynb", "import os, time\nprint('pids', os.getppid(), flush=True)\ntime.sleep(60)")
    runner = subprocess.Popen([sys.executable, "-m", "tmlib.notebook", str(source), str(crowd / "out.ipynb")], env={**os.environ, "TM_ROOT": str(crowd)},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.path.dirname(os.path.dirname(config.__file__)))
    next(line for line in runner.stdout if line.startswith("pids"))
    mine = [p for p in psutil.Process(runner.pid).children(recursive=True)]
    assert sum("tmlib.shadow" in p.cmdline() for p in mine) == 1
    runner.send_signal(signal.SIGKILL)
    runner.communicate(timeout=20)
    _, alive = psutil.wait_procs([p for p in mine], timeout=10)
    assert not alive
