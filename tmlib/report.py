"""From metrics to claims, tables, figures and one page. Nothing here runs a model: every number is read from a JSON file, of this run in
reports/metrics or, for the full size, of real machines in data/measured; what other runs found, beside it, from data/runs.

CLAIMS, just below, is all that decides whether a claim holds: which number of which file, compared with what, and why that.
A verdict is computed, never typed in; a claim that fails is shown as failed, one without its number as not measured.
The same metrics give the same bytes.
"""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import config, measured, runs
from .config import UserError, atomic
from .figures import intervals, shown
from .metrics import interval, paired


@dataclass(frozen=True)
class Bar:
    """One comparison: number `key` of reports/metrics/`file`.json against `bar`, a number or a function of all metrics."""
    file: str
    key: str
    op: str                             # ">=", ">", "<=" or "within" (-bar .. bar)
    bar: float | Callable[[dict], float]
    why: str                            # this bar and no other


@dataclass(frozen=True)
class Claim:
    text: str
    bars: tuple[Bar, ...]               # all must be cleared
    pending: str = ""                   # why it may not have been measured yet


def quiet(m: dict) -> float:
    return 0.08 * m["speaking_opening_mean"] + m["reader_closed_bias"]


SHUT = "mouth opening while listening; allowed: 8 % of that in speech, plus what the reader sees on truly closed mouths"
NOISE = "less than 5 % is not worth having; the interval says how sure it is"

CLAIMS = {
    "C1": Claim("A video model that has only met pictures learns to move its lips to speech it has never heard.", (
        Bar("teacher", "lip_r", ">=", 0.85, "lip r, sentences, voices (of espeak-ng) and faces unseen; a trial before the first line was written had 0.86, where its codec allowed 0.92"),
        Bar("teacher", "lip_r_shuffled", "within", 0.10, "lip r against another's speech: no moving mouth may fit that"),
        Bar("teacher", "lip_offset_frames", "within", 1, "shift at the best fit; ITU-R BT.1359 accepts one frame, 62 ms"))),
    "C2": Claim("It does so in every style: flat (anime), line-shaded, and soft 3D, which stands in for photographs.", tuple(
        Bar("teacher", f"lip_r_{style}", ">=", 0.80, f"lip r, {style}; a single style may lose a little more than all together")
        for style in ("flat", "line", "soft3d"))),
    "C3": Claim("Speaking and listening are both natural, and it turns from one to the other live.", (
        Bar("teacher", "listening_opening_mean", "<=", lambda m: quiet(m["teacher"]), f"teacher: {SHUT}"),
        Bar("student", "listening_opening_mean", "<=", lambda m: quiet(m["student"]), f"student: {SHUT}"),
        *(Bar(who, "listening_motion", "<=", lambda m, who=who: 1.5 * m[who]["listening_motion_real"],
              f"{who}: picture change while listening; half as much again as real clips is a flicker that one sees") for who in ("teacher", "student")),
        Bar("streaming", "toggle_latency_frames", "<=", 12, "frames until the mouth follows a change; a chunk is twelve"))),
    "C4": Claim("Distilled to two denoising steps, the student keeps the teacher's quality.", (
        Bar("student", "frechet_ratio", "<=", 1.0, "Fréchet distance over that of the same weights in two steps, undistilled; above one, distilling would have brought nothing"),
        Bar("ablated", "distilling_quality_gain", ">", 0, "lip r gained by a short distillation from a teacher that is told nothing about the picture, so that two steps are too few at first, on validation clips; any"),
        Bar("ablated", "distilling_frechet_ratio", "<=", 1.0, "Fréchet distance after it over that before"),
        Bar("student", "teacher_ratio", ">=", 0.95, "lip r over the teacher's; a twentieth is about as wide as the interval"),
        Bar("student", "steps", "<=", 2, "denoising steps; the paper has two"),
        Bar("student", "frechet", "<=", lambda m: 1.25 * m["teacher"]["frechet"], "Fréchet distance; 1.25 times the teacher's, a loss that one hardly sees"))),
    "C5": Claim("Sparse-causal attention streams without end and without piling up errors.", (
        Bar("streaming", "lip_r_last_minute", ">=", lambda m: m["streaming"]["lip_r_first_minute"] - 0.03,
            "lip r in the last minute; that of the first, less a typical interval"),
        Bar("streaming", "chunks", ">=", 1000, "chunks in one stream; a thousand are twelve and a half minutes"),
        Bar("streaming", "drift_color_1000", "<=", lambda m: m["streaming"]["drift_color_10"] + 2.3,
            "Lab colour distance to the picture at chunk 1000; 2.3 above that at chunk 10 is just noticeable"),
        Bar("streaming", "drift_sharpness_1000", ">=", lambda m: 0.9 * m["streaming"]["drift_sharpness_10"],
            "sharpness at chunk 1000; at most a tenth below that at chunk 10"),
        Bar("streaming", "drift_identity_1000", "<=", lambda m: 1.25 * m["streaming"]["drift_identity_10"],
            "distance to the picture's face features at chunk 1000; at most a quarter above that at chunk 10"),
        Bar("ablated", "forgetting", "<=", 1.25, "told nothing about the picture: distance to its face features in the last third of a stream over that in the first ten chunks; at most a quarter more"),
        Bar("ablated", "forgetting_without_chunk_0", ">=", 2, "that distance for a student that never sees chunk 0, over that of one who does; twice says that a stream can forget its face, and the line above can fail"),
        Bar("student", "seam_ratio", "<=", lambda m: 1.1 * m["student"]["seam_ratio_real"],
            "picture change across chunk borders over that across other latent frames' borders; at most a tenth above real clips"))),
    "C6": Claim("Putting DiT and decoder on two devices raises the frame rate.", (
        Bar("latency", "speedup_two_device", ">=", 1.05, f"frame rate on two devices (here two cores) over one, transfers blocking; {NOISE}"),),
        "needs two cores or two GPUs, timed by notebook 65"),
    "C7": Claim("Overlapping the transfer with computation raises it further.", (
        Bar("latency", "speedup_overlap", ">=", 1.05, f"frame rate with asynchronous transfers over blocking ones; {NOISE}"),),
        "needs two cores or two GPUs, timed by notebook 65"),
    "C8": Claim("Leaving out all repeated computation raises it further.", (
        Bar("latency", "speedup_no_recompute", ">=", 1.05, f"frame rate, embeddings kept over made anew; {NOISE}"),
        Bar("latency", "speedup_kv_cache", ">=", 1.05, f"frame rate with cached keys and values over without; {NOISE}"))),
    "C9": Claim("At full size, chunk 3 with 2 steps is real-time on one H100-class GPU; chunk 7 with 4 steps is not.", (
        Bar("full_size", "chunk3_steps2_fps", ">=", 16, "frames per second at chunk 3, 2 steps; Wan2.1 plays 16"),
        Bar("full_size", "chunk7_steps4_fps", "<=", 16, "the same at chunk 7, 4 steps, which needs more than one GPU")),
        "needs an H100-class GPU: python -m tmlib.bench"),
    "C10": Claim("More steps and larger chunks raise quality, and cost.", (
        Bar("ablated", "steps_quality_gain", ">", 0, "lip r gained from 2 to 4 steps, on validation clips; any"),
        Bar("ablated", "chunk_quality_gain", ">", 0, "lip r gained from chunk 3 to 7, on validation clips; any"),
        Bar("ablated", "steps_cost_ratio", ">=", 1.05, f"time per frame at 4 steps over 2; {NOISE}"),
        Bar("ablated", "chunk_cost_ratio", ">=", 1.05, f"time per frame at chunk 7 over 3; {NOISE}")),
        "needs the ablations four_steps and chunk_7"),
    "C11": Claim("An audio language model drives it in a live conversation.", (
        Bar("conversation", "reply_ms_p95", "<=", 1000, "ms from the caller's last sound to the answer's first, 95 of 100; people wonder after a second"),
        Bar("conversation", "turns", ">=", 10, "turns answered in one call; enough to go back and forth"),
        Bar("dialogue", "right_unseen", ">=", 0.9, "answers right to the word, sentences and voices (of espeak-ng) unheard; one in ten may be wrong"),
        Bar("conversation", "right_live", ">=", 0.9, "answers right to the word in the call; as above"),
        Bar("conversation", "lip_r", ">=", 0.85, "lip r of each answer, one face and voice; the bar of C1"),
        Bar("conversation", "listening_opening_mean", "<=", lambda m: quiet(m["student"]), f"in the call: {SHUT}"),
        Bar("conversation", "interrupted_ms_max", "<=", 500, "ms until an interrupted face is silent, the slowest; half of what an answer may take"),
        Bar("conversation", "late", "<=", 0.01, "share of frames that were not there in time; one in a hundred")),
        "no call was held: dvc repro conversation"),
    "N1": Claim("Lips survive foreign accents, slow and fast speech, and background noise.", tuple(
        Bar("robustness", f"lip_r_ratio_{kind}", ">=", 0.9, f"lip r with {kind} over that without; a tenth may be lost")
        for kind in ("accent", "rate", "noise")), "the robustness sweep has not been run"),
    "N2": Claim("The distillation also works from a teacher of another architecture.", (
        Bar("other_teacher", "teacher_ratio", ">=", 0.95, "lip r over its convolutional teacher's, as in C4"),
        Bar("other_teacher", "teacher_lip_r", ">=", 0.80, "that teacher's own lip r; to keep a poor one's quality is no feat"),
        Bar("other_teacher", "student_lip_r_shuffled", "within", 0.10, "lip r against another's speech, as in C1")),
        "no second teacher has been trained: dvc repro other_teacher"),
    "N3": Claim("People who do not know which is which prefer it to the baseline, side by side.", (
        Bar("user_study", "preference", ">", 0.5, "share of blind votes for it; half is chance"),
        Bar("user_study", "voters", ">=", 10, "voters who passed the checks; by fewer nothing is settled, whatever they prefer")),
        "nobody has been asked yet: make study"),
}

NOTEBOOKS = {"data": "10_data", "codec": "20_codec", "speech": "21_speech", "readers": "22_readers", "base": "24_base",
             "adaptation": "30_adaptation", "teacher": "40_teacher", "student": "50_distillation", "other_teacher": "55_other_teacher",
             "streaming": "60_streaming", "latency": "65_latency", "latency_matrix": "65_latency", "robustness": "67_robustness",
             "dialogue": "68_conversation", "conversation": "68_conversation", "plain": "69_plain", "ablated": "70_ablations"}


# --------------------------------------------------------------------------------------------------------- claims
DERIVED = {"full_size": "data/measured", "ablated": "reports/metrics/ablations"}      # files of metrics that are made from others


def load_metrics(root: Path) -> dict[str, dict]:
    """{"teacher": {...}, "ablations/no_dmd": {...}, ...} of root/reports/metrics, "ablated" from them, "full_size" of root/data/measured if it has any."""
    folder = root / "reports" / "metrics"
    if not folder.is_dir():
        raise UserError(f"{folder}: not there yet; run `make repro`, which measures before it reports")
    metrics = {p.relative_to(folder).with_suffix("").as_posix(): config.load_json(p) for p in sorted(folder.rglob("*.json"))}
    derived = {"full_size": measured.full_size(root / "data" / "measured"), "ablated": ablated(metrics)}
    return metrics | {name: numbers for name, numbers in derived.items() if numbers}


def ablated(metrics: dict[str, dict]) -> dict:
    """What C4, C5 and C10 ask of the ablations: lip r gained, clip by clip, by distilling, four steps and chunk 7; what these two cost in time per frame on one
    device; Fréchet distance over the undistilled one's; how much further from its picture a stream is in its last third, over its beginning, and without chunk 0."""
    lips = {n.removeprefix("per_clip/ablations/"): np.array(m["lip_r"]) for n, m in metrics.items() if n.startswith("per_clip/ablations/")}
    fps = {(r["chunk"], r["steps"]): r["fps_each"] for r in metrics.get("latency_matrix", {}).get("rows", ()) if r["placement"] == "serial"}
    found = {}
    for what, run, than in (("distilling", "control", "undistilled"), ("steps", "four_steps", "control"), ("chunk", "chunk_7", "control")):
        if run in lips and than in lips:
            found |= interval(f"{what}_quality_gain", lips[run] - lips[than])
    for what, setting in (("steps", (3, 4)), ("chunk", (7, 2))):
        if setting in fps and (3, 2) in fps:
            found |= paired(f"{what}_cost_ratio", fps[3, 2], fps[setting])
    for what, key, run, over, than in (("distilling_frechet_ratio", "frechet", "control", "frechet", "undistilled"), ("forgetting", "stream_identity", "control", "stream_identity_early", "control"),
                                       ("forgetting_without_chunk_0", "stream_identity", "without_chunk_0", "stream_identity", "control")):
        made, other = (metrics.get(f"ablations/{name}", {}) for name in (run, than))
        if key in made and over in other:
            found[what] = made[key] / other[over]
    return found and found | {"scale": metrics["latency_matrix" if fps else "ablations/control"].get("scale")}


def claims(metrics: dict[str, dict]) -> dict[str, dict]:
    """CLAIMS judged by metrics, in the form of reports/claims.json. `parts` has every bar, the claim itself the deciding one:
    a bar missed, clearly rather than narrowly; else one not measured; else one cleared narrowly; else the first. `clear`: the whole interval is on that side."""
    return {name: _judge(claim, metrics) for name, claim in CLAIMS.items()}


def _judge(claim: Claim, metrics: dict[str, dict]) -> dict:
    parts = [_compare(bar, metrics) for bar in claim.bars]
    narrow = lambda p: p["clear"] is False
    order = lambda p: (1, 0) if p["holds"] is None else (2, not narrow(p)) if p["holds"] else (0, narrow(p))
    decides = min(parts, key=order)                                           # the first of equals
    reason = "; ".join(filter(None, (claim.pending if decides["holds"] is None else "", decides["reason"])))
    scale = metrics.get(decides["metric"].partition(":")[0], {}).get("scale")
    return {"claim": claim.text, **decides, "reason": reason or None, "scale": scale, "parts": parts}


def _compare(bar: Bar, metrics: dict[str, dict]) -> dict:
    row = {"metric": f"{bar.file}:{bar.key}", "value": None, "ci95": None, "bar": None if callable(bar.bar) else bar.bar,
           "comparison": bar.op, "why": bar.why, "holds": None, "clear": None, "reason": None,
           "evidence": DERIVED.get(bar.file) or f"reports/metrics/{bar.file}.json"}
    measured = {name: {k: v for k, v in m.items() if v is not None} for name, m in metrics.items()}
    try:
        value = _number(measured[bar.file][bar.key], row["metric"])
        row["bar"] = _number(bar.bar(measured) if callable(bar.bar) else bar.bar, row["metric"])
    except KeyError as missing:
        told = metrics.get(bar.file, {}).get(f"{bar.key}_reason")
        return row | {"reason": told or f"reports/metrics has no {missing.args[0]} yet"}
    ends = [measured[bar.file].get(f"{bar.key}_{end}") for end in ("lo", "hi")]
    row |= {"value": value, "holds": passes(value, bar.op, row["bar"])}
    if None not in ends:
        row |= {"ci95": ends, "clear": all(passes(end, bar.op, row["bar"]) == row["holds"] for end in ends)}
    return row


SIGNS = {">=": "≥", ">": ">", "<=": "≤", "within": "±"}


def passes(value: float, op: str, bar: float) -> bool:
    return {">=": value >= bar, ">": value > bar, "<=": value <= bar, "within": abs(value) <= bar}[op]


def _number(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}, not a number; run its stage again")
    return value


# --------------------------------------------------------------------------------------------------------- tables
def _cell(row: dict, key: str) -> str:
    lo, hi = row.get(f"{key}_lo"), row.get(f"{key}_hi")
    return shown(row.get(key)) + (f" [{shown(lo)}, {shown(hi)}]" if lo is not None and hi is not None else "")


def write_table(folder, name: str, rows: list[dict], headings: dict[str, str]) -> list[list[str]]:
    """Rows as folder/name.md, .csv and .tex; returns the cells, headings first.

    headings: key -> heading, in order; key_lo and key_hi become its interval.
    """
    grid = [list(headings.values()), *([_cell(row, key) for key in headings] for row in rows)]
    marked = [[cell.replace("|", "\\|") for cell in line] for line in grid]
    marked.insert(1, ["---"] * len(headings))
    text = io.StringIO()
    raw = [k for key in headings for k in (key, f"{key}_lo", f"{key}_hi") if k == key or any(k in row for row in rows)]
    writer = csv.DictWriter(text, raw, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    head, *body = [" & ".join(map(_tex, line)) + r" \\" for line in grid]
    tex = [rf"\begin{{tabular}}{{l{'r' * (len(grid[0]) - 1)}}}", r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}"]
    _write(Path(folder) / f"{name}.md", "".join(f"| {' | '.join(line)} |\n" for line in marked))
    _write(Path(folder) / f"{name}.csv", text.getvalue())
    _write(Path(folder) / f"{name}.tex", "\n".join(tex) + "\n")
    return grid


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "<": "$<$", ">": "$>$",
               "≥": r"$\geq$", "≤": r"$\leq$", "±": r"$\pm$"} | {c: "\\" + c for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in text)


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


QUALITY = {"name": "", "lip_r": "lip r", "lip_r_flat": "flat", "lip_r_line": "line", "lip_r_soft3d": "soft 3D",
           "lip_r_natural": "natural voice", "lip_r_shuffled": "shuffled", "lip_r_ceiling": "codec's ceiling",
           "lip_offset_frames": "offset, frames", "listening_opening_mean": "opening, listening",
           "border_ratio": "border ratio", "seam_ratio": "seam ratio", "psnr_db": "PSNR, dB", "frechet": "Fréchet",
           "stream_lip_r": "lip r in a stream", "stream_identity": "identity at its end"}
MATRIX = {"chunk": "chunk", "steps": "steps", "placement": "placement", "fps": "frames/s", "first_frame_ms": "first frame, ms",
          "chunk_ms_p50": "chunk p50, ms", "chunk_ms_p95": "p95", "dit_ms_p50": "DiT", "latents_ms_p50": "latents sent", "vae_ms_p50": "VAE",
          "frames_ms_p50": "frames sent", "gflop": "DiT, GFLOP", "dit_gflop_per_s": "GFLOP/s"}
FULL = {"setting": "chunk x steps", "device": "device", "form": "form", "fps": "frames/s, with VAE", "placement": "placement", "dit_fps": "DiT alone",
        "ms_p50": "DiT chunk p50, ms", "tflops": "TFLOP/s", "mfu": "MFU", "first_frames_ms": "first frames, ms", "peak_gb": "GB", "error": "error",
        "date": "date", "commit": "commit", "torch": "torch"}
DRIFT = {"chunk": "chunk", "drift_color": "colour, Lab", "drift_sharpness": "sharpness", "drift_identity": "identity"}
CLAIM = {"name": "", "claim": "claim", "value": "measured", "bar": "bar", "verdict": "verdict", "reason": "why not measured"}


def tables(metrics: dict[str, dict], verdicts: dict[str, dict], others: dict[str, dict] = {}) -> dict[str, tuple]:
    """The tables that metrics, and the claims of other runs, can fill: name -> (rows, headings)."""
    judged = [row | {"name": name, "verdict": verdict(row), "bar": f"{SIGNS[row['comparison']]} {shown(row['bar'])}"}
              | dict(zip(("value_lo", "value_hi"), row["ci95"] or (None, None))) for name, row in verdicts.items()]
    models = [n for n in ("teacher", "student") if n in metrics] + [n for n in metrics if n.startswith("ablations/")]
    named = lambda n: f"{n.removeprefix('ablations/').replace('_', ' ')}, valid" if "/" in n else n               # they are made on validation clips
    quality = [metrics[n] | {"name": named(n)} for n in models]
    stream = metrics.get("streaming", {})
    drift = [{"chunk": n} | {key: stream.get(f"{key}_{n}") for key in DRIFT if key != "chunk"} for n in (1, 10, 100, 1000)]
    times = [{"name": key, "value": v} for key, v in metrics.get("latency", {}).items()]
    made = {"claims": (judged, CLAIM), "other_runs": runs.compared(verdicts, others, verdict) if others else ([], {}), "quality": (quality, QUALITY), "drift": (drift if stream else [], DRIFT),
            "latency": (times, {"name": "", "value": "local run"}),
            "latency_matrix": (metrics.get("latency_matrix", {}).get("rows", []), MATRIX),
            "full_size": (metrics.get("full_size", {}).get("rows", []), FULL)}
    return {name: (rows, {k: h for k, h in heads.items() if any(r.get(k) is not None for r in rows)})
            for name, (rows, heads) in made.items() if rows}


# ----------------------------------------------------------------------------------------------------------- page
def verdict(row: dict) -> str:
    word = {True: "holds", False: "fails", None: "not measured"}[row["holds"]]
    return f"{word}, narrowly" if row["clear"] is False else word


def beside(value, bar) -> str:
    """A value as it stands beside its bar: with more digits where three would make them look alike."""
    alike = isinstance(value, float) and bar is not None and value != bar and shown(value) == shown(float(bar))
    return f"{value:.4g}" if alike else shown(value)


def build(root=None, captions: dict[str, str] | None = None) -> None:
    """From root/reports/metrics: claims.json, tables/, figures/ of metrics, index.html and README.md, all in root/reports.

    The pages show all of figures/ and videos/. captions: file name without suffix -> one sentence; their order is the page's.
    """
    root = Path(root or config.ROOT)
    reports, metrics = root / "reports", load_metrics(root)
    verdicts = claims(metrics)
    config.save_json(reports / "claims.json", verdicts)
    filled = tables(metrics, verdicts, runs.load(root / "data" / "runs", but=[m.get("scale") for m in metrics.values()]))
    grids = {name: write_table(reports / "tables", name, *table) for name, table in filled.items()}
    lips = [[row.get(k) for k in ("name", "lip_r", "lip_r_lo", "lip_r_hi")] for row in filled.get("quality", ([],))[0]]
    if len(lips) > 1:
        intervals([run for run in lips if run[1] is not None], reports / "figures" / "lip_r_of_every_run.png")
    for name, template in (("index.html", "report_template.html"), ("README.md", "report_template.md")):
        _write(reports / name, page(template, reports, metrics, verdicts, grids, captions or {}))


def page(template: str, reports: Path, metrics: dict, verdicts: dict, grids: dict, captions: dict[str, str]) -> str:
    """The text of a page of the report, from a template beside this file."""
    from jinja2 import Environment, StrictUndefined

    def files(folder: str, *suffixes: str) -> list[dict]:
        order = {stem: place for place, stem in enumerate(captions)}
        paths = [p for p in (reports / folder).glob("*") if p.suffix in suffixes]
        paths.sort(key=lambda p: (order.get(p.stem, len(order)), p.name))
        named = lambda stem: captions.get(stem) or stem.replace("_", " ").capitalize()
        return [{"src": f"{folder}/{p.name}", "caption": named(p.stem)} for p in paths]

    nb = {p.stem: f"../notebooks/{p.name}" for p in sorted((reports.parent / "notebooks").glob("*.ipynb"))}      # sources: they are there before a run
    known = lambda key: sorted({str(m[key]) for m in metrics.values() if key in m})
    environment = Environment(autoescape=template.endswith(".html"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": shown, "beside": beside, "verdict": verdict, "meter": _meter, "cell": lambda text: str(text).replace("|", "\\|")}
    return environment.from_string(Path(__file__).with_name(template).read_text(encoding="utf-8")).render(
        claims=verdicts, pending={n: c.pending for n, c in CLAIMS.items()}, signs=SIGNS, metrics=metrics, tables=grids,
        videos=files("videos", ".mp4", ".webm"), figures=files("figures", ".webp", ".png", ".svg"), notebooks=nb, scales=known("scale"),
        seeds=known("seed"), notebook_of={file: nb[name] for file, name in NOTEBOOKS.items() if name in nb})


def _meter(row: dict) -> dict:
    """Where value, interval, bar and good side lie on a strip 120 wide."""
    bars = [-row["bar"], row["bar"]] if row["comparison"] == "within" else [row["bar"]]
    points = [row["value"], *bars, *(row["ci95"] or ())]
    low, span = min(points), (max(points) - min(points)) or abs(max(points)) or 1.0
    x = lambda v: round(14 + 92 * (v - low) / span, 1)
    good = {"within": (x(bars[0]), x(bars[-1])), "<=": (0, x(bars[0]))}.get(row["comparison"], (x(bars[0]), 120))
    return {"value": x(row["value"]), "ends": [x(v) for v in row["ci95"] or ()], "bars": [x(v) for v in bars],
            "good": (good[0], round(good[1] - good[0], 1))}
