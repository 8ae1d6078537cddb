"""readme: README.md and docs/results.md say what was measured, number by number; a sentence that no longer holds is named."""
import pytest

from tmlib import claims, readme
from tmlib.config import ROOT, UserError

METRICS = {"teacher": {"lip_r": 0.9, "lip_r_lo": 0.88, "lip_r_hi": 0.91, "lip_r_shuffled": 0.01, "lip_offset_frames": 0, "drift": -0.00001, "scale": "mini"},
           "plain": {"lip_r": 0.7, "still_ssim": 0.5},
           "ablations/without_it": {"lip_r": 0.8123, "frechet": 2.0, "ssim": 0.85, "movement": 0.95, "seam_ratio": 1.5, "seam_ratio_real": 1.2, "stream_identity": 0.0312}}


def said(template, **numbers):
    metrics = METRICS | {"teacher": METRICS["teacher"] | numbers}
    return readme.rendered(template, metrics, claims.judge(metrics))


@pytest.mark.parametrize("template, text", [
    ("{{ teacher.lip_r|d(2) }} ({{ interval(teacher, 'lip_r', 2) }}) {{ teacher.drift|d(3) }} {{ teacher.lip_r_shuffled|pct }} %", "0.90 (0.88 to 0.91) 0.000 1 %"),
    ("{{ interval(teacher, 'lip_r', 0, 100) }} %", "88 to 91 %"),
    ("| C1 | lips | {{ claims.C1|claimed }} |\n", "| C1 | lips | lip r, sentences, voices (of espeak-ng) and faces unseen: 0.900 (0.880 to 0.910) | ≥ 0.850 | holds |\n"),
    ("| {{ claims.C9|claimed }} |", "| – |  | not measured: needs an H100-class GPU: python -m tmlib.bench |"),
    ("{{ tally }}", "Of the paper's 11 claims 1 holds, 0 fail, 10 not measured; of 3 more, 0 hold, 0 fail, 3 not measured."),
    ("| {{ ablations.without_it|scored }} |", "| 0.812 | 2.00 | 0.850 | 0.950 | 1.25 | 0.0312 |"),
    ("{{ ablations.teacher.lip_r }} | {{ ablations.still|scored }}", "0.7 | – | – | 0.500 | – | – | –"),
    ("{{ verdicts.C1 }}, {{ bars['teacher:lip_r'].value_lo }}{{ given(teacher.lip_r > 0.5, 'lips move') }}", "holds, 0.88"),
])
def test_a_template_is_filled(template, text):
    assert said(template) == (text, [])


def test_verdicts_follow_the_numbers():
    assert said("{{ tally }}", lip_r_lo=0.8)[0].startswith("Of the paper's 11 claims 1 holds (1 narrowly), 0 fail")
    assert said("{{ verdicts.C1 }}: {{ failing }}", lip_r=0.5, lip_r_lo=0.4, lip_r_hi=0.6)[0] == "fails: C1"


def test_a_sentence_that_no_longer_holds_is_named():
    assert said("Good lips.{{ given(teacher.lip_r > 0.95, 'good lips') }}") == ("Good lips.", ["good lips"])


def test_of_another_run():
    metrics = {"teacher": METRICS["teacher"] | {"lip_r": 0.5, "lip_r_lo": 0.4, "lip_r_hi": 0.6}}
    others = {"seed_1": {"claims": claims.judge(metrics), "ablations": [{"name": "without it", "than": "control", "ssim_gain": 0.25}], "metrics": metrics}}
    template = "{{ teacher.lip_r }} {{ seed_1.teacher.lip_r }} {{ verdicts.C1 }} {{ seed_1.verdicts.C1 }} {{ seed_1.versus.without_it.control.ssim_gain }}"
    assert readme.rendered(template, METRICS, claims.judge(METRICS), others)[0] == "0.9 0.5 holds fails 0.25"


@pytest.mark.parametrize("template", ["{{ teacher.gone|d(2) }}", "{{ gone.lip_r }}", "{{ interval(teacher, 'drift', 2) }}", "{{ ablations.gone|scored }}", "{{ claims.gone|claimed }}", "{% if %}"])
def test_a_number_that_is_not_there(template):
    with pytest.raises(UserError, match="run `make repro`, or mend the sentence"):
        said(template)


@pytest.mark.parametrize("name", readme.WRITTEN)
def test_the_words_say_what_was_measured(name):
    text, outdated = readme.current(name)
    assert (ROOT / name).read_text(encoding="utf-8") == text, "run `python -m tmlib.readme`; what is to change, change in docs/*.jinja"
    assert not outdated, "mend these sentences in docs/*.jinja"


def test_every_claim_has_its_row():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in claims.CLAIMS)
    table = text[text.index("| still |"):].partition("\n\n")[0]
    assert {line.count("|") for line in table.splitlines()} == {3 + len(readme.RUN)}, "a heading for each number"
