"""sampling: guidance in one batch = two passes by hand, and a clip's result depends on its seed alone."""
import pytest
import torch

from tiny import distillation, make_dit, make_latents
from tmlib import chain, flow, sampling


@pytest.fixture(scope="module")
def dit():
    return make_dit().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    return make_latents(tmp_path_factory.mktemp("latents")).batch(torch.arange(3))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def run(dit, batch, x_t, t, **changes):
    return dit(torch.cat([x_t, batch.cond], 1), t, **{**batch.conditions(), **changes})


def test_denoiser_without_guidance_is_the_model(dit, batch):
    x_t, t = torch.randn(batch.z.shape), torch.tensor([100.0, 500.0, 900.0])
    assert torch.equal(sampling.denoiser(dit, batch)(x_t, t), run(dit, batch, x_t, t))
    causal = sampling.denoiser(dit, batch, mask="sparse_causal")(x_t, t)
    assert torch.equal(causal, run(dit, batch, x_t, t, mask="sparse_causal"))
    assert (causal - run(dit, batch, x_t, t)).abs().max() > 1e-3


@pytest.mark.parametrize("mask", ["bidirectional", "sparse_causal"])
@pytest.mark.parametrize("per_frame", [False, True])
def test_guidance_is_two_passes(dit, batch, per_frame, mask):
    x_t = torch.randn(batch.z.shape)
    t = torch.rand(3, 6) * 1000 if per_frame else torch.tensor([100.0, 500.0, 900.0])
    v = run(dit, batch, x_t, t, mask=mask)
    null = run(dit, batch, x_t, t, mask=mask, audio=torch.zeros_like(batch.audio))
    assert (v - null).abs().max() > 1e-3                                 # sound does matter
    close(sampling.denoiser(dit, batch, 2.5, mask)(x_t, t), null + 2.5 * (v - null))


def test_noise_of_a_clip_is_its_own():
    whole = sampling.clip_noise([3, 5, 8], (16, 6, 4, 4))
    assert whole.shape == (3, 16, 6, 4, 4)
    assert torch.equal(sampling.clip_noise(torch.tensor([5]), (16, 6, 4, 4))[0], whole[1])
    assert not torch.equal(whole[0], whole[1]) and abs(whole.mean()) < 0.05 and abs(whole.std() - 1) < 0.05


def test_teacher_by_hand(dit, batch):
    noise = sampling.clip_noise([0, 1, 2], batch.z.shape[1:])
    got = sampling.teacher(dit, batch, [0, 1, 2], steps=3, shift=2.0, guidance=2.0)
    x, ts = noise, [*flow.timesteps(3, 2.0), 0.0]
    for t, after in zip(ts, ts[1:]):
        at = torch.full((3,), t)
        null = run(dit, batch, x, at, audio=torch.zeros_like(batch.audio))
        x = x + (after - t) / 1000 * (null + 2 * (run(dit, batch, x, at) - null))
    close(got, x)
    alone = sampling.teacher(dit, batch.each(lambda v: v[[1]]), [1], 3, 2.0, 2.0)
    close(alone, got[1:2])


@pytest.mark.parametrize("cache", ["per_step", "next_step", "clean_pass"])
def test_student_does_not_depend_on_its_batch(dit, batch, cache):
    p = distillation(cache=cache)
    together = sampling.student(dit, batch, [7, 8, 9], p)
    assert together.shape == batch.z.shape and not together.requires_grad
    fresh = [sampling.clip_noise([100_003 * s + i for s in (7, 8, 9)], batch.z.shape[1:]) for i in range(3)]       # of every step
    close(together, chain.rollout(dit, batch.cond, timesteps=flow.timesteps(2, 3.0), chunk=3, cache=cache, noise=fresh.__getitem__,
                                   **batch.conditions()))
    for i in range(3):
        close(sampling.student(dit, batch.each(lambda v: v[[i]]), [7 + i], p), together[i:i + 1])
    assert (sampling.student(dit, batch, [7, 8, 10], p) - together)[2].abs().max() > 1e-3
