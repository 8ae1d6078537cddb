"""Speed at full size on the machine at hand: `python -m tmlib.bench` -> data/measured/<device>.json.

What is special
- the real streaming path: `chain.Chain` with its caches, sound that changes with every chunk, Wan's decoder if diffusers is here, and then the runtime itself, `stream.Streamer`;
- weights are random (`stand_in`); every form of the model and of the decoder (`fast`) is first held against an eager float32 reference
  of the same weights, the model's over a whole window of a few layers: nothing wrong or zero is timed (`timing`);
- FLOPs are those of `plan`; the machine's own rate of matrix products, measured, stands beside the model's;
- what answers most comes first, and everything is written as soon as it is known: a call that is cut off leaves what it has.
"""

import argparse
import math
import platform
import re
import subprocess
import time
import traceback
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from . import attention as att
from . import config, fast, kernels, plan, stand_in, timing
from .config import UserError, one_line
from .dit import VARIANTS
from .stand_in import DTYPES, bounded_error, named

SWITCHES = ("qkv", "attention", "compile", "persistent", "graphs", "fp8")             # of the model
DECODER = ("together", "by_frames", "channels_last", "autotune", "compile")
PARTS = ("together", "eager", "alone")                    # of the measurements: --parts
WITHOUT = ((), ("persistent",), ("graphs",), ("attention",), ("compile", "persistent"), ("compile", "persistent", "graphs"))      # if all switches together fail: all but these, in turn
SHORT_S = 30                                              # what an attempt of a new kind is thought to take
OVER = "no time left in the budget"
ALONE = "diffusers is not installed: the DiT alone was timed"


class Setting(NamedTuple):
    """Latent frames per chunk and denoising steps: "3x2"."""

    chunk: int
    steps: int

    @classmethod
    def parse(cls, text: str):
        parts = text.split("x")
        if len(parts) != 2 or not all(p.isdecimal() and int(p) for p in parts):
            raise UserError(f"--settings {text}: give latent frames per chunk x denoising steps, such as 3x2")
        if 3 * int(parts[0]) > att.WINDOW:
            raise UserError(f"--settings {text}: chunk 0, the previous and the present one must fit {att.WINDOW} latent frames")
        return cls(*map(int, parts))

    def __str__(self):
        return f"{self.chunk}x{self.steps}"


# All of them

def forms(args, device) -> dict[str, list[tuple[str, ...]]]:
    """The switches of each part: all that this machine has, with fp8 and without it; none; each alone."""
    able = {"qkv": True, "attention": True, "compile": args.compile, "persistent": args.compile and device.type == "cuda" and args.backend == "inductor",
            "graphs": device.type == "cuda", "fp8": args.dtype == "fp8"}
    on = tuple(s for s in SWITCHES if able[s])
    without = tuple(s for s in on if s != "fp8")
    return {"together": list(dict.fromkeys([on, without])), "eager": [()], "alone": [("compile", s) if s == "persistent" else (s,) for s in on]}


def decoders(args) -> dict[str, list[tuple[str, ...]]]:
    """As `forms`. If 2D or 3D convolutions are faster is the machine's to say: all others with either."""
    able = tuple(s for s in DECODER if args.compile or s != "compile")
    but = lambda *left_out: tuple(s for s in able if s not in left_out)
    together = [but("by_frames", "autotune"), but("autotune"), but("by_frames"), able]
    return {"together": list(dict.fromkeys(filter(None, together))), "eager": [()], "alone": [(s,) for s in able]}


class Session:
    """One call: what it has found so far, what it may still start."""

    def __init__(self, args, device, save):
        self.args, self.device, self.save = args, device, save
        self.began, self.longest = time.monotonic(), {}
        model = plan.build(args.variant, chunk=args.settings[0].chunk, **({"num_layers": args.layers} if args.layers else {}))
        self.c, self.place = model.config, plan.tokens_of(model.config, args.size)
        self.vae = self.plain_vae = self.latents = self.pictures = None
        self.kernels = {}                                               # the fastest for attention, of bfloat16's and of fp8's forms
        self.diffusers = find_spec("diffusers") is not None
        tokens, count, width = math.prod(self.place), plan.parameters(model), DTYPES[args.dtype].itemsize
        least = lambda s: s.steps * plan.step_bytes(self.c, count, s.chunk, tokens, width) / 1e9
        planned = lambda s, width: sum(plan.streaming_memory(model, s.chunk, tokens, s.steps, width).values()) / 1e9
        self.result = {**provenance(args, device), "options": options(args), "parameters": count, "runs": {}, "vae": {},
                       "missing": {} if self.diffusers else {"diffusers": ALONE}, "least_gb": {str(s): least(s) for s in args.settings},
                       "planned_gb": {f"{s} {d}": planned(s, width) for s in args.settings for d, width in plan.WIDTHS.items()}}

    def attempt(self, what, do, kind=None) -> bool:
        """do(), if it will probably end in time, as long as the longest of its kind took; out of memory, no such kernel: a line in
        "missing", and the rest still counts. Whether it may be tried no further: done, or out of time."""
        started, kind, missing = time.monotonic(), kind or what, self.result["missing"]
        if started + self.longest.get(kind, SHORT_S) - self.began > 60 * self.args.budget_minutes:
            missing[what] = OVER
        else:
            missing.pop(what, None)                                     # of an attempt before, which the decoder in a faster form may mend
            try:
                do()
            except Exception as error:                                  # whatever it is: the other measurements are not to blame
                traceback.print_exc()
                missing[what] = f"{type(error).__name__}: {one_line(error, 300)}"
                print(f"{what:44s} {missing[what]}", flush=True)
            self.longest[kind] = max(self.longest.get(kind, 0), time.monotonic() - started)
        self.save(self.result)
        return missing.get(what, OVER) == OVER

    def machine(self):
        """What it can do at most, its best attention kernel, whether it compiles; then the latents that every form is held against."""
        args, device, dtype, first = self.args, self.device, DTYPES[self.args.dtype], self.args.settings[0]
        most = self.result["machine"] = timing.ceilings(dtype, device, args.repeats)
        self.save(self.result)
        if args.dtype == "fp8":
            self.attempt("fp8 product", lambda: most.update(timing.fp8_ceiling(most["matmul_n"], dtype, device, args.repeats)))
            args.dtype = "bf16" if "fp8 product" in self.result["missing"] else "fp8"                # its forms would all fail
        ms = self.result["attention_ms"] = timing.attention_kernels(self.c, first.chunk, math.prod(self.place), dtype, device, args.repeats)
        quick = {k: v for k, v in ms.items() if not isinstance(v, str)}
        exact = {k: v for k, v in quick.items() if not k.endswith("fp8")}
        self.kernels = {"": min(exact, key=exact.get, default="auto"), "fp8": min(quick, key=quick.get, default="auto")}
        self.result |= {"attention_kernel": self.kernels[""]} | ({"attention_kernel_fp8": self.kernels["fp8"]} if args.dtype == "fp8" else {})
        self.save(self.result)
        self.latents = stand_in.shallow_latents(args, (), "auto", self.place, device, exact=True)
        if args.compile:
            torch._functorch.config.enable_autograd_cache = False             # its keys know nothing of the attention kernel that was chosen
            small = lambda: torch.compile(lambda x: x.sin() + 1, backend=args.backend)(torch.ones(8, device=device))
            self.attempt("compile", small)
            args.compile = "compile" not in self.result["missing"]             # without a compiler at hand all forms would fail

    def decoder(self, switches):
        """One form of the decoder, kept for the placements of models with switches on if it is the fastest so far; without switches for those without."""
        args, device, chunk, dtype, label = self.args, self.device, self.args.settings[0].chunk, DTYPES[self.args.dtype], named(switches)
        shape = {} if device.type == "cuda" else {"base_dim": 8, "num_res_blocks": 1}
        if self.pictures is None:
            self.pictures = stand_in.two_chunks(stand_in.random_vae(device, dtype, **shape).float(), chunk, device)
        fast.autotune(False)                                            # not for the check's small pictures
        vae = fast.decoder(stand_in.random_vae(device, dtype, encoder=True, **shape), switches, chunk, args.backend)
        rows, columns = self.place
        z = torch.randn(1, 16, chunk, 2 * rows, 2 * columns, generator=torch.Generator(device).manual_seed(3), device=device)
        vae.decode(z, vae.decode(z)[1])                                 # compiled code is tuned to the size that it meets first
        error = bounded_error(stand_in.two_chunks(vae, chunk, device), self.pictures, dtype, f"the decoder with {label}")
        fast.autotune("autotune" in switches)
        found = self.result["vae"][label] = {"error": error, **timing.decoder(vae, z, args.repeats, device), **shape}
        print(f"VAE {chunk} latents, {label:28s} {found['ms_p50']:9.2f} ms p50   error {error:.2g}", flush=True)
        if not switches:
            self.plain_vae = vae
        elif found["ms_p50"] == min(v["ms_p50"] for name, v in self.result["vae"].items() if name != "eager"):
            self.vae, self.result["vae_form"] = vae, label

    def run(self, switches, settings):
        """One form of the model, checked, at several settings; the first of them with the decoder, and what it is compared with."""
        args, device, place, label, first = self.args, self.device, self.place, named(switches), self.args.settings[0]
        kernel = self.kernels["fp8" if "fp8" in switches else ""]
        error = bounded_error(stand_in.shallow_latents(args, switches, kernel, place, device), self.latents,
                              fast.E4M3 if "fp8" in switches else DTYPES[args.dtype], label)
        dit = stand_in.form(args, switches, device, kernel, args.layers)
        fast.autotune("autotune" in self.result.get("vae_form", ""))

        def at(setting):
            played, vae = stand_in.Stream(dit, setting, place, device), {0: self.plain_vae, 1: None}.get(len(switches), self.vae)
            if vae is not None and vae.together > 1:
                vae.together = setting.chunk
            row = {"chunk": setting.chunk, "steps": setting.steps, "form": label, "error": error}
            row |= timing.stream(played, place, device, args.repeats, self.result["machine"])
            self.result["runs"][f"{setting} {label}"] = row                            # known, and what does not fit beside it takes nothing away
            self.save(self.result)
            if vae is not None:
                beside = lambda: [row.update(found) for found in timing.placements(vae, played, row["n"], device)]
                self.attempt(f"{setting} {label} and decoder", beside, kind=f"{setting} and decoder")
            row |= timing.first_chunk(played, device)
            if vae is not None and setting == first and self.c.audio_dim:
                played.chain = None                                                    # the runtime has caches of its own
                self.attempt(f"{setting} {label} in the runtime", lambda: row.update(timing.runtime(dit, vae, setting, place, device, row["n"])), kind="runtime")
            whole = row.get("runtime_fps") or max((row[k] for k in ("serial_fps", "overlap_fps") if k in row), default=None)
            print(f"{setting} {label:40s} {row['ms_p50']:9.2f} ms p50  {row['tflops']:8.4g} TFLOP/s  MFU {row['mfu']:.2f}  error {error:.2g}"
                  f"  {row['dit_fps']:6.1f} frames/s" + (f", {whole:.1f} with the decoder" if whole else ""), flush=True)
        for setting in settings:
            if not self.attempt(f"{setting} {label}", lambda: at(setting), kind=f"{setting}") and setting == first:
                break                                                                      # larger settings would fail too
        broken = self.result["missing"].get(f"{settings[0]} {label}", OVER)
        if broken != OVER and "OutOfMemory" not in broken:                # what passed with a few layers fails with all of them: other switches may not
            raise RuntimeError(broken)
        if not switches:
            for name, rival in {"no_cache": timing.recomputing, **({"diffusers": timing.diffusers_window} if self.diffusers else {})}.items():
                self.attempt(name, lambda: self.result.update({name: rival(dit, place, first.chunk, device, max(3, args.repeats // 4))}))
        elif switches == forms(args, device)["together"][0]:
            self.attempt("profile", lambda: self.result.update(profile=timing.where_time_goes(dit, first, place, device)))

    def try_all(self, switches, settings, without=WITHOUT):
        """`run`; switches that fail together are tried again without some of them."""
        for fewer in dict.fromkeys(tuple(s for s in switches if s not in left_out) for left_out in without):
            if self.attempt(named(fewer), lambda: self.run(fewer, settings)):
                return

    def try_decoder(self, switches):
        self.attempt(f"VAE {named(switches)}", lambda: self.decoder(switches), kind="VAE")


@torch.no_grad()
def bench(args, device, save=lambda result: None) -> dict:
    """All measurements of one call; `save` is called with what is there after each."""
    session = Session(args, device, save)
    session.machine()
    for part in (p for p in PARTS if p in args.parts):
        settings, able = args.settings if part == "together" else args.settings[:1], decoders(args)[part] if session.diffusers else []
        for switches in (d for d in able if "autotune" not in d):
            session.try_decoder(switches)
        for switches in forms(args, device)[part]:
            session.try_all(switches, settings, WITHOUT if part == "together" else WITHOUT[:1])
        before = session.vae
        for switches in (d for d in able if "autotune" in d):                  # each may take a minute, and seldom helps
            session.try_decoder(switches)
        if part == "together" and session.vae is not before:
            session.try_all(forms(args, device)[part][0], settings)            # the first form again, with the decoder that is faster still
    kernels.use_attention("auto"), fast.autotune(False)
    return session.result


# The command

def name_of(device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def options(args) -> dict:
    kept = {k: v for k, v in vars(args).items() if k not in ("out", "commit")}
    return kept | {"settings": [str(s) for s in args.settings]}


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


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tmlib.bench", description="Measure streaming with random weights on this machine.")
    add_argument, gpu = parser.add_argument, torch.cuda.is_available()
    add_argument("--variant", default="talkingmachines-18b" if gpu else "smoke", help=f"one of {', '.join(VARIANTS)}")
    add_argument("--settings", type=Setting.parse, nargs="+", default=[Setting(3, 2), Setting(7, 4)], metavar="CxS",
                 help="latent frames per chunk x denoising steps; all of them for all switches together, the first for all else (default 3x2 7x4)")
    add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="eager; all switches together; each alone (default all three)")
    add_argument("--size", default="512" if gpu else "64", metavar="PIXELS", help="512, or 480x832 for height x width")
    add_argument("--dtype", choices=list(DTYPES), default="fp8" if gpu else "fp32", help="fp8: bfloat16, with large linears in e4m3 as a switch")
    add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu, help="measure torch.compile too (default: on a GPU)")
    add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    add_argument("--layers", type=int, metavar="N", help="a scaled run: only so many layers")
    add_argument("--repeats", type=int, default=20, metavar="N", help="chunks timed per run, fewer if they take long (default 20)")
    add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (default 0)")
    add_argument("--budget-minutes", type=float, default=9.0, metavar="M", help="start nothing that would probably end later (default 9)")
    add_argument("--commit", metavar="HASH", help="of this code, where its copy has no history (default: git's)")
    add_argument("--out", metavar="FILE", help="default data/measured/<device>.json, without a GPU data/scratch/measured/...; results are added to it")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    for name in ("layers", "repeats", "budget_minutes"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number above 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no GPU here: what follows is a trial of the command, of little models", flush=True)
    out = Path(args.out or (config.DATA if device.type == "cuda" else config.SCRATCH) / "measured" / (re.sub(r"\W+", "-", name_of(device)).strip("-").lower() + ".json"))
    before = config.load_json(out) if out.exists() else {}
    key = f"{args.variant} {args.size} {args.dtype}" + (f" {args.layers} layers" if args.layers else "")
    print(f"{name_of(device)}: {key}", flush=True)
    save = lambda result: config.save_json(out, {**before, f"{result['date']} {key}": result})
    result = bench(args, device, save)
    print(f"written: {out}")
    return 1 if set(result["missing"].values()) - {OVER, ALONE} else 0       # something failed: the file says what, and why


if __name__ == "__main__":
    config.cli(main)
