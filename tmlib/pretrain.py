"""How the models before the student learn, the image-to-video model and stages 1 and 2: flow matching over whole clips. Stage 3 is `distill`."""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import chain, flow, losses, ranks
from .config import UserError
from .latents import Latents
from .sampling import denoiser


def flow_matching_loss(dit: nn.Module, latents: Latents, p) -> list[Callable[[torch.Generator, int], dict[str, Tensor]]]:
    """The loss of stages 0-2, in parts: every clip of a batch at `p.repeats` stratified noise levels, conditions dropped for guidance.

    p: batch, at_once (see `ranks.parts`), repeats, shift, drop_audio (1: the model never hears sound), drop_text, sway_weight (see `losses.flow_matching`).
    """
    if p.sway_weight and "sway" not in latents.store:
        raise UserError("sway_weight is above 0, but the latents do not tell how heads sway: params.yaml needs latents.sway: true, or sway_weight: 0")

    def loss(part: slice, g: torch.Generator, step: int) -> dict[str, Tensor]:
        silent = p.drop_audio >= 1
        index = latents.draw(p.batch, g)                                                         # the whole batch: equal on all ranks
        heard = None if silent else torch.rand(p.batch, generator=g) >= p.drop_audio
        told = torch.rand(p.batch, generator=g) >= p.drop_text
        n = p.batch * p.repeats
        u = (torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n                     # stratified in (0, 1)
        eps = torch.randn(n, *latents.shape, generator=g)                                        # drawn on the CPU: equal everywhere

        batch = latents.batch(index[part])
        batch = (batch.silent() if silent else batch.keep(audio=heard[part])).keep(text=told[part]).repeat(p.repeats).to(dit.device)
        t, eps = (x.unflatten(0, (p.batch, p.repeats))[part].flatten(0, 1).to(dit.device) for x in (1000 * flow.shift_sigma(u, p.shift), eps))
        return {"loss": losses.flow_matching(denoiser(dit, batch), batch.z, eps, t, batch.weight, batch.sway, p.sway_weight, chain.bare(dit).loss_weight(batch.z, t))}
    return [partial(loss, part) for part in ranks.parts(p.batch, p.at_once)]
