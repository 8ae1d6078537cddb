"""`python -m tmlib.demo`: copy the trained miniature into data/demo in half precision, with where it came from, and a face to try it on.

The copy is committed, so that a newcomer sees it talk before training anything. Refresh it seldom.
"""
import shutil

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


def halve(source, target) -> None:
    """A safetensors file with its floats in float16; shapes, names and metadata stay. UserError for a number that is too large."""
    with safe_open(source, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        metadata = f.metadata()
    small = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
    if lost := [k for k, v in tensors.items() if not v.isfinite().equal(small[k].isfinite())]:
        raise UserError(f"{source}: {lost[0]} holds numbers that half precision does not; train it again with a lower learning rate")
    with atomic(target) as tmp:
        save_file(small, tmp, metadata)


def main() -> None:
    missing = [name for name in FILES if not (MODELS / name).exists()]
    if missing:
        raise UserError(f"data/models/{missing[0]} is missing: run `make repro` first")
    for name in FILES:
        target = DATA / "demo" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        halve(MODELS / name, target) if name.endswith(".safetensors") else shutil.copyfile(MODELS / name, target)
    test = Clips(DATA / "clips", "test")
    with atomic(DATA / "demo" / "face.png") as tmp:
        Image.fromarray(test.frames[test.examples()[0], 0]).save(tmp)
    numbers = {f"{file}_{key}": load_json(METRICS / f"{file}.json")[key] for file, keys in NUMBERS.items() for key in keys}
    save_json(DATA / "demo" / "provenance.json", {"commit": commit(ROOT), "precision": "float16", **numbers})
    size = sum(p.stat().st_size for p in (DATA / "demo").rglob("*") if p.is_file())
    print(f"data/demo: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli(main)
