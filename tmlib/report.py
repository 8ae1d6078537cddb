"""From metrics to tables, figures and one page. Nothing here runs a model: every number is read from a JSON file, of this run, of real machines
(data/measured) or of other runs (data/runs). What decides whether a claim holds stands in `claims`.

The same metrics give the same bytes.
"""

import csv
import io
from pathlib import Path

import numpy as np

from . import config, runs
from .claims import CLAIMS, SIGNS, compared, judge, load_metrics, verdict
from .config import atomic
from .figures import figure, intervals, shown
from .metrics import paired

NOTEBOOKS = {"data": "10_data", "codec": "20_codec", "speech": "21_speech", "readers": "22_readers", "base": "24_base",
             "adaptation": "30_adaptation", "teacher": "40_teacher", "student": "50_distillation", "other_teacher": "55_other_teacher",
             "streaming": "60_streaming", "close_look": "62_close_look", "latency": "65_latency", "latency_matrix": "65_latency", "robustness": "67_robustness",
             "dialogue": "68_conversation", "conversation": "68_conversation", "plain": "69_plain", "ablated": "70_ablations"}

MANY = {"70_ablations": "ablations"}                  # notebooks that ran many times, and the folder of what they made


# --------------------------------------------------------------------------------------------------------- tables
def _cell(row: dict, key: str) -> str:
    lo, hi, say = row.get(f"{key}_lo"), row.get(f"{key}_hi"), lambda value: beside(value, row.get("limit"))
    return say(row.get(key)) + (f" [{say(lo)}, {say(hi)}]" if lo is not None and hi is not None else "")


def write_table(folder, name: str, rows: list[dict], headings: dict[str, str]) -> list[list[str]]:
    """Rows as folder/name.md, .csv and .tex; returns the cells, headings first.

    headings: key -> heading, in order; key_lo and key_hi become its interval. limit: a bar, which no number of its row should look like.
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
           "lip_r_natural": "natural voice", "lip_r_shuffled": "shuffled",
           "lip_offset_frames": "offset, frames", "lip_width_r": "width r", "listening_opening_mean": "opening, listening", "motion_ratio": "motion", "eye_moves_per_s": "eyes' moves / s", "eye_r": "eyes' r",
           "border_ratio": "border ratio", "seam_ratio": "seam ratio", "psnr_db": "PSNR, dB", "ssim": "SSIM", "frechet": "Fréchet",
           "stream_lip_r": "lip r in a stream", "stream_identity": "identity at its end"}
ABLATIONS = {"name": "", "than": "against", "quality_gain": "lip r gained", "ssim_gain": "SSIM gained", "frechet_ratio": "Fréchet, over"}
MATRIX = {"chunk": "chunk", "steps": "steps", "placement": "placement", "fps": "frames/s", "first_frame_ms": "first frame, ms",
          "chunk_ms_p50": "chunk p50, ms", "chunk_ms_p95": "p95, ms", "hear_ms_p50": "hearing, ms", "dit_ms_p50": "DiT, ms", "latents_ms_p50": "latents sent, ms", "vae_ms_p50": "VAE, ms",
          "frames_ms_p50": "frames sent, ms", "gflop": "DiT, GFLOP", "dit_gflop_per_s": "GFLOP/s"}
FULL = {"setting": "chunk x steps", "device": "device", "form": "form", "fps": "frames/s, with VAE", "placement": "placement", "dit_fps": "DiT alone",
        "ms_p50": "DiT chunk p50, ms", "tflops": "TFLOP/s", "mfu": "MFU", "first_frames_ms": "first frames, ms", "peak_gb": "GB", "error": "error",
        "date": "date", "commit": "commit", "torch": "torch"}
DRIFT = {"chunk": "chunk", "drift_color": "colour, Lab", "drift_sharpness": "sharpness", "drift_identity": "identity"}
CLOSE = {"name": "", "closures": "p, b, m closed", "closures_by_chance": "by chance", "r_opening": "r of opening", "r_width": "width", "r_rounding": "rounding",
         "eyes_recall": "blinks met", "eyes_precision": "moves that are blinks", "eyes_precision_by_chance": "by chance", "takes_apart": "two takes apart, grey levels"}
CLAIM = {"name": "", "claim": "claim", "value": "measured", "bar": "bar", "verdict": "verdict", "reason": "why not measured"}


def tables(metrics: dict[str, dict], verdicts: dict[str, dict], others: dict[str, dict] = {}) -> dict[str, tuple]:
    """The tables that metrics, and other runs (`runs.load`), can fill: name -> (rows, headings)."""
    judged = [row | {"name": name, "verdict": verdict(row), "limit": row["bar"], "bar": f"{SIGNS[row['comparison']]} {shown(row['bar'])}"}
              | dict(zip(("value_lo", "value_hi"), row["ci95"] or (None, None))) for name, row in verdicts.items()]
    quality = [*yardsticks(metrics.get("readers", {})), *models(metrics)]
    stream = metrics.get("streaming", {})
    drift = [{"chunk": n} | {key: stream.get(f"{key}_{n}") for key in DRIFT if key != "chunk"} for n in (1, 10, 100, 1000)]
    times = [{"name": key, "value": v} for key, v in metrics.get("latency", {}).items()]
    made = {"claims": (judged, CLAIM), "quality": (quality, QUALITY), "ablations": runs.repeated(compared(metrics), others, ABLATIONS), "drift": (drift if stream else [], DRIFT), "close_look": (closer(metrics.get("close_look", {})), CLOSE),
            "latency": (times, {"name": "", "value": "local run"}),
            "latency_matrix": ([row | paired("fps", row["fps_each"], np.ones(len(row["fps_each"]))) for row in metrics.get("latency_matrix", {}).get("rows", [])], MATRIX),
            "full_size": (metrics.get("full_size", {}).get("rows", []), FULL), "other_runs": runs.side_by_side(verdicts, others)}
    return {name: (rows, {k: h for k, h in heads.items() if any(r.get(k) is not None for r in rows)})
            for name, (rows, heads) in made.items() if rows}


def models(metrics: dict[str, dict]) -> list[dict]:
    """What each model made, row by row: the workbook's, the same weights undistilled, N2's pair, then those that were scored on validation clips."""
    part = lambda file, who: {k.removeprefix(f"{who}_"): v for k, v in metrics.get(file, {}).items() if k.startswith(f"{who}_")}
    of_test = {"teacher": metrics.get("teacher"), "student": metrics.get("student"), "the teacher's weights in two steps": part("student", "undistilled"),
               "convolutional teacher": part("other_teacher", "teacher"), "its student": part("other_teacher", "student")}
    of_valid = {"the ablations' teacher": metrics.get("plain")} | {n.removeprefix("ablations/").replace("_", " "): m for n, m in metrics.items() if n.startswith("ablations/")}
    return [row | {"name": name} for name, row in [*of_test.items(), *((f"{name}, valid", row) for name, row in of_valid.items())] if row and "lip_r" in row]


def closer(numbers: dict) -> list[dict]:
    """Whoever notebook 62 looked at, a row each."""
    part = lambda who: {k.removeprefix(f"{who}_"): v for k, v in numbers.items() if k.startswith(f"{who}_")}
    names = {"codec": "the codec's copies", "teacher": "teacher", "undistilled": "the teacher's weights in two steps", "student": "student"}
    return [part(who) | {"name": name} for who, name in names.items() if part(who)]


def yardsticks(readers: dict) -> list[dict]:
    """What real clips would have in the table of quality, and what is left of it when the codec has copied them: no generator does better."""
    copies = {key.removeprefix("codec_"): value for key, value in readers.items() if key.startswith("codec_")}
    real = {f"lip_r{end}": readers.get(f"reader_r{end}") for end in ("", "_lo", "_hi")} | {key: copies.get(f"{key}_real") for key in ("border_ratio", "seam_ratio", "eye_moves_per_s")}
    return [{"name": "real clips"} | real, {"name": "the codec's copies"} | copies] if "frechet" in copies else []


# ----------------------------------------------------------------------------------------------------------- page
def beside(value, bar) -> str:
    """A value as it stands beside its bar: with more digits where three would make them look alike."""
    alike = isinstance(value, float) and bar is not None and value != bar and shown(value) == shown(float(bar))
    return next(text for digits in range(4, 18) if float(text := f"{value:.{digits}g}") != bar) if alike else shown(value)


def build(root=None, captions: dict[str, str] | None = None) -> None:
    """From root/reports/metrics: claims.json, tables/, figures/ of metrics, index.html and README.md, all in root/reports.

    The pages show all of figures/ and videos/. captions: file name without suffix -> one sentence; their order is the page's.
    """
    root = Path(root or config.ROOT)
    reports, metrics = root / "reports", load_metrics(root)
    verdicts = judge(metrics)
    config.save_json(reports / "claims.json", verdicts)
    filled = tables(metrics, verdicts, runs.load(root / "data" / "runs", but=[m.get("scale") for m in metrics.values()]))
    grids = {name: write_table(reports / "tables", name, *table) for name, table in filled.items()}
    lips = [[row.get(k) for k in ("name", "lip_r", "lip_r_lo", "lip_r_hi")] for row in filled.get("quality", ([],))[0]]
    if len(lips) > 1:
        intervals([run for run in lips if run[1] is not None], reports / "figures" / "lip_r_of_every_run.png")
    differences(*filled.get("ablations", ([], ABLATIONS)), reports / "figures" / "ablations.png")
    for name, template in (("index.html", "report_template.html"), ("README.md", "report_template.md")):
        _write(reports / name, page(template, reports, metrics, verdicts, grids, captions or {}))


def differences(rows: list[dict], headings: dict[str, str], path) -> None:
    """What each ablation gains over its like, a panel for each number of ABLATIONS: dots and intervals of this run, and in other colours those of others (`runs.repeated`).
    What is far beyond all others stands at the edge, in figures. A run with a single ablation has empty panels."""
    kinds = {key: heading for key, heading in ABLATIONS.items() if key not in ("name", "than")}
    each = ["", *dict.fromkeys(key.removesuffix(kind) for key in headings for kind in kinds if key.endswith(f"_{kind}"))]
    with figure(path, 1, len(kinds), size=(8.5, 0.34 * len(rows) + 1.1), sharey=True) as (fig, axes):
        for ax, (kind, heading) in zip(axes, kinds.items()):
            none = 1.0 if kind == "frechet_ratio" else 0.0
            dots = [(y + 0.22 * n, n, *(row.get(run + kind + end) for end in ("", "_lo", "_hi"))) for n, run in enumerate(each) for y, row in enumerate(rows) if row.get(run + kind) is not None]
            spans = [max(abs(x - none) for x in dot[2:] if x is not None) for dot in dots]
            room = 1.1 * max([span for span in spans if span <= 5 * np.median(spans)], default=0.0) or 1.0 if spans else 1.0
            ax.axvline(none, color="#999999", linewidth=1)
            for y, n, value, lo, hi in dots:
                if abs(value - none) > room:
                    ax.text(none + np.sign(value - none) * room, y, f" {shown(value)} ", color=f"C{n}", ha="right" if value > none else "left", va="center", fontsize="small")
                else:
                    ax.errorbar(value, y, xerr=None if lo is None else [[value - lo], [hi - value]], fmt="o", markersize=4, color=f"C{n}")
            ax.set(title=heading, xlim=(none - room, none + room))
        axes[0].set(yticks=range(len(rows)), yticklabels=[f"{row['name']} / {row['than']}" for row in rows], ylim=(len(rows) - 0.4, -0.6))
        for n, run in enumerate(each):
            axes[0].plot([], [], "o", markersize=4, color=f"C{n}", label=run.strip("_").replace("_", " ") or "this run")
        if len(each) > 1:
            axes[0].legend(loc="best", fontsize="small")


def page(template: str, reports: Path, metrics: dict, verdicts: dict, grids: dict, captions: dict[str, str]) -> str:
    """The text of a page of the report, from a template beside this file."""
    from jinja2 import Environment, StrictUndefined

    def files(folder: str, *suffixes: str) -> list[dict]:
        order = {stem: place for place, stem in enumerate(captions)}
        paths = [p for p in (reports / folder).glob("*") if p.suffix in suffixes]
        paths.sort(key=lambda p: (order.get(p.stem, len(order)), p.name))
        named = lambda stem: captions.get(stem) or stem.replace("_", " ").capitalize()
        return [{"src": f"{folder}/{p.name}", "caption": named(p.stem)} for p in paths]

    nb = {p.stem: f"nb/{MANY.get(p.stem, p.name)}" for p in sorted((reports.parent / "notebooks").glob("*.ipynb"))}
    known = lambda key: sorted({str(m[key]) for name, m in metrics.items() if key in m and not name.startswith("ablations/")})          # `again` has another seed
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
