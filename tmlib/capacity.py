"""How many devices N concurrent calls need, at which latency: a formula and a small simulation, from measured stage times.

A call's sound fills a chunk every `period` seconds (chunk 3: 12 frames, 0.75 s). Each chunk is denoised, then decoded, first
come, first served. A call stays on its devices, where its caches are, so every device is one queue of n periodic customers.

- Stability: n services fit in a period, n s <= T. Evenly spread calls then never wait.
- Calls begin when people like: independent phases. The wait of such a queue, N*D/D/1, is known exactly: `wait_tail` (Eckberg
  1979; Roberts and Virtamo 1991).
- The knee: the most calls of a device whose wait exceeds a service's length for no more than 5 % of chunks. Beyond it, latency
  soars while the last per cents of use are gained.
Seconds everywhere.
"""
import math
from dataclasses import dataclass

import numpy as np


# Formulas

def wait_tail(x: float, calls: int, service: float, period: float) -> float:
    """P(a chunk waits longer than x) on a device of `calls` calls with independent phases; service constant.

    A chunk meets the unfinished work V of the other N = calls - 1. With D = period / service and x in services,
    P(V > x) = sum over x < n <= N of  C(N, n) ((n - x) / D)^n (1 - (n - x) / D)^(N - n) (D - N + x) / (D - n + x).
    """
    if calls * service > period:
        return 1.0                                       # no steady state: in the end everybody waits longer than anything
    N, D, x = calls - 1, period / service, x / service
    terms = ((n, (n - x) / D) for n in range(math.floor(x) + 1, N + 1))
    return sum(math.comb(N, n) * q ** n * (1 - q) ** (N - n) * (D - N + x) / (D - n + x) for n, q in terms)


def mean_wait(calls: int, service: float, period: float, points: int = 120) -> float:
    """Mean of the wait whose tail is `wait_tail`: its integral, on points that lie closer near 0, where the tail is steep."""
    x = (calls - 1) * service * np.linspace(0, 1, points) ** 2
    return float(np.trapezoid([wait_tail(v, calls, service, period) for v in x], x)) if calls * service <= period else math.inf


def most_calls(service: float, period: float) -> int:
    """Calls that one device can serve at all."""
    return math.floor(period / service + 1e-9)


def knee(service: float, period: float, miss: float = 0.05) -> int:
    """Calls of one device up to which no more than `miss` of all chunks wait longer than a service takes; at least 1 if any fit."""
    return next((n for n in range(most_calls(service, period), 1, -1) if wait_tail(service, n, service, period) <= miss),
                min(1, most_calls(service, period)))


def devices(calls: int, dit: float, vae: float, period: float, each=knee) -> tuple[float, float]:
    """Devices that denoise and that decode, for so many calls, `each` of them loaded to its knee (or `most_calls`).

    Infinite where one device cannot serve even one call: the chunk takes longer than it plays.
    """
    return tuple(math.ceil(calls / n) if (n := each(service, period)) else math.inf for service in (dit, vae))


# Simulation

@dataclass(frozen=True)
class Load:
    """Every chunk of a simulation, each (calls, chunks): when its sound was complete, and when its frames were."""
    arrived: np.ndarray
    left: np.ndarray

    @property
    def latency(self) -> np.ndarray:
        return self.left - self.arrived


def simulate(calls: int, dits: int, vaes: int, dit, vae, period: float, chunks: int = 100, seed: int = 0) -> Load:
    """So many calls of so many chunks each, which begin when they like. dit, vae: seconds of a stage, or measured ones (n,) to draw from."""
    rng = np.random.default_rng(seed)
    call = np.arange(calls)
    arrived = period * (rng.random(calls)[:, None] + np.arange(chunks))                  # (calls, chunks)
    draw = lambda seconds: rng.choice(np.atleast_1d(seconds), size=arrived.shape)
    done = served(arrived, call % dits, draw(dit))
    return Load(arrived, served(done, call % vaes, draw(vae)))


def served(arrived: np.ndarray, device: np.ndarray, service: np.ndarray) -> np.ndarray:
    """When chunks (calls, chunks) leave their devices (calls,), each of which serves one at a time, first come, first served."""
    left, free = np.empty_like(arrived), np.zeros(device.max() + 1)
    for i in np.argsort(arrived, axis=None, kind="stable"):
        c = i // arrived.shape[1]
        free[device[c]] = left.flat[i] = max(arrived.flat[i], free[device[c]]) + service.flat[i]
    return left
