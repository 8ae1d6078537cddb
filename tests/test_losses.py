"""losses: each equals its formula written out by hand, and gradients point where the papers say."""
import pytest
import torch

from tmlib import losses


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPE = (2, 3, 6, 2, 2)                                                  # (B, C, F, h, w)
A, B, WEIGHT = randn(*SHAPE), randn(*SHAPE, seed=1), 1 + randn(2, 1, 6, 2, 2, seed=2).abs()


def by_hand(error, weight):
    """Weighted mean over every element, one at a time."""
    top = bottom = 0.0
    for index in torch.cartesian_prod(*map(torch.arange, error.shape)).tolist():
        b, c, f, y, x = index
        w = weight[b, 0, f, y, x].item()
        top, bottom = top + w * error[b, c, f, y, x].item() ** 2, bottom + w
    return top / bottom


def test_weighted_mse():
    assert losses.weighted_mse(A, B, WEIGHT).item() == pytest.approx(by_hand(A - B, WEIGHT))
    plain = torch.nn.functional.mse_loss(A, B)
    torch.testing.assert_close(losses.weighted_mse(A, B), plain)
    torch.testing.assert_close(losses.weighted_mse(A, B, 7.0), plain)                       # the scale stays
    torch.testing.assert_close(losses.weighted_mse(A, B, 5 * WEIGHT), losses.weighted_mse(A, B, WEIGHT))
    half = torch.zeros_like(WEIGHT)
    half[0] = 1                                                          # a place of no weight counts for nothing
    torch.testing.assert_close(losses.weighted_mse(A, B, half), (A - B)[0].square().mean())
    assert losses.weighted_mse(A.float(), B.float(), WEIGHT).dtype == torch.float32


@pytest.mark.parametrize("t", [torch.tensor([200.0, 700.0]), torch.linspace(0, 1000, 12).view(2, 6)], ids=["B", "BF"])
def test_flow_matching(t):
    seen = []

    def denoise(x_t, at):
        seen.append((x_t, at))
        return 0.5 * x_t

    got = losses.flow_matching(denoise, A, B, t, WEIGHT)
    s = (t.double() / 1000).view(2, 1, -1, 1, 1)
    x_t = (1 - s) * A + s * B
    torch.testing.assert_close(seen[0][0], x_t, atol=1e-6, rtol=0)
    assert seen[0][1] is t
    assert got.item() == pytest.approx(by_hand(0.5 * x_t - (B - A), WEIGHT), rel=1e-5)
    assert losses.flow_matching(lambda x, at: B - A, A, B, t, WEIGHT) == 0


def test_errors_along_the_sway_count_more_behind_the_first_frame():
    q = torch.linalg.qr(torch.randn(len(A), A[0, :, 0].numel(), 2, generator=torch.Generator().manual_seed(3)))[0].mT.reshape(len(A), 2, *A[0, :, 0].shape)
    t, at = torch.full((len(A),), 500.0), A.shape[2] - 1
    def loss(error, weight):
        return losses.flow_matching(lambda x, t: B - A + error, A, B, t, 1.0, q, weight, 4.0)
    error = torch.zeros_like(A)
    error[:, :, at] = 0.3 * q[:, 0] - 0.4 * q[:, 1]
    torch.testing.assert_close(loss(error, 20.0), loss(error, 0.0) + 20 * 4 * 0.25 * len(A) / torch.tensor(float(A.numel())), atol=1e-5, rtol=1e-5)
    aside = torch.randn(A[:, :, 0].shape, generator=torch.Generator().manual_seed(4))
    aside = aside - torch.einsum("bchw,bdchw,bdkij->bkij", aside, q, q)
    error = torch.zeros_like(A)
    error[:, :, at], error[:, :, 0] = aside, q[:, 0]                      # across the sway, and in the picture's own frame
    torch.testing.assert_close(loss(error, 20.0), loss(error, 0.0), atol=1e-5, rtol=1e-5)


def test_border_looks_at_steps_between_chunks_only():
    step = lambda z, f: z[:, :, f] - z[:, :, f - 1]
    by_hand = sum(((step(A, f) - step(B, f)) ** 2).mean() for f in (2, 4)) / 2
    torch.testing.assert_close(losses.border(A, B, 2), by_hand)
    torch.testing.assert_close(losses.border(A, B, 3), ((step(A, 3) - step(B, 3)) ** 2).mean())
    one = (((step(A, 3) - step(B, 3)) ** 2) * WEIGHT[:, :, 3]).mean() / WEIGHT[:, :, 3].mean()
    torch.testing.assert_close(losses.border(A, B, 3, WEIGHT), one)
    shifted = B.clone()
    shifted[:, :, 3:] += 1                                               # a jump at the border, nowhere else
    assert losses.border(shifted, B, 3).item() == pytest.approx(1)
    assert losses.border(shifted, B, 2).item() == pytest.approx(0)
    assert losses.border(A + 3.0, A, 3).item() == pytest.approx(0)       # the level does not matter, only the step


def test_border_of_a_single_chunk_is_nothing():
    x = A.clone().requires_grad_()
    loss = losses.border(x, B, 6, WEIGHT)
    assert loss == 0
    (loss + x.sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("weight", [1.0, WEIGHT], ids=["plain", "weighted"])
def test_dmd_gradient_is_the_score_difference(weight):
    x = randn(*SHAPE, seed=3).requires_grad_()
    real, fake = A.clone().requires_grad_(), B.clone().requires_grad_()
    losses.dmd(x, real, fake, weight).backward()
    w = torch.as_tensor(weight, dtype=torch.float64)
    for b in range(2):                                                   # the normaliser is per sample
        scale = (x[b] - real[b]).abs().mean() + 1e-6
        share = (w if w.dim() == 0 else w[b]) / w.mean() / x.numel()
        torch.testing.assert_close(x.grad[b], (share * (fake[b] - real[b]) / scale).detach())
    assert real.grad is None and fake.grad is None


def test_dmd_moves_samples_from_fake_to_real():
    x = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    losses.dmd(x, torch.ones(SHAPE, dtype=torch.float64), -torch.ones(SHAPE, dtype=torch.float64)).backward()
    assert (x.grad < 0).all()                                            # a step down the gradient goes up, to `real`
    x.grad = None
    losses.dmd(x, A, A).backward()
    assert not x.grad.any()                                              # equal scores: at rest
    losses.dmd(x, A, torch.full_like(A, float("nan"))).backward()
    assert x.grad.isfinite().all()
