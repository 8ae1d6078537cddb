"""What training the DiT costs at a scale of params.yaml, stage by stage, before a GPU is rented: `python -m tmlib.budget gpu`.

Arithmetic alone, by the counts of `plan`: FLOPs of forward and backward passes with Wan's 512 text tokens (the miniature's three cost less),
time at an assumed rate of each GPU, bytes on each. On as many GPUs as the stage has processes, so many clips at once, and with blocks computed
again where `ranks` does so. Codec, speech, readers, the pictures of a stage, the convolutional teacher and the ablations are not in it.
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
    """{stage: (steps, TFLOP of a step, TFLOP in all, GB at its peak on each GPU, GPUs)} of the DiT's training; without stages that train nothing.

    A step of `solutions` is one pair that the guided teacher makes; its peak is below that of the training which follows, and not counted (0).
    """
    size, chunk, width = params["data"]["size"], params["common"]["chunk"], 2 if params["common"]["bf16"] else 4
    frames, d = (params["data"]["frames"] - 1) // plan.STRIDE + 1, params["distillation"]
    dit = plan.build(params["base"]["variant"], chunk=chunk)
    rows, columns = plan.tokens_of(dit.config, str(size))
    passes = plan.stage_passes(d["steps"], d["real_ratio"])

    def cost(p, what) -> float:
        return plan.training_flops(dit.config, rows * columns, what, frames, p["batch"] * p.get("repeats", 1), checkpointing=p["processes"] > 1) / 1e12

    def memory(p, **how) -> float:
        at_once = (p["at_once"] or p["batch"] // p["processes"]) * p.get("repeats", 1)
        return sum(plan.training_memory(dit, p["processes"], rows, columns, frames=frames, batch=at_once, width=width, checkpointing=p["processes"] > 1,
                                        **how).values()) / 1e9

    found = {}
    for stage in ("base", "adaptation", "teacher", "plain"):
        p = params[stage]
        steps = 0 if p.get("pretrained") else p["steps"]
        found[stage] = (steps, cost(p, passes["teacher" if p["drop_audio"] < 1 else "adaptation"]), memory(p), p)
    guided = [("bidirectional", True, False, 2 * d["pair_steps"])]
    found["solutions"] = (d["pairs"], cost({**d, "batch": 1}, guided), 0.0, d)
    regression = [("sparse_causal", True, True, 1), ("sparse_causal", True, False, (d["steps"] - 1) / 2)]
    found["regression"] = (d["regression_steps"], cost(d, regression), memory(d, frozen=2, mask="sparse_causal"), d)          # the critic is there already
    each = cost(d, passes["student"]) / d["critic_steps"] + cost(d, passes["critic"])                       # the student plays on every n-th step
    averaged = sum(d[who].get("ema", 0) > 0 for who in ("student_optim", "critic_optim"))
    found["matching"] = (d["dmd_steps"], each, memory(d, trained=2, averaged=averaged, frozen=1, graphs=2, mask="sparse_causal"), d)
    return {stage: (steps, step, steps * step, peak, p["processes"]) for stage, (steps, step, peak, p) in found.items() if steps}


def report(scale: str, rate: float) -> None:
    params = read(scale)
    found = stages(params)
    seconds = {stage: whole * 1e12 / rate / gpus for stage, (*_, whole, _, gpus) in found.items()}
    longest = max(seconds.values())
    unit, length = ("days", 86400) if longest > 86400 else ("min", 60) if longest > 60 else ("s", 1)
    table = {stage: [str(steps), step, whole / 1000, str(gpus), seconds[stage] / length, peak or "-"] for stage, (steps, step, whole, peak, gpus) in found.items()}
    plan.show(f"Training the DiT at the scale {scale}: {params['base']['variant']}, {params['data']['size']} pixels, clips of {att.WINDOW} latent frames",
              table, ["steps", "TFLOP a step", "PFLOP", "GPUs", f"{unit} at {rate / 1e12:.0f} TFLOP/s each (assumed)", "GB on each"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tmlib.budget", description="What training the DiT costs at a scale of params.yaml.")
    parser.add_argument("scale", help="such as gpu; `mini` is params.yaml itself")
    parser.add_argument("--tflops", type=float, default=FLOPS / 1e12, metavar="R", help=f"rate that each GPU reaches (default {FLOPS / 1e12:.0f})")
    args = parser.parse_args(argv)
    if not args.tflops > 0:
        raise UserError(f"--tflops {args.tflops}: give a rate above 0")
    report(args.scale, args.tflops * 1e12)
    return 0


if __name__ == "__main__":
    config.cli(main)
