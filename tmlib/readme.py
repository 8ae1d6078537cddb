"""README.md and docs/results.md, from their templates in docs/ and the numbers of reports/:  python -m tmlib.readme

Sentences are somebody's, numbers a run's: `{{ student.lip_r|d(3) }}` is lip_r of reports/metrics/student.json, with three decimals. A test compares what is written with what was measured.
"""
import sys
from collections import Counter
from pathlib import Path

from . import config, runs
from .claims import CLAIMS, SIGNS, compared, load_metrics, verdict
from .config import UserError, cli, load_json
from .figures import shown
from .report import measured

WRITTEN = ("README.md", "docs/results.md")                                               # from docs/README.md.jinja and docs/results.md.jinja
RUN = ("lip_r", "frechet", "ssim", "movement", "seam_ratio", "stream_identity")           # of an ablation


def claimed(row: dict) -> str:
    """A claim of claims.json as cells of a table: measured, bar, verdict."""
    if row["value"] is None:
        return f"– |  | not measured: {row['reason']}"
    reason = f": {row['reason']}" if row["holds"] is None else ""
    value, *ends = measured(row)
    interval = " ({} to {})".format(*ends) if ends else ""
    return f"{row['why'].partition(';')[0]}: {value}{interval} | {SIGNS[row['comparison']]} {shown(row['bar'])} | {verdict(row)}{reason}"


def tally(claims: dict[str, dict], others: dict[str, dict]) -> str:
    """How many hold, and how that was in other runs, in a line."""
    def count(rows: list[dict]) -> str:
        said = Counter(map(verdict, rows))
        def counted(word: str) -> str:
            clearly, narrowly = said[f"{word}s"], said[f"{word}s, narrowly"]
            return f"{clearly + narrowly} {word}{'s' if clearly + narrowly == 1 else ''}{f' ({narrowly} narrowly)' if narrowly else ''}"
        unknown = [f"{said[words]} {words}" for words in ("not measured", "cannot be judged here") if said[words]]
        return ", ".join([counted("hold"), counted("fail"), *unknown])

    papers, more = ([row for name, row in claims.items() if name.startswith("N") == ours] for ours in (False, True))
    line = f"Of the paper's {len(papers)} claims {count(papers)}; of {len(more)} more, {count(more)}."
    for name, run in others.items():
        there = run["claims"]
        same = [claim for claim, row in claims.items() if {*map(runs.meant, row["parts"])} == {*map(runs.meant, there.get(claim, {}).get("parts", ()))}]
        changed = [f"{claim} {verdict(there[claim])}" for claim in same if verdict(there[claim]) != verdict(claims[claim])]
        judged = sum(claims[claim]["holds"] is not None for claim in same)
        if judged:
            which = "" if len(same) == len(claims) else f", where {judged} of the claims measured here had the same bars,"
            line += f" In the run `{name}`{which} " + ("every verdict is the same." if not changed else f"all verdicts are the same but these: {', '.join(changed)}.")
    return line


def scored(run: dict) -> str:
    """An ablation's cells. Chunks of other sizes have other seams, at which real clips change by more or less, so the seam ratio is one over theirs."""
    value = lambda key: run[key] / run.get(f"{key}_real", 1) if key == "seam_ratio" else run[key]
    return " | ".join(shown(value(key)) if key in run else "–" for key in RUN)


def decimals(x: float, n: int) -> str:
    """x with n decimals; nothing is -0."""
    return f"{round(x, n) + 0.0:.{n}f}"


def interval(numbers: dict, key: str, n: int, times: float = 1) -> str:
    """The interval of a number, as words."""
    return " to ".join(decimals(times * numbers[f"{key}_{end}"], n) for end in ("lo", "hi"))


def known(metrics: dict[str, dict], claims: dict[str, dict], comparisons: list[dict]) -> dict:
    """What a template may say of a run: its metrics by file, `ablations` by name, with what notebook 69 scored before anything was distilled; `versus`, one ablation's numbers against another's;
    `serial`, times on one device by chunk x steps; `claims`, their `verdicts`, which are `failing`, and their `bars` by number."""
    found = {name: numbers for name, numbers in metrics.items() if "/" not in name}
    part = lambda who: {key.removeprefix(f"{who}_"): value for key, value in metrics.get("plain", {}).items() if key.startswith(f"{who}_")}
    found["ablations"] = {name.removeprefix("ablations/"): numbers for name, numbers in metrics.items() if name.startswith("ablations/")}
    found["ablations"] |= {"teacher": metrics.get("plain", {})} | {who: part(who) for who in ("still", "causal", "two_steps")}
    found["versus"] = {row["name"].replace(" ", "_"): {} for row in comparisons}
    for row in comparisons:
        found["versus"][row["name"].replace(" ", "_")][row["than"].replace(" ", "_")] = row
    found["serial"] = {f"{row['chunk']}x{row['steps']}": row for row in metrics.get("latency_matrix", {}).get("rows", ()) if row["placement"] == "serial"}
    found["claims"], found["verdicts"] = claims, {name: verdict(row) for name, row in claims.items()}
    found["failing"] = ", ".join(name for name in CLAIMS if name in claims and claims[name]["holds"] is False)
    found["bars"] = {part["metric"]: part | dict(zip(("value_lo", "value_hi"), part["ci95"] or ())) for row in claims.values() for part in row["parts"]}
    return found


def rendered(template: str, metrics: dict[str, dict], claims: dict[str, dict], others: dict[str, dict] = {}) -> tuple[str, list[str]]:
    """A template's text with this run's numbers and those of `others` (`runs.load`), by name; and the sentences that these numbers no longer bear out. UserError for a number that is not there.

    `given(what, words)` in a template says what a sentence rests on.
    """
    from jinja2 import Environment, StrictUndefined, TemplateError

    outdated = []
    def given(true, words: str) -> str:
        if not true:
            outdated.append(words)
        return ""

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters |= {"d": decimals, "pct": lambda share: decimals(100 * share, 0), "claimed": claimed, "scored": scored}
    runs_known = {name: known(run.get("metrics", {}), run["claims"], run["ablations"]) for name, run in others.items()}
    try:
        return environment.from_string(template).render(known(metrics, claims, compared(metrics)) | runs_known | {
            "tally": tally(claims, others), "interval": interval, "given": given}), outdated
    except (TemplateError, KeyError, TypeError) as error:
        raise UserError(f"a number of the template is not in reports/ ({error}); run `make repro`, or mend the sentence") from None


def current(name: str) -> tuple[str, list[str]]:
    """`rendered`, of README.md or docs/results.md, from this tree's reports and data/runs."""
    root = Path(config.ROOT)
    template = (root / "docs" / f"{Path(name).name}.jinja").read_text(encoding="utf-8")
    try:
        return rendered(template, load_metrics(root), load_json(root / "reports" / "claims.json"), runs.load(root / "data" / "runs"))
    except UserError as error:
        raise UserError(f"docs/{Path(name).name}.jinja: {error}") from None


def main() -> None:
    if sys.argv[1:]:
        raise UserError("usage: python -m tmlib.readme")
    for name in WRITTEN:
        text, outdated = current(name)
        path = Path(config.ROOT) / name
        same = path.exists() and path.read_text(encoding="utf-8") == text
        if not same:
            with config.atomic(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        print(f"{name}: {'as it was' if same else 'written'}")
        for words in outdated:
            print(f"note: {name}: these numbers no longer bear out: {words}")


if __name__ == "__main__":
    cli(main)
