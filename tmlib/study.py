"""Which of two would people rather watch, when they do not know which is which? `python -m tmlib.study make FOLDER` makes the page that asks them,
`python -m tmlib.study count FOLDER votes*.json` counts what they answered (claim N3).

Special here:
- both videos of a pair are one file, side by side with one sound, and there is a file for either order: a browser cannot let one of them lag;
- nothing in FOLDER says which is which. That is in FOLDER.key.json beside it, which voters must not get;
- checks are pairs of the same video, once with its pictures in reverse order: same face, same system, lips of nothing. `rule` says, before
  anybody votes, how many may be missed; the page holds it, and `count` refuses a key that has another;
- intervals resample voters and clips both: other people and other sentences might have been asked.
"""
import argparse
import json
import math
import re
import secrets
from collections import Counter
from pathlib import Path

import numpy as np

from . import config, media
from .config import Progress, UserError, atomic
from .rivals import Item, from_folders, loudness, rendered

QUESTIONS = {"lips": "Whose lips fit the words better?", "looks": "Who looks better?", "watch": "Which would you rather watch?"}
NAMES = {"watch": "preference", "lips": "lips_preference", "looks": "looks_preference"}          # in reports/metrics/user_study.json
ANSWERS = ("left", "none", "right")
GAP = 4                                         # pixels between the two videos


# ----------------------------------------------------------------------------------------------------------- make
def make(folder, items: list[Item], spare: list[Item], fps: int, against: str, scale: str | None = None, rng=None) -> dict:
    """Writes FOLDER (index.html and two videos a pair) and FOLDER.key.json, or neither; returns the key.

    items: films gives (ours, theirs). spare: films gives one video, for the checks. scale: of the models, if they are this workbook's.
    rng: a random.Random; by default one that nobody can repeat, or order and names would give the key away.
    """
    folder, rng, checks = Path(folder), rng or secrets.SystemRandom(), checks_for(len(items))
    free(folder)
    if len(spare) < checks:
        raise UserError(f"{len(spare)} videos to make checks of, {checks} are needed; give more clips")
    wrong = [Item(i.name, i.wave, lambda i=i: (f := i.films(), f[::-1])) for i in sorted(spare, key=lambda i: symmetry(i.wave))[:checks]]
    trials = [*((i, ("ours", "theirs")) for i in items), *((i, ("true", "reversed")) for i in wrong)]
    rng.shuffle(trials)
    token = lambda: f"{rng.getrandbits(64):016x}"
    page, hidden = {"study": token(), "questions": QUESTIONS, "rule": rule(checks), "trials": []}, {}
    progress = Progress(len(trials), "study")
    with atomic(folder) as temporary:
        temporary.mkdir()
        for item, who in trials:
            first, files, name, films = rng.randrange(2), [f"{token()}.mp4" for _ in range(2)], token(), item.films()
            for at, file in enumerate(files):
                left, right = films[::-1] if at == first else films
                write_pair(temporary / file, left, right, item.wave, fps)
            page["trials"].append({"id": name, "files": files})
            hidden[name] = {"clip": item.name, "left": list(who[::-1] if first == 0 else who), "check": "reversed" in who}
            progress.step()
        template = Path(__file__).with_name("study_template.html").read_text(encoding="utf-8")
        text = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")
        (temporary / "index.html").write_text(template.replace("@STUDY@", text), encoding="utf-8")
        key = {"page": page, "trials": hidden, "against": against, **({"scale": scale} if scale else {})}
        config.save_json(key_of(folder), key)
    return key


def key_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.key.json"


def counted_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.counted.json"


def free(folder: Path) -> None:
    """UserError if a study, or anything else, would be written over: votes cannot be counted without their key."""
    if not folder.name:
        raise UserError(f"{folder}: has no name of its own, and the key is named after it; give a new folder")
    for path in (folder, key_of(folder)):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path}: is there already; choose another folder, or move it away together with its key and votes")


def checks_for(pairs: int) -> int:
    return max(3, -(-pairs // 6))


def rule(checks: int) -> dict:
    """Who is excluded, in words and as number."""
    misses = checks // 6
    return {"checks": checks, "misses": misses, "text": f"{checks} of the pairs are checks: in one of their two videos the lips are plainly wrong. "
            f"Whoever misses {'any' if not misses else f'more than {misses}'} of them in the first question is not counted."}


def chance(checks: int, misses: int, options: int) -> float:
    """Probability that somebody who clicks at random, `options` answers alike, is counted all the same."""
    return sum(math.comb(checks, m) * (1 - 1 / options) ** m / options ** (checks - m) for m in range(misses + 1))


def symmetry(wave: np.ndarray) -> float:
    """Correlation of loudness with itself in reverse: where it is high, lips in reverse might fit."""
    level = loudness(wave)
    return float((level * level[::-1]).sum() / max((level * level).sum(), 1e-12))


def write_pair(path: Path, left: np.ndarray, right: np.ndarray, wave: np.ndarray, fps: int) -> None:
    """Frames uint8 (T, H, W, 3), of one height, and their sound -> one mp4, as long as the shorter one."""
    T, H = min(len(left), len(right)), left.shape[1]
    gap, at = np.zeros((T, H, GAP, 3), np.uint8), lambda t: t * media.RATE // fps
    with media.VideoWriter(path, fps, (H, left.shape[2] + GAP + right.shape[2]), scale=max(1, media.WATCHABLE // H)) as video:
        for lo in range(0, T, fps):                             # second by second: memory, and an mp4 that plays while it loads
            hi = min(lo + fps, T)
            video.write(np.concatenate([left[lo:hi], gap[lo:hi], right[lo:hi]], 2), wave[at(lo):at(hi)])


# ---------------------------------------------------------------------------------------------------------- count
def count(folder, paths) -> dict:
    """Numbers of reports/metrics/user_study.json. Raises UserError, naming the file, for anything that is not one whole ballot a voter."""
    key = read_key(Path(folder))
    ballots, files = [], {}
    for path in map(Path, paths):
        voter, answers = ballot(path, key)
        if voter in files:
            raise UserError(f"{path}: the voter of {files[voter]} again; leave one of the two out")
        files[voter] = path
        ballots.append(answers)
    checks = [name for name, trial in key["trials"].items() if trial["check"]]
    pairs = [name for name, trial in key["trials"].items() if not trial["check"]]
    choice = lambda answers, name, question: chosen(answers[name], question, key["trials"][name]["left"])
    good = [b for b in ballots if sum(choice(b, name, "lips") != "true" for name in checks) <= key["page"]["rule"]["misses"]]
    if not good:
        raise UserError(f"{folder}: all {len(ballots)} voters failed the checks, so nothing can be counted; ask others")
    points = {"ours": 1.0, None: 0.5, "theirs": 0.0}
    out = {"voters": len(good), "excluded": len(ballots) - len(good), "clips": len(pairs), "votes": len(good) * len(pairs), "against": key["against"],
           **({"scale": key["scale"]} if "scale" in key else {})}
    for question, name in NAMES.items():
        out |= two_way(name, np.array([[points[choice(b, pair, question)] for pair in pairs] for b in good]))
    sides = Counter(b[pair]["watch"] for b in good for pair in pairs)
    out |= {"ties": sides["none"], "left_share": sides["left"] / decided if (decided := sides["left"] + sides["right"]) else None}
    return out | ({} if decided else {"left_share_reason": "every vote is a tie"})


def chosen(answer: dict, question: str, left: list[str]) -> str | None:
    """Who was preferred, by name; None: neither. left: who stands at the left in each of the pair's two files."""
    if answer[question] == "none":
        return None
    return left[answer["shown"] if answer[question] == "left" else 1 - answer["shown"]]


def two_way(name: str, scores: np.ndarray, n: int = 2000, seed: int = 0) -> dict[str, float]:
    """{name, name_lo, name_hi}: mean of scores (voters, clips) and its 95 % interval, voters and clips both drawn with replacement."""
    rng, (V, K) = np.random.default_rng(seed), scores.shape
    weights = lambda size: np.stack([np.bincount(draw, minlength=size) for draw in rng.integers(size, size=(n, size))]) / size
    means = np.einsum("nv,vk,nk->n", weights(V), scores, weights(K), optimize=True)
    lo, hi = np.percentile(means, [2.5, 97.5])
    return {name: float(scores.mean()), f"{name}_lo": float(lo), f"{name}_hi": float(hi)}


def read_key(folder: Path) -> dict:
    """FOLDER.key.json, if it is that of FOLDER's page."""
    key, index = config.load_json(key_of(folder), "give the folder that `make` wrote, with its key beside it"), folder / "index.html"
    try:
        page = re.search(r'<script type="application/json" id="study">(.*?)</script>', index.read_text(encoding="utf-8"), re.S)
    except OSError:
        raise UserError(f"{index}: not there; give the folder that `make` wrote") from None
    if not page or json.loads(page[1]) != (key.get("page") if isinstance(key, dict) else None):
        raise UserError(f"{key_of(folder)}: not the key of {index}, or one of them was changed; give the two as `make` wrote them")
    return key


def ballot(path: Path, key: dict) -> tuple[str, dict[str, dict]]:
    """One voter's file -> (voter, trial -> answer)."""
    votes, again = config.load_json(path, "ask the voter for it again"), "ask the voter for the file again, as the page gave it"
    if not isinstance(votes, dict) or set(votes) != {"study", "voter", "seed", "answers"}:
        raise UserError(f"{path}: not a file of votes; {again}")
    if votes["study"] != key["page"]["study"]:
        raise UserError(f"{path}: votes of another study; leave it out")
    if not isinstance(votes["voter"], str) or not re.fullmatch("[0-9a-f]{16}", votes["voter"]) or not isinstance(votes["answers"], list):
        raise UserError(f"{path}: its voter or its answers are malformed; {again}")
    answers = {}
    for n, row in enumerate(votes["answers"], 1):
        if not isinstance(row, dict) or set(row) != {"trial", "shown", "plays", *QUESTIONS}:
            raise UserError(f"{path}: answer {n} is malformed; {again}")
        if not isinstance(row["trial"], str) or row["trial"] not in key["trials"] or row["trial"] in answers:
            raise UserError(f"{path}: answer {n} is to no pair of this study, or the second one to its pair; {again}")
        if any(type(row[k]) is not int for k in ("shown", "plays")) or row["shown"] not in (0, 1) or row["plays"] < 1:
            raise UserError(f"{path}: answer {n} has shown {row['shown']!r}, plays {row['plays']!r}; {again}")
        if bad := [row[question] for question in QUESTIONS if row[question] not in ANSWERS]:
            raise UserError(f"{path}: answer {n} says {bad[0]!r}, not {', '.join(ANSWERS)}; {again}")
        answers[row["trial"]] = row
    if missing := len(key["trials"]) - len(answers):
        raise UserError(f"{path}: {missing} of {len(key['trials'])} pairs are not answered; ask the voter to finish")
    return votes["voter"], answers


# -------------------------------------------------------------------------------------------------------- command
def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tmlib.study", description="A blind side-by-side study: make its page, count its votes.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("make", help="write FOLDER, which voters get, and FOLDER.key.json, which they do not").add_argument
    add("folder", help="a new folder for the page and its videos")
    add("--clips", type=int, default=12, metavar="N", help="pairs, besides the checks (default 12)")
    add("--against", choices=("undistilled", "teacher"), default="undistilled",
        help="the baseline: the teacher's weights in as many steps as the student's, or in its own many steps (default undistilled)")
    add("--ours", metavar="DIR", help="compare videos of this folder instead ...")
    add("--theirs", metavar="DIR", help="... with those of the same names in this one")
    add("--real", metavar="DIR", help="with them: true recordings, for the checks")
    add = commands.add_parser("count", help="votes -> reports/metrics/user_study.json, or FOLDER.counted.json where the videos are not this workbook's").add_argument
    add("folder", help="the folder that `make` wrote, its key beside it")
    add("votes", nargs="+", help="the voters' files")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    return (_make if args.command == "make" else _count)(args)


def _make(args) -> int:
    free(Path(args.folder))
    if bool(args.ours) != bool(args.theirs) or args.real and not args.ours:
        raise UserError("--ours, --theirs: give both, two folders of equally named .mp4 files; --real goes with them")
    if args.clips < 1:
        raise UserError(f"--clips {args.clips}: give at least 1")
    if args.ours:
        items, spare, fps = from_folders(args.ours, args.theirs, args.real)
        key = make(args.folder, items, spare, fps, str(Path(args.theirs).name))
    else:
        items, spare, fps, scale = rendered(args.clips, checks_for(args.clips), args.against)
        key = make(args.folder, items, spare, fps, args.against, scale)
    folder, rules = Path(args.folder), key["page"]["rule"]
    print(f"{folder / 'index.html'}: {len(items)} pairs and {rules['checks']} checks; give people the whole folder, and keep {key_of(folder)} from them. "
          f"Random clicks pass the checks with a probability of {100 * chance(rules['checks'], rules['misses'], 3):.1f} %")
    return 0


def _count(args) -> int:
    from .claims import CLAIMS
    found, needed = count(args.folder, args.votes), next(bar.bar for bar in CLAIMS["N3"].bars if bar.key == "voters")
    own = "scale" in found                                      # videos of this workbook's student: N3 is about no other's
    config.save_json(out := config.METRICS / "user_study.json" if own else counted_of(Path(args.folder)), found)
    print(f"{out}: {100 * found['preference']:.0f} % ({100 * found['preference_lo']:.0f} to {100 * found['preference_hi']:.0f}) would rather watch ours than "
          f"{found['against']}; {found['voters']} voters, {found['excluded']} excluded, {found['clips']} clips, {found['ties']} ties."
          + (" For N3 in the report: dvc repro --force --single-item report" if own else ""))
    if own and found["voters"] < needed:
        print(f"too few: N3 asks for {needed} voters; with {found['voters']} it does not hold, whatever they prefer")
    return 0


if __name__ == "__main__":
    config.cli(main)
