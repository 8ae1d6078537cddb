"""The autoregressive chain: one loop for training and for the runtime.

- `Chain` holds the caches and makes one chunk after another; `rollout` runs it over a clip, `stream.Streamer` for ever.
- `full` is the same few-step student on a whole sequence under its mask, as `distill.student` trains it. With a cache per denoising
  step it equals `rollout` for as long as the sequence fits the window, which is why no clean pass is needed.
- Beyond the window positions stay pinned: reference at 0.., previous chunk and present chunk at the window's end.
"""

import torch

from . import flow
from .config import UserError

CACHES = ("per_step", "next_step", "clean_pass")


# Conditions

def chunk_condition(cond, index, chunk):
    """The part of cond (B, 20, F, H, W) for chunk `index`; past its end the last chunk repeats."""
    first = min(index * chunk, cond.shape[2] - chunk)
    return cond[:, :, first : first + chunk]


def with_null_audio(conditions):
    """Conditions of a guided batch (2 B, ...): the given half, then the half whose audio is null (zero features)."""
    if conditions.get("audio") is None:
        raise UserError("guidance other than 1 needs audio: the null condition is zero audio features")
    twice = {name: None if c is None else torch.cat([c, c]) for name, c in conditions.items()}
    audio = conditions["audio"]
    return {**twice, "audio": torch.cat([audio, torch.zeros_like(audio)])}


def predict(dit, x_t, cond, t, conditions, guidance=1.0, **how):
    """Velocity of x_t (B, 16, F, H, W). If guided, t and conditions are a batch of 2 B, see `with_null_audio`."""
    x = torch.cat([x_t, cond.to(x_t)], dim=1)                                            # (B, 36, F, H, W)
    x = x if guidance == 1 else torch.cat([x, x])
    v = dit(x, t, **conditions, **how)
    return v if guidance == 1 else flow.guided(*v.chunk(2), guidance)


def bare(dit):
    """The WanDiT inside a wrapper such as DistributedDataParallel."""
    return getattr(dit, "module", dit)


# The chain

class Chain:
    """An endless autoregressive chain: `next` makes the following chunk from its own past.

    cond: (B, 20, F, H, W), see `chunk_condition`; (B, 0, F, H, W) for a model without image channels.
    ts: falling times of the denoising steps.
    cache: where the context of a denoising step comes from:
        "per_step"    the previous chunk at the same step; no extra pass (the paper's figure);
        "next_step"   the previous chunk one step further, so less noisy (the last step: at the same); no extra pass;
        "clean_pass"  the finished previous chunk, written by one more forward pass at time 0 (Self-Forcing).
    """

    def __init__(self, dit, cond, ts, *, chunk=None, cache="per_step"):
        if cache not in CACHES:
            raise UserError(f"cache {cache!r} is unknown; choose one of {', '.join(CACHES)}")
        self.dit, self.cond, self.ts = dit, cond, list(ts)
        self.chunk, self.mode, self.index = chunk or bare(dit).chunk, cache, 0
        self.caches = self.new_caches()
        self.times = {t: torch.full((len(cond),), float(t), device=cond.device) for t in {*self.ts, 0.0}}

    def new_caches(self):
        """Static buffers, {t: (cache to read, cache to write)}: one per denoising step or the single clean one; one memo."""
        count, memo = 1 if self.mode == "clean_pass" else len(self.ts), {}
        B, *_, H, W = self.cond.shape
        caches = [bare(self.dit).new_cache(B, H, W, chunk=self.chunk, memo=memo) for _ in range(count)]
        if self.mode == "clean_pass":
            return {t: (caches[0], None) for t in self.ts}
        read = caches if self.mode == "per_step" else [*caches[1:], caches[-1]]
        return {t: (r, w) for t, r, w in zip(self.ts, read, caches)}

    def distinct(self):
        """The caches, each once, in the order of the denoising steps."""
        return list({id(c): c for pair in self.caches.values() for c in pair if c is not None}.values())

    def next(self, noise, *, text=None, image=None, audio=None, audio_mask=None, grad=None):
        """x_0 of the next chunk (B, 16, chunk, H, W).

        noise: step -> eps (B, 16, chunk, H, W); audio (B, chunk, tokens, D) and audio_mask are of this chunk alone.
        grad: see flow.few_step; context is always constant to gradients.
        """
        cond = chunk_condition(self.cond, self.index, self.chunk)
        conditions = dict(text=text, image=image, audio=audio, audio_mask=audio_mask)
        velocity = lambda i, x_t: self.velocity(x_t, self.ts[i], cond, conditions)
        x_0 = flow.few_step(velocity, noise, self.ts, grad, run_on=self.mode == "next_step")
        if self.mode == "clean_pass":
            self.write_clean(x_0.detach(), cond, conditions)
        self.index += 1
        return x_0

    def velocity(self, x_t, t, cond, conditions):
        cache, writes_to = self.caches[t]
        cache.writes_to = writes_to
        return predict(self.dit, x_t, cond, self.times[t], conditions, cache=cache)

    @torch.no_grad()
    def write_clean(self, x_0, cond, conditions):
        clean = self.caches[self.ts[0]][0]
        clean.writes_to = clean
        predict(self.dit, x_0, cond, self.times[0.0], conditions, cache=clean)


def noise_maker(shape, noise=None, generator=None, device="cpu"):
    """(frames slice) -> (step -> eps (B, 16, frames, H, W)). From `noise`, see `rollout`, or drawn when asked for."""
    whole = noise if noise is None or callable(noise) else noise.__getitem__

    def draw(frames):
        if whole is not None:
            return lambda step: whole(step)[:, :, frames]
        B, _, H, W = shape
        size = (B, 16, frames.stop - frames.start, H, W)
        where = generator.device if generator is not None else device      # drawn on a CPU: equal numbers on any device
        return lambda step: torch.randn(size, generator=generator, device=where).to(device)
    return draw


def rollout(dit, cond, *, timesteps, chunks=None, text=None, image=None, audio=None, audio_mask=None, noise=None, generator=None,
            grad=None, **chain):
    """Latents (B, 16, chunks * chunk, H, W) made chunk by chunk, each from chunk 0 and the one before it; chunks: as cond has.

    cond (B, 20, F, H, W), text, image: as in `Chain` and WanDiT.forward; audio (B, frames, tokens, D), audio_mask (B, frames, h, w)
    noise: (steps, B, 16, frames, H, W), or a function step -> (B, 16, frames, H, W), or None to draw from `generator`
    grad: index of the denoising step that keeps its gradient and whose x_0 is taken, the same in every chunk
    (Self-Forcing, Algorithm 1); None: no gradient at all.
    chain: chunk, cache of `Chain`.
    """
    state = Chain(dit, cond, timesteps, **chain)
    draw = noise_maker((cond.shape[0], 16, *cond.shape[-2:]), noise, generator, cond.device)
    part = lambda c, frames: None if c is None else c[:, frames]
    out = []
    for index in range(cond.shape[2] // state.chunk if chunks is None else chunks):
        frames = slice(index * state.chunk, (index + 1) * state.chunk)
        out.append(state.next(draw(frames), text=text, image=image, audio=part(audio, frames),
                              audio_mask=part(audio_mask, frames), grad=grad))
    return torch.cat(out, dim=2)


def full(dit, cond, *, timesteps, mask="sparse_causal", noise=None, generator=None, grad=None, **conditions):
    """Few-step latents (B, 16, F, H, W) of a whole sequence at once, under a mask, all chunks sharing each step's time.

    The layout of the paper's training figure. Arguments as in `rollout`; conditions: text, image, audio, audio_mask.
    """
    B, _, frames, H, W = cond.shape
    eps = noise_maker((B, 16, H, W), noise, generator, cond.device)(slice(0, frames))
    times = [torch.full((B,), float(t), device=cond.device) for t in timesteps]
    velocity = lambda i, x_t: predict(dit, x_t, cond, times[i], conditions, mask=mask)
    return flow.few_step(velocity, eps, timesteps, grad)
