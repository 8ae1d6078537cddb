"""What other runs of the pipeline found, of another seed or at another scale, kept in data/runs for the report to set beside its own:

    make repro SCALE=seed_1 && python -m tmlib.runs seed_1
"""

import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

from . import config
from .claims import compared, load_metrics, verdict
from .config import UserError

ORIGIN = ("commit", "date", "machine", "python")


def keep(scale: str, root: Path) -> Path:
    """The verdicts of root/.scales/<scale>, how its ablations compare, and all its metrics but those clip by clip, as root/data/runs/<scale>.json, with where they are from; UserError before there are any."""
    made = root / ".scales" / scale / "reports" / "claims.json"
    if not made.is_file():
        raise UserError(f"{made}: not there; run `make repro SCALE={scale}` first")
    date = datetime.fromtimestamp(made.stat().st_mtime, timezone.utc).date().isoformat()
    origin = dict(zip(ORIGIN, ((root / ".scales" / scale / ".commit").read_text(encoding="utf-8"), date, f"{platform.system()} {platform.machine()}", platform.python_version())))
    path = root / "data" / "runs" / f"{scale}.json"
    metrics = load_metrics(root / ".scales" / scale)
    known = {name: numbers for name, numbers in metrics.items() if not name.startswith("per_clip/")}
    config.save_json(path, {**origin, "claims": config.load_json(made), "ablations": compared(metrics), "metrics": known})
    return path


def load(folder: Path, but: list[str] = ()) -> dict[str, dict]:
    """{scale: {"claims": as `claims.judge` gives them, "ablations": as `claims.compared` does}}, by name, `but` some; UserError for a file of another kind."""
    found = {}
    for path in sorted(path for path in Path(folder).glob("*.json") if path.stem not in but):
        found[path.stem] = kept = config.load_json(path)
        if not isinstance(kept, dict) or not isinstance(kept.get("claims"), dict) or not isinstance(kept.get("ablations"), list):
            raise UserError(f"{path}: not written by this tmlib.runs; remove it, or keep that run again")
    return found


def meant(part: dict) -> tuple[str, str]:
    """Which number a bar of claims.json looks at, and how. A number that comes to mean something else needs another name, or the other runs must be made again."""
    return part["metric"], part["comparison"]


def side_by_side(judged: dict[str, dict], others: dict[str, dict]) -> tuple[list[dict], dict[str, str]]:
    """Every bar with what each run has for it, as rows and headings of `report.write_table`: value, interval, verdict. Where a run did not have that bar
    it stays empty; a bar that only this run has is left out."""
    def cells(claims: dict, name: str, here: dict, prefix: str) -> dict:
        part = next((p for p in claims.get(name, {}).get("parts", ()) if meant(p) == meant(here)), None)
        ends = dict(zip((f"{prefix}_lo", f"{prefix}_hi"), part["ci95"])) if part and part["ci95"] else {}
        return {prefix: part and part["value"], f"{prefix}_verdict": part and verdict(part), **ends}

    each = {"here": judged, **{scale: run["claims"] for scale, run in others.items()}}
    rows = [{"name": name, "metric": part["metric"], "limit": part["bar"]} | {k: v for key, claims in each.items() for k, v in cells(claims, name, part, key).items()}
            for name, claim in judged.items() for part in claim["parts"]]
    rows = [row for row in rows if any(row[key] is not None for key in others)]
    columns = {key: heading for run in each for key, heading in ((run, run.replace("_", " ")), (f"{run}_verdict", "verdict"))}
    return rows, {"name": "", "metric": "number", **columns}


def repeated(rows: list[dict], others: dict[str, dict], headings: dict[str, str]) -> tuple[list[dict], dict[str, str]]:
    """Comparisons of ablations (`claims.compared`), with columns for those that other runs made too: whoever wants to know how much of a difference is luck looks along a row."""
    numbers = [key for key in headings if key not in ("name", "than")]
    wider = {f"{run}_{key}": f"{headings[key]}, {run.replace('_', ' ')}" for run in others for key in numbers}
    def more(row: dict) -> dict:
        same = {run: next((r for r in kept["ablations"] if (r["name"], r["than"]) == (row["name"], row["than"])), {}) for run, kept in others.items()}
        return {f"{run}_{key}{end}": there.get(f"{key}{end}") for run, there in same.items() for key in numbers for end in ("", "_lo", "_hi")}
    return [row | more(row) for row in rows], headings | wider


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("usage: python -m tmlib.runs SCALE, after `make repro SCALE=...`")
    if sys.argv[1] == "smoke":
        raise UserError("smoke: its models are hardly trained, so there is nothing to set beside another run")
    print(keep(sys.argv[1], config.ROOT).relative_to(config.ROOT))


if __name__ == "__main__":
    config.cli(main)
