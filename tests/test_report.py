"""Verdicts follow from numbers alone; tables, figures and page are the same bytes each time; the page is sound HTML."""

import csv
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tmlib import claims, config, figures, media, report, runs
from tmlib.config import UserError
from tmlib.metrics import average

RUN = dict(n=108, seed=0, scale="mini")


def lips(r):
    values = {"lip_r": r, "lip_r_flat": r + 0.01, "lip_r_line": r - 0.012, "lip_r_soft3d": r}
    ends = {f"{k}_{end}": v + by for k, v in values.items() for end, by in (("lo", -0.012), ("hi", 0.012))}
    return RUN | values | ends | dict(lip_r_shuffled=0.02, lip_offset_frames=0, lip_r_ceiling=0.92, lip_r_natural=0.78, psnr_db=22.4,
                                      listening_opening_mean=0.03, speaking_opening_mean=0.31, reader_closed_bias=0.01,
                                      border_ratio=1.3, seam_ratio=1.05, seam_ratio_real=1.01, frechet=3.2,
                                      listening_movement=0.9, listening_eye_moves_per_s=0.3)


def good():
    """Metrics by which everything holds."""
    drift = {f"drift_{kind}_{n}": v for kind, v in (("color", 1.6), ("sharpness", 0.97), ("identity", 0.03)) for n in (1, 10, 100, 1000)}
    return {
        "readers": dict(codec_listening_eye_moves_per_s=0.4),
        "teacher": lips(0.875),
        "student": lips(0.863) | dict(steps=2, teacher_ratio=0.985, teacher_ratio_lo=0.955, teacher_ratio_hi=1.01, teacher_frechet_ratio=1.1, frechet_ratio=0.88, frechet_ratio_lo=0.8, frechet_ratio_hi=0.95, ssim_gain=0.004, movement=0.8, teacher_movement_ratio=0.9),
        "streaming": RUN | drift | dict(chunks=1000, toggle_latency_frames=3, lip_r_trend=-0.005, drift_color_trend=0.1, drift_sharpness_trend=-0.01, drift_identity_trend=0.001),
        "latency": dict(scale="mini", serial_fps=61.2, chunk_ms_p50=1234.5, device="CPU, 2 threads", blocking_over_serial=1.6,
                        two_process_over_blocking=1.1, bound_over_blocking=1.3, speedup_no_recompute=1.2, speedup_kv_cache=1.7),
        "latency_matrix": dict(scale="mini", rows=[dict(chunk=3, steps=2, placement="two_process", fps=250.5, fps_each=[240.0, 250.5, 260.0], first_frame_ms=80.0)]),
        "full_size": dict(chunk3_steps2_fps=29.0, chunk7_steps4_fps=12.1),
        "ablated": dict(steps_quality_gain=0.01, chunk_quality_gain=0.004, steps_cost_ratio=1.9, chunk_cost_ratio=1.2, steps_frechet_ratio=0.9, chunk_frechet_ratio=0.95,
                        distilling_quality_gain=0.06, distilling_ssim_gain=0.05, distilling_frechet_ratio=0.4, distilling_movement=0.9, forgetting=1.05, forgetting_without_chunk_0=9.0,
                        endless_lip_r_trend=-0.004, endless_identity_trend=0.0001, endless_identity=0.008, endless_chunks=1021),
        "conversation": dict(turns=12, reply_ms_p95=800.0, lip_r=0.89, listening_opening_mean=0.02, interrupted_ms_max=420.0, late=0.0, right_live=0.96),
        "dialogue": dict(right_unseen=0.95),
        "robustness": dict(lip_r_ratio_accent=0.97, lip_r_ratio_slow=0.98, lip_r_ratio_fast=0.95, lip_r_ratio_noise=0.91),
        "other_teacher": dict(teacher_ratio=0.96, teacher_lip_r=0.85, student_lip_r_shuffled=0.01),
        "user_study": dict(preference=0.62, voters=24),
    }


BARS = [(name, place) for name, claim in claims.CLAIMS.items() for place in range(len(claim.bars))]


def measured(metrics, **changes):
    """Metrics with some numbers replaced, as teacher__lip_r=0.7; None removes."""
    metrics = {name: dict(numbers) for name, numbers in metrics.items()}
    for where, value in changes.items():
        file, key = where.split("__")
        metrics[file][key] = value
        if value is None:
            del metrics[file][key]
    return metrics


@pytest.fixture
def root(tmp_path):
    for name, numbers in (good() | {"ablations/no_dmd": lips(0.85), "ablations/one_step": lips(0.80)}).items():
        config.save_json(tmp_path / "reports" / "metrics" / f"{name}.json", numbers)
    return tmp_path


def test_more_steps_and_larger_chunks_are_compared_clip_by_clip(root):
    """Gains are paired with control's clips; costs are one device's; what is missing stays unmeasured."""
    def write(name, numbers):
        config.save_json(root / "reports" / "metrics" / f"{name}.json", numbers)

    def clips(name, lip_r, far):
        write(f"per_clip/ablations/{name}", {"lip_r": lip_r, "voice": ["a", "b", "c"], "ssim": [0.8, 0.9 - 0.01 * far], "movement": [2.0, 4.0], "face": [1, 2], "frechet": far, "frechet_left_out": [far, 1.1 * far]})

    rows = [dict(chunk=c, steps=s, placement=p, fps_each=fps) for c, s, p, fps in
            ((3, 2, "serial", [100, 50]), (3, 4, "serial", [50, 25]), (7, 2, "serial", [80, 40]), (7, 2, "overlap", [1, 1]))]
    (root / "reports" / "metrics" / "ablated.json").unlink()
    write("latency_matrix", dict(scale="mini", rows=rows))
    clips("longer", [0.5, 0.7, 0.9], 2.0)
    clips("four_longer", [0.6, 0.8, 1.0], 1.5)
    found = claims.load_metrics(root)
    made = found["ablated"]
    assert made["steps_quality_gain"] == pytest.approx(0.1) == made["steps_quality_gain_lo"] and "chunk_quality_gain" not in made
    assert (made["steps_cost_ratio"], made["chunk_cost_ratio"], made["scale"]) == (2.0, 1.25, "mini")
    assert made["steps_frechet_ratio"] == pytest.approx(0.75) == made["steps_frechet_ratio_lo"]               # of what both are without each face
    assert not {"distilling_quality_gain", "distilling_frechet_ratio", "forgetting"} & set(made)
    row = claims.judge(found)["C10"]
    assert row["holds"] is None and "chunk_quality_gain" in row["reason"] and row["evidence"] == "reports/metrics/ablations"
    clips("control", [0.5, 0.7, 0.9], 2.0)
    clips("chunk_7", [0.5, 0.6, 0.9], 2.0)
    assert claims.judge(claims.load_metrics(root))["C10"]["holds"] is False
    clips("undistilled", [0.3, 0.6, 0.8], 8.0)
    clips("matching", [0.5, 0.7, 0.9], 2.0)
    ends = lambda name, value: {name: value, f"{name}_lo": value - 0.1, f"{name}_hi": value + 0.1}
    write("ablations/matching", ends("forgetting", 1.2) | ends("stream_lip_r_trend", 0.0) | ends("stream_identity_trend", 0.1) | {"stream_identity_passage": 0.5, "stream_chunks": 1021})
    write("ablations/without_chunk_0", ends("forgetting", 6.0))
    made = claims.load_metrics(root)["ablated"]
    assert made["distilling_quality_gain"] == pytest.approx(0.4 / 3) and made["distilling_quality_gain_lo"] == pytest.approx(average([0.2, 0.1, 0.1])[1])
    assert [made[f"distilling_ssim_gain{end}"] for end in ("", "_lo", "_hi")] == pytest.approx(average([0.0, 0.06]))
    assert [made[k] for k in ("distilling_frechet_ratio", "forgetting", "forgetting_lo", "forgetting_without_chunk_0_hi")] == pytest.approx([0.25, 1.2, 1.1, 6.1])
    assert [made[k] for k in ("endless_lip_r_trend", "endless_identity_trend_hi", "endless_identity", "endless_chunks")] == pytest.approx([0.0, 0.2, 0.5, 1021])


def test_ablations_stand_beside_their_like(root):
    """next_step and clean_pass are trained by rollout, and so is what they are compared with; what was scored on other clips is compared with nothing."""
    def clips(lip_r, voices="ab"):
        return {"lip_r": lip_r, "voice": list(voices), "ssim": lip_r, "movement": [2.0, 4.0], "face": [1, 2], "frechet": 1.0, "frechet_left_out": [1.0, 1.0]}

    each = {"undistilled": clips([0.1, 0.1]), "control": clips([0.5, 0.5]), "matching": clips([0.6, 0.6]), "rolled": clips([0.4, 0.4]), "next_step": clips([0.45, 0.45]),
            "longer": clips([0.55, 0.55]), "mine": clips([0.7, 0.7]), "others": clips([0.7, 0.7], "ac")}
    rows, headings = report.tables({f"per_clip/ablations/{name}": run for name, run in each.items()}, {})["ablations"]
    assert [(row["name"], row["than"], round(row["quality_gain"], 3)) for row in rows] == [
        ("matching", "undistilled", 0.5), ("control", "undistilled", 0.4), ("longer", "control", 0.05), ("matching", "longer", 0.05), ("rolled", "control", -0.1), ("next step", "rolled", 0.05), ("mine", "control", 0.2)]
    assert list(headings) == ["name", "than", "quality_gain", "ssim_gain", "frechet_ratio", "movement_ratio"] and rows[0]["movement_ratio"] == 1
    other = [row | {"quality_gain": row["quality_gain_lo"]} for row in rows[:2]]
    report.differences([], report.ABLATIONS, root / "none.png")                                     # what the scale smoke has
    assert (root / "none.png").is_file()
    for name, others in (("alone", {}), ("both", {"seed_1": {"ablations": other}})):
        report.differences(*runs.repeated(rows, others, headings), root / f"{name}.png")
    assert (root / "alone.png").read_bytes() != (root / "both.png").read_bytes()


# -------------------------------------------------------------------------------------------------------- verdicts
def test_every_claim_of_the_paper_has_its_row_in_the_agreed_form():
    rows = claims.judge(good())
    assert list(rows) == [f"C{n}" for n in range(1, 12)] + ["N1", "N2", "N3"]
    for row in rows.values():
        assert {"claim", "metric", "value", "ci95", "bar", "holds", "evidence", "scale"} <= row.keys()
        assert row["holds"] is True and row["reason"] is None
    assert rows["C1"]["value"] == 0.875 and rows["C1"]["ci95"] == [0.863, 0.887] and rows["C1"]["scale"] == "mini"
    assert rows["C1"]["evidence"] == "reports/metrics/teacher.json" and rows["C1"]["metric"] == "teacher:lip_r"


@pytest.mark.parametrize("name, place", BARS)
def test_each_bar_alone_can_fail_its_claim(name, place):
    bar = claims.CLAIMS[name].bars[place]
    limit = bar.bar(good()) if callable(bar.bar) else bar.bar
    for value, holds in ((limit, bar.op != ">"), (limit - 0.01, bar.op in ("<=", "within")), (limit + 0.01, bar.op in (">=", ">"))):
        row = claims.judge(measured(good(), **{f"{bar.file}__{bar.key}": value}))[name]
        assert row["parts"][place]["holds"] is holds and row["holds"] is holds
        if not holds:
            assert row["metric"] == f"{bar.file}:{bar.key}" and row["value"] == value    # the row shows what failed
    if bar.op == "within":
        assert claims.judge(measured(good(), **{f"{bar.file}__{bar.key}": -limit - 0.01}))[name]["holds"] is False


@pytest.mark.parametrize("name, place", BARS)
def test_a_missing_number_is_not_measured_and_never_a_verdict(name, place):
    bar = claims.CLAIMS[name].bars[place]
    row = claims.judge(measured(good(), **{f"{bar.file}__{bar.key}": None}))[name]
    assert row["holds"] is None and row["value"] is None and bar.key in row["reason"]


def test_nothing_measured_gives_a_reason_for_everything():
    rows = claims.judge({})
    assert all(row["value"] is None and row["holds"] is None and row["reason"] for row in rows.values())
    assert "bench" in rows["C9"]["reason"]


def test_a_metric_may_say_itself_why_it_is_missing():
    metrics = good()
    metrics["latency"] |= {"blocking_over_serial": None, "blocking_over_serial_reason": "one core was free"}
    assert "one core was free" in claims.judge(metrics)["C6"]["reason"]


def test_what_no_runtime_could_reach_is_not_judged():
    """Where even an ideal schedule stays below C7's bar, the machine has nothing to decide it by; the number is shown, and no verdict."""
    row = claims.judge(measured(good(), latency__two_process_over_blocking=1.01, latency__bound_over_blocking=1.03))["C7"]
    assert row["holds"] is None and row["value"] == 1.01 and claims.verdict(row) == "cannot be judged here" and row["reason"] == "even an ideal runtime would reach no more than 1.03"
    assert claims.judge(measured(good(), latency__two_process_over_blocking=1.01))["C7"]["holds"] is False
    assert claims.judge(measured(good(), latency__bound_over_blocking=1.03))["C7"]["holds"] is True                       # what has cleared its bar has
    unsure = measured(good(), latency__two_process_over_blocking=1.01, latency__bound_over_blocking=1.03, latency__bound_over_blocking_hi=1.06)
    assert claims.judge(unsure)["C7"]["holds"] is False


def test_two_equal_trainings_widen_what_others_gain():
    gained, chance = {"quality_gain": 0.002, "quality_gain_lo": 0.001, "quality_gain_hi": 0.003, "frechet_ratio": 0.9, "frechet_ratio_lo": 0.85, "frechet_ratio_hi": 0.95}, {"quality_gain": -0.0015, "frechet_ratio": 1.1}
    assert claims.by_chance(gained, chance) == pytest.approx({"quality_gain": 0.002, "quality_gain_lo": -0.0005, "quality_gain_hi": 0.0045, "frechet_ratio": 0.9, "frechet_ratio_lo": 0.85 / 1.1, "frechet_ratio_hi": 0.95 * 1.1})
    assert claims.by_chance(gained, {}) == gained and claims.by_chance({}, chance) == {}
    assert claims.by_chance({"frechet_ratio": 0.5, "frechet_ratio_lo": -0.2, "frechet_ratio_hi": 1.2}, {"frechet_ratio": 1.5})["frechet_ratio_lo"] == pytest.approx(-0.3)


def test_the_weakest_bar_stands_for_its_claim():
    """A bar missed clearly comes before one missed narrowly, one not measured, one cleared; of those cleared the one whose interval has least to spare, then their own order counts."""
    def shown(**rates):
        numbers = {f"lip_r_ratio_{kind}{end}": v for kind, (value, lo, hi) in rates.items() for end, v in (("", value), ("_lo", lo), ("_hi", hi))}
        row = claims.judge(good() | {"robustness": {"scale": "mini", **numbers}})["N1"]
        return row["metric"].rpartition("_")[2], row["holds"], row["clear"]

    clear, narrow, missed, nearly = (0.97, 0.95, 0.99), (0.91, 0.85, 0.95), (0.8, 0.7, 0.85), (0.89, 0.8, 0.95)
    assert shown(accent=clear, slow=clear, fast=clear, noise=clear) == ("accent", True, True)
    assert shown(accent=clear, slow=narrow, fast=clear, noise=narrow) == ("slow", True, False)
    assert shown(accent=clear, slow=narrow, fast=clear, noise=(0.905, 0.88, 0.93)) == ("noise", True, False)
    assert shown(accent=clear, slow=clear, fast=(0.94, 0.91, 0.97), noise=clear) == ("fast", True, True)
    assert shown(accent=narrow, fast=clear, noise=clear) == ("slow", None, None)
    assert shown(accent=nearly, fast=clear, noise=narrow) == ("accent", False, False)
    assert shown(accent=nearly, slow=missed, fast=clear, noise=missed) == ("slow", False, True)


def test_a_failed_bar_decides_before_a_missing_one():
    row = claims.judge(measured(good(), teacher__lip_r=None, teacher__lip_offset_frames=3))["C1"]
    assert row["holds"] is False and row["metric"] == "teacher:lip_offset_frames"


def test_bars_made_of_other_numbers_follow_them():
    at = lambda **changes: claims.judge(measured(good(), **changes))
    assert at()["C3"]["parts"][1]["bar"] == pytest.approx(0.08 * 0.31 + 0.01)
    assert at(teacher__reader_closed_bias=0.0)["C3"]["holds"] is False
    assert at(readers__codec_listening_eye_moves_per_s=0.7)["C3"]["holds"] is False         # it stares
    assert at(student__frechet_ratio=1.02)["C4"]["holds"] is False                          # nothing gained by distilling
    assert at(streaming__drift_identity_1=0.003)["C5"]["holds"] is False
    missing = at(teacher__reader_closed_bias=None)["C3"]
    assert missing["holds"] is None and "reader_closed_bias" in missing["reason"]


def test_an_interval_across_the_bar_is_said_to_be_narrow():
    clear = lambda **changes: claims.judge(measured(good(), **changes))["C1"]
    assert clear()["clear"] is True and claims.verdict(clear()) == "holds"
    assert claims.verdict(clear(teacher__lip_r_lo=0.84)) == "holds, narrowly"
    assert claims.verdict(clear(teacher__lip_r=0.84, teacher__lip_r_lo=0.83)) == "fails, narrowly"
    assert clear(teacher__lip_r_lo=None)["ci95"] is None


@pytest.mark.parametrize("value", ["0.9", True, float("nan"), [0.9]])
def test_a_value_that_is_no_number_is_refused_by_name(value):
    with pytest.raises(UserError, match="teacher:lip_r"):
        claims.judge(measured(good(), teacher__lip_r=value))


# ---------------------------------------------------------------------------------------------------------- tables
@pytest.mark.parametrize("value, text", [(0.8, "0.800"), (0.02104, "0.0210"), (61.23, "61.2"), (123.4, "123"), (1234.56, "1,235"),
                                         (0.0, "0.00"), (-3.14159, "-3.14"), (12, "12"), (1000, "1,000"), (None, "–"), ("CPU", "CPU")])
def test_numbers_are_shown_with_three_digits(value, text):
    assert figures.shown(value) == text


def test_no_number_of_a_row_looks_like_its_bar(tmp_path):
    rows = [{"value": 0.8996, "value_lo": 0.8, "value_hi": 0.9004, "limit": 0.9}]
    assert report.write_table(tmp_path, "t", rows, {"value": "measured"})[1] == ["0.8996 [0.8000, 0.9004]"]


def test_rates_have_an_interval_over_rounds():
    rows, _ = report.tables({"latency_matrix": {"rows": [{"chunk": 3, "fps": 20.0, "fps_each": [10.0, 20.0, 30.0]}]}}, {})["latency_matrix"]
    assert (rows[0]["fps"], rows[0]["fps_lo"], rows[0]["fps_hi"]) == (20.0, 10.0, 30.0)


def test_a_table_says_the_same_in_three_forms(tmp_path):
    rows = [{"name": "a_b & 50 %", "r": 0.123456, "r_lo": 0.1, "r_hi": 0.2}, {"name": "x|y", "r": None, "extra": 1}]
    report.write_table(tmp_path, "t", rows, {"name": "run", "r": "lip r"})
    assert (tmp_path / "t.md").read_text() == "| run | lip r |\n| --- | --- |\n| a_b & 50 % | 0.123 [0.100, 0.200] |\n| x\\|y | – |\n"
    with (tmp_path / "t.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert float(read[0]["r"]) == 0.123456 and float(read[0]["r_hi"]) == 0.2 and read[1]["r"] == ""
    tex = (tmp_path / "t.tex").read_text()
    assert r"a\_b \& 50 \% & 0.123 [0.100, 0.200] \\" in tex and r"\begin{tabular}{lr}" in tex and "x|y & -- " in tex


# --------------------------------------------------------------------------------------------------------- figures
DRAWINGS = {
    "sheet": lambda path: figures.contact_sheet([np.full((9, 8, 8, 3), level, np.uint8) for level in (20, 220)], ["dark", "light"], path),
    "lips": lambda path: figures.lip_trace(np.eye(2, 30) + 0.2, np.eye(2, 28) + 0.1, ["one", "two"], path),
    "curves": lambda path: figures.curves([{"step": 1, "loss": 0.5}, {"step": 9, "loss": 0.3}], ["loss"], path),
    "intervals": lambda path: figures.intervals({"some": [{"name": "a", "r": 0.8, "r_lo": 0.7, "r_hi": 0.9}], "none": [], "others": [{"name": "b", "r": 0.6}]}, "r", path),
}


@pytest.mark.parametrize("kind", DRAWINGS)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_figures_have_the_same_bytes_twice_and_tell_no_date(tmp_path, kind, suffix):
    paths = [tmp_path / folder / (kind + suffix) for folder in "ab"]
    for path in paths:
        DRAWINGS[kind](path)
    content = paths[0].read_bytes()
    assert content == paths[1].read_bytes() and len(content) > 2_000
    assert b"Matplotlib v" not in content and b"dc:date" not in content


def test_a_figure_that_fails_leaves_no_file_and_the_global_style_alone(tmp_path):
    import matplotlib
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError), figures.figure(tmp_path / "a.png"):
        1 / 0
    assert not list(tmp_path.iterdir()) and dict(matplotlib.rcParams) == before


def test_the_contact_sheet_shows_its_clips(tmp_path):
    figures.contact_sheet([np.full((9, 8, 8, 3), (200, 30, 30), np.uint8)], ["red"], tmp_path / "a.png", columns=2)
    picture = media.read_image(tmp_path / "a.png", 64).reshape(-1, 3).astype(int)
    assert (np.abs(picture - (200, 30, 30)).max(1) < 12).mean() > 0.3


def test_a_contact_sheet_may_name_its_columns(tmp_path):
    sheet = lambda name, **titles: figures.contact_sheet([np.zeros((17, 8, 8, 3), np.uint8)], [""], tmp_path / name, columns=2, **titles)
    sheet("a.png"), sheet("b.png", titles=["0.0 s", "1.0 s"]), sheet("c.png", titles=["picture", "chunk 9"])
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c                                                   # by default the seconds


def test_a_moving_picture_moves_and_has_the_same_bytes_twice(tmp_path):
    from PIL import Image
    ramp = np.arange(0, 200, 20, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)            # (10, 16, 16, 3)
    for name in "ab":
        figures.moving([[ramp, ramp], [ramp, 255 - ramp[:8]]], tmp_path / f"{name}.webp")
    picture = Image.open(tmp_path / "a.webp")
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()
    assert picture.n_frames == 8 and picture.size == (64, 64)
    picture.seek(5)
    shade = np.asarray(picture.convert("RGB"), int)[16::32, 16::32, 0]   # the middle of each tile
    assert np.abs(shade - [[100, 100], [100, 155]]).max() < 12


# ------------------------------------------------------------------------------------------------------------ page
class Page(HTMLParser):
    """Collects what the tests ask about; complains where a tag is closed that is not open."""
    EMPTY = {"meta", "link", "img", "rect", "line", "circle", "br", "source"}

    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.words = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[key] for key in ("href", "src") if key in attributes]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def furnish(root):
    """Pictures, videos and notebooks beside the metrics."""
    reports = root / "reports"
    DRAWINGS["lips"](reports / "figures" / "lips.png")
    DRAWINGS["intervals"](reports / "figures" / "a_bars.svg")
    media.write_video(reports / "videos" / "talk.mp4", np.zeros((5, 16, 16, 3), np.uint8), np.zeros(5_000, np.float32))
    (root / "data" / "measured").mkdir(parents=True)
    (reports / "metrics" / "ablations").mkdir(exist_ok=True)
    (root / "notebooks").mkdir()
    (reports / "nb").mkdir()
    for place in (root / "notebooks", reports / "nb"):
        (place / "40_teacher.ipynb").write_text("{}")
    return {"lips": "Lips <b>of</b> \"four\" & more", "talk": "A face talks."}


def test_the_page_is_sound_html_whose_every_link_leads_somewhere(root):
    report.build(root, furnish(root))
    page = Page(root / "reports" / "index.html")
    assert len(set(page.ids)) == len(page.ids)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        elif not link.startswith("https://arxiv.org/"):
            assert (root / "reports" / link.partition("#")[0]).exists(), link
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}                 # stands alone
    assert page.tags.count(("html", {"lang": "en"})) == 1
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    videos = [attributes for tag, attributes in page.tags if tag == "video"]
    assert len(videos) == 1 and "controls" in videos[0] and "autoplay" not in videos[0]
    assert 'Lips <b>of</b> "four" & more' in page.text                                      # shown, not obeyed
    assert page.links.index("figures/lips.png") < page.links.index("figures/a_bars.svg")    # in the order of the captions
    assert page.links.count("nb/40_teacher.ipynb") > 3 and "../reports/metrics/teacher.json" in page.links
    assert "0.875 [0.863, 0.887]" in page.text and "14 of 14 hold, 0 fail, 0 not judged" in page.text


def test_a_value_does_not_look_like_its_bar():
    assert [report.beside([x], 1.05)[0] for x in (1.0525, 1.0489, 1.06, 1.05, None, 1.04976)] == ["1.052", "1.049", "1.06", "1.05", "–", "1.0498"]
    assert report.beside([12], 12) == ["12"] and report.beside([0.9004], 0.9) == ["0.9004"] and report.beside([0.5], None) == ["0.500"]
    assert report.beside([1.0525, 1.0509, 1.0559], 1.05) == ["1.052", "1.051", "1.056"]                  # all with as many digits
    assert report.beside([1.0593, 1.0551, 1.0638], 1.05) == ["1.059", "1.055", "1.064"] and report.beside([0.5, 0.5, 0.5], None) == ["0.500"] * 3      # ends unlike the value


def test_the_same_stands_in_markdown(root):
    captions = furnish(root)
    config.save_json(root / "reports" / "metrics" / "student.json", measured(good(), student__frechet_ratio=1.5, student__frechet_ratio_lo=1.3, student__frechet_ratio_hi=1.7)["student"])
    report.build(root, captions)
    text = (root / "reports" / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://arxiv.org/") or (root / "reports" / link).exists(), link
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.partition("## Tables")[0].splitlines() if line.startswith("|")]
    told = {row[0].strip().strip("*"): [cell.strip() for cell in row] for row in rows if row[0].strip().startswith("**")}
    assert list(told) == list(claims.CLAIMS) and told["C4"][-1] == "**fails**" and told["C1"][-1] == "**holds**"
    assert {len(row) for row in rows} == {5} and len(rows) == 2 + sum(1 + len(c.bars) for c in claims.CLAIMS.values())
    assert "0.875 [0.863, 0.887]" in text and "13 of 14 hold, 1 fail, 0 were not judged" in text and "| teacher | 0.875 [0.863, 0.887] |" in text
    assert "![A bars](figures/a_bars.svg)" in text and "- [talk.mp4](videos/talk.mp4): A face talks." in text


def test_the_page_shows_failures_and_gaps_as_such(root):
    (root / "reports" / "metrics" / "user_study.json").unlink()
    config.save_json(root / "reports" / "metrics" / "teacher.json", measured(good(), teacher__lip_r_line=0.5)["teacher"])
    report.build(root)
    text = Page(root / "reports" / "index.html").text
    assert "12 of 14 hold, 1 fails, 1 not judged" in text and "✗ fails" in text and "Nobody has been asked yet: make study." in text
    saved = json.loads((root / "reports" / "claims.json").read_text())
    assert saved["C2"]["holds"] is False and saved["C2"]["value"] == 0.5 and saved["N3"]["value"] is None


def test_the_same_metrics_give_the_same_bytes(root, tmp_path_factory):
    def digest(folder):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    other = tmp_path_factory.mktemp("other")
    for path in sorted((root / "reports" / "metrics").rglob("*.json"), reverse=True):       # written in another order
        copy = other / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    report.build(root)
    first = digest(root)
    report.build(root)
    report.build(other)
    assert digest(root) == first == digest(other)
    made = {path.removeprefix("reports/") for path in first}
    assert {"claims.json", "index.html", "README.md", "figures/lip_r_of_every_run.png", "figures/ablations.png"} <= made
    assert {f"tables/{t}.{kind}" for t in ("claims", "lips", "pictures", "drift", "latency", "latency_matrix") for kind in ("md", "csv", "tex")} <= made


def test_a_run_with_nothing_measured_still_has_its_page(tmp_path):
    with pytest.raises(UserError, match="make repro"):
        report.build(tmp_path)
    config.save_json(tmp_path / "reports" / "metrics" / "data.json", dict(scale="smoke", seed=0, n=6))
    report.build(tmp_path)
    page = Page(tmp_path / "reports" / "index.html")
    assert "0 of 14 hold" in page.text and "A smoke run." in page.text


def test_metrics_are_read_in_one_order_whatever_the_disk_says(root, monkeypatch):
    names = list(claims.load_metrics(root))
    listed = type(root).rglob
    monkeypatch.setattr(type(root), "rglob", lambda self, pattern: sorted(listed(self, pattern), reverse=True))
    assert list(claims.load_metrics(root)) == names and {"teacher", "ablations/no_dmd"} <= set(names)


def test_a_corrupt_metrics_file_is_named(root):
    (root / "reports" / "metrics" / "student.json").write_text("{")
    with pytest.raises(UserError, match="student.json"):
        report.build(root)
    assert not (root / "reports" / "index.html").exists()


def test_every_bar_says_why():
    for claim in claims.CLAIMS.values():
        assert all(len(bar.why) > 20 and bar.op in claims.SIGNS for bar in claim.bars)


def test_the_tables_begin_with_what_can_be_had():
    """Real clips, and their copies by the codec, which were scored like a model, and their first pictures, standing still."""
    readers = {"reader_r": 0.99, "reader_r_lo": 0.98, "reader_r_hi": 1.0, "codec_lip_r": 0.97, "codec_frechet": 0.05, "codec_border_ratio": 1.15,
               "codec_border_ratio_real": 0.98, "codec_seam_ratio_real": 1.02, "codec_mae": 0.03, "still_frechet": 0.02, "still_movement": 0.0}
    rows, headings = report.tables({"readers": readers, "teacher": {"lip_r": 0.9}}, {})["pictures"]
    assert [(row["name"], row.get("lip_r"), row.get("frechet"), row.get("border_ratio"), row.get("movement")) for row in rows] == [
        ("real clips", 0.99, None, 0.98, 1), ("the codec's copies", 0.97, 0.05, 1.15, None), (report.STILL, None, 0.02, None, 0), ("teacher", 0.9, None, None, None)]
    assert set(headings) == {"name", "border_ratio", "seam_ratio", "frechet", "movement", "listening_movement"}
    assert [row["name"] for row in report.tables({"readers": {"codec_lip_r": 0.97}, "teacher": {"lip_r": 0.9}}, {})["lips"][0]] == ["teacher"]


def test_a_table_says_which_rows_are_of_validation_clips():
    rows, _ = report.tables({"teacher": {"lip_r": 0.9}, "student": {"lip_r": 0.9, "undistilled_lip_r": 0.7}, "other_teacher": {"teacher_lip_r": 0.6, "student_lip_r": 0.65, "teacher_ratio": 1.1},
                             "plain": {"lip_r": 0.85}, "ablations/four_steps": {"lip_r": 0.8}}, {})["lips"]
    assert [(row["name"], row["lip_r"]) for row in rows] == [
        ("teacher", 0.9), ("student", 0.9), ("the teacher's weights in two steps", 0.7), ("convolutional teacher", 0.6), ("its student", 0.65),
        ("the ablations' teacher, valid", 0.85), ("four steps, valid", 0.8)]
