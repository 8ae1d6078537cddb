"""Full size, small: the scale wan14b is consistent, and its three stages train and stream on clips of real files with real parts.

The parts are those of diffusers and transformers by class, file layout and names of parameters, a few numbers wide and random: a
Wan2.1 transformer of 2 layers (4 heads of 16, 7 frames of 2 x 2 tokens), its codec, UMT5, CLIP, Wav2Vec2. Parameters of training
are those of params.yaml but for length and batch.
"""
import json
import subprocess
import sys
from types import SimpleNamespace

import films
import numpy as np
import public
import pytest
import torch
from ruamel.yaml import YAML
from test_conditions import house               # a fixture: UMT5, CLIP and their tokenizer in diffusers' layout

from tmlib import conditions, config, distill, flow, hub, plan, ranks, readers, scales, train, videos, wan_vae, wav2vec
from tmlib.data import Clips
from tmlib.dit import VARIANTS, WanDiT
from tmlib.latents import Latents, encode_split
from tmlib.pretrain import flow_matching_loss
from tmlib.stream import Streamer
from tmlib.train import Optim, Player

ROOT = config.ROOT


def section(name, **changes):
    """A section of params.yaml at the scale wan14b, as `config.load` gives it there."""
    params = YAML(typ="safe", pure=True).load(scales.scaled_params(ROOT, "wan14b"))
    return SimpleNamespace(**{**params["common"], **params[name], **changes})


# ---- the configuration -------------------------------------------------------------------------

def test_the_scale_fits_the_model():
    variant, data, speech = VARIANTS[section("base").variant], section("data"), section("speech")
    assert data.frames == 4 * (21 - 1) + 1 and data.size == 512 and 21 % section("base").chunk == 0
    assert section("base").condition == variant["condition"] and section("latents").text_dim == variant["text_dim"]
    ears = wav2vec.Wav2VecConfig(per_frame=speech.per_frame, context=speech.context, group=speech.chunk, **speech.wav2vec)
    assert (4 + 2 * ears.context) * ears.per_frame == variant["audio_tokens"]
    assert 17.5e9 < plan.parameters(plan.build(section("base").variant)) < 18.5e9
    assert videos.settings(data).frames == 81
    assert section("base").prior is False and section("base").variant == "talkingmachines-18b"
    assert all(Optim(**section(stage).optim).muon == 0 for stage in ("adaptation", "teacher"))
    p = section("distillation")
    assert p.steps == 2 and len(flow.timesteps(p.steps, p.shift)) == 2 and p.cache == "per_step"
    assert [Optim(**o).lr for o in (p.student_optim, p.critic_optim)] == [2e-6, 4e-7]
    sources = {section(s).pretrained for s in ("codec", "readers", "base")}
    assert sources == {"Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"}                             # one download for four parts


def test_its_training_fits_its_processes(monkeypatch):
    """Batches can be dealt, and by arithmetic stages 1 and 2 fit cards of 80 GB, stage 3 cards of 141."""
    dit = plan.build(section("base").variant)
    for stage, card in (("base", 80), ("adaptation", 80), ("teacher", 80), ("distillation", 141)):
        p = section(stage)
        how = dict(trained=2, frozen=1, graphs=2, mask="sparse_causal") if stage == "distillation" else {}
        assert sum(plan.training_memory(dit, p.processes, 32, 32, batch=p.at_once, **how).values()) < card * 1e9
        monkeypatch.setattr(ranks, "WORLD", p.processes)
        monkeypatch.setattr(ranks, "RANK", p.processes - 1)
        assert stage == "base" or [len(range(p.batch)[part]) for part in ranks.parts(p.batch, p.at_once)] == [p.at_once] * 8
    assert {v["processes"] for v in YAML(typ="safe", pure=True).load(scales.scaled_params(ROOT, "wan14b"))["ablations"].values()} == {p.processes}


@pytest.mark.slow
def test_the_pipeline_is_known_at_that_scale(tmp_path):
    """A mirror as `make repro SCALE=wan14b` makes it; every stage is new there, and nothing runs."""
    for name in scales.sources(ROOT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("params.yaml", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    folder = scales.mirror("wan14b", tmp_path)
    dvc = lambda *words: subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, capture_output=True, text=True)
    drawn, status = dvc("dag", "--dot"), dvc("status", "--json")
    assert drawn.returncode == status.returncode == 0, drawn.stderr + status.stderr
    assert all(f'"{stage}"' in drawn.stdout for stage in ("data", "codec", "base", "teacher", "distillation", "report"))
    assert {"data", "codec", "speech", "base", "adaptation", "teacher", "distillation"} <= set(json.loads(status.stdout))


# ---- the stages --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory, house):
    """Four short videos, clips of them, and a folder of models that links to pretrained parts; then the latents."""
    public.skip_without_faces()
    folder = tmp_path_factory.mktemp("world")
    for i in range(4):
        films.good(folder / "videos" / f"{i}.mp4", i, frames=26, style=("flat", "line", "soft3d")[i % 3], kind=("speaking", "listening")[i == 3])
    p = section("data", folder=folder / "videos", size=32, frames=25, workers=1, shares={"train": 1.0})
    videos.collect(p.folder, folder / "clips", videos.settings(p), p.shares, p.workers, folder / "scratch")

    public.save(folder, house)
    models, speech = folder / "models", section("speech")
    hub.link(models / "vae.safetensors", folder / "wan")
    hub.link(models / "speech.safetensors", folder / "w2v", per_frame=speech.per_frame, context=speech.context, group=1, layers=[1, 2], past_s=0.5)
    readers.save_readers(readers.LipReader(), readers.FaceEncoder(2, 8), models, str(folder / "wan"))
    patch = pytest.MonkeyPatch()
    patch.setattr(config, "SCRATCH", folder / "scratch")
    told = conditions.load_conditions(models)
    encode_split(Clips(folder / "clips", "train"), wan_vae.load_codec(models), wav2vec.load_speech(models), told,
                 section("latents", text_dim=16), folder / "latents.safetensors")
    patch.undo()
    return folder


def test_real_clips_become_what_the_dit_takes(world):
    s = Latents(world / "latents.safetensors").store
    n = 4
    assert {k: tuple(v.shape) for k, v in s.items()} == {
        "z": (n, 16, 7, 4, 4), "cond": (n, 20, 7, 4, 4), "audio": (n, 7, 32, 32), "image": (n, 257, 16), "text": (2, 512, 16), "prompt": (n,),
        "face": (n, 7, 2, 2), "weight": (n, 1, 7, 4, 4)}
    assert all(v.isfinite().all() for v in s.values()) and (s["weight"] == 1).all() and 0 < s["face"].mean() <= 1
    assert torch.equal(s["cond"][:, :4].amax((1, 3, 4)), torch.eye(7)[:1].repeat(n, 1))   # the picture is given on latent 0 alone
    assert (s["cond"][:, 4:, 1:] - s["cond"][:1, 4:, 1:]).abs().max() > 0                  # behind it grey, as its causal codec sees it
    kinds = [m["kind"] for m in Clips(world / "clips", "train").meta]
    text = Latents(world / "latents.safetensors").batch(torch.arange(n)).text
    same = [torch.equal(text[0], t) for t in text]
    assert text.shape == (n, 512, 16) and same == [k == kinds[0] for k in kinds] and set(kinds) == {"speaking", "listening"}


def trained(players, steps, folder, name):
    """The real loop; every player's loss must be finite and its weights must move."""
    before = {p.name: {n: w.detach().clone() for n, w in p.model.named_parameters()} for p in players}
    history = train.train(players, steps, 0, folder / name, name, log_every=1)
    assert history[-1]["step"] == steps and all(np.isfinite(v) for row in history for v in row.values())
    for p in players:
        moved = {n for n, w in p.model.named_parameters() if not torch.equal(w, before[p.name][n])}
        yield moved


def test_every_stage_takes_steps_and_the_student_streams(world, tmp_path):
    latents, models, short = Latents(world / "latents.safetensors"), tmp_path / "models", dict(batch=2, at_once=1, chunk=1)

    # base: the public weights, and an audio path grown onto them that says nothing yet
    base = section("base", **short)
    s = latents.store
    dit = WanDiT.from_pretrained(world / "wan", chunk=1, audio_dim=s["audio"].shape[-1], audio_tokens=s["audio"].shape[-2],
                                 audio_width=24, audio_hidden=32, condition=base.condition)
    assert sum("audio" in n for n, _ in dit.named_parameters()) > 10
    dit.save_pretrained(models / "base")

    # stage 1: the picture comes alive, without sound
    p = section("adaptation", **short)
    [moved] = trained([Player("dit", dit, flow_matching_loss(dit, latents, p), Optim(**p.optim))], 2, tmp_path, "adaptation")
    assert "blocks.1.attn1.to_q.weight" in moved and "blocks.1.attn2.add_k_proj.weight" in moved and not any("audio_k" in n for n in moved)
    dit.save_pretrained(models / "adapted")

    # stage 2: it hears
    p, dit = section("teacher", **short), WanDiT.from_pretrained(models / "adapted")
    [moved] = trained([Player("dit", dit, flow_matching_loss(dit, latents, p), Optim(**p.optim))], 3, tmp_path, "teacher")
    assert "blocks.0.attn2.audio_out.weight" in moved and "audio_embedder.proj.net.2.weight" in moved
    dit.save_pretrained(models / "teacher")

    # stage 3: regression on the teacher's solutions, then distribution matching with a critic
    p = section("distillation", **short, pairs=3, pair_steps=2, critic_steps=2)
    teacher = WanDiT.from_pretrained(models / "teacher").eval().requires_grad_(False)
    student, critic = WanDiT.from_pretrained(models / "teacher"), WanDiT.from_pretrained(models / "teacher")
    pairs = distill.solve(teacher, latents, p, tmp_path / "kept.safetensors", models / "pairs.safetensors")
    loss = distill.regression_loss(student, latents, pairs, p)
    [moved] = trained([Player("student", student, loss, Optim(**p.regression_optim))], 2, tmp_path, "regression")
    assert "blocks.1.attn2.audio_k.weight" in moved
    student_loss, critic_loss = distill.matching_losses(student, critic, teacher, latents, pairs, p)
    players = [Player("student", student, student_loss, Optim(**p.student_optim), every=p.critic_steps), Player("critic", critic, critic_loss, Optim(**p.critic_optim))]
    for moved in trained(players, 4, tmp_path, "matching"):
        assert "blocks.0.attn1.to_v.weight" in moved and "proj_out.weight" in moved
    student.save_pretrained(models / "student")

    # and it streams, with the pretrained codec and ears
    clips = Clips(world / "clips", "train")
    student = WanDiT.from_pretrained(models / "student").eval().requires_grad_(False)
    batch = latents.batch([0])
    streamer = Streamer(student, wan_vae.load_codec(world / "models"), wav2vec.load_speech(world / "models"), timesteps=flow.timesteps(p.steps, p.shift), cache=p.cache)
    made = list(streamer.stream(clips.frames[0][0], clips.wave(0), text=batch.text, image_tokens=batch.image, audio_mask=batch.face[0, 0]))
    assert [len(f) for f in made] == [1] + [4] * 6 and np.concatenate(made).shape == (25, 32, 32, 3) and np.concatenate(made).std() > 1
