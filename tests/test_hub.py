"""hub: parts are found where libraries put them, incomplete ones are named, and a fingerprint tells models apart."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tmlib import hub
from tmlib.config import UserError


def make_part(folder, size=4, kind="model"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "X"} if kind.startswith("diffusion") else {"model_type": "x"}))
    save_file({"w": torch.arange(size).float()}, folder / f"{kind}.safetensors")
    return folder


def test_a_part_is_found_in_its_pipeline_or_alone(tmp_path):
    part = make_part(tmp_path / "vae")
    assert hub.find_part(tmp_path, "vae") == hub.find_part(str(part), "vae") == part
    (tmp_path / "config.json").write_text("{}")                              # of something else: the part's own folder comes first
    assert hub.find_part(tmp_path, "vae") == part
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="text_encoder/config.json: missing"):
        hub.find_part(tmp_path, "text_encoder")
    for nowhere in ("no/such/folder", "./nowhere", str(tmp_path / "nowhere"), "nowhere"):
        with pytest.raises(UserError, match="no such folder"):
            hub.find_part(nowhere, "vae")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    part = make_part(tmp_path / "wan" / "vae")
    assert hub.find_part("~/wan", "vae") == part
    with pytest.raises(UserError, match="no such folder"):
        hub.find_part("~/nowhere", "vae")


def test_a_hub_id_is_downloaded_without_pickles(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub
    part, asked = make_part(tmp_path / "vae"), {}

    def download(hub_id, allow_patterns):
        asked[hub_id] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find_part("Wan-AI/Some", "vae") == part
    wanted = lambda name: any(fnmatch.fnmatch(name, p) for p in asked["Wan-AI/Some"])
    assert all(map(wanted, ("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "model-00001-of-00002.safetensors", "chat_template.jinja")))
    hub.download("Wan-AI/Both", "transformer")                               # diffusers' layout, and Wan2.1's own
    both = [any(fnmatch.fnmatch(name, p) for p in asked["Wan-AI/Both"]) for name in (
        "transformer/diffusion_pytorch_model-00001-of-00014.safetensors", "diffusion_pytorch_model-00001-of-00007.safetensors",
        "diffusion_pytorch_model.safetensors.index.json", "config.json", "models_t5_umt5-xxl-enc-bf16.pth", "vae/diffusion_pytorch_model.safetensors")]
    assert both == [True] * 4 + [False] * 2
    assert not any(map(wanted, ("vae/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.safetensors", "x.bin")))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert hub.find_part("Wan-AI/Some", "vae") == part                       # the hub is asked once in a process
    hub.download.cache_clear()
    with pytest.raises(UserError, match="^Wan-AI/Some: no folder here, and no model that could be downloaded"):
        hub.find_part("Wan-AI/Some", "vae")


@pytest.mark.parametrize("kind", ["model", "diffusion_pytorch_model"])
def test_files_of_weights(tmp_path, kind):
    folder = make_part(tmp_path, kind=kind)
    whole = folder / f"{kind}.safetensors"
    assert hub.weight_files(folder) == [whole]
    (folder / f"{kind}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(UserError, match="one.safetensors: missing"):
        hub.weight_files(folder)
    for name in ("one", "two"):
        save_file({"w": torch.zeros(2)}, folder / f"{name}.safetensors")
    assert [f.name for f in hub.weight_files(folder)] == ["one.safetensors", "two.safetensors"]
    (folder / "two.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="two.safetensors: not a complete safetensors file"):
        hub.weight_files(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_configurations_that_are_none(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="config.json: not"):
        hub.read_json(tmp_path / "config.json")


def test_fingerprints_tell_models_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "EDGE", 64)                                     # of files of 1,000 numbers
    a, b = make_part(tmp_path / "a", 1000), make_part(tmp_path / "b", 1000)
    same = hub.fingerprint(a)
    assert hub.fingerprint(b) == same and hub.fingerprint(a, b) != same      # wherever it lies
    (b / "README.md").write_text("words")
    assert hub.fingerprint(b) == same
    (b / "config.json").write_text("{}")
    assert hub.fingerprint(b) != same
    c, w = make_part(tmp_path / "c", 1000), torch.arange(1000).float()
    w[-1] = 0
    save_file({"w": w}, c / "model.safetensors")                             # the last number alone
    assert hub.fingerprint(c) != same
    save_file({"v": torch.arange(1000).float()}, c / "model.safetensors")    # another name
    assert hub.fingerprint(c) != same


def test_a_link_says_where_a_part_lies(tmp_path, monkeypatch):
    path = tmp_path / "models" / "vae.safetensors"
    assert hub.linked(path) is None
    hub.link(path, tmp_path, layers=(1, -1), group=3)
    assert hub.linked(path) == {"source": str(tmp_path), "layers": [1, -1], "group": 3} and path.stat().st_size < 1000
    monkeypatch.chdir(tmp_path.parent)
    hub.link(path, tmp_path.name)                                             # found from anywhere
    assert hub.linked(path) == {"source": str(tmp_path.resolve())}
    hub.link(path, "Wan-AI/Some", {"w": torch.ones(2)})                       # beside weights of its own
    assert hub.linked(path) == {"source": "Wan-AI/Some"} and load_file(path)["w"].sum() == 2
    save_file({"w": torch.zeros(2)}, path)
    assert hub.linked(path) is None
    path.write_bytes(b"no safetensors")
    assert hub.linked(path) is None


def test_too_little_memory_is_not_taken_for_wrong_weights(tmp_path, monkeypatch):
    class Hungry:
        @staticmethod
        def from_pretrained(folder, **how):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11 GiB")
    monkeypatch.setattr(hub, "weight_files", lambda folder: [])
    with pytest.raises(UserError, match="no memory left for it on cuda"):
        hub.load_part(Hungry, tmp_path, torch.bfloat16, "cuda")
