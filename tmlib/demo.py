"""`python -m tmlib.demo`: copy the trained miniature into data/demo in half precision, with where it came from, and a face to try it on.
`python -m tmlib.demo use`: the other way, in place of training; see `make ready`.

The copy is committed, so that a newcomer sees it talk before training anything. Refresh it seldom.
"""
import shutil
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from .config import DATA, METRICS, MODELS, ROOT, UserError, atomic, cli, load_json, save_json
from .data import Clips
from .scales import commit

FILES = ("vae.safetensors", "speech.safetensors", "readers.safetensors", "dialogue.safetensors", "student/stream.json", *(f"{dit}/{name}" for dit in ("student", "teacher") for name in (
    "diffusion_pytorch_model.safetensors", "tm_audio.safetensors", "config.json", "tm_config.json")))
NUMBERS = {"codec": ["psnr_db"], "readers": ["codec_lip_r"], "speech": ["phone_accuracy_test"], "teacher": ["lip_r"],
           "student": ["lip_r", "lip_r_natural", "border_ratio", "teacher_ratio"], "dialogue": ["right_unseen"]}


def cast(source, target, dtype: torch.dtype) -> None:
    """A safetensors file with its floats of 16 or 32 bits as `dtype` (bfloat16 stays); shapes, names and metadata stay too. UserError for a number that is too large."""
    with safe_open(source, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        metadata = f.metadata()
    made = {k: v.to(dtype) if v.dtype in (torch.float16, torch.float32) else v for k, v in tensors.items()}
    if lost := [k for k, v in tensors.items() if not v.isfinite().equal(made[k].isfinite())]:
        raise UserError(f"{source}: {lost[0]} holds numbers that half precision does not; train it again with a lower learning rate")
    with atomic(target) as tmp:
        save_file(made, tmp, metadata)


def copy(source: Path, target: Path, dtype: torch.dtype) -> None:
    """All FILES of a folder of models into another."""
    for name in FILES:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        cast(source / name, target / name, dtype) if name.endswith(".safetensors") else shutil.copyfile(source / name, target / name)


def make() -> None:
    """data/demo from data/models; UserError before all are trained."""
    missing = [name for name in FILES if not (MODELS / name).exists()]
    if missing:
        raise UserError(f"data/models/{missing[0]} is missing: run `make repro` first")
    copy(MODELS, DATA / "demo", torch.float16)
    test = Clips(DATA / "clips", "test")
    with atomic(DATA / "demo" / "face.png") as tmp:
        Image.fromarray(test.frames[test.examples()[0], 0]).save(tmp)
    numbers = {f"{file}_{key}": load_json(METRICS / f"{file}.json")[key] for file, keys in NUMBERS.items() for key in keys}
    save_json(DATA / "demo" / "provenance.json", {"commit": commit(ROOT), "precision": "float16", **numbers})
    size = sum(p.stat().st_size for p in (DATA / "demo").rglob("*") if p.is_file())
    print(f"data/demo: {size / 1e6:.1f} MB")


def use() -> None:
    """data/models from data/demo, in single precision, as if they had been trained here; UserError where a run has written some."""
    if found := [name for name in FILES if (MODELS / name).exists()]:
        raise UserError(f"data/models/{found[0]} is there already, of a run or of `make ready`; move data/models away first")
    copy(DATA / "demo", MODELS, torch.float32)


def main() -> None:
    if sys.argv[1:] not in ([], ["use"]):
        raise UserError("usage: python -m tmlib.demo [use]")
    use() if sys.argv[1:] else make()


if __name__ == "__main__":
    cli(main)
