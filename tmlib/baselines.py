"""What the stream is held against, on the same device and the same weights: the window without a cache, ours and diffusers'.

Both put chunk 0, the previous and the present chunk, the latent frames that a streamed chunk sees, through the whole network at every
denoising step.
"""

import torch

from . import attention as att
from .clock import median
from .config import UserError
from .stand_in import Scene

CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.05}       # relative difference of two ways of rounding through a whole network


def window(dit, scene: Scene):
    """x (1, C, 3 chunk, H, W), t and the RoPE positions of chunk 0, the previous and the present chunk of a steady stream."""
    n = scene.chunk // 3
    x = torch.cat([scene.randn(*scene.shape), scene.cond[:, :, :scene.chunk]], 1)
    return x, torch.full((1,), 500.0, device=x.device), [*range(n), *range(att.WINDOW - 2 * n, att.WINDOW)]


def recomputing(dit, rows, columns, chunk, device, n) -> float:
    """Milliseconds of a denoising step without any cache: the window under the sparse-causal mask."""
    scene = Scene(dit.config, rows, columns, 3 * chunk, device)
    x, t, places = window(dit, scene)
    audio = scene.randn(*scene.sound) if scene.sound else None
    given = dict(text=scene.text, image=scene.image, audio=audio, audio_mask=scene.mask)
    return median(lambda: dit(x, t, positions=places, mask="sparse_causal", **given), n, device, warm=1)


def of_diffusers(dit):
    """diffusers' WanTransformer3DModel on the very tensors of `dit`, its audio path left out. Raises ImportError without diffusers."""
    from diffusers import WanTransformer3DModel
    c = dit.config
    shape = {k: getattr(c, k) for k in ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "in_channels", "out_channels",
                                        "text_dim", "image_dim", "freq_dim", "patch_size", "eps")}
    with torch.device("meta"):
        net = WanTransformer3DModel(**shape, added_kv_proj_dim=c.dim if c.image_dim else None)
    net.rope = type(net.rope)(c.attention_head_dim, c.patch_size, 1024).to(dit.device)           # tables, not weights
    net.load_state_dict({name: p for name, p in dit.state_dict().items() if "audio" not in name}, assign=True)
    return net.eval()


def diffusers_window(dit, rows, columns, chunk, device, n) -> dict[str, float]:
    """Milliseconds of diffusers' forward pass of the window (bidirectional, without sound), and how far it is from ours."""
    scene = Scene(dit.config, rows, columns, 3 * chunk, device)
    x, t, _ = window(dit, scene)
    net, given = of_diffusers(dit), (scene.text.to(dit.dtype), scene.image.to(dit.dtype) if scene.image is not None else None)
    step = lambda: net(x.to(dit.dtype), t, *given, return_dict=False)[0]
    ours, theirs = dit(x, t, text=scene.text, image=scene.image).float(), step().float()
    difference = float((theirs - ours).norm() / ours.norm())
    if not difference <= CLOSE[dit.dtype]:
        raise UserError(f"diffusers' window differs from ours by {difference:.3g}: not the same model, so not timed")
    return {"step_ms_p50": median(step, n, device, warm=1), "difference": difference,
            "ours_step_ms_p50": median(lambda: dit(x, t, text=scene.text, image=scene.image), n, device, warm=1)}
