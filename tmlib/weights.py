"""Folders of weights in diffusers' layout: config.json, safetensors (sharded when large), and our own tm_config.json.

- Wan2.1's own checkpoints, of other names in the same files, are read too.
- The Wan part of a folder is exactly what diffusers writes; audio weights lie beside it in tm_audio.safetensors.
- Weights stream in one tensor at a time: 16 B parameters never exist twice. No pickle is ever read.
- Every file is written beside its place and renamed.
"""

import dataclasses
import json
import re
from pathlib import Path

import torch

from . import ranks
from .config import RANK, UserError, atomic
from .hub import read_json, weight_files

SHARD = 5_000_000_000                                       # bytes per safetensors file
STEM = "diffusion_pytorch_model"                            # diffusers' name for weights
AUDIO_FILE = "tm_audio.safetensors"
FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")     # whatever the dtype, as in diffusers
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "pos_embed_seq_len": None}    # the only Wan we build


# Wan2.1's own names of parameters, and diffusers', which are ours. What stands before (blocks.N.) and behind (.weight, .bias) is the
# same in both. The norm before cross-attention is Wan's third and our second; the others have no weights.
OF_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
                "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
IN_BLOCK = {**{f"{a}.{wan}": f"{b}.{ours}" for a, b in (("self_attn", "attn1"), ("cross_attn", "attn2")) for wan, ours in OF_ATTENTION.items()},
            "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "modulation": "scale_shift_table"}
AT_ROOT = {"head.head": "proj_out", "head.modulation": "scale_shift_table", **{wan: f"condition_embedder.{ours}" for wan, ours in {
    "time_embedding.0": "time_embedder.linear_1", "time_embedding.2": "time_embedder.linear_2", "time_projection.1": "time_proj",
    "text_embedding.0": "text_embedder.linear_1", "text_embedding.2": "text_embedder.linear_2",
    "img_emb.proj.0": "image_embedder.norm1", "img_emb.proj.1": "image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "image_embedder.ff.net.2", "img_emb.proj.4": "image_embedder.norm2"}.items()}}


def renamed(name: str, back: bool = False) -> str:
    """Wan2.1's own name of a parameter -> ours, which stays as it is; back: ours -> Wan2.1's."""
    block, middle, end = re.fullmatch(r"(blocks\.\d+\.|)(.+?)(\.weight|\.bias|)", name).groups()
    table = IN_BLOCK if block else AT_ROOT
    return block + ({ours: wan for wan, ours in table.items()} if back else table).get(middle, middle) + end


def original_config(wan: dict) -> dict:
    """config.json of a Wan2.1 checkpoint (WanModel) in diffusers' words; what it leaves out are constants of Wan2.1's code."""
    return {"num_attention_heads": wan["num_heads"], "attention_head_dim": wan["dim"] // wan["num_heads"], "num_layers": wan["num_layers"],
            "ffn_dim": wan["ffn_dim"], "in_channels": wan["in_dim"], "out_channels": wan["out_dim"], "freq_dim": wan["freq_dim"],
            "eps": wan["eps"], "text_dim": wan.get("text_dim", 4096), "image_dim": wan.get("image_dim", 1280) if wan["model_type"] == "i2v" else None}


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
    tensors = {n: ranks.whole(t.detach()).contiguous() for n, t in tensors.items()}
    if RANK:
        return                                              # rank 0 writes: see `ranks`
    with atomic(path) as temp:
        save_file(tensors, temp, metadata={"format": "pt"})


def write_json(path, values):
    with atomic(path) as temp:
        temp.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# Reading

def read_config(folder, cls, ours):
    """A `cls` from config.json and tm_config.json; `ours`: what the latter's fields are where there is no such file."""
    wan = read_json(folder / "config.json")
    try:
        wan = original_config(wan) if wan.get("_class_name") == "WanModel" else wan
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: not a Wan configuration ({error} is missing); copy it again") from error
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


def load_into(model, folder, dtype=None, device="cpu", optional="audio"):
    """Give the meta-device `model` its weights; returns the names (all holding `optional`) that the folder lacks, left empty.

    A model in pieces (`ranks.shard`) is filled piece by piece: every rank reads the files, and keeps its own part of each tensor.
    """
    from safetensors import SafetensorError, safe_open
    wanted, found = dict(model.named_parameters()), set()
    for path in weight_files(folder) + [f for f in [folder / AUDIO_FILE] if f.is_file()]:
        try:
            with safe_open(path, framework="pt", device=str(device)) as f:
                for name in f.keys():
                    if name.endswith("norm_added_q.weight"):             # in some Wan conversions, used by none
                        continue
                    put(model, wanted, renamed(name), f.get_tensor(name), dtype, path)
                    found.add(renamed(name))
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
    if ranks.in_pieces(wanted[name]):
        with torch.no_grad():
            wanted[name].copy_(ranks.cut(tensor, wanted[name]))
        return
    if dtype is not None:
        tensor = tensor.to(torch.float32 if any(part in name for part in FLOAT32) else dtype)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=wanted[name].requires_grad))
