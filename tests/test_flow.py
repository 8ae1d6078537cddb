"""flow: every conversion is the inverse of its partner, and samplers do what their equations say."""

import pytest
import torch

from tmlib import flow


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, 2, 2, generator=g, dtype=torch.float64), torch.randn(2, 4, 3, 2, 2, generator=g, dtype=torch.float64)


TIMES = [250.0, torch.tensor([100.0, 900.0]), torch.tensor([[10.0, 500.0, 1000.0], [999.0, 1.0, 300.0]])]


@pytest.mark.parametrize("t", TIMES, ids=["float", "B", "BF"])
def test_conversions_invert_each_other(pair, t):
    x_0, eps = pair
    x_t, v = flow.add_noise(x_0, eps, t), flow.velocity(x_0, eps)
    torch.testing.assert_close(flow.x0_from_v(x_t, v, t), x_0)


def test_per_frame_time_noises_each_frame_with_its_own(pair):
    x_0, eps = pair
    x_t = flow.add_noise(x_0, eps, TIMES[2])
    for b in range(2):
        for f in range(3):
            s = TIMES[2][b, f].item() / 1000
            torch.testing.assert_close(x_t[b, :, f], (1 - s) * x_0[b, :, f] + s * eps[b, :, f])


def test_ends_are_clean_and_noise(pair):
    x_0, eps = pair
    assert torch.equal(flow.add_noise(x_0, eps, 0.0), x_0)
    assert torch.equal(flow.add_noise(x_0, eps, 1000.0), eps)


def test_a_float_time_gives_the_bits_of_a_tensor():
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(2, 4, 3, 2, 2, dtype=dtype)
        for t in (*flow.timesteps(4, 5), 0.0, 123.456789):
            assert torch.equal(flow.like(t, x), flow.like(torch.tensor(t, dtype=dtype), x))


def test_known_schedules():
    assert flow.timesteps(2, 5) == pytest.approx([1000, 833.3333])
    assert flow.timesteps(4, 5) == pytest.approx([1000, 937.5, 833.3333, 625])
    assert flow.timesteps(4, 1) == pytest.approx([1000, 750, 500, 250])
    assert set(flow.timesteps(3, 3)) <= set(flow.timesteps(6, 3))                       # floats equal, not just close
    with pytest.raises(ValueError):
        flow.timesteps(0, 5)


def test_shift_and_unshift():
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(flow.shift_sigma(flow.shift_sigma(s, 5.0), 1 / 5.0), s)
    assert (flow.shift_sigma(s, 5.0) >= s).all()
    t = flow.random_timesteps(1000, 5.0, torch.Generator().manual_seed(0), 20, 980)
    assert t.shape == (1000,) and t.min() >= 20 and t.max() <= 980
    assert abs(flow.shift_sigma(t / 1000, 1 / 5.0).mean() - 0.5) < 0.05                   # uniform before the shift


def test_guidance_is_the_standard_form(pair):
    cond, uncond = pair
    assert torch.allclose(flow.guided(cond, uncond, 1.0), cond)
    torch.testing.assert_close(flow.guided(cond, uncond, 4.0), cond + 3 * (cond - uncond))   # their s = 3 is our 4


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_is_exact_on_a_straight_path(pair, steps):
    x_0, eps = pair
    out = flow.sample(lambda x, t: flow.velocity(x_0, eps), eps, flow.timesteps(steps, 3))
    torch.testing.assert_close(out, x_0)


def test_sample_gives_the_model_the_right_times(pair):
    times = []
    flow.sample(lambda x, t: times.append(t.tolist()) or torch.zeros_like(x), pair[1], [1000.0, 400.0])
    assert times == [[1000.0, 1000.0], [400.0, 400.0]]


def test_few_step_by_hand(pair):
    x_0, eps = pair
    model = lambda i, x: (0.3 + 0.1 * i) * x
    out = flow.few_step(model, lambda i: eps if i == 0 else x_0, [1000.0, 600.0])
    first = eps - 0.3 * eps
    x_t = 0.4 * first + 0.6 * x_0
    torch.testing.assert_close(out, x_t - 0.6 * 0.4 * x_t)


@pytest.mark.parametrize("run_on", [False, True])
@pytest.mark.parametrize("grad", [None, 0, 1, 2])
def test_gradient_only_through_the_chosen_step(pair, grad, run_on):
    weights = [torch.tensor(0.1 * i, dtype=torch.float64, requires_grad=True) for i in range(3)]
    calls = []

    def model(i, x):
        calls.append(i)
        return weights[i] * x

    out = flow.few_step(model, lambda i: pair[i % 2], [1000.0, 800.0, 500.0], grad=grad, run_on=run_on)
    assert calls == list(range(3 if grad is None or run_on else grad + 1))
    assert out.requires_grad == (grad is not None)
    if grad is not None:
        out.sum().backward()
    assert [w.grad is not None for w in weights] == [i == grad for i in range(3)]
    with torch.no_grad():
        assert not flow.few_step(model, lambda i: pair[0], [1000.0], grad=0).requires_grad


# The prior around the reference picture

@pytest.mark.parametrize("t", [1000.0, 700.0, 250.0, 30.0])
def test_reference_prior_is_the_best_guess_of_a_gaussian_world(t):
    """Draw x_0 from the prior itself: the guess must explain all that x_t tells, and the stated deviation must be what is left."""
    g = torch.Generator().manual_seed(0)
    std, reference = torch.tensor([[0.1, 0.5], [1.0, 2.0]]), torch.randn(1, 3, 1, 2, 2, generator=g)
    x_0 = reference + std * torch.randn(40_000, 3, 1, 2, 2, generator=g)
    eps = torch.randn(x_0.shape, generator=g)
    x_t = flow.add_noise(x_0, eps, t)
    seen, guess, left = flow.reference_prior(x_t, reference, std, t)
    error = (eps - x_0 - guess) / left
    place = (0, 1, 2)
    torch.testing.assert_close(seen.square().mean(place), torch.ones(2, 2), atol=0.02, rtol=0)
    torch.testing.assert_close(error.square().mean(place), torch.ones(2, 2), atol=0.02, rtol=0)
    torch.testing.assert_close((error * seen).mean(place), torch.zeros(2, 2), atol=0.02, rtol=0)


def test_reference_prior_takes_a_time_per_clip_and_per_frame():
    g = torch.Generator().manual_seed(0)
    x, r, std = torch.randn(2, 16, 3, 4, 4, generator=g), torch.randn(2, 16, 3, 4, 4, generator=g), torch.rand(4, 4, generator=g) + 0.1
    t = torch.tensor([[900.0, 500.0, 20.0], [400.0, 400.0, 400.0]])
    for b in range(2):
        for f in range(3):
            one = flow.reference_prior(x[b:b + 1, :, f:f + 1], r[b:b + 1, :, f:f + 1], std, float(t[b, f]))
            for whole, part in zip(flow.reference_prior(x, r, std, t), one):
                torch.testing.assert_close(whole.expand_as(x)[b:b + 1, :, f:f + 1], part.expand(1, 16, 1, 4, 4))
    torch.testing.assert_close(flow.prior_variance(x, std, t), (std * (1 - flow.like(t, x))) ** 2 + flow.like(t, x) ** 2)


def test_std_map_keeps_its_mean_at_any_size():
    rows = ((0.1, 0.3), (0.5, 0.7))
    assert torch.equal(flow.std_map(rows, 2, 2, torch.device("cpu")), torch.tensor(rows))
    for size in (4, 8):
        big = flow.std_map(rows, size, size, torch.device("cpu"))
        assert big.shape == (size, size) and big.mean() == pytest.approx(0.4)
