"""Pretrained parts in the folders of diffusers and transformers: found, checked and loaded whole, or refused in one line.

What is special
- A source is a part's own folder, a pipeline's folder that holds it ("vae/", "text_encoder/"), or a hub id of either.
- A run that takes a public part trains none: in the place of its weights stands a *link*, a safetensors file that says in
  its metadata where the part lies. So a folder of models knows by itself which encoders belong to it.
- Files are looked at before a library sees them: what is missing, cut short or not safetensors is named. No pickle is ever read.
- Libraries give weights that a file lacks random values and go on; here that is an error.
- The miniature's own small parts, too, are a file each: weights, with the configuration inside.
"""
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from .config import UserError, atomic, one_line

EDGE = 1 << 20                                   # bytes at either end of a weight file that identify it


def find_part(source, part: str, config: str = "config.json") -> Path:
    """The folder of `part` ("vae"): the first of `source`/part and `source` itself that holds the file `config`."""
    path = Path(source).expanduser()
    if not path.is_dir():
        if str(source).count("/") != 1 or path.is_absolute() or str(source).startswith("."):
            raise UserError(f"{source}: no such folder; give a folder in diffusers' layout or a hub id such as Wan-AI/...")
        path = download(str(source), part)
    for candidate in (path / part, path):
        if (candidate / config).is_file():
            return candidate
    raise UserError(f"{path / part / config}: missing, and so is {path / config}; copy the model's {part} there")


@lru_cache
def download(hub_id: str, part: str) -> Path:
    """Once in a process: every batch asks where its encoders are, and each time the hub would be asked."""
    try:
        from huggingface_hub import snapshot_download
        alone = ("diffusion_pytorch_model", "tm_") if part == "transformer" else ("model",)      # files of a part that is no pipeline's
        kinds = (f"{part}/*.safetensors", f"{part}/*.model", f"{part}/*.txt", *(f"{stem}*.safetensors" for stem in alone), "*.json", "*.jinja")
        return Path(snapshot_download(hub_id, allow_patterns=kinds))
    except Exception as error:
        raise UserError(f"{hub_id}: no folder here, and no model that could be downloaded ({type(error).__name__})") from error


def read_json(path: Path) -> dict:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({type(error).__name__}); copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not an object with settings; copy it again")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part, each there and complete (safetensors checks its length against its header)."""
    from safetensors import safe_open
    stem = "diffusion_pytorch_model" if "_class_name" in read_json(folder / "config.json") else "model"
    index = folder / f"{stem}.safetensors.index.json"
    names = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else [f"{stem}.safetensors"]
    files = [folder / name for name in names]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: missing; copy it there, or convert other weights to safetensors first")
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:
            raise UserError(f"{path}: not a complete safetensors file ({one_line(error)}); copy it again") from error
    return files


def load_part(cls, folder: Path, dtype, device, optional: tuple[str, ...] = (), **how):
    """`cls.from_pretrained(folder, **how)`, frozen, for inference. Only weights whose names end in `optional` may be missing."""
    import torch
    weight_files(folder)
    try:
        how = dict(how, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True)
        net, info = cls.from_pretrained(folder, **how)
        net = net.to(device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"{folder}: no memory left for it on {device}; close what else uses that memory, or give another device or a smaller model") from error
    except Exception as error:
        raise UserError(f"{folder}: its weights are not those of its config.json ({one_line(error, 200)}); copy both again") from error
    if lost := sorted(name for name in info["missing_keys"] if not name.endswith(optional)):
        raise UserError(f"{folder}: {len(lost)} weights missing, such as {', '.join(lost[:3])}; is config.json of another model?")
    return net.eval().requires_grad_(False)


def fingerprint(*folders: Path) -> str:
    """Hex digest of models: all small files (configurations, vocabularies), and size and ends of each file of weights.

    Reading 11 GB to look up one prompt would take longer than to encode it; a fine-tuned model that differs from another in the
    middle of a file alone would be taken for it.
    """
    digest = hashlib.sha256()
    kinds = (".json", ".txt", ".model", ".safetensors")
    for path in (p for folder in folders for p in sorted(Path(folder).iterdir()) if p.suffix in kinds):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors" or size <= 2 * EDGE:
                digest.update(file.read())
            else:
                digest.update(file.read(EDGE))
                file.seek(-EDGE, 2)
                digest.update(file.read())
    return digest.hexdigest()


def link(path, source, tensors: dict | None = None, **how) -> None:
    """Write the link `path` to the pretrained part `source`; how: JSON values that its loader takes; tensors: weights that share the file."""
    from safetensors.torch import save_file
    folder = Path(source).expanduser()
    source = folder.resolve() if folder.is_dir() else source                 # found from wherever it is read
    with atomic(path) as temporary:
        save_file(tensors or {}, temporary, {"pretrained": json.dumps({"source": str(source), **how})})


def linked(path) -> dict | None:
    """What `link` wrote into this file: {"source": ..., ...}; None for a plain file of weights, or none at all."""
    from safetensors import safe_open
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("pretrained", "null"))
    except Exception:                                # whoever reads its weights says what is wrong with it
        return None


def save_own(path, weights: dict, cfg) -> None:
    """One of the miniature's own networks as a file: its weights, and its configuration, a dataclass, inside."""
    from safetensors.torch import save_file
    with atomic(path) as temporary:
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary, {"config": json.dumps(asdict(cfg))})


def load_own(path, make: Callable, what: str):
    """make(**configuration) with the weights that `save_own` wrote, to be run. UserError: the file is missing, or is no `what`."""
    from safetensors import safe_open
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run `make repro`, or give a folder of trained models")
    try:
        with safe_open(path, "pt") as file:
            net = make(**json.loads(file.metadata()["config"]))
            net.load_state_dict({k: file.get_tensor(k) for k in file.keys()})
    except Exception as error:
        raise UserError(f"{path} is no {what} of this project ({type(error).__name__}): delete it and run `make repro`") from error
    return net.eval().requires_grad_(False)
