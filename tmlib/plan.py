"""The arithmetic of full size: parameters, memory and FLOPs of any variant, before a GPU is rented.

`python -m tmlib.plan talkingmachines-18b --gpus 8` prints it. What is special
- parameters are counted on the model itself, on the meta device, and what autograd keeps on one block of fake tensors:
  nothing is allocated, and no formula can fall behind the code;
- FLOPs are closed formulas, equal to what torch's FlopCounterMode counts: 2 for every multiply-add of a matrix product;
  elementwise work (norms, RoPE, softmax, GELU) is not counted, as is usual;
- a mask costs its true number of (query, key) pairs. Recomputing attention scores in a flash backward is not model work.

Names: c a DiTConfig, L tokens of a pass, S tokens of a latent frame, width the bytes of one element.
"""

import argparse
import math

import torch

from . import attention as att
from . import config, fast
from .config import STRIDE, UserError
from .dit import VARIANTS, WanDiT
from .layers import Block, Context

TEXT, IMAGE = 512, 257                            # tokens of UMT5 and CLIP in Wan2.1
WIDTHS = {"fp32": 4, "bf16": 2, "fp8": 1}         # bytes per element
FLOPS = 790e12 * 0.65                             # assumed: 65 % of what large bf16 products reach on an H200, whose data sheet says 990e12
CARDS, CODEC = (80, 141), 4                       # GB of a card; assumed of the codec's decoder: weights, past, the pictures of a chunk
NO_INPUT_GRADIENT = ("patch", "time in", "text in")              # first on their path: backward makes a weight gradient only
KNOWN = frozenset({"time", "text", "image"})      # what a stream remembers for ever; audio from a chunk's second step on


def build(name: str, **overrides) -> WanDiT:
    """The model without its memory: on the meta device."""
    with torch.device("meta"):
        return WanDiT.from_variant(name, **overrides)


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


# FLOPs

def mask_pairs(kind: str, frames: int, tokens: int, chunk: int) -> int:
    """How many (query, key) pairs of a sequence a mask lets through; the last chunk may be shorter."""
    visible, sizes = att.predicate(kind), [min(chunk, frames - f) for f in range(0, frames, chunk)]
    return tokens ** 2 * sum(a * b for q, a in enumerate(sizes) for k, b in enumerate(sizes) if visible(q, k))


def flops(c, frames: int, tokens: int, pairs: int, *, batch=1, text=TEXT, image=None, audio=None, known=()) -> dict[str, int]:
    """FLOPs of one forward pass by part. frames, tokens: F and S of its queries; pairs: (query, key) pairs of self-attention.

    text, image, audio: tokens given (audio: per latent frame), 0 for a source that is None; image and audio: by default as the
    model takes them. known: sources whose embedding, keys and values are remembered from before ("time": the modulation).
    """
    image = IMAGE if image is None and c.image_dim else image or 0
    audio = c.audio_tokens if audio is None and c.audio_dim else audio or 0
    L, d, n = batch * frames * tokens, c.dim, c.num_layers
    hearing = -(-n // c.audio_every) if audio else 0                                    # blocks with an audio layer
    patch, heard = math.prod(c.patch_size), batch * frames * audio
    new = {name: 0 if name in known else rows for name, rows in
           dict(time=batch, text=batch * text, image=batch * image, audio=heard).items()}
    multiply_adds = {
        "patch": L * c.in_channels * patch * d,
        "time in": new["time"] * c.freq_dim * d, "time": new["time"] * 7 * d * d,
        "text in": new["text"] * c.text_dim * d, "text": new["text"] * d * d,
        "image": new["image"] * c.image_dim * (c.image_dim + d) if image else 0,
        "audio": new["audio"] * c.audio_hidden * (c.audio_dim + (1 + 2 * c.audio_depth) * c.audio_width) if audio else 0,
        "self linear": n * 4 * L * d * d,
        "self products": n * 2 * batch * pairs * d,
        "cross linear": n * (2 if text or image else 1) * L * d * d,
        "text k, v": n * 2 * new["text"] * d * d,
        "image k, v": n * 2 * new["image"] * d * d,
        "audio k, v": hearing * 2 * new["audio"] * c.audio_width * d,
        "text products": n * 2 * L * text * d,
        "image products": n * 2 * L * image * d,
        "audio products": hearing * 2 * L * audio * d,                                  # a frame hears its own window only
        "audio linear": hearing * L * d * d,
        "feed-forward": n * 2 * L * d * c.ffn_dim,
        "head": L * d * c.out_channels * patch,
    }
    return {part: 2 * count for part, count in multiply_adds.items()}


def sequence_flops(c, frames, tokens, mask="bidirectional", **given) -> dict[str, int]:
    """A whole sequence under a mask over chunks of c.chunk frames: training, or a stream without any cache."""
    return flops(c, frames, tokens, mask_pairs(mask, frames, tokens, c.chunk), **given)


def step_flops(c, chunk, tokens, *, reference=None, known=KNOWN | {"audio"}, **given) -> dict[str, int]:
    """One denoising step of a streamed chunk in its steady state: it sees chunk 0, the previous chunk and itself.

    reference: latent frames of chunk 0; None: `chunk`, as `chain.Chain` has it (the usual estimate takes 3 for both sizes).
    """
    seen = (chunk if reference is None else reference) + 2 * chunk
    return flops(c, chunk, tokens, chunk * tokens * seen * tokens, known=known, **given)


def chunk_flops(c, chunk, tokens, steps, **how) -> dict[str, int]:
    """A whole chunk: its first step embeds the chunk's sound and makes its keys and values, the others remember them."""
    return add(step_flops(c, chunk, tokens, known=KNOWN, **how), *[step_flops(c, chunk, tokens, **how)] * (steps - 1))


def add(*passes: dict[str, int]) -> dict[str, int]:
    return {part: sum(p[part] for p in passes) for part in passes[0]}


def total(parts: dict[str, int], holding: str = "") -> int:
    return sum(count for part, count in parts.items() if holding in part)


def backward(parts: dict[str, int]) -> int:
    """FLOPs of the gradients of a forward pass: those of inputs and of weights cost once the forward each."""
    return 2 * total(parts) - sum(parts[part] for part in NO_INPUT_GRADIENT)


def recomputed(parts: dict[str, int]) -> int:
    """FLOPs that gradient checkpointing adds: the blocks once more."""
    outside = ("patch", "time", "time in", "text", "text in", "image", "audio", "head")
    return sum(count for part, count in parts.items() if part not in outside)


def stage_passes(steps=2, real_ratio=0.25) -> dict[str, list[tuple]]:
    """The passes of one training step of each stage: (mask, with audio, with gradient, how many on average).

    As `distill.matching_losses` plays it: the student's loss is DMD plus regression, each at one step that keeps its gradient after
    the steps before it without one (a start from real video skips those), all steps in turn; the guided teacher runs two branches.
    """
    before = (steps - 1) / 2
    return {
        "adaptation": [("bidirectional", False, True, 1)],
        "teacher": [("bidirectional", True, True, 1)],
        "student": [("sparse_causal", True, True, 2), ("sparse_causal", True, False, before * (2 - real_ratio)),
                    ("bidirectional", True, False, 2 + 1)],                              # guided teacher, critic
        "critic": [("sparse_causal", True, False, 1 + before * (1 - real_ratio)), ("bidirectional", True, True, 1)],
    }


def training_flops(c, tokens, passes, frames=att.WINDOW, batch=1, checkpointing=True) -> float:
    """FLOPs of one training step of clips of `frames` latent frames; passes: of one stage of `stage_passes`."""
    count = 0.0
    for mask, hears, gradient, times in passes:
        parts = sequence_flops(c, frames, tokens, mask, batch=batch, audio=None if hears else 0)
        count += times * (total(parts) + gradient * (backward(parts) + checkpointing * recomputed(parts)))
    return count


# Bytes

def activation_bytes(c, frames: int, rows: int, columns: int, mask="bidirectional", batch=1, dtype=torch.bfloat16) -> int:
    """What autograd keeps of one block's forward pass with all conditions, seen by saved-tensor hooks on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    S, d, kept = rows * columns, c.dim, {}
    with torch.device("meta"):
        block = Block(c, 0)
    with FakeTensorMode():                                            # of a CPU: they take fused attention, as a GPU does
        empty = lambda *shape, of=dtype: torch.empty(shape, dtype=of)
        weights = {name: empty(*p.shape).requires_grad_() for name, p in block.named_parameters()}
        rope = empty(2, frames * S, c.attention_head_dim // 2, of=torch.float32)
        ctx = Context(rope, rope, empty(batch, TEXT, d), empty(batch, IMAGE, d) if c.image_dim else None,
                      *((empty(batch, frames, c.audio_tokens, c.audio_width), empty(batch, frames, S, 1)) if c.audio_dim else (None, None)),
                      mask, c.chunk)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
            h, mod = empty(batch, frames, S, d).requires_grad_(), empty(batch, 1, 6, d).requires_grad_()
            torch.func.functional_call(block, weights, (h, mod, ctx))
        for shared in (*weights.values(), *ctx):                      # counted elsewhere, or once for all blocks
            kept.pop(shared.untyped_storage()._cdata if isinstance(shared, torch.Tensor) else None, None)
        return sum(t.untyped_storage().nbytes() for t in kept.values())


def training_memory(dit, gpus, rows, columns, *, trained=1, averaged=1, frozen=0, graphs=1, frames=att.WINDOW, batch=1, width=2,
                    checkpointing=True, mask="bidirectional") -> dict[str, float]:
    """Bytes per GPU, everything sharded over `gpus` (FSDP, ZeRO-3), with AdamW, by item.

    As `ranks.shard` does it: weights, gradients, moments and averages rest in float32; a block and the next are gathered, and
    one block's gradient waits to be scattered, in float32 too. width: bytes of an activation. trained, averaged, frozen: models of
    this size that learn, that keep an EMA, and that only predict. graphs: forward passes kept until one backward.
    """
    c, count, block = dit.config, parameters(dit), parameters(dit.blocks[0])
    dtype = {4: torch.float32}.get(width, torch.bfloat16)
    one = activation_bytes(c, frames, rows, columns, mask, batch, dtype)
    stream = batch * frames * rows * columns * c.dim * dtype.itemsize                   # h, the input of a block
    return {
        "weights, float32": 4 * count * trained / gpus,
        "gradients, float32": 4 * count * trained / gpus,
        "AdamW moments, float32": 8 * count * trained / gpus,
        "moving average, float32": 4 * count * averaged / gpus,
        "frozen weights": 4 * count * frozen / gpus,
        "gathered blocks": 3 * block * 4,
        "activations": graphs * (c.num_layers * stream + one if checkpointing else c.num_layers * one),
    }


def cache_bytes(c, chunk, tokens, width=2, batch=1) -> int:
    """Keys and values of chunk 0 and the previous chunk in every layer: one `KVCache`, and there is one per denoising step."""
    return c.num_layers * 2 * 2 * batch * chunk * tokens * c.dim * width


def memo_bytes(c, chunk, width=2, batch=1) -> int:
    """Remembered keys and values of text, image and the chunk's sound, in every layer."""
    hearing = -(-c.num_layers // c.audio_every) if c.audio_dim else 0
    constant = TEXT + (IMAGE if c.image_dim else 0)
    return 2 * batch * c.dim * width * (c.num_layers * constant + hearing * chunk * c.audio_tokens)


def streaming_memory(dit, chunk, tokens, steps, width=2, batch=1) -> dict[str, float]:
    """Bytes on the one GPU that streams. fp8 is one byte for the weights that `fast.to_fp8` takes, two for all else."""
    c, kept = dit.config, max(width, 2)
    small = sum(b.get_submodule(name).weight.numel() for b in dit.blocks for name in fast.fp8_layers(b)) if width == 1 else 0
    return {"weights": parameters(dit) * kept - small,
            f"K/V caches of {steps} steps": steps * cache_bytes(c, chunk, tokens, kept, batch),
            "cross-attention K/V": memo_bytes(c, chunk, kept, batch)}


def step_bytes(c, count, chunk, tokens, width=2) -> int:
    """Least memory traffic of a streamed step: all `count` weights and the cache read once, the chunk's keys and values written."""
    return count * width + cache_bytes(c, chunk, tokens, max(width, 2)) * 3 // 2


# The command

def tokens_of(c, size: str) -> tuple[int, int]:
    """Rows and columns of tokens of a picture "512" or "480x832" (height x width) of pixels."""
    parts, steps = size.lower().split("x"), [8 * p for p in c.patch_size[1:]]
    parts = parts * 2 if len(parts) == 1 else parts
    sides = [int(s) for s in parts if s.isdecimal()]
    if not len(parts) == len(sides) == 2 or min(sides) < 1 or any(side % step for side, step in zip(sides, steps)):
        raise UserError(f"size {size}: give multiples of {steps[0]} pixels such as 512, or 480x832 for height x width")
    return sides[0] // steps[0], sides[1] // steps[1]


def show(title: str, rows: dict[str, list | str | float], head: list[str] = ()) -> None:
    """Print an aligned table: {name: cells}, numbers to three digits."""
    cells = lambda row: [c if isinstance(c, str) else f"{c:,.4g}" for c in (row if isinstance(row, list) else [row])]
    lines = [["", *head]] * bool(head) + [[name, *cells(row)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{title}")
    for line in lines:
        print("  " + line[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(line[1:], widths[1:])))


def paper_rows(c, tokens, reference=None, rate=FLOPS) -> dict[str, list]:
    """What a chunk costs, from a configuration: per chunk size TFLOP per step (linear, products), then time and rate at 2, 4 steps."""
    rows = {}
    for chunk in (3, 7):
        step = step_flops(c, chunk, tokens, reference=reference)
        seconds = [total(chunk_flops(c, chunk, tokens, steps, reference=reference)) / rate for steps in (2, 4)]
        products = total(step, "products")
        rows[f"{chunk} latent = {STRIDE * chunk} frames"] = [total(step) / 1e12, (total(step) - products) / 1e12, products / 1e12,
                                                             *seconds, *(STRIDE * chunk / s for s in seconds)]
    return rows


def fits(dit, tokens: int) -> dict[str, list[str]]:
    """Per setting, GB in bf16 and in fp8, and the smallest of CARDS that holds them beside the codec."""
    def cell(chunk, steps, width):
        gb = sum(streaming_memory(dit, chunk, tokens, steps, width).values()) / 1e9
        card = next((card for card in CARDS if gb + CODEC <= card), None)
        return f"{gb:.1f}, {f'fits {card}' if card else 'fits none'}"
    return {f"chunk {chunk}, {steps} steps": [cell(chunk, steps, WIDTHS[d]) for d in ("bf16", "fp8")] for chunk in (3, 7) for steps in (2, 4)}


def report(args) -> None:
    dit = build(args.variant, chunk=args.chunk)
    c, count, width = dit.config, parameters(dit), WIDTHS[args.dtype]
    rows, columns = tokens_of(c, args.size)
    S, sound = rows * columns, sum(p.numel() for n, p in dit.named_parameters() if "audio" in n)
    print(f"{args.variant}: {args.size} pixels are {S} tokens per latent frame; chunks of {args.chunk} latent = {STRIDE * args.chunk} video frames")
    show("Parameters", {"all": f"{count:,}", f"one of {c.num_layers} blocks": f"{parameters(dit.blocks[0]):,}",
                        "audio, everywhere": f"{sound:,}", "tensors": f"{len(dit.state_dict()):,}"})

    kinds = {"adaptation, teacher": {}, "distillation": dict(trained=2, frozen=1, graphs=2, mask="sparse_causal")}
    columns_of = {f"{name}{'' if keep else ', no checkpointing'}": training_memory(
        dit, args.gpus, rows, columns, batch=args.batch, width=max(width, 2), checkpointing=keep, **how)
        for name, how in kinds.items() for keep in (True, False)}
    items = {item: [kind[item] / 1e9 for kind in columns_of.values()] for item in next(iter(columns_of.values()))}
    items["in all"] = [sum(kind.values()) / 1e9 for kind in columns_of.values()]
    show(f"Training memory, GB on each of {args.gpus} GPUs, batch {args.batch} each, clips of {att.WINDOW} latent frames", items, list(columns_of))

    serving = streaming_memory(dit, args.chunk, S, args.steps, width)
    show("Streaming memory, GB on one GPU, the video codec aside", {k: v / 1e9 for k, v in {**serving, "in all": sum(serving.values())}.items()})
    show(f"In all at other settings: what fits a card of {' or '.join(map(str, CARDS))} GB, {CODEC:g} GB of it for the codec", fits(dit, S), ["bf16", "fp8"])

    show(f"PFLOP of one training step, batch {args.batch}", {
        stage: [training_flops(c, S, passes, batch=args.batch, checkpointing=again) / 1e15 for again in (False, True)]
        for stage, passes in stage_passes(args.steps).items()}, ["model work", "with checkpointing"])

    parts = {"first step": step_flops(c, args.chunk, S, known=KNOWN), "other steps": step_flops(c, args.chunk, S),
             "nothing remembered": step_flops(c, args.chunk, S, known=()),
             "no cache at all": sequence_flops(c, 3 * args.chunk, S, "sparse_causal")}
    table = {part: [p[part] / 1e12 for p in parts.values()] for part in parts["first step"]}
    show("TFLOP of one denoising step of a chunk", {**table, "in all": [total(p) / 1e12 for p in parts.values()]}, list(parts))
    whole = total(chunk_flops(c, args.chunk, S, args.steps))
    show(f"A chunk of {args.steps} steps", {"TFLOP": whole / 1e12, "GB read and written, at least":
         args.steps * step_bytes(c, count, args.chunk, S, width) / 1e9, f"s at {FLOPS / 1e12:.0f} TFLOP/s (not measured)": whole / FLOPS})

    head = ["TFLOP/step", "linear", "products", "s, 2 steps", "s, 4 steps", "frames/s, 2", "frames/s, 4"]
    silent = build(args.variant, audio_dim=None).config
    show(f"What a chunk costs at {FLOPS / 1e12:.0f} TFLOP/s (assumed), estimated without sound: no audio, chunk 0 of 3 frames", paper_rows(silent, S, 3), head)
    show("The same, as this code streams: with its audio path, chunk 0 as large as the others", paper_rows(c, S), head)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tmlib.plan", description="Parameters, memory and FLOPs of a variant at full size.")
    add_argument = parser.add_argument
    add_argument("variant", help=f"one of {', '.join(VARIANTS)}")
    add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs that training is sharded over (default 8)")
    add_argument("--size", default="512", metavar="PIXELS", help="of the video: 512, or 480x832 for height x width (default 512)")
    add_argument("--chunk", type=int, default=3, metavar="N", help="latent frames per chunk (default 3)")
    add_argument("--steps", type=int, default=2, metavar="N", help="denoising steps (default 2)")
    add_argument("--batch", type=int, default=1, metavar="N", help="clips per GPU in training (default 1)")
    add_argument("--dtype", choices=list(WIDTHS), default="bf16", help="of computation; training takes bf16 for fp8 (default bf16)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    for name in ("gpus", "chunk", "steps", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give a whole number of at least 1")
    report(args)
    return 0


if __name__ == "__main__":
    config.cli(main)
