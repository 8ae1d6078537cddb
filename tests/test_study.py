"""study, rivals: voters cannot learn which is which, the count gives back what simulated people prefer, and no odd file gets past it."""
import json
import random
import re
import shutil
import subprocess
from types import SimpleNamespace

import av
import numpy as np
import pytest
from fakes import FakeVAE
from films import write
from tiny import make_dit, make_latents

from tmlib import config, data, media, rivals, study
from tmlib.config import UserError
from tmlib.rivals import Item

NAMES = re.compile(rb"theirs|student|teacher|distill|baseline|\"check\"|talkingmachines", re.I)


def speech(seconds=1.0, seed=0):
    """Noise whose loudness comes and goes."""
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.uniform(0, 0.3, round(20 * seconds)), media.RATE // 20)
    return (level * rng.standard_normal(len(level))).astype(np.float32)


def still(grey, frames=4, side=16):
    return np.full((frames, side, side, 3), grey, np.uint8)


def pairs(n, first=0):
    """Ours is bright, theirs dark; a real one goes from black to white."""
    ramp = np.linspace(0, 255, 4).astype(np.uint8)[:, None, None, None] + np.zeros((1, 16, 16, 3), np.uint8)
    items = [Item(f"test {i}", speech(seed=i), lambda: (still(220), still(40))) for i in range(first, first + n)]
    return items, [Item(f"real {i}", speech(seed=100 + i), lambda: ramp) for i in range(6)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies") / "one"
    return folder, study.make(folder, *pairs(8), fps=4, against="undistilled", scale="mini")


def fake_key(clips=12, seed=0):
    """A key as `make` writes it, without videos."""
    rng, checks = random.Random(seed), study.checks_for(clips)
    names = [(f"{rng.getrandbits(64):016x}", n >= clips) for n in range(clips + checks)]
    order = lambda check: rng.sample(["true", "reversed"] if check else ["ours", "theirs"], 2)
    return {"page": {"study": "5" * 16, "rule": study.rule(checks), "questions": study.QUESTIONS, "trials": [{"id": n, "files": []} for n, _ in names]},
            "trials": {n: {"clip": n, "left": order(check), "check": check} for n, check in names}, "against": "undistilled", "scale": "mini"}


def put(folder, key, ballots):
    """Page, key and files of votes below `folder`; returns (study folder, files)."""
    (folder / "s").mkdir(exist_ok=True)
    (folder / "s" / "index.html").write_text(f'<script type="application/json" id="study">{json.dumps(key["page"])}</script>')
    (folder / "s.key.json").write_text(json.dumps(key))
    files = [folder / f"votes-{n}.json" for n in range(len(ballots))]
    for file, votes in zip(files, ballots):
        file.write_text(json.dumps(votes))
    return folder / "s", files


def vote(key, number, rng, choose):
    """One voter's file. choose: (question, clip, check) -> who is preferred, or None."""
    answers = []
    for name, trial in key["trials"].items():
        shown = rng.randrange(2)
        side = lambda who: "none" if who is None else "left" if trial["left"][shown] == who else "right"
        answers.append({"trial": name, "shown": shown, "plays": 1} | {q: side(choose(q, trial["clip"], trial["check"])) for q in study.QUESTIONS})
    rng.shuffle(answers)
    return {"study": key["page"]["study"], "voter": f"{number:016x}", "seed": number, "answers": answers}


def attentive(rng, p=0.7, ties=0.1):
    """Finds what is reversed; prefers ours with probability p where it is not a tie."""
    return lambda question, clip, check: "true" if check else None if rng.random() < ties else "ours" if rng.random() < p else "theirs"


def clicker(rng, key, number):
    votes = vote(key, number, rng, lambda *_: None)
    for row in votes["answers"]:
        row |= {q: rng.choice(study.ANSWERS) for q in study.QUESTIONS}
    return votes


# ----------------------------------------------------------------------------------------------------------- make
def test_nothing_that_voters_get_says_which_is_which(made):
    folder, key = made
    files = sorted(folder.iterdir())
    assert len(files) == 1 + 2 * (8 + 3) and json.loads((folder.parent / "one.key.json").read_text()) == key
    for file in files:
        assert file.name == "index.html" or re.fullmatch(r"[0-9a-f]{16}\.mp4", file.name)
        assert not NAMES.search(file.read_bytes()), file
    assert not re.search(r"\bours\b", (folder / "index.html").read_text())
    page = study.read_key(folder)["page"]
    assert {f for t in page["trials"] for f in t["files"]} == {f.name for f in files} - {"index.html"}
    assert all(set(trial) == {"id", "files"} for trial in page["trials"])          # checks look like all the others
    assert sum(trial["check"] for trial in key["trials"].values()) == 3 == page["rule"]["checks"]


def test_the_page_needs_no_network(made):
    text = (made[0] / "index.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|sendBeacon|<link|localStorage|cookie", text)
    assert "No personal data is collected" in text and "@STUDY@" not in text


def test_videos_are_what_the_key_says(made):
    folder, key = made
    for trial in key["page"]["trials"]:
        hidden = key["trials"][trial["id"]]
        for file, left in zip(trial["files"], hidden["left"]):
            with av.open(str(folder / file)) as container:
                frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
            light = lambda frame: (frame[:, :384].mean(), frame[:, -384:].mean())
            assert len(frames) == 4 and frames[0].shape == (384, 2 * 384 + 24 * study.GAP, 3)
            (a, b), (c, d) = light(frames[0]), light(frames[-1])
            assert (a > b) == {"ours": True, "theirs": False, "true": False, "reversed": True}[left]
            assert not hidden["check"] or (c > d) != (a > b)
            assert len(media.read_audio(folder / file)) == pytest.approx(media.RATE, rel=0.1)


@pytest.fixture
def unwritten(monkeypatch):
    """Videos are empty files: what is drawn does not depend on them."""
    monkeypatch.setattr(study, "write_pair", lambda path, *_: path.touch())


def test_sides_names_and_order_are_drawn_anew(tmp_path, unwritten):
    keys = [study.make(tmp_path / str(n), *pairs(12), fps=4, against="x") for n in range(20)]
    assert len({name for key in keys for name in key["trials"]}) == 20 * 15 and len({key["page"]["study"] for key in keys}) == 20
    orders = [[key["trials"][t["id"]] for t in key["page"]["trials"]] for key in keys]
    assert len({json.dumps([t["clip"] for t in order]) for order in orders}) == 20
    first = [t["left"][0] in ("ours", "true") for order in orders for t in order]
    checks = [at for order in orders for at, t in enumerate(order) if t["check"]]
    assert 0.35 < np.mean(first) < 0.65 and 4 < np.mean(checks) < 10                    # of 300 and of 60: 5 standard deviations


def test_what_is_there_is_not_written_over_and_a_failure_leaves_nothing(tmp_path, unwritten):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="full: is there already"):
        study.make(tmp_path / "full", *pairs(1), fps=4, against="x")
    (tmp_path / "old.key.json").write_text("{}")
    with pytest.raises(UserError, match="old.key.json: is there already"):
        study.make(tmp_path / "old", *pairs(1), fps=4, against="x")
    with pytest.raises(UserError, match="no name of its own"):
        study.main(["make", "."])
    items, spare = pairs(2)
    with pytest.raises(UserError, match="2 videos to make checks of, 3 are needed"):
        study.make(tmp_path / "few", items, spare[:2], fps=4, against="x")
    broken = [*items, Item("broken", speech(), lambda: 1 / 0)]
    with pytest.raises(ZeroDivisionError):
        study.make(tmp_path / "new", broken, spare, fps=4, against="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "old.key.json"] and (tmp_path / "full" / "thesis.txt").exists()


def test_random_clicks_seldom_pass():
    assert study.rule(3)["misses"] == 0 and study.rule(6)["misses"] == 1
    assert study.chance(3, 0, 3) == pytest.approx(1 / 27) and study.chance(3, 0, 2) == pytest.approx(1 / 8)
    assert study.chance(6, 1, 3) == pytest.approx(13 / 729)
    assert [study.checks_for(n) for n in (1, 12, 18, 19, 36)] == [3, 3, 3, 4, 6]


def test_checks_are_made_of_speech_that_reversed_is_another(tmp_path, unwritten):
    even = np.concatenate([speech(0.5), speech(0.5)[::-1]])
    assert study.symmetry(even) > 0.99 > study.symmetry(speech(seed=3)) + 0.3
    spare = [Item("even", even, lambda: still(1)), *pairs(1)[1][:3]]
    key = study.make(tmp_path / "a", pairs(1)[0], spare, fps=4, against="x")
    assert "even" not in {trial["clip"] for trial in key["trials"].values()}


def test_the_models_videos_become_pairs(root, monkeypatch, capsys):
    """Tiny networks in the folders of a run: the student's, and those of the teacher's weights, in its own way and in the student's."""
    from tmlib import wan_vae
    from tmlib.dit import WanDiT

    def clip(n):
        return data.Clip(still(n, 21, 32), speech(21 / 16, n), np.zeros((21, 3), np.float32), np.ones(21, bool), *np.zeros((2, 21, 4), np.float32), [], "")

    n = 6
    meta = [{"kind": "listening" if i == 1 else "speaking", "style": data.STYLES[i % 3], "fps": 16} for i in range(n)]
    shutil.copy(study.__file__.replace("tmlib/study.py", "params.yaml"), root / "params.yaml")
    (root / "data" / "latents").mkdir(parents=True)
    data.save_split(root / "data" / "clips", "test", n, ((clip(i), m) for i, m in enumerate(meta)))
    made = make_latents(root, n)
    (root / "latents.safetensors").rename(root / "data" / "latents" / "test.safetensors")
    config.save_json(root / "data" / "models" / "student" / "stream.json", dict(steps=2, shift=3.0, chunk=3, cache="per_step"))
    loaded = []
    monkeypatch.setattr(wan_vae, "load_codec", lambda folder, device: FakeVAE())
    monkeypatch.setattr(config, "seed_everything", lambda *_: None)
    monkeypatch.setattr(WanDiT, "from_pretrained", lambda path, **_: (loaded.append(path.name), make_dit(seed=len(loaded) % 2))[1])
    assert made.shape[1] == 6
    items, spare, fps, scale = rivals.rendered(2, 3, "undistilled")
    assert [item.name for item in items] == ["test 0", "test 2"] and len(spare) == 3 and (fps, scale) == (16, "mini")
    a, b = items[0].films()
    c, d = rivals.rendered(2, 3, "teacher")[0][0].films()
    assert a.shape == b.shape == (21, 32, 32, 3) and (a != b).any() and (a == c).all() and (d != b).any()
    assert loaded == ["student", "teacher"] * 2
    with pytest.raises(UserError, match="--clips 3: with 3 checks more than the 5 speaking clips"):
        study.main(["make", str(root / "x"), "--clips", "3"])
    assert study.main(["make", str(root / "x"), "--clips", "1"]) == 0
    assert "1 pairs and 3 checks" in capsys.readouterr().out and (root / "x" / "index.html").exists()


# ---------------------------------------------------------------------------------------------- videos from folders
def put_videos(folder, names=("a", "b", "c"), side=32, grey=99, fps=16, delay=0, seed=0, frames=None):
    for n, name in enumerate(names):
        sound = np.roll(speech(2.0, seed=seed + n), delay)
        write(folder / f"{name}.mp4", still(grey, frames or 2 * fps, side), sound, fps)
    return folder


def test_anybodys_videos_are_compared_at_one_height_and_rate(tmp_path):
    ours, theirs = put_videos(tmp_path / "mine", grey=220), put_videos(tmp_path / "others", side=48, grey=40, fps=30)
    assert study.main(["make", str(tmp_path / "s"), "--ours", str(ours), "--theirs", str(theirs)]) == 0
    key = json.loads((tmp_path / "s.key.json").read_text())
    assert key["against"] == "others" and "scale" not in key and len(key["trials"]) == 6
    assert not any(re.search(rb"mine|others", file.read_bytes()) for file in (tmp_path / "s").glob("*.html"))
    a, b = rivals.from_folders(ours, theirs)[0][0].films()
    assert a.shape[1:] == b.shape[1:] == (48, 48, 3) and abs(len(a) - 50) <= 1 and abs(len(b) - 50) <= 1
    real = put_videos(tmp_path / "real", names="xyz", seed=50)
    assert [item.name for item in rivals.from_folders(ours, theirs, real)[1]] == ["x.mp4", "y.mp4", "z.mp4"]


@pytest.mark.parametrize("change, told", [
    (dict(names="ab"), r"ours/c.mp4: not in .*theirs \(1 such"), (dict(names="abcd"), r"theirs/d.mp4: not in .*ours"),
    (dict(seed=9), "theirs/a.mp4: its sound is not that of"), (dict(delay=1600), "theirs/a.mp4: its sound comes 100 ms after")])
def test_folders_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, change, told):
    put_videos(tmp_path / "ours"), put_videos(tmp_path / "theirs", **change)
    with pytest.raises(UserError, match=told):
        study.main(["make", str(tmp_path / "s"), "--ours", str(tmp_path / "ours"), "--theirs", str(tmp_path / "theirs")])
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.key.json").exists()


def test_odd_arguments_and_videos(tmp_path):
    run = lambda *args: study.main(["make", str(tmp_path / "s"), *map(str, args)])
    ours = put_videos(tmp_path / "ours")
    for args, told in ((["--ours", ours], "give both"), (["--real", ours], "give both"), (["--clips", 0], "at least 1"),
                       (["--ours", ours, "--theirs", tmp_path / "no"], "no such folder"), (["--ours", ours, "--theirs", tmp_path], "holds no .mp4")):
        with pytest.raises(UserError, match=told):
            run(*args)
    theirs = put_videos(tmp_path / "theirs", frames=16)
    with pytest.raises(UserError, match="theirs/[abc].mp4: 1.0 s of pictures"):
        run("--ours", ours, "--theirs", theirs)
    write(theirs / "a.mp4", still(9), None)
    with pytest.raises(UserError, match="a.mp4: no sound"):
        run("--ours", ours, "--theirs", theirs)
    write(theirs / "a.mp4", still(9, 16 * 14), speech(14.0))
    with pytest.raises(UserError, match="a.mp4: lasts 14 s"):
        run("--ours", ours, "--theirs", theirs)
    (theirs / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match="a.mp4: not a video"):
        run("--ours", ours, "--theirs", theirs)
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------------------------------------------------- count
def test_what_people_prefer_is_what_is_counted(root, tmp_path, capsys):
    """Everybody's every answer is known here: 12 voters, 12 clips; ours 6 times, theirs 4 times, no difference twice."""
    key, rng = fake_key(), random.Random(1)
    clips = [n for n, t in key["trials"].items() if not t["check"]]
    says = lambda question, clip, check: "true" if check else {"watch": ["ours"] * 6 + ["theirs"] * 4 + [None] * 2, "lips": ["ours"] * 12,
                                                               "looks": [None] * 12}[question][clips.index(clip)]
    folder, files = put(tmp_path, key, [vote(key, n, rng, says) for n in range(12)])
    assert study.main(["count", str(folder), *map(str, files)]) == 0
    found = json.loads((root / "reports" / "metrics" / "user_study.json").read_text())
    assert found["preference"] == pytest.approx(7 / 12, abs=1e-5) and found["lips_preference"] == found["lips_preference_lo"] == 1
    assert found["looks_preference"] == found["looks_preference_hi"] == 0.5
    assert (found["voters"], found["excluded"], found["clips"], found["votes"], found["ties"], found["against"]) == (12, 0, 12, 144, 24, "undistilled")
    assert 0.3 < found["left_share"] < 0.7 and found["preference_lo"] < 7 / 12 < found["preference_hi"]
    out = capsys.readouterr().out
    assert "58 % (" in out and "12 voters" in out and "too few" not in out
    study.main(["count", str(folder), *map(str, files[:3])])
    assert "too few: N3 asks for 10 voters" in capsys.readouterr().out


def test_votes_on_others_videos_are_no_evidence_for_the_claim(root, tmp_path, capsys):
    key, rng = fake_key(), random.Random(1)
    del key["scale"]
    folder, files = put(tmp_path, key, [vote(key, n, rng, attentive(rng)) for n in range(3)])
    assert study.main(["count", str(folder), *map(str, files)]) == 0
    assert json.loads((tmp_path / "s.counted.json").read_text())["voters"] == 3 and not (root / "reports").exists()
    assert "N3" not in capsys.readouterr().out
    assert [study.counted_of(tmp_path / name).name for name in ("s.a", "s.b")] == ["s.a.counted.json", "s.b.counted.json"]


def test_ten_voters_are_needed_for_the_claim():
    from tmlib import claims
    judged = lambda voters: claims.judge({"user_study": {"preference": 0.9, "preference_lo": 0.8, "preference_hi": 0.95, "voters": voters}})["N3"]
    assert judged(10)["holds"] is True and judged(9)["holds"] is False
    assert judged(9)["metric"] == "user_study:voters"


def test_intervals_cover_the_truth_over_voters_and_clips(tmp_path):
    """Voters and clips both differ: 100 studies; an interval that resampled votes alone would miss far more often."""
    hits, naive = 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        p = np.clip(0.65 + 0.12 * rng.standard_normal((15, 1)) + 0.12 * rng.standard_normal((1, 12)), 0, 1)
        scores = (rng.random((15, 12)) < p).astype(float)
        found = study.two_way("p", scores, n=400)
        hits += found["p_lo"] <= 0.65 <= found["p_hi"]
        half = 1.96 * scores.std() / np.sqrt(scores.size)
        naive += abs(scores.mean() - 0.65) <= half
    assert hits >= 93 and naive < hits


def test_random_clickers_are_excluded_and_do_not_move_the_number(tmp_path):
    key, rng = fake_key(), random.Random(3)
    people = [vote(key, n, rng, attentive(rng)) for n in range(20)]
    clicks = [clicker(rng, key, 100 + n) for n in range(270)]
    folder, files = put(tmp_path, key, people + clicks)
    found = study.count(folder, files)
    passed = found["voters"] - 20
    assert passed + found["excluded"] == 270 and 2 <= passed <= 20                       # 1 in 27: 10 of 270, 3 standard deviations are 9.3
    alone = study.count(folder, files[:20])
    assert alone["excluded"] == 0 and alone["preference_lo"] < 0.9 * 0.7 + 0.05 < alone["preference_hi"]


def test_with_more_checks_one_may_be_missed(tmp_path):
    key, rng = fake_key(36), random.Random(4)
    checks = [n for n, t in key["trials"].items() if t["check"]]
    ballots = [vote(key, n, rng, lambda q, clip, check, n=n: (None if clip in checks[:n] else "true") if check else "ours") for n in range(3)]
    folder, files = put(tmp_path, key, ballots)
    found = study.count(folder, files)
    assert (found["voters"], found["excluded"]) == (2, 1)
    with pytest.raises(UserError, match="all 1 voters failed the checks"):
        study.count(folder, files[2:])


def test_the_count_does_not_depend_on_sides_or_order(tmp_path):
    key, rng = fake_key(), random.Random(5)
    ballots = [vote(key, n, rng, attentive(rng)) for n in range(10)]
    folder, files = put(tmp_path, key, ballots)
    before = study.count(folder, files)
    other = {"left": "right", "right": "left", "none": "none"}
    for votes in ballots:
        for row in votes["answers"]:
            row |= {"shown": 1 - row["shown"]} | {q: other[row[q]] for q in study.QUESTIONS}
        rng.shuffle(votes["answers"])
    after = study.count(*put(tmp_path, key, ballots))
    assert after.pop("left_share") == pytest.approx(1 - before.pop("left_share")) and after == before


def test_all_ties_have_no_side(tmp_path):
    key, rng = fake_key(), random.Random(6)
    folder, files = put(tmp_path, key, [vote(key, 1, rng, lambda q, clip, check: "true" if check else None)])
    found = study.count(folder, files)
    assert found["left_share"] is None and found["left_share_reason"] and found["preference"] == 0.5 and found["ties"] == 12


def change(**what):
    return lambda votes: votes | what


def answer(**what):
    def changed(votes):
        votes["answers"][2] |= what
        return votes
    return changed


ODD = {
    "another study": change(study="6" * 16), "voter": change(voter="Ann"), "no text": change(voter=7), "answers are malformed": change(answers=None),
    "not a file of votes": lambda v: [v], "not a file": lambda v: v | {"name": "Ann"}, "not a file of": lambda v: {k: v[k] for k in v if k != "seed"},
    "1 of 15 pairs are not answered": lambda v: v | {"answers": v["answers"][1:]}, "second one to its pair": lambda v: v | {"answers": v["answers"] * 2},
    "answer 3 is to no pair": answer(trial="7" * 16), "answer 3 is to": answer(trial=["x"]), "shown 2": answer(shown=2), "shown True": answer(shown=True),
    "plays 0": answer(plays=0), "answer 3 says 'both'": answer(lips="both"), r"answer 3 says \[\]": answer(watch=[]), "answer 3 is malformed": answer(extra=1),
    "answer 1 is malformed": lambda v: v | {"answers": [3]},
}


@pytest.mark.parametrize("told", ODD)
def test_every_odd_file_has_its_line_and_nothing_is_written(root, tmp_path, told):
    key, rng = fake_key(), random.Random(7)
    good = [vote(key, n, rng, attentive(rng)) for n in range(2)]
    folder, files = put(tmp_path, key, [good[0], ODD[told](good[1])])
    line = "voter or its answers" if told in ("voter", "no text") else told
    with pytest.raises(UserError, match=rf"votes-1\.json: .*{line}"):
        study.main(["count", str(folder), *map(str, files)])
    assert not (root / "reports").exists()


def test_files_that_are_no_votes_at_all(tmp_path):
    key, rng = fake_key(), random.Random(8)
    folder, (file,) = put(tmp_path, key, [vote(key, 1, rng, attentive(rng))])
    copy = tmp_path / "votes-0 (1).json"
    copy.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"votes-0 \(1\).json: the voter of .*votes-0.json again"):
        study.count(folder, [file, copy])
    copy.write_text("{")
    for path, told in ((copy, "cannot be read"), (tmp_path / "no.json", "not there yet"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=told):
            study.count(folder, [path])
    copy.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        study.count(folder, [copy])


def test_a_rule_that_was_changed_afterwards_is_refused(tmp_path):
    key, rng = fake_key(), random.Random(9)
    folder, files = put(tmp_path, key, [vote(key, 1, rng, attentive(rng))])
    study.count(folder, files)
    key["page"]["rule"]["misses"] = 3
    (tmp_path / "s.key.json").write_text(json.dumps(key))
    with pytest.raises(UserError, match="s.key.json: not the key of"):
        study.count(folder, files)
    (folder / "index.html").unlink()
    with pytest.raises(UserError, match="index.html: not there"):
        study.count(folder, files)
    with pytest.raises(UserError, match="no.key.json: not there"):
        study.count(tmp_path / "no", files)


# ------------------------------------------------------------------------------------------------- the page itself
BROWSER = """
const fs = require("fs"), html = fs.readFileSync(process.argv[2], "utf8"), pick = process.argv[3], luck = Number(process.argv[4]);
Object.defineProperty(crypto, "getRandomValues", { value: into => into.map((_, i) => 3 * luck + i) });
const script = tag => html.split(tag)[1].split("</script>")[0];
class Element {
  constructor() { this.children = []; this.on = {}; }
  append(...more) { this.children.push(...more); }
  replaceChildren(...all) { this.children = all; }
  addEventListener(name, does) { this.on[name] = does; }
  focus() {} pause() {} select() {}
  play() { played.push(this.src); return Promise.resolve(); }
}
const played = [], byId = {}, blobs = [];
globalThis.document = { createElement: () => new Element(), getElementById: id => byId[id] ??= new Element() };
document.getElementById("study").textContent = script('id="study">');
globalThis.addEventListener = () => {};
["end", "trial", "intro"].forEach(document.getElementById);
globalThis.FormData = class { get() { return pick; } };
URL.createObjectURL = blob => (blobs.push(blob), "blob:");
(0, eval)(script("<script>"));
byId.begin.on.click();
const submit = () => byId.form.on.submit({ preventDefault() {} });
let early = 0;
while (byId.end.hidden !== false) {
  const where = byId.where.textContent;
  submit();                                             // not watched yet
  early += byId.where.textContent !== where || !byId.form.children.every(part => part.disabled);
  byId.play.on.click(); byId.video.on.ended(); byId.play.on.click(); byId.video.on.ended();
  early += byId.form.children.some(part => part.disabled);
  submit();
}
blobs[0].text().then(text => console.log(JSON.stringify({ text, shown: byId.text.value, name: byId.save.download, played, early })));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_page_asks_everything_once_and_gives_votes_that_count(made, tmp_path):
    folder, key = made
    (tmp_path / "browser.js").write_text(BROWSER)
    orders, files = [], []
    for luck in (1, 2, 3, 1):                               # what the page's only source of chance gives
        done = subprocess.run(["node", tmp_path / "browser.js", folder / "index.html", "left", str(luck)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        end = json.loads(done.stdout)
        votes = json.loads(end["text"])
        assert end["early"] == 0 and end["shown"] == end["text"] and end["name"] == f"votes-{votes['voter']}.json"
        files.append(tmp_path / end["name"])
        files[-1].write_text(end["text"])
        _, answers = study.ballot(files[-1], key)
        assert all(row["plays"] == 2 and row["watch"] == "left" for row in answers.values())
        named = {t["id"]: t["files"] for t in key["page"]["trials"]}
        assert end["played"][::2] == end["played"][1::2] == [named[row["trial"]][row["shown"]] for row in votes["answers"]]
        orders.append([(row["trial"], row["shown"]) for row in votes["answers"]])
    assert orders[3] == orders[0]
    assert len({tuple(order) for order in orders}) == 3 and len({json.dumps(sorted(order)) for order in orders}) == 3
