"""README's claims table from reports/claims.json:  python -m tmlib.readme

The words of a row stay as somebody wrote them; measured value, bar and verdict are filled in, and how many hold. A test compares the two.
"""
import re
from pathlib import Path

from . import config
from .config import UserError, cli, load_json
from .figures import shown
from .report import SIGNS, beside, verdict

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"


def cells(row: dict) -> tuple[str, str, str]:
    """A claim of claims.json -> measured, bar, verdict."""
    if row["value"] is None:
        return "–", "", f"not measured: {row['reason']}"
    interval = " ({} to {})".format(*(beside(end, row["bar"]) for end in row["ci95"])) if row["ci95"] else ""
    return f"{row['why'].partition(';')[0]}: {beside(row['value'], row['bar'])}{interval}", f"{SIGNS[row['comparison']]} {shown(row['bar'])}", verdict(row)


def tally(claims: dict[str, dict]) -> str:
    """How many hold, in a sentence."""
    held = [row["holds"] for row in claims.values()]
    return f"Of {len(held)} claims {held.count(True)} hold, {held.count(False)} fail, {held.count(None)} could not be measured."


def filled(text: str, claims: dict[str, dict]) -> str:
    """`text` with the last three cells of every row between the marks made anew; UserError for a row that no claim has."""
    before, begin, rest = text.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"README.md: the marks {BEGIN} and {END} are missing; put them around the claims table")

    def row(found: re.Match) -> str:
        if found[1] not in claims:
            raise UserError(f"README.md: the claims table has a row {found[1]}, reports/claims.json has not; run `make repro`")
        return f"| {found[1]} | {found[2]} | {' | '.join(cells(claims[found[1]]))} |"
    table = re.sub(r"^Of \d+ claims .*$", tally(claims), table, flags=re.M)
    return before + begin + re.sub(r"^\| ([CN]\d+) \| (.*?) \|.*$", row, table, flags=re.M) + end + after


def main() -> None:
    path = Path(config.ROOT) / "README.md"
    text = filled(path.read_text(encoding="utf-8"), load_json(config.REPORTS / "claims.json"))
    with config.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli(main)
