"""From metrics to tables, figures and one page. Nothing here runs a model: every number is read from a JSON file, of this run, of real machines
(data/measured) or of other runs (data/runs). What decides whether a claim holds stands in `claims`.

The same metrics give the same bytes.
"""

import csv
import io
from pathlib import Path

import numpy as np

from . import config, runs
from .claims import CLAIMS, SIGNS, compared, in_order, judge, load_metrics, verdict
from .config import atomic
from .figures import dot, figure, intervals, shown
from .metrics import paired

NOTEBOOKS = {"data": "10_data", "codec": "20_codec", "speech": "21_speech", "readers": "22_readers", "base": "24_base",
             "adaptation": "30_adaptation", "teacher": "40_teacher", "student": "50_distillation", "other_teacher": "55_other_teacher",
             "streaming": "60_streaming", "close_look": "62_close_look", "latency": "65_latency", "latency_matrix": "65_latency", "robustness": "67_robustness",
             "dialogue": "68_conversation", "conversation": "68_conversation", "plain": "69_plain", "ablated": "70_ablations"}

MANY = {"70_ablations": "ablations"}                  # notebooks that ran many times, and the folder of what they made
VALID = ", valid"                                     # behind the names of what was scored on validation clips
STILL = "their first pictures, still"


# --------------------------------------------------------------------------------------------------------- tables
def _cell(row: dict, key: str) -> str:
    value, lo, hi = beside([row.get(f"{key}{end}") for end in ("", "_lo", "_hi")], row.get("limit"))
    return value if row.get(f"{key}_lo") is None else f"{value} [{lo}, {hi}]"


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


LIPS = {"name": "", "lip_r": "lip r", "lip_r_flat": "flat", "lip_r_line": "line", "lip_r_soft3d": "soft 3D", "lip_r_natural": "natural voice", "lip_r_shuffled": "shuffled",
        "lip_offset_frames": "offset, frames", "lip_width_r": "width r", "listening_opening_mean": "opening, listening", "stream_lip_r": "lip r in a stream"}
PICTURES = {"name": "", "frechet": "Fréchet", "ssim": "SSIM", "psnr_db": "PSNR, dB", "movement": "movement", "listening_movement": "movement, listening", "eye_moves_per_s": "eyes' moves / s", "listening_eye_moves_per_s": "eyes' moves / s, listening", "eye_r": "eyes' r",
            "border_ratio": "border ratio", "seam_ratio": "seam ratio", "stream_identity": "identity, end of a stream"}
ABLATIONS = {"name": "", "than": "against", "quality_gain": "lip r gained", "ssim_gain": "SSIM gained", "frechet_ratio": "Fréchet, ratio", "movement_ratio": "movement, ratio", "movement": "movement"}
MATRIX = {"chunk": "chunk", "steps": "steps", "placement": "placement", "fps": "frames/s", "first_frame_ms": "first frame, ms",
          "chunk_ms_p50": "chunk p50, ms", "chunk_ms_p95": "p95, ms", "hear_ms_p50": "hearing, ms", "dit_ms_p50": "DiT, ms", "latents_ms_p50": "latents sent, ms", "vae_ms_p50": "VAE, ms",
          "frames_ms_p50": "frames sent, ms", "gflop": "DiT, GFLOP", "dit_gflop_per_s": "GFLOP/s"}
FULL = {"setting": "chunk x steps", "device": "device", "form": "form", "fps": "frames/s, with VAE", "placement": "placement", "dit_fps": "DiT alone",
        "ms_p50": "DiT chunk p50, ms", "tflops": "TFLOP/s", "mfu": "MFU", "first_frames_ms": "first frames, ms", "peak_gb": "GB", "error": "error",
        "date": "date", "commit": "commit", "torch": "torch"}
DRIFT = {"chunk": "chunk", "drift_color": "colour, Lab", "drift_sharpness": "sharpness", "drift_identity": "identity"}
CLOSE = {"name": "", "closures": "p, b, m closed", "closures_by_chance": "by chance", "closures_nearly": "nearly closed", "r_opening": "r of opening", "r_width": "width", "r_rounding": "rounding",
         "eyes_recall": "blinks met", "eyes_precision": "moves that are blinks", "eyes_precision_by_chance": "by chance", "takes_apart": "two takes apart, grey levels", "frechet": "Fréchet"}
WORDS = {                                             # below a table, for its columns
    "lips": "Lip r with the 95 % interval, and of each style apart. Natural voice: lip r of clips that a neural voice speaks. Shuffled: lip r against other clips' speech, which should be 0. Offset: by how many frames the lips must be "
            "shifted to fit best. Width r: as lip r, of the mouth's width. Opening, listening: of the mouth, from 0 to 1, in clips in which nobody speaks. In a stream: of 45 seconds. "
            "Rows that end in \"valid\" are of validation clips, whose voices are easier, and of a teacher without the picture's help: compare them with one another.",
    "pictures": "Fréchet: distance from real clips. PSNR, SSIM: likeness to the true clip, frame by frame. Movement: how far the head moves in a second, over real clips'. Eyes' moves: "
                "blinks and quick glances. Both also of the clips in which somebody listens. Eyes' r: correlation of the eyes' change with the true clip's. Identity: distance of the face's features from the picture's in the last 15 of 45 seconds of stream. Rows as in the table of lips.",
    "ablations": "Gained by the first over the second, clip by clip; Fréchet, ratio: the first's distance over the second's, below 1 is better. Movement: how far the head moves in a second, of the first over the second's, and over real clips'. What `again` shows is chance, since it is `control` from the same solutions of the teacher with other batches and other noise in its second step.",
    "drift": "Three streams together, over up to ten chunks around this one: distance of the mean colour from the picture's, sharpness over the picture's, distance of the face's features from the picture's.",
    "close_look": "Shares of the closures for p, b and m that are there (opening below 0.05), that are there by chance, and that nearly are (below 0.15); correlations of three numbers of the mouth with the true ones; of the true eyes' quick moves the share that is met, and of the made ones the share that meets a true one; "
                  "mean difference of two takes of the same clip; Fréchet distance from real clips, and as yardsticks those of spoiled real clips.",
    "latency_matrix": "serial: DiT and decoder take turns on one core. overlap: two threads that share it. two_device: two threads of one process on two cores. two_process: two processes on two cores. Stages that run side by side slow one another down, so only serial's add up.",
}
CLAIM = {"name": "", "claim": "claim", "value": "measured", "bar": "bar", "verdict": "verdict", "reason": "why not measured"}


def tables(metrics: dict[str, dict], verdicts: dict[str, dict], others: dict[str, dict] = {}) -> dict[str, tuple]:
    """The tables that metrics, and other runs (`runs.load`), can fill: name -> (rows, headings)."""
    judged = [row | {"name": name, "verdict": verdict(row), "limit": row["bar"], "bar": f"{SIGNS[row['comparison']]} {shown(row['bar'])}"}
              | dict(zip(("value_lo", "value_hi"), row["ci95"] or (None, None))) for name, row in verdicts.items()]
    quality = [*yardsticks(metrics.get("readers", {})), *models(metrics)]
    stream = metrics.get("streaming", {})
    drift = [{"chunk": n} | {key: stream.get(f"{key}_{n}") for key in DRIFT if key != "chunk"} for n in (1, 10, 100, 1000)]
    times = [{"name": key, "value": v} for key, v in metrics.get("latency", {}).items()]
    made = {"claims": (judged, CLAIM), "lips": (quality, LIPS), "pictures": (quality, PICTURES), "ablations": runs.repeated(compared(metrics), others, ABLATIONS), "drift": (drift if stream else [], DRIFT), "close_look": (closer(metrics.get("close_look", {})), CLOSE),
            "latency": (times, {"name": "", "value": "local run"}),
            "latency_matrix": ([row | paired("fps", row["fps_each"], np.ones(len(row["fps_each"]))) for row in metrics.get("latency_matrix", {}).get("rows", [])], MATRIX),
            "full_size": (metrics.get("full_size", {}).get("rows", []), FULL), "other_runs": runs.side_by_side(verdicts, others)}
    return {name: (rows, {k: h for k, h in heads.items() if any(r.get(k) is not None for r in rows)})
            for name, (rows, heads) in made.items() if rows}


def models(metrics: dict[str, dict]) -> list[dict]:
    """What each model made, row by row: the workbook's, the same weights undistilled, N2's pair, then what was scored on validation clips."""
    part = lambda file, who: {k.removeprefix(f"{who}_"): v for k, v in metrics.get(file, {}).items() if k.startswith(f"{who}_")}
    of_test = {"teacher": metrics.get("teacher"), "student": metrics.get("student"), "the teacher's weights in two steps": part("student", "undistilled"),
               "convolutional teacher": part("other_teacher", "teacher"), "its student": part("other_teacher", "student")}
    of_valid = {"the ablations' teacher": metrics.get("plain"), "the same, sparse-causal": part("plain", "causal"), "the same in two steps, seeing everything": part("plain", "two_steps"), STILL: part("plain", "still")} | {run.replace("_", " "): metrics[f"ablations/{run}"] for run in in_order(n.removeprefix("ablations/") for n in metrics if n.startswith("ablations/"))}
    return [row | {"name": name} for name, row in [*of_test.items(), *((f"{name}{VALID}", row) for name, row in of_valid.items())] if row and row.keys() & {"lip_r", "ssim"}]


def closer(numbers: dict) -> list[dict]:
    """Whoever notebook 62 looked at, a row each."""
    part = lambda who: {k.removeprefix(f"{who}_"): v for k, v in numbers.items() if k.startswith(f"{who}_")}
    names = {"codec": "the codec's copies", "teacher": "teacher", "undistilled": "the teacher's weights in two steps", "student": "student",
             "linear_ear": "a straight line from the sound", "tinted": "real clips, with eight levels more of red", "blurred": "real clips, blurred over three pixels", "still": STILL}
    return [part(who) | {"name": name} for who, name in names.items() if part(who)]


def by_voices(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of the table of lips that have lip r: of test clips, and of validation clips."""
    rows = [row for row in rows if row.get("lip_r") is not None]
    valid = [row | {"name": row["name"].removesuffix(VALID)} for row in rows if row["name"].endswith(VALID)]
    return {"test clips": [row for row in rows if not row["name"].endswith(VALID)], "validation clips, whose voices are easier": valid}


def yardsticks(readers: dict) -> list[dict]:
    """What real clips would have in the tables of lips and pictures, what is left of it when the codec has copied them (no generator does better), and what their first pictures have, standing still."""
    part = lambda who: {key.removeprefix(f"{who}_"): value for key, value in readers.items() if key.startswith(f"{who}_")}
    copies, still = part("codec"), part("still")
    real = {f"lip_r{end}": readers.get(f"reader_r{end}") for end in ("", "_lo", "_hi")} | {key: copies.get(f"{key}_real") for key in ("border_ratio", "seam_ratio", "eye_moves_per_s", "listening_eye_moves_per_s")} | {"movement": 1.0, "listening_movement": 1.0}
    return [{"name": "real clips"} | real, {"name": "the codec's copies"} | copies, *([{"name": STILL} | still] if still else [])] if "frechet" in copies else []


# ----------------------------------------------------------------------------------------------------------- page
def beside(values: list, bar) -> list[str]:
    """A value and the ends of its interval as they stand beside their bar, all with as many digits: three, or more where one would look like the bar and is not,
    or (up to five) the ends like the value."""
    say = lambda value, digits: shown(value) if digits == 3 or not isinstance(value, float) else f"{value:#.{digits}g}"
    alike = lambda value, digits: isinstance(value, float) and value != bar and say(value, digits) == say(float(bar), digits)
    digits = next(n for n in range(3, 18) if bar is None or not any(alike(value, n) for value in values))
    told = lambda n: len({say(value, n) for value in values}) == len(set(values))
    digits = max(digits, next((n for n in (3, 4, 5) if told(n)), 3))
    return [say(value, digits) for value in values]


def measured(row: dict) -> list[str]:
    """What a claim or a bar of claims.json measured: a value, and the ends of its interval if it has one."""
    return beside([row["value"], *(row["ci95"] or ())], row["bar"])


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
    if "lips" in filled:
        intervals(by_voices(filled["lips"][0]), "lip_r", reports / "figures" / "lip_r_of_every_run.png")
    differences(*filled.get("ablations", ([], ABLATIONS)), reports / "figures" / "ablations.png")
    for name, template in (("index.html", "report_template.html"), ("README.md", "report_template.md")):
        _write(reports / name, page(template, reports, metrics, verdicts, grids, captions or {}))


MOST = 3                                              # a Fréchet distance so many times as large is written, not drawn
BETTER = {"quality_gain": "right is better", "ssim_gain": "right is better", "frechet_ratio": "left is better"}


def differences(rows: list[dict], headings: dict[str, str], path) -> None:
    """What each ablation gains over its like, a panel for each number of ABLATIONS: dots and intervals of this run, and in other colours those of others (`runs.repeated`).
    Grey is what chance alone did (`again`). A run with a single ablation has empty panels."""
    each = ["", *dict.fromkeys(key.removesuffix(kind) for key in headings for kind in BETTER if key.endswith(f"_{kind}"))]
    with figure(path, 1, len(BETTER), size=(8.5, 0.34 * len(rows) + 1.4), sharey=True) as (fig, axes):
        for ax, (kind, better) in zip(axes, BETTER.items()):
            found = [(y + 0.22 * n, n, row, run + kind) for n, run in enumerate(each) for y, row in enumerate(rows) if row.get(run + kind) is not None]
            ends = [(row["name"], row[f"{key}{end}"]) for *_, row, key in found for end in ("", "_lo", "_hi") if row.get(f"{key}{end}") is not None]
            scale = stretch(ax, [x for _, x in ends], kind == "frechet_ratio") if ends else ""
            if chance := [x for name, x in ends if name == "again"]:
                ax.axvspan(min(chance), max(chance), color="#dddddd", linewidth=0)
            ax.axvline(kind == "frechet_ratio", color="#999999", linewidth=1)
            for y, n, row, key in found:
                if ax.get_xlim()[0] <= row[key] <= ax.get_xlim()[1]:
                    dot(ax, y, row, key, f"C{n}")
                else:
                    ax.annotate(f"{shown(row[key])} →", (ax.get_xlim()[1], y + 0.25 * n - 0.15), ha="right", va="center", color=f"C{n}", fontsize="small")
            ax.set(title=f"{ABLATIONS[kind]}\n({better})\n{scale}")
        axes[0].set(yticks=range(len(rows)), yticklabels=[f"{row['name']}, against {row['than']}" for row in rows], ylim=(len(rows) - 0.4, -0.6))
        for n, run in enumerate(each):
            axes[0].plot([], [], "o", markersize=4, color=f"C{n}", label=run.strip("_").replace("_", " ") or "this run")
        if len(each) > 1:
            axes[0].legend(loc="best", fontsize="small")


def stretch(ax, values: list[float], ratio: bool) -> str:
    """A logarithmic scale with room for all values, large and small: ratios around 1, those above MOST left out; differences around 0, near which it is linear. Returns what a title says of it."""
    if ratio:
        values, ticks, said = [x for x in values if 0 < x <= MOST], [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3], "logarithmic"
        ax.set_xscale("log")
        limits = 0.9 * min([*values, 1]), 1.1 * max([*values, 1])
    else:
        middle, most = 10.0 ** np.ceil(np.log10(np.median(np.abs(values)) + 1e-9)), 1.2 * max(np.abs(values)) + 1e-9
        said = f"logarithmic beyond ±{middle:g}"
        ax.set_xscale("symlog", linthresh=middle)
        ticks, limits = [sign * n * middle for sign, n in ((-1, 10), (-1, 3), (-1, 1), (0, 1), (1, 1), (1, 3), (1, 10))], (-most, most)
    ax.set_xticks(ticks)
    ax.tick_params("x", rotation=60)
    ax.set_xlim(limits)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.minorticks_off()
    return said


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
    environment.filters |= {"shown": shown, "measured": measured, "verdict": verdict, "meter": _meter, "cell": lambda text: str(text).replace("|", "\\|")}
    return environment.from_string(Path(__file__).with_name(template).read_text(encoding="utf-8")).render(
        claims=verdicts, pending={n: c.pending for n, c in CLAIMS.items()}, signs=SIGNS, metrics=metrics, tables=grids,
        videos=files("videos", ".mp4", ".webm"), figures=files("figures", ".webp", ".png", ".svg"), notebooks=nb, words=WORDS, scales=known("scale"),
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
