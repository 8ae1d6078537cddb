"""Training and sampling with the networks on another device than the clips.

The other device is torch's `meta`, which has shapes but no numbers and, like a GPU, meets no tensor of the CPU in an operation;
or one of our own, from which tensors may come back (card_job.py).
"""

from types import SimpleNamespace

import pytest
import torch

from tiny import distillation, make_dit, make_latents
from tmlib import dialogue, distill, placement, sampling, train
from tmlib.data import to_float
from tmlib.muon import Muon
from tmlib.pretrain import flow_matching_loss
from tmlib.vae import VAEConfig, VideoVAE

PLAYERS = SimpleNamespace(batch=2, at_once=None, repeats=2, shift=3.0, drop_audio=0.1, drop_text=0.1, sway_weight=20)


def elsewhere():
    return make_dit(condition="repeat", prior_std=[[0.5, 0.6], [0.7, 0.8]], num_layers=1).to("meta")


@pytest.fixture
def latents(tmp_path):
    return make_latents(tmp_path)


def learns(dit, loss):
    loss.backward()
    assert loss.is_meta and any(p.grad is not None for p in dit.parameters())


def test_flow_matching(latents):
    dit = elsewhere()
    learns(dit, flow_matching_loss(dit, latents, PLAYERS)[0](train.generator(0), 0)["loss"])


@pytest.mark.parametrize("cache, real", [("per_step", 0.0), ("per_step", 1.0), ("clean_pass", 0.0)])
def test_distillation(latents, cache, real):
    p = distillation(cache=cache, real_ratio=real, critic_steps=1)
    dit, critic, teacher = elsewhere(), elsewhere(), elsewhere().requires_grad_(False)
    pairs = {"index": torch.arange(4), "seed": torch.arange(4), "target": latents.store["z"]}
    [student_loss], [critic_loss] = distill.matching_losses(dit, critic, teacher, latents, pairs, p)     # the student's has the regression in it
    for step in range(p.steps):                                             # each step that keeps a gradient
        learns(dit, student_loss(train.generator(step), step)["loss"])
        learns(critic, critic_loss(train.generator(step), step)["loss"])


def test_regression(latents):
    dit, pairs = elsewhere(), {"index": torch.arange(4), "seed": torch.arange(4), "target": latents.store["z"]}
    for step in range(2):
        learns(dit, distill.regression_loss(dit, latents, pairs, distillation())[0](train.generator(step), step)["loss"])


def test_sampling_ends_with_the_way_back(latents):
    dit, batch = elsewhere().requires_grad_(False), latents.batch([0, 1])
    for made in (lambda: sampling.teacher(dit, batch, [0, 1], 2, 3.0, 2.0), lambda: sampling.student(dit, batch, [0, 1], distillation())):
        with pytest.raises(NotImplementedError, match="copy out of meta"):
            made()


def test_the_clips_themselves_would_not_do(latents):
    """What these tests rest on: a batch left on the CPU is an error."""
    batch = latents.batch([0, 1])
    with pytest.raises(RuntimeError, match="device"):
        sampling.denoiser(elsewhere(), batch)(batch.z, torch.zeros(2))


# The other networks, and what must come home

@pytest.mark.parametrize("name", ["the_codec_gives_back_where_it_was_given", "what_a_turn_sounds_like_is_kept_on_the_cpu"])
def test_what_comes_home(python, name):
    done = python("-m", "tests.card_job", name)
    assert done.returncode == 0, done.stderr


def test_the_codec_learns_from_bytes():
    vae = VideoVAE(VAEConfig(patch=4, encoder=(8, 8), decoder=(8, 8), blocks=1, kernel_f=3)).to("meta")
    film = torch.zeros(2, 9, 16, 16, 3, dtype=torch.uint8, device="meta")
    learns(vae, vae.loss(to_float(film), torch.ones(2, 1, 9, 16, 16, device="meta"), torch.randn(2, 16, 3, 2, 2, device="meta"))["loss"])


def test_a_conversation_is_learnt():
    lm, heard = dialogue.DialogueLM(dialogue.DialogueConfig(("yes", "no", "."), 32, width=16, layers=1, heads=2)).to("meta"), torch.randn(4, 32)
    rows, targets = lm.embed([(heard, [0, 2]), (heard, [1, 2], 1)])
    assert rows.is_meta and targets.is_meta and rows.shape == (len(targets), 16)


def test_matrices_are_turned_where_they_are():
    net = torch.nn.Linear(8, 16, device="meta")
    net(torch.randn(3, 8, device="meta")).sum().backward()
    optimiser = Muon([net.weight], lr=0.1)
    optimiser.step(), optimiser.step()
    assert optimiser.state[net.weight]["momentum"].is_meta


def test_latents_arrive_before_they_are_decoded(monkeypatch):
    """Onto a CPU a copy must not run ahead: the host reads it at once."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: seen.append(non_blocking))
    chunk = SimpleNamespace(latents=torch.zeros(1), ready=None)
    for device in ("cpu", "cuda:1"):
        placement.received(chunk, torch.device(device))
    assert seen == [False, True]
