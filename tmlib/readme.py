"""README's tables of claims and of ablations, from reports/:  python -m tmlib.readme

The words of a row stay as somebody wrote them; measured values, bar and verdict are filled in, and how many claims hold. A test compares the two.
"""
import re
from collections import Counter
from pathlib import Path

from . import config, runs
from .claims import SIGNS, verdict
from .config import UserError, cli, load_json
from .figures import shown
from .report import measured

RUN = ("lip_r", "frechet", "ssim", "movement", "seam_ratio", "stream_identity")           # of an ablation


def cells(row: dict) -> tuple[str, str, str]:
    """A claim of claims.json -> measured, bar, verdict."""
    if row["value"] is None:
        return "–", "", f"not measured: {row['reason']}"
    reason = f": {row['reason']}" if row["holds"] is None else ""
    value, *ends = measured(row)
    interval = " ({} to {})".format(*ends) if ends else ""
    return f"{row['why'].partition(';')[0]}: {value}{interval}", f"{SIGNS[row['comparison']]} {shown(row['bar'])}", verdict(row) + reason


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


def numbers(run: dict) -> list[str]:
    """An ablation's cells. Chunks of other sizes have other seams, at which real clips change by more or less, so the seam ratio is one over theirs."""
    value = lambda key: run[key] / run.get(f"{key}_real", 1) if key == "seam_ratio" else run[key]
    return [shown(value(key)) if key in run else "–" for key in RUN]


def before(plain: dict) -> dict[str, dict]:
    """What notebook 69 scored before anything was distilled, by its name in README's table."""
    part = lambda who: {key.removeprefix(f"{who}_"): value for key, value in plain.items() if key.startswith(f"{who}_")}
    return {"teacher": plain} | {who: part(who) for who in ("still", "causal", "two_steps")}


def refilled(text: str, block: str, rows: dict[str, dict], cells) -> str:
    """`text` with the cells behind the words of every row `| name | words | ...` between the marks of `block` made anew, of rows[name]; UserError for one that is not there."""
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, opened, rest = text.partition(begin)
    table, closed, after = rest.partition(end)
    if not (opened and closed):
        raise UserError(f"README.md: the marks {begin} and {end} are missing; put them around the table of {block}")

    def row(found: re.Match) -> str:
        if found[1] not in rows:
            raise UserError(f"README.md: the table of {block} has a row {found[1]}, reports/ has not; run `make repro`")
        return f"| {found[1]} | {found[2]} | {' | '.join(cells(rows[found[1]]))} |"
    return before + begin + re.sub(r"^\| (\w+) \| (.*?) \|.*$", row, table, flags=re.M) + end + after


def filled(text: str, claims: dict[str, dict], ablations: dict[str, dict], others: dict[str, dict] = {}) -> str:
    """README's text with both tables and the tally made anew; claims: of claims.json; ablations: of metrics/ablations; others: of data/runs."""
    text = re.sub(r"^Of the paper's \d+ claims .*$", tally(claims, others), text, flags=re.M)
    return refilled(refilled(text, "claims", claims, cells), "ablations", ablations, numbers)


def current(text: str) -> str:
    """`filled` from this run's reports."""
    ablations = {path.stem: load_json(path) for path in (config.METRICS / "ablations").glob("*.json")} | before(load_json(config.METRICS / "plain.json"))
    return filled(text, load_json(config.REPORTS / "claims.json"), ablations, runs.load(config.DATA / "runs"))


def main() -> None:
    path = Path(config.ROOT) / "README.md"
    text = current(path.read_text(encoding="utf-8"))
    with config.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli(main)
