"""readme: the table of README.md says what reports/claims.json says, and nothing else of the text moves."""
import pytest

from tmlib import config, readme, report
from tmlib.config import ROOT, UserError

TEXT = f"before\n{readme.BEGIN}\nOf 3 claims 3 hold.\n\n| | claim | here | bar | verdict |\n|---|---|---|---|---|\n| C1 | lips | old | old | old |\n" \
       f"| C9 | real-time | – | | not measured |\n{readme.END}\nafter | C1 | stays |\n"


def judged(**numbers):
    return report.claims({"teacher": {"lip_r_shuffled": 0.01, "lip_offset_frames": 0, "scale": "mini", **numbers}})


def test_rows_are_filled_and_words_stay():
    text = readme.filled(TEXT, judged(lip_r=0.9, lip_r_lo=0.88, lip_r_hi=0.91))
    assert "| C1 | lips | lip r, sentences, voices (of espeak-ng) and faces unseen: 0.900 (0.880 to 0.910) | ≥ 0.850 | holds |" in text
    assert "| C9 | real-time | – |  | not measured: needs an H100-class GPU" in text
    assert f"\nOf {len(report.CLAIMS)} claims 1 hold, 0 fail, {len(report.CLAIMS) - 1} could not be measured.\n" in text
    assert text.startswith("before\n") and text.endswith("after | C1 | stays |\n")
    assert readme.filled(text, judged(lip_r=0.9, lip_r_lo=0.88, lip_r_hi=0.91)) == text
    assert "| fails |" in readme.filled(text, judged(lip_r=0.5))


def test_a_row_without_a_claim_and_a_text_without_marks():
    with pytest.raises(UserError, match="a row C1, reports/claims.json has not"):
        readme.filled(TEXT, {})
    with pytest.raises(UserError, match="the marks"):
        readme.filled("no table", {})


def test_the_readme_says_what_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme.filled(text, config.load_json(ROOT / "reports" / "claims.json")), "run `python -m tmlib.readme`"
    assert all(f"| {name} |" in text for name in report.CLAIMS)
