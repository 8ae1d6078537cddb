"""capacity: formula and simulation agree where both are exact, and obey what every queue obeys."""
import math

import numpy as np
import pytest

from tmlib.capacity import devices, knee, mean_wait, most_calls, served, simulate, wait_tail

T = 0.75


def evenly(calls, dits, vaes, dit, vae, chunks):
    """Latencies (calls, chunks) where the calls of a device begin one after another, equally spaced."""
    call = np.arange(calls)
    arrived = T * ((call // dits / math.ceil(calls / dits))[:, None] + np.arange(chunks))
    each = lambda seconds: np.full(arrived.shape, seconds)
    return served(served(arrived, call % dits, each(dit)), call % vaes, each(vae)) - arrived


def under_way(load, begin, end):
    """Mean number of chunks between two moments, by walking through the events."""
    times = np.concatenate([load.arrived.ravel(), load.left.ravel()])
    order = np.argsort(times, kind="stable")
    count = np.cumsum(np.repeat([1, -1], load.arrived.size)[order])
    return (count[:-1] * np.diff(np.clip(times[order], begin, end))).sum() / (end - begin)


@pytest.mark.parametrize("calls,dits,vaes", [(1, 1, 1), (6, 1, 1), (12, 2, 2), (18, 3, 3)])
def test_evenly_spread_calls_never_wait(calls, dits, vaes):
    """The deterministic limit: latency is denoising plus decoding, for as long as a period holds all services."""
    dit, vae = 0.12, 0.1
    assert math.ceil(calls / dits) <= most_calls(dit, T)
    assert np.allclose(evenly(calls, dits, vaes, dit, vae, 20), dit + vae)


def test_one_call_too_many_waits_ever_longer():
    n = most_calls(0.12, T)
    fits, over = (evenly(calls, 1, calls, 0.12, 0.01, 200).mean(0) for calls in (n, n + 1))
    assert n == 6 and fits.max() < 0.14
    assert over[-1] - over[100] == pytest.approx(100 * ((n + 1) * 0.12 - T), rel=0.05)


@pytest.mark.parametrize("calls,service", [(2, 0.2), (5, 0.1), (12, 0.05)])
def test_simulation_equals_the_formula_for_random_phases(calls, service):
    waits = []
    for seed in range(400):
        load = simulate(calls, 1, calls, service, 0.0, T, chunks=5, seed=seed)
        waits.append(load.latency[:, -1] - service)                       # periodic by then
    waits = np.concatenate(waits)
    for x in (0.0, 0.5 * service, service, 2.5 * service):
        assert (waits > x + 1e-9).mean() == pytest.approx(wait_tail(x, calls, service, T), abs=0.035)
    assert waits.mean() == pytest.approx(mean_wait(calls, service, T), rel=0.15, abs=1e-3)


def test_a_pair_of_calls_by_hand():
    """Two calls collide if the other began less than a service earlier: probability s / T; then the wait is uniform."""
    assert wait_tail(0.0, 2, 0.1, T) == pytest.approx(0.1 / T)
    assert wait_tail(0.05, 2, 0.1, T) == pytest.approx(0.05 / T)
    assert mean_wait(2, 0.1, T) == pytest.approx(0.1 ** 2 / 2 / T, rel=1e-3)
    assert wait_tail(0.0, 1, 0.1, T) == 0 and wait_tail(9.0, 8, 0.1, T) == 1.0 and mean_wait(8, 0.1, T) == math.inf


def test_littles_law():
    """Mean number under way = rate of arrival x mean time under way, each measured on its own."""
    rng = np.random.default_rng(0)
    load = simulate(11, 2, 2, rng.gamma(20, 0.1 / 20, 500), rng.gamma(9, 0.08 / 9, 500), T, chunks=400)
    inside = under_way(load, 0.0, load.left.max())
    assert inside == pytest.approx(load.arrived.size / load.left.max() * load.latency.mean(), rel=1e-9)
    middle = under_way(load, 50.0, 250.0)                                 # and wherever one looks, ends aside
    seen = (load.arrived >= 50) & (load.arrived < 250)
    assert middle == pytest.approx(seen.sum() / 200 * load.latency[seen].mean(), rel=0.02)


def test_more_calls_never_need_fewer_devices_nor_wait_less():
    service = 0.06
    waits = [mean_wait(n, service, T) for n in range(1, most_calls(service, T) + 1)]
    assert waits == sorted(waits) and waits[0] == 0 < waits[1]
    needed = [devices(n, 0.12, service, T) for n in range(1, 60)]
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(needed, needed[1:]))
    p95 = [np.quantile(np.concatenate([simulate(n, 1, 1, 0.05, 0.02, T, 6, seed=s).latency[:, -1] for s in range(60)]), 0.95)
           for n in (2, 6, 10, 14)]
    assert p95 == sorted(p95)


@pytest.mark.parametrize("service", [0.01, 0.06, 0.12, 0.3])
def test_the_knee_is_where_it_says(service):
    n = knee(service, T)
    assert 1 <= n <= most_calls(service, T)
    assert wait_tail(service, n, service, T) <= 0.05
    assert n == most_calls(service, T) or wait_tail(service, n + 1, service, T) > 0.05
    assert devices(n, service, service, T) == (1, 1) and devices(n + 1, service, service, T) == (2, 2)


def test_a_chunk_that_takes_longer_than_it_plays_cannot_be_served():
    assert knee(0.8, T) == most_calls(0.8, T) == 0 and devices(3, 0.8, 0.1, T)[0] == math.inf
    assert knee(0.7, T) == 1 and devices(3, 0.7, 0.1, T) == (3, math.ceil(3 / knee(0.1, T)))
