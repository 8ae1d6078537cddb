"""unet: a velocity as the DiT's, from a whole clip; starts at the prior; trains and teaches."""

import pytest
import torch

from tiny import distillation, make_dit, make_latents, stir
from tmlib import distill, flow, sampling
from tmlib.config import UserError
from tmlib.sampling import denoiser
from tmlib.unet import UNetConfig, VideoUNet


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return make_latents(tmp_path_factory.mktemp("latents"))


def make(latents, prior=True, **changes):
    s = latents.store
    torch.manual_seed(0)
    return VideoUNet(UNetConfig(s["text"].shape[-1], s["image"].shape[-1], s["audio"].shape[-1], s["audio"].shape[-2],
                                latents.spread() if prior else None, **{"widths": (8, 16), "blocks": 1, "known": 16, **changes}))


def given(latents, n=2):
    batch = latents.batch(torch.arange(n))
    return batch, torch.randn(batch.z.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([800.0, 300.0][:n])


@pytest.mark.parametrize("blocks", (1, 3))
def test_it_begins_as_the_prior(latents, blocks):
    """Before training it knows what `flow.reference_prior` knows; without a prior, nothing at all."""
    batch, x_t, t = given(latents)
    unet = make(latents, blocks=blocks)
    guess = flow.reference_prior(x_t, batch.cond[:, 4:], unet.std_at(x_t), t)[1]
    torch.testing.assert_close(denoiser(unet, batch)(x_t, t), guess)
    assert not denoiser(make(latents, prior=False), batch)(x_t, t).any()


def test_every_condition_counts_and_only_for_its_clip(latents):
    batch, x_t, t = given(latents)
    unet = stir(make(latents), 0.1)
    v = denoiser(unet, batch)(x_t, t)
    assert v.shape == x_t.shape and v.dtype == x_t.dtype
    for name in ("cond", "audio", "face", "text", "image"):
        other = batch.each(torch.clone)
        getattr(other, name)[0] += 1.0
        change = (denoiser(unet, other)(x_t, t) - v).abs().amax((1, 2, 3, 4))
        assert change[0] > 1e-4 and change[1] == 0, name
    assert (denoiser(unet, batch)(x_t, t + 100) - v).abs().amax() > 1e-4


def test_sound_is_heard_in_its_own_time(tmp_path):
    """A latent frame's sound reaches as many frames as there are convolutions over time, before and after: it is no causal model."""
    latents = make_latents(tmp_path, n=1, frames=12)
    batch, x_t, t = given(latents, 1)
    unet, other = stir(make(latents), 0.1), batch.each(torch.clone)
    other.audio[:, 6] += 1.0
    changed = (denoiser(unet, other)(x_t, t) - denoiser(unet, batch)(x_t, t)).abs().amax((0, 1, 3, 4))
    far = torch.tensor([abs(k - 6) > len(unet.blocks) for k in range(12)])
    assert changed[5] > 0 and changed[6] > 0 and changed[7] > 0
    assert far.sum() == 3 and not changed[far].any()
    with pytest.raises(UserError, match="whole clips only"):
        denoiser(unet, batch, mask="sparse_causal")(x_t, t)


def test_it_is_sampled_with_guidance_as_a_dit_is(latents):
    batch, x_t, t = given(latents)
    unet = stir(make(latents), 0.1).eval().requires_grad_(False)
    with_sound, without = (denoiser(unet, b)(x_t, t) for b in (batch, batch.keep(audio=torch.zeros(2))))
    torch.testing.assert_close(denoiser(unet, batch, 1.5)(x_t, t), flow.guided(with_sound, without, 1.5), atol=1e-5, rtol=1e-4)
    made = sampling.teacher(unet, batch, [0, 1], 3, 5.0, 1.5)
    assert made.shape == batch.z.shape and made.isfinite().all()


def test_conditions_may_come_in_bfloat16(latents):
    batch, x_t, t = given(latents)
    unet, half = stir(make(latents), 0.1), batch.each(torch.clone)
    half.text, half.image, half.audio = (c.bfloat16() for c in (half.text, half.image, half.audio))
    v = denoiser(unet, half)(x_t, t)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, denoiser(unet, batch)(x_t, t), atol=0.05, rtol=0.05)


def test_it_teaches_a_dit(latents, tmp_path):
    """Its solutions and scores reach a student of another kind, and only the student learns from them."""
    p, unet = distillation(), stir(make(latents), 0.1).eval().requires_grad_(False)
    student, critic = make_dit(), make_dit(1)
    pairs = distill.solve(unet, latents, p, tmp_path / "kept", tmp_path / "pairs")
    by_hand = sampling.teacher(unet, latents.batch(pairs["index"][:1]), pairs["seed"][:1], p.pair_steps, p.pair_shift, p.guidance)
    torch.testing.assert_close(pairs["target"][:1], by_hand, atol=1e-4, rtol=1e-4)
    for loss in (*distill.regression_loss(student, latents, pairs, p), *distill.matching_losses(student, critic, unet, latents, pairs, p)[0]):
        student.zero_grad()
        loss(torch.Generator().manual_seed(0), 0)["loss"].backward()
        assert all(w.grad is None or w.grad.isfinite().all() for w in student.parameters()) and any(w.grad is not None and w.grad.any() for w in student.parameters())
        assert all(w.grad is None for w in (*unet.parameters(), *critic.parameters()))
