"""Rectified flow as Wan2.1 uses it: every equation of noise levels, conversions, samplers and guidance, in one place.

    x_t = (1 - sigma) x_0 + sigma eps          x_0 clean latents, eps ~ N(0, 1), sigma = t / 1000
    v   = eps - x_0                            what the network predicts (dx_t / dsigma)
so  x_0 = x_t - sigma v,   eps = x_t + (1 - sigma) v,   and sampling walks from t = 1000 (noise) down to 0.

t is a float, (B,) or per latent frame (B, F); latents are (B, C, F, H, W), or any (B, ...) with t a float or (B,).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

T_MAX = 1000.0


# Noise levels

def sigma(t):
    """Share of noise at time t: sigma = t / 1000, in [0, 1]."""
    return t / T_MAX


def shift_sigma(s, shift):
    """Move noise levels towards noise: s' = shift s / (1 + (shift - 1) s); shift 1 changes nothing, 1 / shift undoes it (SD3, section 5.3)."""
    return shift * s / (1 + (shift - 1) * s)


def timesteps(steps, shift=1.0):
    """The `steps` times at which the network is called, from 1000 down, 0 excluded; 2 steps at shift 5: [1000, 833.3].

    timesteps(k s) contains timesteps(s) at equal shift. Raises ValueError for steps < 1 or shift <= 0.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"timesteps needs steps >= 1 and shift > 0, got steps={steps}, shift={shift}")
    return [T_MAX * shift_sigma((steps - i) / steps, shift) for i in range(steps)]


def random_timesteps(n, shift=1.0, generator=None, low=0.0, high=T_MAX):
    """(n,) times for training: uniform, then shifted, then clamped to [low, high] (DMD clamps to [20, 980])."""
    u = torch.rand(n, generator=generator, device=None if generator is None else generator.device)
    return (T_MAX * shift_sigma(u, shift)).clamp(low, high)


# Conversions

def like(t, x):
    """sigma(t) shaped to multiply x (B, C, F, ...), in x's precision but never below float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(t, torch.Tensor):
        s = sigma(t.to(x.device, dtype))
    else:                                                           # filled where x is: no copy to wait for, none in a CUDA graph
        s = sigma(torch.full((), t, dtype=dtype, device=x.device))
    if s.ndim == 2:                                                 # (B, F) -> (B, 1, F, 1, 1)
        return s[:, None].reshape(s.shape[0], 1, s.shape[1], *[1] * (x.ndim - 3))
    return s.reshape(s.shape + (1,) * (x.ndim - s.ndim)) if s.ndim else s


def add_noise(x_0, eps, t):
    """x_t = (1 - sigma) x_0 + sigma eps."""
    s = like(t, x_0)
    return (1 - s) * x_0 + s * eps


def velocity(x_0, eps):
    """The training target v = eps - x_0."""
    return eps - x_0


def x0_from_v(x_t, v, t):
    """x_0 = x_t - sigma v."""
    return x_t - like(t, x_t) * v


# A prior, for models without a pretrained base

def reference_prior(x_t, reference, std, t):
    """What is known of x_0 before any learning: N(reference, std^2). Preconditioning after Karras et al. 2022, for velocities.

    With y = x_t - (1 - sigma) reference and var = std^2 (1 - sigma)^2 + sigma^2, the best guess of the velocity is
    E[v | x_t] = y (sigma - std^2 (1 - sigma)) / var - reference, and what it leaves open has deviation std / sqrt(var).
    Returns y / sqrt(var), of unit variance: what the network should see; the guess; and that deviation, which scales its answer.
    A squared error of v counts the network's own by std^2 / var, so by std^2 at sigma = 1 and by 1 at sigma = 0; times var, all levels count alike.
    """
    s, var = like(t, x_t), prior_variance(x_t, std, t)
    y = x_t - (1 - s) * reference
    return y / var.sqrt(), y * (s - std ** 2 * (1 - s)) / var - reference, std / var.sqrt()


def prior_variance(x_t, std, t):
    """var of `reference_prior`, broadcast to x_t (B, C, F, H, W); std (H, W)."""
    s = like(t, x_t)
    return (std * (1 - s)) ** 2 + s ** 2


@lru_cache(maxsize=8)
def std_map(rows, height, width, device):
    """A map of deviations, rows of numbers, as a tensor of any size: (height, width)."""
    with torch.inference_mode(False), torch.no_grad():
        return F.interpolate(torch.tensor(rows)[None, None], size=(height, width), mode="area")[0, 0].to(device)


# Guidance

def guided(v_cond, v_uncond, scale):
    """Classifier-free guidance in standard form: v_uncond + scale (v_cond - v_uncond); scale 1 is no guidance.

    Trap: CausVid, Self-Forcing and LiveTalk write v_cond + s (v_cond - v_uncond), which is a standard scale of s + 1,
    so their published 3.0 is `scale=4.0` here.
    """
    return v_uncond + scale * (v_cond - v_uncond)


# Samplers

def euler_step(x_t, v, t, t_next):
    """One Euler step of dx = v dsigma from t to t_next (lower); t_next = 0 gives x_0."""
    return x_t + (like(t_next, x_t) - like(t, x_t)) * v


def sample(model_fn, noise, ts):
    """Euler sampling (Wan's flow prediction): noise at ts[0] -> x_0. For many steps, the teacher's way.

    model_fn: (x_t, t (B,)) -> v. ts: falling times without 0.
    """
    x_t = noise
    for t, t_next in zip(ts, [*ts[1:], 0.0]):
        v = model_fn(x_t, torch.full((x_t.shape[0],), t, device=x_t.device))
        x_t = euler_step(x_t, v, t, t_next)
    return x_t


def few_step(model_fn, noise_fn, ts, grad=None, run_on=False):
    """Few-step sampling of a distilled student (DMD2, section 4.4): predict x_0, noise it again to the next time.

    model_fn: (i, x_t) -> v at time ts[i]. noise_fn: i -> fresh eps for step i; eps of step 0 is the starting point.
    grad: index of the one step that keeps its gradient, whose x_0 is returned: sampling ends there, as in Self-Forcing's
    Algorithm 1, or with run_on takes its other steps too, for what model_fn leaves behind. None: no gradient anywhere.
    """
    tracked, last = torch.is_grad_enabled(), len(ts) - 1 if grad is None else grad
    x_t = noise_fn(0)
    for i, t in enumerate(ts if run_on else ts[: last + 1]):
        with torch.set_grad_enabled(tracked and i == grad):
            v = model_fn(i, x_t)
            x_0 = x0_from_v(x_t, v, t)
        if i == last:
            result = x_0
        if i + 1 < len(ts):
            with torch.no_grad():
                x_t = add_noise(x_0, noise_fn(i + 1), ts[i + 1])
    return result
