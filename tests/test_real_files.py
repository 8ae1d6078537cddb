"""The whole pipeline on real files, its notebooks by `dvc repro`: a folder of mp4s in, public parts in the place of the miniature's own.

The parts are those of diffusers and transformers by class, file layout and names, random and a few numbers wide. Sizes and lengths are those
of `smoke`, choices those of `wan14b`; its models are shared by two processes, where wan14b has eight. Six to fifteen minutes, so it runs when asked for: `make test ARGS='-m whole'`.
"""
import json
import shutil

import films
import public
import pytest
from ruamel.yaml import YAML
from test_conditions import house               # a fixture: UMT5, CLIP and their tokenizer in diffusers' layout
from test_pipeline import dvc, said

from tmlib import config, hub, scales

pytestmark = [pytest.mark.whole, pytest.mark.slow]
PEOPLE = 15
SPLITS = ("train", "generic", "test", "natural", "valid")


@pytest.fixture(scope="module")
def world(tmp_path_factory, house):
    """videos/, people who speak and who listen, and one without sound; wan/, w2v/, qwen2_audio/: the public parts."""
    public.skip_without_faces()
    folder = tmp_path_factory.mktemp("world")
    for i in range(PEOPLE):
        for kind in ("speaking", "listening"):
            films.good(folder / "videos" / f"person{i}" / f"{kind}.mp4", i, frames=83, style=("flat", "line", "soft3d")[i % 3], kind=kind)
    films.silent(folder / "videos" / "silent.mp4")
    public.save(folder, house)
    return folder


def trial(params, world):
    """params.yaml with one scale more."""
    wan, smoke, wan14b = str(world / "wan"), params["scales"]["smoke"], params["scales"]["wan14b"]
    made = json.loads(json.dumps(smoke))
    made["common"] = {**smoke["common"], "condition": wan14b["common"]["condition"]}
    made["data"] = {"folder": str(world / "videos"), "workers": 1, "shares": dict.fromkeys(SPLITS, 0.2)}
    for stage in ("codec", "readers", "base"):
        made[stage] = {**smoke[stage], "pretrained": wan}
    made["speech"] = {**smoke["speech"], "pretrained": str(world / "w2v"), "wav2vec": {"layers": [1, 2], "past_s": 0.5}, "per_frame": 4, "context": 2}
    made["conversation"] = {**smoke["conversation"], "pretrained": str(world / "qwen2_audio"), "settings": {"tokens": 12}}
    made["latents"] = {"text_dim": 16, **{k: wan14b["latents"][k] for k in ("mouth_weight", "eye_weight")}}
    made["base"]["prior"] = wan14b["base"]["prior"]
    for stage in ("latents", "base", "adaptation", "teacher", "distillation"):
        made[stage] = {**made[stage], "processes": 2}
    made["ablations"]["clean_pass"]["processes"] = 2
    params["scales"]["trial"] = made
    return params


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """The mirror of that scale, and the pipeline run there once, from the videos to the report."""
    copy = tmp_path_factory.mktemp("clone")
    for name in [*scales.sources(config.ROOT), "params.yaml", ".dvc/config"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(config.ROOT / name, copy / name)
    yaml = YAML()
    params = trial(yaml.load(copy / "params.yaml"), world)
    yaml.dump(params, copy / "params.yaml")
    folder = scales.mirror("trial", copy)
    said(dvc(folder, "repro"), limit=3000)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_every_stage_has_run(run):
    """DVC itself fails a stage that lacks one of its outputs; a second run has nothing to do."""
    again = said(dvc(run, "repro"))
    assert "Running stage" not in again and "up to date" in again
    assert {p.stem for p in (run / "reports" / "nb").glob("*.ipynb")} == {p.stem for p in (run / "notebooks").glob("*.ipynb")} - {"70_ablations"}
    assert {p.name for p in (run / "reports" / "videos").iterdir()} == {f"{who}_{k}.mp4" for who in ("teacher", "student") for k in (1, 2, 3)} | {"conversation.mp4"}
    assert not [p for p in (run / "data" / "scratch").glob("latents-*")]


def test_what_is_public_is_linked_and_what_is_unusable_is_told(run):
    """Three people a split, as `shares` says; nothing was trained in the place of a public part."""
    assert all(hub.linked(run / "data" / "models" / f"{name}.safetensors") for name in ("vae", "speech", "readers", "dialogue"))
    base = read(run, "reports/metrics/base.json")
    assert base["train_loss"] is None and base["test_flow_loss"] > 0
    assert [u["video"] for u in read(run, "data/clips/unusable.json")["unusable"]] == ["silent.mp4"]
    found = read(run, "reports/metrics/data.json")
    assert [found[f"{split}_{what}"] for split in SPLITS for what in ("clips", "identities")] == [2 * PEOPLE // 5, PEOPLE // 5] * 5
    assert len(found["examples"]) == 3 and all(name.startswith("clip ") for name in found["examples"])


def test_what_was_measured_is_a_number(run):
    metrics = {p.stem: read(run, p) for p in (run / "reports" / "metrics").glob("*.json")}
    assert set(metrics) == {"data", "codec", "speech", "readers", "base", "adaptation", "teacher", "student", "streaming", "close_look", "latency", "latency_matrix",
                            "robustness", "other_teacher", "dialogue", "conversation", "plain"}
    assert {m["scale"] for m in metrics.values()} == {"trial"}
    for name in ("teacher", "student"):
        m = metrics[name]
        assert all(-1 <= m[key] <= 1 for key in ("lip_r", "lip_r_natural", "lip_r_shuffled", "lip_r_ceiling"))
        assert 0 <= m["listening_opening_mean"] <= 1 and m["frechet"] > 0 and m["n"] == 2 * PEOPLE // 5
    assert all(-1 <= metrics["other_teacher"][f"{who}_lip_r"] <= 1 for who in ("teacher", "student"))
    assert metrics["streaming"]["chunks"] == 24 and metrics["latency"]["serial_fps"] > 0
    assert metrics["conversation"]["n"] == 2 and metrics["conversation"]["seconds"] > 5 and metrics["dialogue"]["right_unseen"] is None
    look = metrics["close_look"]
    assert look["n"] == 6 and look["student_closures"] is None and "is known" in look["student_closures_reason"] and -1 <= look["linear_ear_lip_r"] <= 1
    assert metrics["robustness"]["n"] == 3 and -1 <= metrics["robustness"]["lip_r_noise"] <= 1


def test_what_is_null_is_so_for_a_reason(run):
    """Styles, accents and rates are drawn people's alone; the rest of a claim is judged all the same."""
    claims = read(run, "reports/claims.json")
    parts = {part["metric"]: part for claim in claims.values() for part in claim["parts"]}
    for style in ("flat", "line", "soft3d"):
        assert parts[f"teacher:lip_r_{style}"]["holds"] is None and "no clip of this style" in parts[f"teacher:lip_r_{style}"]["reason"]
    for kind in ("accent", "slow", "fast"):
        assert parts[f"robustness:lip_r_ratio_{kind}"]["holds"] is None and "real clips" in parts[f"robustness:lip_r_ratio_{kind}"]["reason"]
    assert "no list says" in parts["dialogue:right_unseen"]["reason"]
    for metric in ("teacher:lip_r", "student:teacher_ratio", "streaming:toggle_latency_frames", "robustness:lip_r_ratio_noise"):
        assert isinstance(parts[metric]["holds"], bool) and parts[metric]["value"] is not None, metric
    assert all(part["reason"] for part in parts.values() if part["holds"] is None)
    page = (run / "reports" / "index.html").read_text()
    assert "student_1.mp4" in page and "no clip of this style" in page
