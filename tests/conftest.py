"""Shared by all tests: one thread (two test runs on two cores must not fight), and small throwaway houses to run things in."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before anything imports torch or numpy

import shutil
import subprocess
import sys

import pytest

from tmlib import config


# First, the longest before the others, so that no worker is left with them at the end.
SLOW = ("test_pipeline.py", "test_bench.py", "test_videos.py", "test_make.py", "test_explore.py", "test_notebook.py", "test_device.py", "test_full_size.py",
        "test_placement.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    try:
        import torch
    except (ImportError, OSError):                  # tests of the house itself run without it
        return
    torch.set_num_threads(1)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder as config.ROOT, with the paths that hang off it."""
    repository = config.ROOT
    for name in ("ROOT", "DATA", "MODELS", "SCRATCH", "REPORTS", "METRICS"):
        monkeypatch.setattr(config, name, tmp_path / getattr(config, name).relative_to(repository))
    return tmp_path


@pytest.fixture
def git():
    """git(folder, *arguments) -> what it printed; as a person without any configuration."""
    if not shutil.which("git"):
        pytest.skip("needs git")                    # the workbook does not: an unpacked archive works too

    def run(folder, *arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "init.defaultBranch=main"]
        done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def python():
    """python(*arguments, cwd=..., **environment) -> CompletedProcess of a fresh interpreter that imports this tmlib."""

    def run(*arguments, cwd=config.ROOT, **environment):
        repository = os.path.dirname(os.path.dirname(os.path.abspath(config.__file__)))
        env = {**os.environ, "PYTHONPATH": repository, **{key: str(value) for key, value in environment.items()}}
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True)

    return run
