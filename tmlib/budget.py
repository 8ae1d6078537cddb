"""What training the DiT costs at a scale of params.yaml, stage by stage, before a GPU is rented: `python -m tmlib.budget gpu`.

Arithmetic alone, by the counts of `plan`: FLOPs of forward and backward passes with Wan's 512 text tokens (the miniature's three cost less),
minutes at an assumed rate, bytes without gradient checkpointing. Codec, speech, readers and the pictures of a stage are not in it.
"""

import argparse

from . import attention as att
from . import config, plan, scales
from .config import UserError

FLOPS = 100e12                                            # assumed, of a small model trained in bfloat16: an eighth of an H100's peak


def read(scale: str) -> dict:
    """params.yaml as that scale has it."""
    from ruamel.yaml import YAML
    if scale == config.read_params()["common"]["scale"]:
        return config.read_params()
    return YAML(typ="safe", pure=True).load(scales.scaled_params(config.ROOT, scale))


def stages(params: dict) -> dict[str, tuple[int, float, float, float]]:
    """{stage: (steps, TFLOP of a step, TFLOP in all, GB at its peak)} of the DiT's training on one GPU."""
    size, chunk, width = params["data"]["size"], params["common"]["chunk"], 2 if params["common"]["bf16"] else 4
    frames, d = (params["data"]["frames"] - 1) // plan.STRIDE + 1, params["distillation"]
    dit = plan.build(params["base"]["variant"], chunk=chunk)
    rows, columns = plan.tokens_of(dit.config, str(size))
    passes = plan.stage_passes(d["steps"], d["real_ratio"])
    cost = lambda what, batch: plan.training_flops(dit.config, rows * columns, what, frames, batch, checkpointing=False) / 1e12
    memory = lambda batch, **how: sum(plan.training_memory(dit, 1, rows, columns, frames=frames, batch=batch, width=width, checkpointing=False,
                                                           **how).values()) / 1e9
    found = {}
    for stage in ("base", "adaptation", "teacher", "plain"):
        p = params[stage]
        batch, hears = p["batch"] * p["repeats"], p["drop_audio"] < 1
        found[stage] = (p["steps"], cost(passes["teacher" if hears else "adaptation"], batch), memory(batch))
    regression = [("sparse_causal", True, True, 1), ("sparse_causal", True, False, (d["steps"] - 1) / 2)]
    found["regression"] = (d["regression_steps"], cost(regression, d["batch"]), memory(d["batch"], frozen=1, mask="sparse_causal"))
    each = cost(passes["student"], d["batch"]) / d["critic_steps"] + cost(passes["critic"], d["batch"])     # the student plays on every n-th step
    found["matching"] = (d["dmd_steps"], each, memory(d["batch"], trained=2, averaged=2, frozen=1, graphs=2, mask="sparse_causal"))
    return {stage: (steps, step, steps * step, peak) for stage, (steps, step, peak) in found.items()}


def report(scale: str, rate: float) -> None:
    params = read(scale)
    table = {stage: [str(steps), step, whole / 1000, whole * 1e12 / rate / 60, peak] for stage, (steps, step, whole, peak) in stages(params).items()}
    plan.show(f"Training the DiT at the scale {scale}: {params['base']['variant']}, {params['data']['size']} pixels, clips of {att.WINDOW} latent frames",
              table, ["steps", "TFLOP a step", "PFLOP", f"min at {rate / 1e12:.0f} TFLOP/s (assumed)", "GB"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tmlib.budget", description="What training the DiT costs at a scale of params.yaml.")
    parser.add_argument("scale", help="such as gpu; `mini` is params.yaml itself")
    parser.add_argument("--tflops", type=float, default=FLOPS / 1e12, metavar="R", help=f"rate that the GPU reaches (default {FLOPS / 1e12:.0f})")
    args = parser.parse_args(argv)
    if not args.tflops > 0:
        raise UserError(f"--tflops {args.tflops}: give a rate above 0")
    report(args.scale, args.tflops * 1e12)
    return 0


if __name__ == "__main__":
    config.cli(main)
