"""Speed at full size on the machine at hand: `python -m tmlib.bench` -> data/measured/<device>.json.

What is special
- the real streaming path: `chain.Chain` with its caches, sound that changes with every chunk, the Wan VAE if diffusers is here;
- weights are random, drawn on the device tensor by tensor with nothing left at zero: speed does not depend on their values,
  as long as they are not zeros, which run faster than real data;
- every form of the model (`tmlib.fast`) is first held against an eager float32 reference of a few layers, over a whole window;
- the rate of the machine's own matrix products stands beside the model's, FLOPs are those of `tmlib.plan`;
- results are written after every run, so that a call cut off by its budget leaves what it has.
"""

import argparse
import gc
import math
import platform
import re
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import attention as att
from . import clock, config, fast, flow, plan, weights
from .chain import Chain, bare
from .clock import measure, median, typical
from .config import UserError
from .dit import VARIANTS, WanDiT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
SWITCHES = ("qkv", "attention", "compile", "graphs", "fp8")
BOUNDS = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.5}              # relative error of a few layers above which a run is wrong, not rounded
SHIFT = 5.0
LAYERS_CHECKED = 2
OVER = "no time left in the budget"


# What is run

def random_model(variant: str, device, dtype, seed=0, **overrides) -> WanDiT:
    """The variant with every weight alive, in the precisions of `WanDiT.from_pretrained`; layer i is the same at any depth."""
    with torch.device("meta"):
        dit = WanDiT.from_variant(variant, **overrides)
    generator, wanted = torch.Generator(device).manual_seed(seed), dict(dit.named_parameters())
    for name, p in wanted.items():
        scale = 0.02 if p.ndim == 1 else p.shape[-1] ** -0.5 if "table" in name else p[0].numel() ** -0.5
        drawn = torch.randn(p.shape, generator=generator, device=device) * scale
        weights.put(dit, wanted, name, drawn + 1 if p.ndim == 1 and name.endswith("weight") else drawn, dtype, variant)
    return dit.eval().requires_grad_(False)


class Scene:
    """Random conditions of one stream, on the device: fixed picture, words and face; sound and noise anew for every chunk."""

    def __init__(self, c, rows, columns, chunk, device, seed=1):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.shape = (1, 16, chunk, rows * c.patch_size[1], columns * c.patch_size[2])
        self.cond = self.randn(1, c.in_channels - 16, att.WINDOW, *self.shape[3:])
        self.text, self.image = self.randn(1, plan.TEXT, c.text_dim), self.randn(1, plan.IMAGE, c.image_dim) if c.image_dim else None
        self.sound = (1, chunk, c.audio_tokens, c.audio_dim) if c.audio_dim else None
        self.mask = torch.rand(1, chunk, rows, columns, device=device, generator=self.generator) if c.audio_dim else None

    def randn(self, *shape):
        return torch.randn(shape, device=self.generator.device, generator=self.generator)

    def next(self, chain):
        """x_0 (1, 16, chunk, H, W) of the chain's next chunk."""
        audio = self.randn(*self.sound) if self.sound else None
        return chain.next(lambda step: self.randn(*self.shape), text=self.text, image=self.image, audio=audio, audio_mask=self.mask)


def form(args, switches, device, kernel="auto", layers=None):
    """The model with its switches on. The order matters: attention is settled before compilation, graphs wrap it all."""
    gc.collect(), torch.cuda.empty_cache()                              # the form before this one must not be there any more
    torch._dynamo.reset()                                               # and compiled graphs have its attention kernel baked in
    fast.use_attention(kernel if "attention" in switches else "auto")
    dit = random_model(args.variant, device, DTYPES[args.dtype], args.seed, chunk=args.chunk,
                       **({} if layers is None else {"num_layers": layers}))
    dit = fast.fuse_qkv(dit) if "qkv" in switches else dit
    dit = fast.to_fp8(dit) if "fp8" in switches else dit
    dit = fast.compile_blocks(dit, backend=args.backend) if "compile" in switches else dit
    return fast.Graphed(dit) if "graphs" in switches else dit


def new_chain(dit, scene, args):
    if isinstance(dit, fast.Graphed):
        dit.forget()
    return Chain(dit, scene.cond, flow.timesteps(args.steps, SHIFT))


def to_steady_state(chain, scene):
    """Chunks until positions are pinned, and two more: graphs run once as they are and are then recorded."""
    for _ in range(math.ceil(att.WINDOW / chain.chunk) + 2):
        x_0 = scene.next(chain)
    return x_0


def checked(x, what):
    if not torch.isfinite(x).all() or x.float().std() == 0:
        raise UserError(f"bench: {what} gave latents that are {'not finite' if x.isnan().any() or x.isinf().any() else 'constant'}: nothing to time")
    return x


class Decoder:
    """diffusers' Wan VAE decoder with random weights, fed chunk by chunk: its feature cache is never cleared in a stream.

    Equal to its `decode` of all latents at once, which clears the cache at both ends.
    """

    def __init__(self, device, dtype, **changes):
        from diffusers import AutoencoderKLWan
        with torch.device(device):
            self.vae = AutoencoderKLWan(**changes).to(dtype).eval().requires_grad_(False)
        self.vae.encoder, self.dtype = None, dtype
        self.restart()

    def restart(self):
        self.vae.clear_cache()
        self.begun = False

    def lay_out(self, memory_format):
        for conv in (m for m in self.vae.modules() if isinstance(m, torch.nn.Conv3d)):
            conv.weight.data = conv.weight.data.to(memory_format=memory_format)

    def __call__(self, z):
        """Latents (1, 16, F, H, W) -> video (1, 3, 4 F, 8 H, 8 W), 4 F - 3 frames for the first chunk."""
        x, frames = self.vae.post_quant_conv(z.to(self.dtype)), []
        for f in range(x.shape[2]):
            self.vae._conv_idx = [0]
            frames.append(self.vae.decoder(x[:, :, f:f + 1], feat_cache=self.vae._feat_map, feat_idx=self.vae._conv_idx, first_chunk=not self.begun))
            self.begun = True
        return torch.cat(frames, 2).clamp(-1, 1)


# Measuring

def compare(args, switches, kernel, rows, columns, device, reference=None):
    """Latents of a shallow model's chunk after a whole window; with a `reference`, their error relative to it."""
    dit = form(args, switches, device, kernel, layers=min(LAYERS_CHECKED, args.layers or LAYERS_CHECKED))
    if reference is None:
        dit = dit.float()                                               # the same weights, rounded as they are at speed
    scene = Scene(bare(dit).config, rows, columns, args.chunk, device)
    x_0 = checked(to_steady_state(new_chain(dit, scene, args), scene), f"the check of {'+'.join(switches) or 'eager'}")
    return x_0 if reference is None else float((x_0 - reference).norm() / reference.norm())


def timed(args, dit, rows, columns, device, counted, rate) -> dict:
    """Time one form of the model: warm-up, `args.repeats` chunks in the steady state, then the first chunk of a new stream."""
    scene = Scene(bare(dit).config, rows, columns, args.chunk, device)
    chain, last = new_chain(dit, scene, args), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    to_steady_state(chain, scene)
    result = typical(measure(lambda: last.__setitem__(slice(None), [scene.next(chain)]), args.repeats, device))
    checked(last[0], "the timed stream")
    result |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {}
    del chain                                                           # large chunks' caches fit once
    fresh = new_chain(dit, scene, args)
    result |= {"first_chunk_ms": measure(lambda: scene.next(fresh), 1, device)[0]}
    per_second = counted / result["ms_p50"] / 1e9
    result |= {"tflops": per_second, "mfu": per_second / rate, "dit_fps": 4000 * args.chunk / result["ms_p50"]}
    return result


def decoding(args, dit, rows, columns, device) -> dict:
    """The VAE alone, and on a stream of its own while the DiT makes the next chunk; or why not."""
    try:
        small = {} if device.type == "cuda" else {"base_dim": 8}
        decoder = Decoder(device, DTYPES[args.dtype], **small)
    except ImportError:
        return {"missing": "diffusers is not installed: the DiT alone was timed"}
    scene = Scene(bare(dit).config, rows, columns, args.chunk, device)
    chain = new_chain(dit, scene, args)
    z = to_steady_state(chain, scene)
    checked(decoder(z), "the VAE")
    result = {"vae_" + k: v for k, v in typical(measure(lambda: decoder(z), args.repeats, device)).items()} | small
    decoder.lay_out(torch.channels_last_3d)
    result["vae_channels_last_ms_p50"] = median(lambda: decoder(z), args.repeats, device)
    if result["vae_channels_last_ms_p50"] > result["vae_ms_p50"]:
        decoder.lay_out(torch.contiguous_format)
    if device.type == "cuda":
        side = torch.cuda.Stream()
        decoder.restart()                                               # its cache lives on one stream only

        def both():
            x_0 = scene.next(chain)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x_0.record_stream(side)
                decoder(x_0)
        both()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(args.repeats):
            both()
        torch.cuda.synchronize()
        result["overlapped_ms"] = 1000 * (time.perf_counter() - began) / args.repeats
        result["overlapped_fps"] = 4000 * args.chunk / result["overlapped_ms"]
    del chain
    fresh, first = new_chain(dit, scene, args), Decoder(device, DTYPES[args.dtype], **small)
    result["first_frame_ms"] = measure(lambda: first(scene.next(fresh)), 1, device)[0]
    return result


def recomputing(args, dit, rows, columns, device) -> dict:
    """The same chunk without any cache: chunk 0, the previous one and itself as a whole sequence, at every step."""
    dit = bare(dit)
    scene = Scene(dit.config, rows, columns, 3 * args.chunk, device)
    x, t = torch.cat([scene.randn(*scene.shape), scene.cond[:, :, :3 * args.chunk]], 1), torch.full((1,), 500.0, device=device)
    audio = scene.randn(*scene.sound) if scene.sound else None
    step = lambda: dit(x, t, text=scene.text, image=scene.image, audio=audio, audio_mask=scene.mask, mask="sparse_causal")
    return {"ms_p50": args.steps * median(step, max(3, args.repeats // 4), device, warm=1)}


def profiled(args, dit, rows, columns, device) -> dict[str, float]:
    """Where the time of one more chunk in the steady state goes."""
    scene = Scene(bare(dit).config, rows, columns, args.chunk, device)
    chain = new_chain(dit, scene, args)
    to_steady_state(chain, scene)
    return clock.where_time_goes(lambda: scene.next(chain), device)


# The command

def forms(args, device) -> list[tuple[str, ...]]:
    """Eager first, all switches together second (a short budget should see both), the same without fp8, then each alone."""
    able = {"qkv": True, "attention": True, "compile": args.compile, "graphs": device.type == "cuda", "fp8": args.dtype == "fp8"}
    on = tuple(s for s in SWITCHES if able[s])
    return list(dict.fromkeys([(), on, tuple(s for s in on if s != "fp8"), *((s,) for s in on)]))


def attentions(c, chunk, tokens) -> list[tuple[int, int, int]]:
    """(batch, queries, keys) of a layer's attentions in the steady state: self, text, image, audio."""
    L, sound = chunk * tokens, [(chunk, tokens, c.audio_tokens)] if c.audio_dim else []
    return [(1, L, 3 * L), (1, L, plan.TEXT), *([(1, L, plan.IMAGE)] if c.image_dim else []), *sound]


def name_of(device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def provenance(args, device) -> dict:
    def git(*words):
        done = subprocess.run(["git", "-C", str(config.ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        commit, changed = None, None
    return {"device": name_of(device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": args.commit or commit,
            "uncommitted_changes": bool(changed), "torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


@torch.no_grad()
def bench(args, device, save=lambda result: None) -> dict:
    """All measurements of one set of options; `save` is called with what is there after each."""
    began, longest = time.monotonic(), 0.0
    shape = plan.build(args.variant, chunk=args.chunk, **({"num_layers": args.layers} if args.layers else {}))
    c = shape.config
    rows, columns = plan.tokens_of(c, args.size)
    tokens, dtype = rows * columns, DTYPES[args.dtype]
    counted, count = plan.total(plan.chunk_flops(c, args.chunk, tokens, args.steps)), plan.parameters(shape)
    result = {**provenance(args, device), "options": {k: v for k, v in vars(args).items() if k not in ("out", "commit")}, "runs": {},
              "machine": clock.ceilings(dtype, device, args.dtype == "fp8"),
              "tflop_per_chunk": counted / 1e12, "least_gb_per_chunk": args.steps * plan.step_bytes(c, count, args.chunk, tokens, dtype.itemsize) / 1e9,
              "parameters": count, "missing": {},
              "attention_ms": clock.attention_kernels(c.num_attention_heads, c.attention_head_dim, attentions(c, args.chunk, tokens), dtype, device)}
    quick = {k: ms for k, ms in result["attention_ms"].items() if not isinstance(ms, str)}
    kernel = result["attention_kernel"] = min(quick, key=quick.get)
    reference = compare(args, (), kernel, rows, columns, device)

    def attempt(what, do):
        """Out of memory, or no such kernel: the rest still counts."""
        try:
            do()
        except (RuntimeError, UserError) as error:
            result["missing"][what] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            print(f"{what:40s} {result['missing'][what]}", flush=True)
        save(result)

    def run(label, switches):
        error = compare(args, switches, kernel, rows, columns, device, reference)
        if not error <= BOUNDS["fp8" if "fp8" in switches else "bf16" if args.dtype == "fp8" else args.dtype]:
            raise UserError(f"bench: {label} is {error:.3g} away from the float32 reference: wrong, not rounded")
        dit = form(args, switches, device, kernel, args.layers)
        found = {"error": error, **timed(args, dit, rows, columns, device, counted, result["machine"]["matmul_tflops"])}
        result["runs"][label] = found
        print(f"{label:40s} {found['ms_p50']:9.2f} ms p50 {found['ms_p95']:9.2f} p95  {found['tflops']:8.4g} TFLOP/s  MFU {found['mfu']:.2f}  "
              f"{found['dit_fps']:6.1f} frames/s  error {error:.2g}", flush=True)
        more = {"no_cache": recomputing} if not switches else {"vae": decoding, "profile": profiled} if switches == forms(args, device)[1] else {}
        for name, measurement in more.items():
            attempt(name, lambda: result.update({name: measurement(args, dit, rows, columns, device)}))

    for switches in forms(args, device):
        label, started = "+".join(switches) or "eager", time.monotonic()
        if started + longest - began > 60 * args.budget_minutes:
            result["missing"][label] = OVER
            continue
        attempt(label, lambda: run(label, switches))
        longest = max(longest, time.monotonic() - started)
    fast.use_attention("auto")
    return result


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tmlib.bench", description="Measure streaming with random weights on this machine.")
    add_argument, gpu = parser.add_argument, torch.cuda.is_available()
    add_argument("--variant", default="talkingmachines-18b" if gpu else "smoke", help=f"one of {', '.join(VARIANTS)}")
    add_argument("--chunk", type=int, default=3, metavar="N", help="latent frames per chunk (default 3)")
    add_argument("--steps", type=int, default=2, metavar="N", help="denoising steps (default 2)")
    add_argument("--size", default="512" if gpu else "64", metavar="PIXELS", help="512, or 480x832 for height x width")
    add_argument("--dtype", choices=list(DTYPES), default="bf16" if gpu else "fp32", help="fp8: bfloat16, with large linears in e4m3 as a switch")
    add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu, help="measure torch.compile too (default: on a GPU)")
    add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    add_argument("--layers", type=int, metavar="N", help="a scaled run: only so many layers")
    add_argument("--repeats", type=int, default=20, metavar="N", help="chunks timed per run (default 20)")
    add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (default 0)")
    add_argument("--budget-minutes", type=float, default=9.0, metavar="M", help="start no run that would probably end later (default 9)")
    add_argument("--commit", metavar="HASH", help="of this code, where its copy has no history (default: git's)")
    add_argument("--out", metavar="FILE", help="default data/measured/<device>.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    for name in ("chunk", "steps", "layers", "repeats", "budget_minutes"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number above 0")
    if 3 * args.chunk > att.WINDOW:
        raise UserError(f"--chunk {args.chunk}: chunk 0, the previous and the present one must fit {att.WINDOW} latent frames")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(args.out or config.DATA / "measured" / (re.sub(r"\W+", "-", name_of(device)).strip("-").lower() + ".json"))
    before = config.load_json(out) if out.exists() else {}
    key = f"{args.variant} {args.size} chunk {args.chunk} x {args.steps} {args.dtype}" + (f" {args.layers} layers" if args.layers else "")
    print(f"{name_of(device)}: {key}", flush=True)
    save = lambda result: config.save_json(out, {**before, key: result})
    result = bench(args, device, save)
    save(result)
    print(f"written: {out}")
    return 1 if set(result["missing"].values()) - {OVER} else 0       # some form failed: the file says which, and why


if __name__ == "__main__":
    config.cli(main)
