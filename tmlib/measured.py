"""What `python -m tmlib.bench` found on real machines, data/measured/*.json: rows of a table, and the numbers of claim C9."""

from pathlib import Path

from . import config
from .config import UserError

PAPER = ("talkingmachines-18b", "512", None)              # variant, size, layers (None: all): what C9 is about
SETTINGS = {"chunk3_steps2": (3, 2), "chunk7_steps4": (7, 4)}
KEPT = ("chunk", "steps", "form", "ms_p50", "tflops", "mfu", "dit_fps", "first_frames_ms", "picture_to_frames_ms", "peak_gb", "grown_bytes", "error")


def rows(folder: Path) -> list[dict]:
    """The newest measurement of every form at every setting on every device, with where it is from; fps: of the runtime, or else with the decoder at
    the better placement, or None. A file that is not the bench's -> UserError."""
    newest = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            for call in sorted(config.load_json(path).values(), key=lambda call: call["date"]):
                at, origin = call["options"], {key: call[key] for key in ("device", "date", "commit", "torch", "uncommitted_changes")}
                for run in call["runs"].values():
                    placed = {name: run[f"{name}_fps"] for name in ("serial", "overlap", "runtime") if f"{name}_fps" in run}
                    best = "runtime" if "runtime" in placed else max(placed, key=placed.get, default=None)
                    row = {**origin, "variant": at["variant"], "size": at["size"], "layers": at["layers"], **{key: run.get(key) for key in KEPT},
                           "fps": placed.get(best), "placement": best, "setting": f"{run['chunk']} x {run['steps']}"}
                    newest[row["device"], row["variant"], row["size"], row["layers"], row["setting"], row["form"]] = row
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not written by tmlib.bench ({type(error).__name__}: {error}); remove it or measure again") from error
    return sorted(newest.values(), key=lambda row: (row["device"], row["variant"], row["chunk"], row["steps"], row["ms_p50"]))


def full_size(folder: Path) -> dict:
    """The metrics `full_size` of the report, {} where nothing of the paper's shape was measured.

    Frame rates are the runtime's, or count the decoder, and are the best of any one device. Those of the claim are without fp8, of which the paper says nothing;
    with it they stand beside, as <setting>_fps_fp8. What is missing has a reason.
    """
    found = [row for row in rows(folder) if (row["variant"], row["size"], row["layers"]) == PAPER]
    if not found:
        return {}
    numbers = {"rows": found, "n": len(found)}
    for name, setting in SETTINGS.items():
        for suffix, fp8 in (("", False), ("_fp8", True)):
            here = [row for row in found if (row["chunk"], row["steps"]) == setting and ("fp8" in row["form"]) == fp8]
            best = max((row for row in here if row["fps"] is not None), key=lambda row: row["fps"], default=None)
            numbers[f"{name}_fps{suffix}"] = best and best["fps"]
            if best is None:
                what = "the DiT alone" if here else "nothing"
                numbers[f"{name}_fps{suffix}_reason"] = f"data/measured has {what} at chunk {setting[0]}, {setting[1]} steps in {'fp8' if fp8 else 'bf16'}"
            else:
                numbers |= {f"{name}_{key}{suffix}": best[key] for key in ("device", "date", "commit", "form", "placement", "first_frames_ms", "mfu")}
    return numbers
