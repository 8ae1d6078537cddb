"""muon: torch.optim.Muon's steps, matrices of one shape together, and nothing lost on the way to a checkpoint."""
import pytest
import torch
from torch import nn

from tmlib.muon import NEWTON_SCHULZ, STEPS, Muon, orthogonal

SHAPES = [(24, 24), (24, 24), (48, 24), (24, 48), (24, 24)]


def matrices(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g)) for s in SHAPES]


def steps(optimiser, params, n, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g) * torch.rand(len(p), 1, generator=g)
        optimiser.step()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 10), (1, 8, 64)])
def test_orthogonal(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(m))
    assert 0.5 < values.min() and values.max() < 1.3
    assert torch.linalg.svdvals(m).max() > 4                              # it had something to do
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    assert ((orthogonal(m) * (u @ v)).sum((1, 2)) / values.shape[1]).min() > 0.8       # and kept the directions
    assert not orthogonal(torch.zeros(shape)).any()


def test_steps_are_those_of_torch():
    ours, theirs = matrices(), matrices()
    steps(Muon(ours, lr=0.02, weight_decay=0.1), ours, 4)
    steps(torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs, 4)
    for a, b, start in zip(ours, theirs, matrices()):
        assert (a - b).norm() < 0.02 * (b - start).norm()                 # theirs works in bfloat16
        assert (a - start).norm() > 0.01


def test_a_kernel_is_a_matrix():
    """(out, in, taps ...) moves as its (out, in x taps) does."""
    g = torch.Generator().manual_seed(0)
    kernel = nn.Parameter(torch.randn(12, 4, 3, 3, generator=g))
    flat = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(kernel.shape, generator=g)
    flat.grad = kernel.grad.flatten(1)
    for p in (kernel, flat):
        Muon([p], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(kernel.flatten(1), flat) and kernel.shape == (12, 4, 3, 3)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 10), (1, 8, 4000)])
def test_on_gram_matrices_as_on_the_whole(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (a, b, c), expected = NEWTON_SCHULZ, x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(STEPS):                                                # the iteration as Jordan et al. write it
        xx = expected @ expected.mT
        expected = a * expected + (b * xx + c * xx @ xx) @ expected
    torch.testing.assert_close(orthogonal(x).double(), expected, atol=2e-4, rtol=0)


def test_together_is_one_by_one():
    together, alone = matrices(), matrices()
    steps(Muon(together, lr=0.02), together, 3)
    optimisers = [Muon([p], lr=0.02) for p in alone]
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p, o in zip(alone, optimisers):
            p.grad = torch.randn(p.shape, generator=g) * torch.rand(len(p), 1, generator=g)
            o.step()
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_state_goes_into_a_checkpoint_and_parameters_without_gradient_stay():
    whole, parts = matrices(), matrices()
    first = Muon(whole, lr=0.02)
    steps(first, whole, 2)
    before = Muon(parts, lr=0.02)
    steps(before, parts, 2)
    again = Muon(parts, lr=0.5)
    again.load_state_dict(before.state_dict())
    steps(first, whole, 2, seed=2), steps(again, parts, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))
    still = matrices()
    optimiser = Muon(still, lr=0.5)
    still[0].grad = torch.ones_like(still[0])
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(still[1:], matrices()[1:])) and not torch.equal(still[0], matrices()[0])
