"""Which claims hold. CLAIMS, just below, is all that decides it: which number of which file, compared with what, and why that.

A verdict is computed from numbers in JSON files, of this run in reports/metrics or, for the full size, of real machines in data/measured; never typed
in. A claim that fails is shown as failed, one without its number as not measured, one that this machine could not decide as not to be judged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import config, measured
from .config import UserError
from .metrics import interval, jackknife, named, paired, ratio


@dataclass(frozen=True)
class Bar:
    """One comparison: number `key` of reports/metrics/`file`.json against `bar`, a number or a function of all metrics."""
    file: str
    key: str
    op: str                             # ">=", ">", "<=" or "within" (-bar .. bar)
    bar: float | Callable[[dict], float]
    why: str                            # this bar and no other
    most: str = ""                      # the number of that file, if any, that even an ideal runtime could not surpass here: if that (its interval's upper end) is below the bar, there is nothing to judge
    control: bool = False               # of a model that must fail, so that another bar can be trusted: it stands for its claim only if it is missed


@dataclass(frozen=True)
class Claim:
    text: str
    bars: tuple[Bar, ...]               # all must be cleared
    pending: str = ""                   # why it may not have been measured yet


def quiet(m: dict) -> float:
    return 0.08 * m["speaking_opening_mean"] + m["reader_closed_bias"]


SHUT = "mouth opening while listening; allowed: 8 % of the opening in speech, plus what the lip reader reads on mouths that are truly closed"
MOVES = "how far the head moves in a second, over real clips"
NOISE = "a difference below 5 % does not count; the interval says how sure it is"

CLAIMS = {
    "C1": Claim("An image-to-video model learns to move its lips to speech, for sentences and voices that it has never heard.", (
        Bar("teacher", "lip_r", ">=", 0.85, "lip r, sentences, voices (of espeak-ng) and faces unseen; a trial before the workbook was begun reached 0.86, with a codec that allowed 0.92"),
        Bar("teacher", "lip_r_shuffled", "within", 0.10, "lip r against the truth of other clips' speech; the mouth must not fit speech that it was not given"),
        Bar("teacher", "lip_offset_frames", "within", 1, "frames by which the lips must be shifted to fit best; ITU-R BT.1359 accepts one frame, 62 ms"))),
    "C2": Claim("It does so in every style: flat (anime), line-shaded, and soft 3D, which stands in for photographs.", tuple(
        Bar("teacher", f"lip_r_{style}", ">=", 0.80, f"lip r, {style}; a single style may be a little worse than all styles together")
        for style in ("flat", "line", "soft3d"))),
    "C3": Claim("Speaking and listening are both natural, and it turns from one to the other live.", (
        Bar("streaming", "toggle_latency_frames", "<=", 12, "frames of the video by which the mouth is late when speech begins or ends, the slower of the two; a chunk is twelve frames"),
        Bar("teacher", "listening_opening_mean", "<=", lambda m: quiet(m["teacher"]), f"teacher: {SHUT}"),
        Bar("student", "listening_opening_mean", "<=", lambda m: quiet(m["student"]), f"student: {SHUT}"),
        *(Bar(who, "listening_movement", op, bar, f"{who}: {MOVES}, while listening; {why}")
          for who in ("teacher", "student") for op, bar, why in (("<=", 1.5, "half as much again is restless"), (">=", 0.5, "half is a face that hardly lives"))),
        *(Bar(who, "listening_eye_moves_per_s", ">=", lambda m: 0.5 * m["readers"]["codec_listening_eye_moves_per_s"], f"{who}: blinks and quick glances a second while listening; with fewer than half of those in the codec's copies of real clips a face stares")
          for who in ("teacher", "student")))),
    "C4": Claim("Distilled to two denoising steps, the student keeps the teacher's quality.", (
        Bar("student", "teacher_ratio", ">=", 0.95, "lip r over the teacher's; a twentieth may be lost"),
        Bar("student", "teacher_frechet_ratio", "<=", 1.25, "Fréchet distance over the teacher's; a quarter more can hardly be seen"),
        Bar("student", "steps", "<=", 2, "denoising steps; the paper has two"),
        Bar("student", "ssim_gain", ">", 0, "SSIM with the true clip gained over the same weights in two steps, undistilled, clip by clip; any gain counts"),
        Bar("student", "teacher_movement_ratio", ">=", 0.8, "how far the head moves in a second, over the teacher's; a fifth less can be seen"),
        Bar("student", "movement", ">=", 0.5, f"{MOVES}, since a face that stands still gains SSIM too; half is a face that hardly lives"),
        Bar("student", "frechet_ratio", "<=", 1.0, "Fréchet distance over that of the same weights in two steps, undistilled; above one, distilling would have gained nothing"),
        Bar("ablated", "distilling_quality_gain", ">", 0, "lip r gained by a short distillation (`matching`) without the reference picture's help, on validation clips; without that help two steps are too few at first, so any gain counts"),
        Bar("ablated", "distilling_ssim_gain", ">", 0, "SSIM with the true clip gained by that short distillation, clip by clip; any gain counts"),
        Bar("ablated", "distilling_frechet_ratio", "<=", 1.0, "Fréchet distance after that short distillation over that before; above one, it would have gained nothing"),
        Bar("ablated", "distilling_movement", ">=", 0.5, f"{MOVES}, after that short distillation; a picture that stands still gains SSIM too"))),
    "C5": Claim("Sparse-causal attention streams without end and without accumulating errors.", (
        Bar("streaming", "lip_r_trend", ">=", -0.03, "lip r gained over streams that say the same words again and again, by a line through the passages; 0.03 may be lost, less than C1 can tell apart"),
        Bar("streaming", "chunks", ">=", 1000, "chunks in each stream; a thousand are twelve and a half minutes"),
        Bar("streaming", "drift_color_trend", "<=", 2.3, "Lab colour distance to the picture gained over the streams, likewise; 2.3 is just noticeable"),
        Bar("streaming", "drift_sharpness_trend", ">=", -0.1, "sharpness, as a share of the picture's, gained over the streams, likewise; a tenth may be lost"),
        Bar("streaming", "drift_identity_trend", "<=", lambda m: 0.25 * m["streaming"]["drift_identity_1"],
            "distance to the picture's face features gained over the streams, likewise; a quarter of the first five chunks' may be gained"),
        Bar("ablated", "endless_lip_r_trend", ">=", -0.03, "lip r gained, likewise, by the whole method without the reference picture's help (`matching`)"),
        Bar("ablated", "endless_identity_trend", "<=", lambda m: 0.25 * m["ablated"]["endless_identity"],
            "distance to the picture's face features gained, likewise, without the reference picture's help (`matching`); a quarter of the first passage's may be gained"),
        Bar("ablated", "endless_chunks", ">=", 1000, "chunks in each stream without the reference picture's help"),
        Bar("ablated", "forgetting", "<=", 1.25, "distance to the picture's face features in the second and third chunk of later passages over that in the first passage's, without the reference picture's help (`matching`); at most a quarter more; the interval is over faces, two of each style"),
        Bar("ablated", "forgetting_without_chunk_0", ">=", 2, "distance to the picture's face features in later passages over that in the first, for a student that never sees chunk 0 (`without_chunk_0`); it must at least double, or the bar above could not fail", control=True),
        Bar("student", "seam_ratio", "<=", lambda m: 1.1 * m["student"]["seam_ratio_real"],
            "picture change across chunk borders over that across the borders of other latent frames; at most a tenth above real clips"))),
    "C6": Claim("Putting DiT and decoder on two devices raises the frame rate.", (
        Bar("latency", "blocking_over_serial", ">=", 1.05, f"frame rate on two devices (here two cores) over that on one, with blocking transfers; {NOISE}"),),
        "needs two cores or two GPUs, timed by notebook 65"),
    "C7": Claim("Overlapping the transfer with computation raises it further.", (
        Bar("latency", "two_process_over_blocking", ">=", 1.05, f"frame rate with asynchronous transfers over that with blocking ones; {NOISE}", "bound_over_blocking"),),
        "needs two cores or two GPUs, timed by notebook 65"),
    "C8": Claim("Leaving out all repeated computation raises it further.", (
        Bar("latency", "speedup_no_recompute", ">=", 1.05, f"time of a chunk on one device with recomputed embeddings over that with cached ones, from turns of the DiT; {NOISE}"),
        Bar("latency", "speedup_kv_cache", ">=", 1.05, f"time of a chunk on one device without cached keys and values over that with them, likewise; {NOISE}"))),
    "C9": Claim("At full size, chunk 3 with 2 steps is real-time on one H100-class GPU; chunk 7 with 4 steps is not.", (
        Bar("full_size", "chunk3_steps2_fps", ">=", 16, "frames per second at chunk 3, 2 steps; Wan2.1 plays 16"),
        Bar("full_size", "chunk7_steps4_fps", "<=", 16, "the same at chunk 7, 4 steps, which needs more than one GPU")),
        "needs an H100-class GPU: python -m tmlib.bench"),
    "C10": Claim("More steps and larger chunks raise quality, and cost.", (
        Bar("ablated", "steps_quality_gain", ">", 0, "lip r gained from 2 to 4 steps, after as much training (`four_longer` and `longer`), on validation clips; any gain counts"),
        Bar("ablated", "chunk_quality_gain", ">", 0, "lip r gained from chunk 3 to 7, on validation clips; any gain counts. Both intervals are widened by what sets two equal trainings apart (`again`)"),
        Bar("ablated", "steps_frechet_ratio", "<=", 1, "Fréchet distance at 4 steps over that at 2"),
        Bar("ablated", "chunk_frechet_ratio", "<=", 1, "Fréchet distance at chunk 7 over that at 3"),
        Bar("ablated", "steps_cost_ratio", ">=", 1.05, f"time per frame on one device at 4 steps over that at 2; {NOISE}"),
        Bar("ablated", "chunk_cost_ratio", ">=", 1.05, f"time per frame on one device at chunk 7 over that at 3; {NOISE}")),
        "needs the ablations control, longer, four_longer and chunk_7"),
    "C11": Claim("An audio language model drives it in a live conversation.", (
        Bar("conversation", "reply_ms_p95", "<=", 1000, "ms from the caller's last sound to the answer's first, 95th percentile; people wonder after a second"),
        Bar("conversation", "turns", ">=", 10, "turns answered in each call; enough to go back and forth"),
        Bar("dialogue", "right_unseen", ">=", 0.9, "answers right to the word, sentences and voices (of espeak-ng) unheard; one in ten may be wrong"),
        Bar("conversation", "right_live", ">=", 0.9, "answers right to the word in the calls; of an answer that was broken off only the spoken words count, and one in ten may be wrong"),
        Bar("conversation", "lip_r", ">=", 0.85, "lip r of each answer in the calls, one face and voice; the bar of C1"),
        Bar("conversation", "listening_opening_mean", "<=", lambda m: quiet(m["student"]), f"in the calls: {SHUT}"),
        Bar("conversation", "interrupted_ms_max", "<=", 500, "ms until an interrupted face is silent, in the slowest case; half of what an answer may take"),
        Bar("conversation", "late", "<=", 0.01, "share of frames that came late; at most one in a hundred")),
        "no call was held: dvc repro conversation"),
    "N1": Claim("Lips survive foreign accents, slow and fast speech, and background noise.", tuple(
        Bar("robustness", f"lip_r_ratio_{kind}", ">=", 0.9, f"lip r, {kind}, over that of plain speech; a tenth may be lost")
        for kind in ("accent", "slow", "fast", "noise")), "the robustness sweep has not been run"),
    "N2": Claim("The distillation also works from a teacher of another architecture.", (
        Bar("other_teacher", "teacher_ratio", ">=", 0.95, "lip r over its convolutional teacher's, as in C4"),
        Bar("other_teacher", "teacher_lip_r", ">=", 0.80, "that teacher's own lip r; to keep a poor teacher's quality would be no feat"),
        Bar("other_teacher", "student_lip_r_shuffled", "within", 0.10, "lip r against another's speech, as in C1")),
        "no second teacher has been trained: dvc repro other_teacher"),
    "N3": Claim("People who see both side by side, not knowing which is which, prefer the student to the baseline.", (
        Bar("user_study", "preference", ">", 0.5, "share of blind votes for the student; half is chance"),
        Bar("user_study", "voters", ">=", 10, "voters who passed the checks; with fewer, nothing is settled, whatever they prefer")),
        "nobody has been asked yet: make study"),
}


# ---- numbers, and verdicts
DERIVED = {"full_size": "data/measured", "ablated": "reports/metrics/ablations"}      # files of metrics that are made from others


def load_metrics(root: Path) -> dict[str, dict]:
    """{"teacher": {...}, "ablations/longer": {...}, ...} of root/reports/metrics, "ablated" from them, "full_size" of root/data/measured if it has any."""
    folder = root / "reports" / "metrics"
    if not folder.is_dir():
        raise UserError(f"{folder}: not there yet; run `make repro`, which measures before it reports")
    metrics = {p.relative_to(folder).with_suffix("").as_posix(): config.load_json(p) for p in sorted(folder.rglob("*.json"))}
    derived = {"full_size": measured.full_size(root / "data" / "measured"), "ablated": ablated(metrics)}
    return metrics | {name: numbers for name, numbers in derived.items() if numbers}


def per_clip(metrics: dict[str, dict]) -> dict[str, dict]:
    """Of each ablation, by its name, what it reached clip by clip: see `evaluate.score`."""
    return {n.removeprefix("per_clip/ablations/"): m for n, m in metrics.items() if n.startswith("per_clip/ablations/")}


def versus(one: dict, other: dict) -> dict:
    """An ablation against another on the same clips, of `per_clip`: lip r and SSIM gained, clip by clip, its movement and its Fréchet distance over the other's, with intervals. Of other clips: nothing."""
    if any(one.get(k) is None or one[k] != other.get(k) for k in ("voice", "face")):
        return {}
    one, other = ({k: np.array(v) for k, v in run.items()} for run in (one, other))
    moves = named("movement_ratio", ratio(one["movement"], other["movement"], one["face"])) if "movement" in one else {}      # runs before it was measured have none
    return (interval("quality_gain", one["lip_r"] - other["lip_r"], one["voice"]) | interval("ssim_gain", one["ssim"] - other["ssim"], one["face"])
            | moves | jackknife("frechet_ratio", one["frechet"] / other["frechet"], one["frechet_left_out"] / other["frechet_left_out"]))


def by_chance(gained: dict, chance: dict) -> dict:
    """Numbers of `versus` with intervals as much wider as two equal trainings (`chance`) are apart: other clips are not all that might have been. A guard, no interval of 95 %."""
    wider = dict(gained)
    for key, apart in ((k, v) for k, v in chance.items() if not k.endswith(("_lo", "_hi"))):
        if key in gained:
            lo, hi = gained[f"{key}_lo"], gained[f"{key}_hi"]
            ends = [x * y for x in (lo, hi) for y in (apart, 1 / apart)] if key.endswith("_ratio") else [lo - abs(apart), hi + abs(apart)]
            wider |= {f"{key}_lo": min(ends), f"{key}_hi": max(ends)}
    return wider


AGAINST = {"undistilled": None, "control": "undistilled", "again": "control", "longer": "control", "matching": "longer", "matching_alone": "matching", "without_chunk_0": "control", "without_previous": "control", "rolled": "control",
           "next_step": "rolled", "clean_pass": "rolled", "four_steps": "control", "four_longer": "longer", "chunk_7": "control"}      # an ablation's like, in the order of reading; of others: control


def in_order(runs) -> list[str]:
    """Names of ablations in the order of AGAINST, others behind."""
    places = {run: place for place, run in enumerate(AGAINST)}
    return sorted(runs, key=lambda run: places.get(run, len(places)))


def compared(metrics: dict[str, dict]) -> list[dict]:
    """Each ablation beside its like, and the whole method beside none of it, clip by clip; and how much the first moves."""
    each = per_clip(metrics)
    pairs = [("matching", "undistilled"), *((run, AGAINST.get(run, "control")) for run in in_order(each))]
    found = [(run, than, versus(each[run], each[than])) for run, than in pairs if run in each and than in each]
    return [{"name": run.replace("_", " "), "than": than.replace("_", " ")} | numbers | {f"movement{end}": metrics.get(f"ablations/{run}", {}).get(f"movement{end}") for end in ("", "_lo", "_hi")}
            for run, than, numbers in found if numbers]


def ablated(metrics: dict[str, dict]) -> dict:
    """What C4, C5 and C10 ask of the ablations: what is gained by distilling, four steps and chunk 7 (`versus`, and `by_chance`); what the latter two cost in time per frame on one
    device; what becomes of the whole method's endless stream; how much further from its picture a stream that says the same words again is, and without chunk 0."""
    each = per_clip(metrics)
    fps = {(r["chunk"], r["steps"]): r["fps_each"] for r in metrics.get("latency_matrix", {}).get("rows", ()) if r["placement"] == "serial"}
    found, chance = {}, versus(each["again"], each["control"]) if {"again", "control"} <= each.keys() else {}
    for what, run, than in (("distilling", "matching", "undistilled"), ("steps", "four_longer", "longer"), ("chunk", "chunk_7", "control")):
        if run in each and than in each:
            found |= {f"{what}_{k}": v for k, v in by_chance(versus(each[run], each[than]), chance).items()}
    for what, setting in (("steps", (3, 4)), ("chunk", (7, 2))):
        if setting in fps and (3, 2) in fps:
            found |= paired(f"{what}_cost_ratio", fps[3, 2], fps[setting])
    for run, known in (("matching", ENDLESS | {"movement": "distilling_movement"}), ("without_chunk_0", {"forgetting": "forgetting_without_chunk_0"})):
        made = metrics.get(f"ablations/{run}", {})
        found |= {name + end: made[key + end] for key, name in known.items() for end in ("", "_lo", "_hi") if key + end in made}
    return found and found | {"scale": metrics.get("latency_matrix" if fps else "ablations/control", {}).get("scale")}


ENDLESS = {"forgetting": "forgetting", "stream_lip_r_trend": "endless_lip_r_trend", "stream_identity_trend": "endless_identity_trend",
           "stream_identity_passage": "endless_identity", "stream_chunks": "endless_chunks"}             # of an ablation's numbers, as a claim's


def judge(metrics: dict[str, dict]) -> dict[str, dict]:
    """CLAIMS judged by metrics, in the form of reports/claims.json. `parts` has every bar, the claim itself the deciding one:
    a bar missed, clearly rather than narrowly; else one not measured; else the one cleared most narrowly, by its interval; else the first. `clear`: the whole interval is on that side."""
    return {name: _judge(claim, metrics) for name, claim in CLAIMS.items()}


def _judge(claim: Claim, metrics: dict[str, dict]) -> dict:
    parts = [_compare(bar, metrics) for bar in claim.bars]
    order = lambda p: (1, 0) if p["holds"] is None else (2, p["control"], p["clear"] is not False, _margin(p)) if p["holds"] else (0, p["clear"] is False)
    decides = min(parts, key=order)                                           # the first of equals
    reason = [claim.pending] if decides["value"] is None and claim.pending else []
    reason += [decides["reason"]] if decides["reason"] and not (reason and decides["metric"].partition(":")[0] not in metrics) else []      # of a whole file that is missing `pending` says enough
    scale = metrics.get(decides["metric"].partition(":")[0], {}).get("scale")
    return {"claim": claim.text, **decides, "reason": "; ".join(reason) or None, "scale": scale, "parts": parts}


def _margin(p: dict) -> float:
    """How far a number is from its bar, in halves of its interval; without an interval nobody can say."""
    if p["ci95"] is None:
        return math.inf
    half = (p["ci95"][1] - p["ci95"][0]) / 2
    return abs(abs(p["value"]) - p["bar"] if p["comparison"] == "within" else p["value"] - p["bar"]) / max(half, 1e-12)


def _compare(bar: Bar, metrics: dict[str, dict]) -> dict:
    row = {"metric": f"{bar.file}:{bar.key}", "value": None, "ci95": None, "bar": None if callable(bar.bar) else bar.bar,
           "comparison": bar.op, "why": bar.why, "control": bar.control, "holds": None, "clear": None, "reason": None,
           "evidence": DERIVED.get(bar.file) or f"reports/metrics/{bar.file}.json"}
    measured = {name: {k: v for k, v in m.items() if v is not None} for name, m in metrics.items()}
    try:
        value = _number(measured[bar.file][bar.key], row["metric"])
        row["bar"] = _number(bar.bar(measured) if callable(bar.bar) else bar.bar, row["metric"])
    except KeyError as missing:
        told = metrics.get(bar.file, {}).get(f"{bar.key}_reason")
        return row | {"reason": told or ("the ablations that would tell were not run" if missing.args[0] == "ablated" else f"reports/metrics has no {missing.args[0]} yet")}
    most = measured[bar.file].get(f"{bar.most}_hi", measured[bar.file].get(bar.most))
    ends = [measured[bar.file].get(f"{bar.key}_{end}") for end in ("lo", "hi")]
    row |= {"value": value, "holds": passes(value, bar.op, row["bar"])}
    if most is not None and not row["holds"] and not passes(most, bar.op, row["bar"]):
        row |= {"holds": None, "ci95": None if None in ends else ends, "reason": f"even an ideal runtime would reach no more than {most:.3g}"}
    elif None not in ends:
        row |= {"ci95": ends, "clear": all(passes(end, bar.op, row["bar"]) == row["holds"] for end in ends)}
    return row


SIGNS = {">=": "≥", ">": ">", "<=": "≤", "within": "±"}


def passes(value: float, op: str, bar: float) -> bool:
    return {">=": value >= bar, ">": value > bar, "<=": value <= bar, "within": abs(value) <= bar}[op]


def _number(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}, not a number; run its stage again")
    return value


def verdict(row: dict) -> str:
    word = {True: "holds", False: "fails", None: "not measured" if row["value"] is None else "cannot be judged here"}[row["holds"]]
    return f"{word}, narrowly" if row["clear"] is False else word
