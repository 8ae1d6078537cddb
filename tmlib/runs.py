"""What other runs of the pipeline found, of another seed or at another scale, kept in data/runs for the report to set beside its own:

    make repro SCALE=seed_1 && python -m tmlib.runs seed_1
"""

import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

from . import config
from .claims import verdict
from .config import UserError

ORIGIN = ("commit", "date", "machine", "python")


def keep(scale: str, root: Path) -> Path:
    """The verdicts of root/.scales/<scale> as root/data/runs/<scale>.json, with where they are from; UserError before there are any."""
    made = root / ".scales" / scale / "reports" / "claims.json"
    if not made.is_file():
        raise UserError(f"{made}: not there; run `make repro SCALE={scale}` first")
    date = datetime.fromtimestamp(made.stat().st_mtime, timezone.utc).date().isoformat()
    origin = dict(zip(ORIGIN, ((root / ".scales" / scale / ".commit").read_text(encoding="utf-8"), date, f"{platform.system()} {platform.machine()}", platform.python_version())))
    path = root / "data" / "runs" / f"{scale}.json"
    config.save_json(path, {**origin, "claims": config.load_json(made)})
    return path


def load(folder: Path, but: list[str] = ()) -> dict[str, dict]:
    """{scale: its claims, as `claims.judge` gives them}, by name, `but` some; UserError for a file of another kind."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        kept = config.load_json(path)
        if not isinstance(kept, dict) or not isinstance(kept.get("claims"), dict):
            raise UserError(f"{path}: not written by tmlib.runs; remove it, or keep that run again")
        if path.stem not in but:
            found[path.stem] = kept["claims"]
    return found


def meant(part: dict) -> tuple[str, str, str]:
    """What a bar of claims.json says: which number, how compared, in which words. Another state of the workbook may have meant something else."""
    return part["metric"], part["comparison"], part["why"]


def compared(judged: dict[str, dict], others: dict[str, dict]) -> tuple[list[dict], dict[str, str]]:
    """Every bar with what each run has for it, as rows and headings of `report.write_table`: value, interval, verdict. Where a run did not have that bar, or meant
    something else by it, it stays empty; a bar that only this run has is left out."""
    def found(run: dict, name: str, here: dict, prefix: str) -> dict:
        part = next((p for p in run.get(name, {}).get("parts", ()) if meant(p) == meant(here)), None)
        ends = dict(zip((f"{prefix}_lo", f"{prefix}_hi"), part["ci95"])) if part and part["ci95"] else {}
        return {prefix: part and part["value"], f"{prefix}_verdict": part and verdict(part), **ends}

    runs = {"here": judged, **others}
    rows = [{"name": name, "metric": part["metric"], "limit": part["bar"]} | {k: v for key, run in runs.items() for k, v in found(run, name, part, key).items()}
            for name, claim in judged.items() for part in claim["parts"]]
    rows = [row for row in rows if any(row[key] is not None for key in others)]
    columns = {key: heading for run in runs for key, heading in ((run, run.replace("_", " ")), (f"{run}_verdict", "verdict"))}
    return rows, {"name": "", "metric": "number", **columns}


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python -m tmlib.runs SCALE")
    print(keep(sys.argv[1], config.ROOT).relative_to(config.ROOT))


if __name__ == "__main__":
    config.cli(main)
