"""readme: the table of README.md says what reports/claims.json says, and nothing else of the text moves."""
import pytest

from tmlib import claims, readme
from tmlib.config import ROOT, UserError

TEXT = """before
<!-- claims:begin -->
Of the paper's 3 claims 3 hold.

| | claim | here | bar | verdict |
|---|---|---|---|---|
| C1 | lips | old | old | old |
| C9 | real-time | – | | not measured |
<!-- claims:end -->
after | C1 | stays |
<!-- ablations:begin -->
| | words | lip r | Fréchet | SSIM | border | identity |
|---|---|---|---|---|---|---|
| without_it | as it was | 1 | 2 | 3 | 4 | 5 | 6 |
<!-- ablations:end -->
end
"""
RUNS = {"without_it": {"lip_r": 0.8123, "frechet": 2.0, "ssim": 0.85, "movement": 0.95, "seam_ratio": 1.5, "seam_ratio_real": 1.2, "stream_identity": 0.0312}, "more": {}}


def judged(**numbers):
    return claims.judge({"teacher": {"lip_r_shuffled": 0.01, "lip_offset_frames": 0, "scale": "mini", **numbers}})


def test_rows_are_filled_and_words_stay():
    text = readme.filled(TEXT, judged(lip_r=0.9, lip_r_lo=0.88, lip_r_hi=0.91), RUNS)
    assert "| C1 | lips | lip r, sentences, voices (of espeak-ng) and faces unseen: 0.900 (0.880 to 0.910) | ≥ 0.850 | holds |" in text
    assert "| C9 | real-time | – |  | not measured: needs an H100-class GPU" in text
    assert "\nOf the paper's 11 claims 1 holds, 0 fail, 10 not measured; of 3 more, 0 hold, 0 fail, 3 not measured.\n" in text
    assert "| without_it | as it was | 0.812 | 2.00 | 0.850 | 0.950 | 1.25 | 0.0312 |" in text
    assert text.startswith("before\n") and "\nafter | C1 | stays |\n" in text and text.endswith("end\n")
    assert readme.filled(text, judged(lip_r=0.9, lip_r_lo=0.88, lip_r_hi=0.91), RUNS) == text
    assert "11 claims 1 holds (1 narrowly), 0 fail" in readme.filled(text, judged(lip_r=0.9, lip_r_lo=0.8, lip_r_hi=0.95), RUNS)
    assert "| fails |" in readme.filled(text, judged(lip_r=0.5), RUNS)


def test_a_row_without_a_claim_and_a_text_without_marks():
    with pytest.raises(UserError, match="the table of claims has a row C1, reports/ has not"):
        readme.filled(TEXT, {}, RUNS)
    with pytest.raises(UserError, match="the table of ablations has a row without_it"):
        readme.filled(TEXT, judged(), {})
    with pytest.raises(UserError, match="the marks <!-- claims:begin -->"):
        readme.filled("no table", {}, {})


def test_the_readme_says_what_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme.current(text), "run `python -m tmlib.readme`"
    assert all(f"| {name} |" in text for name in claims.CLAIMS)
    table = text.partition("<!-- ablations:begin -->")[2].partition("<!-- ablations:end -->")[0]
    assert {line.count("|") for line in table.splitlines() if line} == {3 + len(readme.RUN)}, "a heading for each number"
