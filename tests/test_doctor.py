"""The machine's check: what it mends, what it leaves alone, what it says."""

import subprocess

import pytest

from tmlib import config, doctor


def result(returncode, stderr=""):
    return subprocess.CompletedProcess([], returncode, stdout="", stderr=stderr)


@pytest.fixture
def torchaudio(tmp_path, monkeypatch):
    """A torchaudio whose import works once its lib holds no .so; `stderr` is what the failing import says."""
    library = tmp_path / "torchaudio" / "lib"
    library.mkdir(parents=True)
    for name in ("_torchaudio.abi3.so", "libtorchaudio.so", "__init__.py"):
        (library / name).touch()
    stderr = ["OSError: libc10_cuda.so: cannot open shared object file: No such file or directory\nOSError: Could not load this library"]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: type("spec", (), {"origin": str(library.parent / "__init__.py")}))
    monkeypatch.setattr(doctor, "_python", lambda _: result(1, stderr[0]) if list(library.glob("*.so")) and stderr[0] else result(0))
    return library, stderr


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_cuda_only_files_are_moved_aside_once_and_openly(torchaudio):
    library, _ = torchaudio
    aside = library.with_name("lib.cuda-only")
    assert doctor.check_torchaudio().startswith(f"moved 2 CUDA-only files to {aside}")
    assert files(library) == ["__init__.py"] and files(aside) == ["_torchaudio.abi3.so", "libtorchaudio.so"]
    assert doctor.check_torchaudio() == "works"


@pytest.mark.parametrize("words", ["", "ModuleNotFoundError: No module named 'torch'", "OSError: libsox.so: cannot open shared object file"])
def test_nothing_is_touched_where_it_works_or_for_another_reason(torchaudio, words):
    library, stderr = torchaudio
    stderr[0] = words
    if words:
        with pytest.raises(config.UserError, match="torchaudio does not import .*run `make env`"):
            doctor.check_torchaudio()
    else:
        assert doctor.check_torchaudio() == "works"
    assert len(files(library)) == 3 and not library.with_name("lib.cuda-only").exists()


def test_every_check_is_reported_and_one_failure_is_enough(monkeypatch, capsys):
    def fails():
        raise config.UserError("only 1 GB free")

    monkeypatch.setattr(doctor, "CHECKS", {"python": doctor.check_python, "disk": fails, "kernel": doctor.check_kernel})
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["python", "disk", "kernel"] and "NOT READY: only 1 GB free" in lines[1]


def test_a_folder_too_deep_for_drawn_speakers(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.config, "SCRATCH", tmp_path / ("deep" * 40))
    with pytest.raises(doctor.config.UserError, match="too deep for espeak-ng"):
        doctor.check_espeak()


def test_espeak_here():
    assert doctor.check_espeak() == "voices load, 22050 Hz"


def test_old_python_is_named(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4))
    with pytest.raises(config.UserError, match="use 3.11 or newer"):
        doctor.check_python()
