"""The losses of the three stages, as pure functions of tensors and of a `denoise` callable.

Notation (flow matching, Lipman et al. 2023; rectified flow as in Wan2.1): x_0 data, eps noise, sigma = t / 1000,
x_t = (1 - sigma) x_0 + sigma eps, velocity v = eps - x_0. `denoise(x_t, t) -> v`. Weights broadcast over (B, 16, F, h, w).
"""
from collections.abc import Callable

import torch
from torch import Tensor

from . import flow

Denoise = Callable[[Tensor, Tensor], Tensor]


def weighted_mse(a: Tensor, b: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of weight (a - b)^2 over the mean weight: the scale stays that of a plain MSE."""
    weight = torch.as_tensor(weight, dtype=a.dtype, device=a.device)
    return ((a - b).square() * weight).mean() / weight.mean()


def flow_matching(denoise: Denoise, x_0: Tensor, eps: Tensor, t: Tensor, weight: Tensor | float = 1.0, sway: Tensor | None = None, sway_weight: float = 0.0, level: Tensor | float = 1.0) -> Tensor:
    """Conditional flow matching (Lipman et al. 2023, eq. 14 with the straight path); t (B,) or (B, F) in [0, 1000]. level: a weight of noise levels that comes on top of `weight`.

    sway (B, 2, 16, h, w), orthonormal: errors along these directions count sway_weight times once more. A head's sway is small at every place, and a network that leaves it out is hardly wrong anywhere.
    """
    v, true = denoise(flow.add_noise(x_0, eps, t), t), flow.velocity(x_0, eps)
    loss = weighted_mse(v, true, weight * level)
    if not sway_weight:
        return loss
    along = torch.einsum("bcfhw,bdchw->bdf", (v - true) * torch.as_tensor(level).sqrt(), sway.to(v))[..., 1:]     # the picture's own frame does not move
    return loss + sway_weight * along.square().sum() / v.numel()


def border(x: Tensor, target: Tensor, chunk: int, weight: Tensor | float = 1.0) -> Tensor:
    """MSE of the latent step across chunk borders: x and target (B, 16, F, h, w), borders at every multiple of `chunk`."""
    at = torch.arange(chunk, x.shape[2], chunk, device=x.device)
    if not len(at):
        return x.new_zeros(())                                                # a single chunk has no borders
    step = lambda z: z[:, :, at] - z[:, :, at - 1]                            # (B, 16, F / chunk - 1, h, w)
    return weighted_mse(step(x), step(target), weight if isinstance(weight, float) else weight[:, :, at])


def dmd(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Distribution matching distillation (Yin et al. 2024, eq. 7-8): a loss whose gradient in x is the score difference.

    x: the student's sample, with its graph; real, fake: the teacher's (guided) and the critic's x_0 for a noised x.
    Noise levels: `flow.random_timesteps(n, shift, low=20, high=980)` (DMD2, Self-Forcing). The per-sample normaliser mean|x - real| keeps the step size alike at all noise levels.
    """
    with torch.no_grad():
        scale = (x - real).abs().mean(dim=tuple(range(1, x.dim())), keepdim=True) + 1e-6
        gradient = torch.nan_to_num((fake - real) / scale)
    return 0.5 * weighted_mse(x, (x - gradient).detach(), weight)
