"""measured: files of the bench become rows and the numbers of C9. All files here are made up, in throwaway folders."""

import json

import pytest

from tmlib import claims, config, measured, report
from tmlib.config import UserError

BF16, FP8 = "qkv+attention+compile+graphs", "qkv+attention+compile+graphs+fp8"


def row(chunk, steps, form, ms, **more):
    return {"chunk": chunk, "steps": steps, "form": form, "ms_p50": ms, "tflops": 400.0, "mfu": 0.6, "dit_fps": 4000 * chunk / ms, "error": 0.01,
            "grown_bytes": 0, "first_chunk_ms": 400.0, **more}


def call(*runs, date="2026-01-01T00:00:00+00:00", variant="talkingmachines-18b", device="Made-up GPU", **options):
    return {"device": device, "date": date, "commit": "c0ffee", "torch": "2.11", "uncommitted_changes": False,
            "options": {"variant": variant, "size": "512", "layers": None, **options}, "runs": {f"{r['chunk']}x{r['steps']} {r['form']}": r for r in runs}}


def write(root, calls, name="made-up.json"):
    config.save_json(root / "data" / "measured" / name, {f"{c['date']} {i}": c for i, c in enumerate(calls)})


PAIR = {"serial_fps": 20.0, "overlap_fps": 24.0, "first_frames_ms": 900.0}


def test_the_claim_takes_the_best_whole_stream_in_bf16(tmp_path):
    write(tmp_path, [call(row(3, 2, "eager", 900.0, serial_fps=9.0, first_frames_ms=2000.0), row(3, 2, BF16, 450.0, **PAIR),
                          row(3, 2, FP8, 300.0, serial_fps=26.0, overlap_fps=25.0), row(7, 4, FP8, 1500.0, serial_fps=15.0), row(3, 2, "qkv", 800.0))])
    found = measured.full_size(tmp_path / "data" / "measured")
    assert (found["chunk3_steps2_fps"], found["chunk3_steps2_placement"], found["chunk3_steps2_form"]) == (24.0, "overlap", BF16)
    assert (found["chunk3_steps2_fps_fp8"], found["chunk3_steps2_placement_fp8"], found["chunk3_steps2_first_frames_ms"]) == (26.0, "serial", 900.0)
    assert found["chunk7_steps4_fps"] is None and "nothing at chunk 7, 4 steps in bf16" in found["chunk7_steps4_fps_reason"] and found["chunk7_steps4_fps_fp8"] == 15.0
    write(tmp_path, [call(row(3, 2, BF16, 450.0, **PAIR, runtime_fps=22.0), row(3, 2, FP8, 300.0, serial_fps=26.0))])
    whole = measured.full_size(tmp_path / "data" / "measured")
    assert (whole["chunk3_steps2_fps"], whole["chunk3_steps2_placement"]) == (22.0, "runtime")                # the runtime's own rate, if it was timed
    assert found["chunk3_steps2_device"] == "Made-up GPU" and found["chunk3_steps2_commit"] == "c0ffee" and found["n"] == 5


def test_only_the_papers_shape_counts(tmp_path):
    write(tmp_path, [call(row(3, 2, BF16, 1.0, **PAIR), variant="smoke"), call(row(3, 2, BF16, 1.0, **PAIR), size="256"),
                     call(row(3, 2, BF16, 1.0, **PAIR), layers=4)])
    assert measured.full_size(tmp_path / "data" / "measured") == {} and len(measured.rows(tmp_path / "data" / "measured")) == 3
    assert measured.full_size(tmp_path / "nowhere") == {}


def test_the_newest_call_of_a_form_counts_and_devices_stay_apart(tmp_path):
    old, new = call(row(3, 2, BF16, 400.0)), call(row(3, 2, BF16, 500.0), date="2026-02-01T00:00:00+00:00")
    write(tmp_path, [new, old])
    write(tmp_path, [call(row(3, 2, BF16, 300.0), device="Another")], "another.json")
    assert [(r["device"], r["ms_p50"], r["date"][:7]) for r in measured.rows(tmp_path / "data" / "measured")] == [
        ("Another", 300.0, "2026-01"), ("Made-up GPU", 500.0, "2026-02")]


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', '{"a": {"runs": {}}}', '{"a": {"date": "x", "options": {}, "runs": {}}}'])
def test_another_file_gets_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="x.json: not written by tmlib.bench"):
        measured.rows(tmp_path)


def test_the_report_has_the_row_and_its_provenance(tmp_path):
    config.save_json(tmp_path / "reports" / "metrics" / "teacher.json", {"scale": "mini"})
    assert "full_size" not in claims.load_metrics(tmp_path)
    write(tmp_path, [call(row(3, 2, BF16, 450.0, **PAIR), row(7, 4, BF16, 2500.0, serial_fps=10.5))])
    report.build(tmp_path)
    claim = json.loads((tmp_path / "reports" / "claims.json").read_text())["C9"]
    assert claim["holds"] is True and claim["value"] == 24.0 and claim["evidence"] == "data/measured"
    table = (tmp_path / "reports" / "tables" / "full_size.md").read_text()
    assert "3 x 2" in table and "Made-up GPU" in table and "2026-01-01" in table and "c0ffee" in table and "24.0" in table and "overlap" in table
    assert "Made-up GPU" in (tmp_path / "reports" / "index.html").read_text()
    write(tmp_path, [call(row(3, 2, BF16, 450.0))])
    assert "DiT alone" in claims.judge(claims.load_metrics(tmp_path))["C9"]["reason"]
