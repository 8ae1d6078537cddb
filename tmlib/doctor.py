"""Is this machine ready?  python -m tmlib.doctor

Says what it finds, one line each, and exits non-zero if something essential is missing. `make env` runs it once after
installing. One thing it mends, and says so: torchaudio beside a CPU-only torch. The package index has one build of torchaudio,
linked against CUDA; without CUDA's libraries `import torchaudio` fails. Nearly all of it is pure PyTorch and works with
its compiled extension out of the way; where the import works, nothing is touched.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import config

CUDA_LIBRARIES = ("libc10_cuda", "libtorch_cuda", "libcudart", "libcublas", "libcudnn", "libnvrtc")
RESAMPLE = "import torch, torchaudio; assert torchaudio.functional.resample(torch.zeros(480), 48000, 16000).shape == (160,)"
PATH_MAX = 130                          # characters of a folder of voices: espeak-ng's C code cuts paths of files in it at 160
DISK_GB = 4                             # data, cache and executed notebooks of the mini scale, with room


def _python(code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter: a failed import, or a C library that aborts, must not take this process along."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def _last_line(result: subprocess.CompletedProcess) -> str:
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


# -------------------------------------------------------------------------------------------------------- checks
def check_python() -> str:
    if sys.version_info < (3, 11):
        raise config.UserError(f"Python {sys.version.split()[0]} is too old; use 3.11 or newer: `make env PYTHON=python3.11`")
    return f"{sys.version.split()[0]}  {sys.executable}"


def check_torch() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise config.UserError(f"torch does not import ({error}); run `make env`") from None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{torch.__version__}  {device}"


def check_torchaudio() -> str:
    """Import and resample; where only CUDA's libraries are missing, move the compiled extension aside, and check again."""
    first = _python(RESAMPLE)
    if first.returncode == 0:
        return "works"
    missing = [line for line in first.stderr.splitlines() if "cannot open shared object" in line]
    spec = importlib.util.find_spec("torchaudio")
    if spec is None or not any(name in line for line in missing for name in CUDA_LIBRARIES):
        raise config.UserError(f"torchaudio does not import ({_last_line(first)}); run `make env`")
    library = Path(spec.origin).parent / "lib"
    moved = set_aside(library)
    second = _python(RESAMPLE)
    if second.returncode:
        raise config.UserError(f"torchaudio does not import even without its extension ({_last_line(second)})")
    return f"moved {len(moved)} CUDA-only files to {library}.cuda-only (torch here has no CUDA); import and resample work"


def set_aside(library: Path) -> list[Path]:
    """Move library/*.so into the sibling folder library.cuda-only; the moved files."""
    aside = library.with_name(library.name + ".cuda-only")
    aside.mkdir(exist_ok=True)
    return [Path(shutil.move(path, aside / path.name)) for path in sorted(library.glob("*.so"))]


def check_espeak() -> str:
    """Load the library and its voices. 0x8000: report a failure instead of leaving the process."""
    code = (
        "import ctypes, espeakng_loader as e; library = ctypes.CDLL(e.get_library_path());"
        "print(library.espeak_Initialize(2, 0, str(e.get_data_path()).encode(), 0x8001))"
    )
    result = _python(code)
    rate = result.stdout.strip()
    if result.returncode or not rate.isdigit():
        raise config.UserError(f"espeak-ng finds no voices ({_last_line(result)}); run `make env`, in a folder with a shorter path")
    if len(str(config.SCRATCH / "speakers-0123456789ab")) > PATH_MAX:
        raise config.UserError(f"{config.SCRATCH} is too deep for espeak-ng, which must find voices there; use a folder with a shorter path")
    return f"voices load, {rate} Hz"


def check_kernel() -> str:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        raise config.UserError("Jupyter has no kernel `python3`; run `make env`") from None
    return f"python3  {spec.resource_dir}"


def check_disk() -> str:
    free = shutil.disk_usage(config.ROOT).free / 1e9
    if free < DISK_GB:
        raise config.UserError(f"only {free:.1f} GB free at {config.ROOT}; the mini scale wants {DISK_GB} GB")
    return f"{free:.0f} GB free"


CHECKS = {
    "python": check_python, "torch": check_torch, "torchaudio": check_torchaudio,
    "espeak-ng": check_espeak, "kernel": check_kernel, "disk": check_disk,
}


def main() -> int:
    failed = 0
    for name, check in CHECKS.items():
        try:
            print(f"{name:12}{check()}", flush=True)
        except config.UserError as error:
            failed += 1
            print(f"{name:12}NOT READY: {error}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    config.cli(main)
