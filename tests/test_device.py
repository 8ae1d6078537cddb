"""Training and sampling with the networks on another device than the clips.

The other device is torch's `meta`, which has shapes but no numbers and, like a GPU, meets no tensor of the CPU in an operation.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.tiny import distillation, make_dit, make_latents
from tmlib import distill, sampling, train

PLAYERS = SimpleNamespace(batch=2, at_once=None, repeats=2, shift=3.0, drop_audio=0.1, drop_text=0.1)


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
    learns(dit, train.flow_matching_loss(dit, latents, PLAYERS)[0](train.generator(0), 0)["loss"])


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
    noise = sampling.clip_noise([0, 1], batch.z.shape[1:])
    for made in (lambda: sampling.teacher(dit, batch, noise, 2, 3.0, 2.0), lambda: sampling.student(dit, batch, [0, 1], distillation())):
        with pytest.raises(NotImplementedError, match="copy out of meta"):
            made()


def test_the_clips_themselves_would_not_do(latents):
    """What these tests rest on: a batch left on the CPU is an error."""
    batch = latents.batch([0, 1])
    with pytest.raises(RuntimeError, match="device"):
        sampling.denoiser(elsewhere(), batch)(batch.z, torch.zeros(2))
