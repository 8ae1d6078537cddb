"""Folders of weights in diffusers' layout: config.json, safetensors (sharded when large), and our own tm_config.json.

- The Wan part of a folder is exactly what diffusers writes; audio weights lie beside it in tm_audio.safetensors.
- Weights stream in one tensor at a time: 16 B parameters never exist twice. No pickle is ever read.
- Every file is written beside its place and renamed.
"""

import dataclasses
import json
from pathlib import Path

import torch

from .config import UserError, atomic

SHARD = 5_000_000_000                                       # bytes per safetensors file
STEM = "diffusion_pytorch_model"                            # diffusers' name for weights
AUDIO_FILE = "tm_audio.safetensors"
FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")     # whatever the dtype, as in diffusers
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "pos_embed_seq_len": None}    # the only Wan we build


def replace(config, overrides):
    """dataclasses.replace that answers an unknown field with the known ones."""
    known = [f.name for f in dataclasses.fields(config)]
    for name in overrides:
        if name not in known:
            raise UserError(f"model setting {name!r} is unknown; the known ones are {', '.join(known)}")
    return dataclasses.replace(config, **overrides)


# Writing

def write_folder(folder, wan, ours, state, max_shard_bytes=SHARD):
    """wan, ours: the two halves of the configuration; state: name -> tensor."""
    folder = Path(folder)
    audio = {n: t for n, t in state.items() if "audio" in n}
    plain = {n: t for n, t in state.items() if "audio" not in n}
    (folder / "config.json").unlink(missing_ok=True)        # written last: a folder cut off half-way has none, and says so
    (folder / AUDIO_FILE).unlink(missing_ok=True)
    if audio:
        write_tensors(folder / AUDIO_FILE, audio)
    write_shards(folder, plain, max_shard_bytes)
    write_json(folder / "tm_config.json", ours)
    write_json(folder / "config.json", {"_class_name": "WanTransformer3DModel", "rope_max_seq_len": 1024, **FIXED, **wan})


def write_shards(folder, state, max_shard_bytes):
    shards, size = [{}], 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [f"{STEM}.safetensors"]
    for name, shard in zip(names, shards):
        write_tensors(folder / name, shard)
    index = folder / f"{STEM}.safetensors.index.json"
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        write_json(index, {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": places})
    for stale in {index, *folder.glob(f"{STEM}*.safetensors")} - {folder / n for n in names} - {index if len(shards) > 1 else None}:
        stale.unlink(missing_ok=True)                       # of an earlier save with another number of shards


def write_tensors(path, tensors):
    from safetensors.torch import save_file
    with atomic(path) as temp:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, temp, metadata={"format": "pt"})


def write_json(path, values):
    with atomic(path) as temp:
        temp.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# Reading

def find_folder(folder):
    """The folder that holds config.json: itself, its transformer/ part, or a download of a hub id such as "Wan-AI/..."."""
    path = Path(folder)
    if not path.is_dir():
        if str(folder).count("/") != 1 or path.is_absolute() or str(folder).startswith("."):
            raise UserError(f"{folder}: no such model folder; train one first (make repro) or give a folder or a hub id")
        path = download(str(folder))
    for candidate in (path, path / "transformer"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"{folder}: no config.json there; give a folder written by save_pretrained or by diffusers")


def download(hub_id):
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(hub_id, allow_patterns=["transformer/*", "config.json", f"{STEM}*", "tm_*"]))
    except Exception as error:
        raise UserError(f"{hub_id}: neither a folder here nor a model that could be downloaded ({type(error).__name__})") from error


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({type(error).__name__}); restore or save it again") from error


def read_config(folder, cls, ours):
    """A `cls` from config.json and tm_config.json; `ours`: what the latter's fields are where there is no such file."""
    wan = read_json(folder / "config.json")
    for name, value in FIXED.items():
        if wan.get(name, value) != value:
            raise UserError(f"{folder / 'config.json'}: {name} = {wan[name]!r} is not supported, only {value!r}")
    if (folder / "tm_config.json").is_file():
        ours = {**ours, **read_json(folder / "tm_config.json")}
    names = {f.name for f in dataclasses.fields(cls)}
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in {**wan, **ours}.items() if n in names}
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{folder / 'config.json'}: not a Wan configuration ({error})") from error


def files(folder):
    """The safetensors files of a folder; a file that the index names must be there."""
    index = folder / f"{STEM}.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [f"{STEM}.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; the folder is incomplete, copy or save it again")
    return [folder / n for n in names] + [f for f in [folder / AUDIO_FILE] if f.is_file()]


def load_into(model, folder, dtype=None, device="cpu", optional="audio"):
    """Give the meta-device `model` its weights; returns the names (all holding `optional`) that the folder lacks, left empty."""
    from safetensors import SafetensorError, safe_open
    wanted, found = dict(model.named_parameters()), set()
    for path in files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as f:
                for name in f.keys():
                    if name.endswith("norm_added_q.weight"):             # in some Wan conversions, used by none
                        continue
                    put(model, wanted, name, f.get_tensor(name), dtype, path)
                    found.add(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); copy or save it again") from error
    missing = sorted(set(wanted) - found)
    lost = [n for n in missing if optional not in n]
    if lost:
        raise UserError(f"{folder}: {len(lost)} weights missing, such as {', '.join(lost[:3])}; is config.json of another model?")
    for name in missing:
        put(model, wanted, name, torch.empty(wanted[name].shape, device=device), dtype, folder)
    return missing


def put(model, wanted, name, tensor, dtype, path):
    if name not in wanted:
        raise UserError(f"{path}: unexpected weight {name}; is config.json of another model?")
    if tensor.shape != wanted[name].shape:
        raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, config.json says {tuple(wanted[name].shape)}")
    if dtype is not None:
        tensor = tensor.to(torch.float32 if any(part in name for part in FLOAT32) else dtype)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=wanted[name].requires_grad))
