"""runs: what another run found is copied whole, and stands beside this run's numbers. All numbers are made up, in throwaway folders."""

import pytest

from tmlib import claims, config, readme, report, runs
from tmlib.config import UserError


def judged(r=0.9, **more):
    return claims.judge({"teacher": {"lip_r": r, "lip_r_lo": r - 0.01, "lip_r_hi": r + 0.01, "lip_r_shuffled": 0.01, "lip_offset_frames": 0, "scale": "mini", **more}})


@pytest.fixture
def root(tmp_path):
    config.save_json(tmp_path / ".scales" / "seed_1" / "reports" / "claims.json", judged(0.8))
    (tmp_path / ".scales" / "seed_1" / ".commit").write_text("c0ffee")
    for name, lip_r in (("control", [0.5, 0.7]), ("again", [0.6, 0.7])):
        config.save_json(tmp_path / ".scales" / "seed_1" / "reports" / "metrics" / "per_clip" / "ablations" / f"{name}.json",
                         {"lip_r": lip_r, "voice": ["a", "b"], "ssim": lip_r, "movement": lip_r, "face": [1, 2], "frechet": 2.0, "frechet_left_out": [2.0, 2.0]})
    config.save_json(tmp_path / ".scales" / "seed_1" / "reports" / "metrics" / "teacher.json", {"lip_r": 0.8})
    return tmp_path


def test_a_run_is_kept_whole_and_says_where_it_is_from(root):
    path = runs.keep("seed_1", root)
    kept = config.load_json(path)
    assert path == root / "data" / "runs" / "seed_1.json" and set(kept) == {*runs.ORIGIN, "claims", "ablations", "metrics"} and kept["commit"] == "c0ffee"
    assert runs.load(path.parent) == {"seed_1": kept} and kept["claims"] == config.load_json(root / ".scales" / "seed_1" / "reports" / "claims.json")
    assert [(row["name"], row["than"], row["quality_gain"], row["frechet_ratio"]) for row in kept["ablations"]] == [("again", "control", pytest.approx(0.05), 1.0)]
    assert kept["metrics"]["teacher"] == {"lip_r": 0.8} and not any("per_clip" in name for name in kept["metrics"])
    assert runs.load(path.parent, but=["seed_1"]) == runs.load(root / "nowhere") == {}


def test_a_run_that_was_not_made_or_is_none_is_named(root):
    with pytest.raises(UserError, match="make repro SCALE=seed_2"):
        runs.keep("seed_2", root)
    for broken in ({"a": 1}, {"claims": {}}):                           # the second as runs were once kept
        config.save_json(root / "data" / "runs" / "other.json", broken)
        with pytest.raises(UserError, match="other.json: not written by this tmlib.runs"):
            runs.load(root / "data" / "runs")
        assert runs.load(root / "data" / "runs", but=["other"]) == {}


def test_each_bar_has_a_row_with_every_run(tmp_path):
    here, there = judged(0.9), judged(0.8)
    del there["N3"], there["C1"]["parts"][1]                            # older than this run's claims
    there["C1"]["parts"][1]["metric"] = "teacher:lip_delay"              # the offset: it was another number
    rows, headings = runs.side_by_side(here, {"seed_1": {"claims": there}})
    assert [row["metric"] for row in rows] == ["teacher:lip_r"]         # of the others no number was there
    assert rows[0] == {"name": "C1", "metric": "teacher:lip_r", "limit": 0.85, "here": 0.9, "here_lo": 0.89, "here_hi": 0.91, "here_verdict": "holds",
                       "seed_1": 0.8, "seed_1_lo": pytest.approx(0.79), "seed_1_hi": pytest.approx(0.81), "seed_1_verdict": "fails"}
    assert [row["metric"] for row in runs.side_by_side(here, {"seed_1": {"claims": judged(0.8)}})[0]] == ["teacher:lip_r", "teacher:lip_r_shuffled", "teacher:lip_offset_frames"]
    grid = report.write_table(tmp_path, "other_runs", rows, headings)
    assert grid[:2] == [["", "number", "here", "verdict", "seed 1", "verdict"], ["C1", "teacher:lip_r", "0.900 [0.890, 0.910]", "holds", "0.800 [0.790, 0.810]", "fails"]]


def test_a_comparison_of_ablations_stands_beside_the_same_of_other_runs():
    row = {"name": "again", "than": "control", "quality_gain": 0.1, "quality_gain_lo": 0.0, "quality_gain_hi": 0.2}
    there = [{"name": "again", "than": "rolled", "quality_gain": 7.0}, row | {"quality_gain": -0.1}]
    rows, headings = runs.repeated([row, row | {"name": "longer"}], {"seed_1": {"ablations": there}}, {"name": "", "than": "against", "quality_gain": "lip r gained"})
    assert headings == {"name": "", "than": "against", "quality_gain": "lip r gained", "seed_1_quality_gain": "lip r gained, seed 1"}
    assert [r["seed_1_quality_gain"] for r in rows] == [-0.1, None] and rows[0]["seed_1_quality_gain_hi"] == 0.2 and rows[0]["quality_gain"] == 0.1


def test_the_report_shows_other_runs_and_not_itself(root):
    runs.keep("seed_1", root)
    teacher = {"scale": "mini", "seed": 0, "lip_r": 0.9}
    config.save_json(root / "reports" / "metrics" / "teacher.json", teacher)
    report.build(root)
    assert "Other runs" in (root / "reports" / "index.html").read_text() and "seed 1" in (root / "reports" / "README.md").read_text()
    (root / "reports" / "tables" / "other_runs.md").unlink()
    config.save_json(root / "reports" / "metrics" / "teacher.json", teacher | {"scale": "seed_1"})
    report.build(root)
    assert "Other runs" not in (root / "reports" / "index.html").read_text() and not (root / "reports" / "tables" / "other_runs.md").exists()


def test_readme_says_which_verdicts_differ():
    same, other = judged(0.9), judged(0.8)
    run = lambda claims: {"seed_1": {"claims": claims}}
    assert readme.tally(same, run(same)).endswith("In the run `seed_1` every verdict is the same.")
    assert readme.tally(same, run(other)).endswith("In the run `seed_1` all verdicts are the same but these: C1 fails.")
    other["C2"]["parts"][0]["metric"] = "teacher:another"
    assert readme.tally(same, run(other)).endswith("In the run `seed_1`, where 1 of the claims measured here had the same bars, all verdicts are the same but these: C1 fails.")
    other["C1"]["parts"][0]["comparison"] = "<="
    assert "seed_1" not in readme.tally(same, run(other))        # nothing to compare
