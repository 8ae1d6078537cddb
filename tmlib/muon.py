"""Muon (Jordan et al. 2024): momentum whose every matrix is made orthogonal before it is applied.

`torch.optim.Muon` does the same, but one matrix at a time and in bfloat16, which a processor without bfloat16 units multiplies
hundreds of times slower than float32. Here matrices of one shape go together, in float32 (a GPU's TF32 moves a step by 2 to 4 %), and
the iteration runs on their small Gram matrices: no cost worth noting. A convolution's kernel is a matrix too, (out, in x taps).
"""
from collections import defaultdict

import torch
from torch import Tensor

from . import ranks

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)        # x -> a x + b x^3 + c x^5 pulls singular values in (0, 1] towards 1
STEPS = 5


def orthogonal(m: Tensor) -> Tensor:
    """Nearly the orthogonal factor of each matrix (n, rows, columns): singular values come out between 0.7 and 1.2.

    Newton-Schulz multiplies x from the left by polynomials in x x^T. Their product p is found first: the long side is met twice.
    """
    a, b, c = NEWTON_SCHULZ
    tall = m.shape[1] > m.shape[2]
    x = m.mT if tall else m
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    gram, p = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)            # (n, short, short)
    for _ in range(STEPS):
        xx = p @ gram @ p                                                     # p is symmetric: of p x, the Gram matrix
        p = a * p + (b * xx + c * xx @ xx) @ p
    x = p @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices and kernels. Steps have the RMS of AdamW's (0.2), so that learning rates and weight decay carry over (Moonlight)."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, ps in alike.items():
                for p in ps:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = torch.stack([ranks.whole(p.grad.lerp(self.state[p]["momentum"], group["momentum"])) for p in ps])      # Nesterov
                ahead = ahead.float().flatten(2)                              # (n, rows, columns)
                step = 0.2 * max(ahead.shape[1:]) ** 0.5 * group["lr"]
                for p, o in zip(ps, orthogonal(ahead)):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(ranks.cut(o.view(shape).to(p.dtype), p), alpha=-step)
