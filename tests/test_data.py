"""data: clips are functions of their specs, test clips share nothing with training, and batches are cut as promised."""
import dataclasses
import errno
import os
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch

from tmlib import avatar, data, speech
from tmlib.config import UserError
from tmlib.data import Clips, Spec, box_map, make_clip, per_latent, specs, to_float, to_uint8, write_split

KINDS = {"speaking": 0.7, "listening": 0.3}
SMALL = dict(frames=33, size=32)


# ---- specs -------------------------------------------------------------------------------------

def test_specs_are_determined_and_in_proportion():
    made = specs("train", 60, KINDS, 12, seed=3, **SMALL)
    assert made == specs("train", 60, KINDS, 12, seed=3, **SMALL) != specs("train", 60, KINDS, 12, seed=4, **SMALL)
    assert [s.style for s in made[:6]] == ["flat", "line", "soft3d"] * 2
    for style in data.STYLES:
        kinds = [s.kind for s in made if s.style == style]
        assert [kinds.count(k) for k in KINDS] == [14, 6]                # in every style
        assert set(np.diff([i for i, k in enumerate(kinds) if k == "listening"])) <= {3, 4}                  # spread evenly
    assert len({(s.identity, s.style) for s in made}) == 12 and len({s.seed for s in made}) == 60
    assert all((s.frames, s.size, s.fps) == (33, 32, 16) for s in made)
    assert [len(specs("test", n, KINDS, 3, 0)) for n in (1, 5, 7)] == [1, 5, 7]


def test_each_of_several_kinds_gets_its_share():
    kinds = {"speaking": 0.86, "listening": 0.07, "ending": 0.07}
    made = [data.kind_of(m, kinds) for m in range(200)]
    assert [made.count(k) for k in kinds] == [172, 14, 14]
    rest = [k for k in made if k != "speaking"]
    assert all(a != b for a, b in zip(rest, rest[1:]))                       # in turn
    assert [data.kind_of(m, {"generic": 1.0}) for m in range(3)] == ["generic"] * 3


def test_what_is_held_out_is_held_out():
    made = {split: specs(split, 30, KINDS, 30, seed=0) for split in speech.SPLITS}
    pairs = list(combinations(speech.SPLITS, 2))
    assert not any({s.identity for s in made[a]} & {s.identity for s in made[b]} for a, b in pairs)
    assert not any({s.seed for s in made[a]} & {s.seed for s in made[b]} for a, b in pairs)
    lists = {split: data.word_list(split) for split in speech.SPLITS}
    spoken = {split: (set(v), set(s)) for split, (v, s) in lists.items()}
    assert all(voices and sentences for voices, sentences in spoken.values())
    assert not any(spoken[a][k] & spoken[b][k] for a, b in pairs for k in (0, 1))
    looks = lambda some: {repr(avatar.sample_identity(np.random.default_rng([7, s.identity]), s.style)) for s in some}
    assert not any(looks(made[a]) & looks(made[b]) for a, b in pairs)


# ---- clips -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clips():
    return {kind: make_clip(Spec(11, "test", kind, "flat", 5, **SMALL)) for kind in ("speaking", "listening", "ending", "generic")}


@pytest.mark.parametrize("kind", ["speaking", "listening", "ending", "generic"])
def test_lengths_agree(clips, kind):
    clip = clips[kind]
    assert clip.frames.shape == (33, 32, 32, 3) and clip.frames.dtype == np.uint8
    assert clip.wave.shape == (33000,) and clip.wave.dtype == np.float32 and np.abs(clip.wave).max() <= 1       # 33 / 16 s
    assert clip.truth.shape == (33, 3) and clip.truth.min() >= 0 and clip.truth.max() <= 1
    assert clip.speaking.shape == (33,) and clip.mouth.shape == clip.face.shape == (33, 4)
    for box in (clip.mouth, clip.face):
        assert box.min() >= 0 and box.max() <= 32 and (box[:, 2:] > box[:, :2]).all()
    middle = (clip.mouth[:, :2] + clip.mouth[:, 2:]) / 2
    assert (middle > clip.face[:, :2]).all() and (middle < clip.face[:, 2:]).all()


@pytest.mark.parametrize("kind", ["speaking", "generic"])
def test_a_clip_is_a_function_of_its_spec(clips, kind):
    again = make_clip(Spec(11, "test", kind, "flat", 5, **SMALL))
    for f in dataclasses.fields(again):
        np.testing.assert_equal(getattr(again, f.name), getattr(clips[kind], f.name))
    assert not np.array_equal(make_clip(Spec(12, "test", kind, "flat", 5, **SMALL)).frames, again.frames)
    assert not np.array_equal(make_clip(Spec(11, "test", kind, "flat", 6, **SMALL)).frames, again.frames)


def test_listening_is_silent_and_closed(clips):
    clip = clips["listening"]
    assert np.sqrt((clip.wave ** 2).mean()) <= data.QUIET * 1.1 and clip.wave.any()         # room noise, not digital zero
    np.testing.assert_allclose(clip.truth, np.tile(np.float32(avatar.NEUTRAL), (33, 1)), atol=1e-6)
    assert not clip.speaking.any() and clip.phones == [] and clip.voice == ""
    assert clip.frames.std(0).max() > 0                                  # it lives


def test_an_ending_shuts_a_mouth_that_speaks():
    made = [make_clip(Spec(seed, "train", "ending", "flat", 5, **SMALL)) for seed in range(12)]
    after = int(data.ENDING_S[1] * 16) + 3                                   # lips need a moment more
    assert max(clip.truth[0, 0] for clip in made) > 0.3
    for clip in made:
        assert clip.truth[after:, 0].max() < 0.02 and not clip.speaking[after:].any()
        assert np.abs(clip.wave[int(data.ENDING_S[1] * 16_000):]).max() <= 6 * data.QUIET
    sound = sum(np.abs(clip.wave[:4000]).max() > 0.05 for clip in made)
    assert sound >= 6


def test_generic_moves_its_mouth_to_no_speech(clips):
    clip = clips["generic"]
    assert np.abs(clip.wave).max() < 0.01 and not clip.phones
    assert clip.truth.std(0).min() > 0.1
    motion = data.babble(np.random.default_rng(0), 4000)
    assert motion.min() == 0 and motion.max() == 1
    assert np.corrcoef(motion[1:, 0], motion[:-1, 0])[0, 1] > 0.7 and abs(np.corrcoef(motion.T)[0, 1]) < 0.1     # smooth, in no step


def test_speech_is_heard_when_the_mouth_speaks(clips):
    clip = clips["speaking"]
    voices = {v.name for v in data.word_list("test")[0]}
    assert clip.voice in voices and clip.speaking.any()
    loud = np.sqrt((clip.wave[:33 * 1000].reshape(33, 1000) ** 2).mean(1))
    assert loud[clip.speaking].mean() > 0.03
    starts, ends = (np.array([p[i] for p in clip.phones]) for i in (1, 2))
    np.testing.assert_allclose(starts[1:], ends[:-1], atol=1e-3)         # no gaps, in order
    assert starts[0] == 0 and ends[-1] >= 33 / 16 - 0.4


def test_talk_begins_anywhere():
    """Pauses are silent, and clips have no beginning in common: by chance one is cut inside a word, another inside a pause."""
    said = [data.talk(np.random.default_rng(i), data.word_list("test"), 2.0) for i in range(24)]
    first = [phones[0].symbol for _, phones, _ in said]
    assert 0 < first.count("sil") < 12
    for wave, phones, _ in said:
        assert wave.shape == (32_000,) and phones[0].start == 0
        quiet = [wave[int(p.start * 16_000) + 800:int(p.end * 16_000) - 800] for p in phones if p.symbol == "sil" and p.start + 0.2 < p.end < 2]
        assert all(np.abs(q).max() < 0.02 for q in quiet)


# ---- files -------------------------------------------------------------------------------------

def test_write_and_read(tmp_path):
    todo = specs("test", 3, {"listening": 0.67, "generic": 0.33}, 3, seed=0, frames=9, size=16)
    numbers = write_split(tmp_path, "test", todo, workers=1)
    assert numbers == {"clips": 3, "seconds": 27 / 16, "silence_fraction": 1.0}
    clips = Clips(tmp_path, "test")
    assert len(clips) == 3 and sorted(p.name for p in tmp_path.iterdir()) == ["test"]
    for i, spec in enumerate(todo):
        clip = make_clip(spec)
        np.testing.assert_array_equal(clips.frames[i], clip.frames)
        np.testing.assert_allclose(clips.wave(i), clip.wave, atol=1 / 32767)
        for name in ("truth", "speaking", "mouth", "face"):
            np.testing.assert_array_equal(getattr(clips, name)[i], getattr(clip, name))
        assert {k: clips.meta[i][k] for k in dataclasses.asdict(spec)} == dataclasses.asdict(spec)
        assert clips.wave(i).dtype == np.float32 and clips.phones(i) == []
    assert clips.where(kind="generic").tolist() == [i for i, s in enumerate(todo) if s.kind == "generic"]
    assert clips.labels([2, 0]) == [todo[2].style, todo[0].style]
    assert clips.where(kind="generic", style="none").tolist() == [] and len(clips.where()) == 3
    again = tmp_path / "again"
    write_split(again, "test", todo, workers=1)
    for p in (tmp_path / "test").iterdir():
        assert p.read_bytes() == (again / "test" / p.name).read_bytes(), p.name             # the same bytes each time


def test_a_split_is_written_whole_or_not_at_all(tmp_path):
    good = specs("test", 1, {"listening": 1.0}, 3, seed=0, frames=5, size=16)
    bad = good + [dataclasses.replace(good[0], style="no such style")]
    with pytest.raises(Exception, match="no such style"):
        write_split(tmp_path, "new", bad, workers=1)
    assert list(tmp_path.iterdir()) == []
    write_split(tmp_path, "old", good, workers=1)
    with pytest.raises(Exception, match="no such style"):
        write_split(tmp_path, "old", bad, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and len(Clips(tmp_path, "old")) == 1


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    """A mapped file that finds it full later would be killed; file systems that cannot take room beforehand go on without."""
    todo, number = specs("test", 2, {"listening": 1.0}, 3, seed=0, frames=5, size=16), errno.ENOSPC

    def full(file, offset, length):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=f"{tmp_path}: no space left for the 7.68e-06 GB of frames.npy; make some") as told:
        write_split(tmp_path, "test", todo, workers=1)
    assert "\n" not in str(told.value) and list(tmp_path.iterdir()) == []
    number = errno.EOPNOTSUPP
    assert write_split(tmp_path, "test", todo, workers=1)["clips"] == 2
    monkeypatch.delattr(os, "posix_fallocate")
    assert write_split(tmp_path, "test", todo, workers=1)["clips"] == 2


def test_no_clips_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no clips.*make repro"):
        Clips(tmp_path, "train")


# ---- pictures and boxes ------------------------------------------------------------------------

def test_float_and_back():
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 4, 8, 8, 3)
    video = to_float(frames)
    assert video.shape == (1, 3, 4, 8, 8) and video.dtype == torch.float32
    assert video.min() == -1 and video.max() == 1
    np.testing.assert_array_equal(to_uint8(video), frames)
    np.testing.assert_array_equal(to_uint8(3 * torch.ones(3, 1, 1, 1)), np.full((1, 1, 1, 3), 255))
    assert torch.equal(to_float(frames[0]), video[0])


def test_float_leaves_files_alone(tmp_path):
    np.save(tmp_path / "frames.npy", np.full((1, 5, 8, 8, 3), 200, np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                  # torch dislikes arrays that it may not write to
        mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
        to_float(mapped)
    assert (mapped == 200).all()


def test_box_map_by_brute_force():
    g = np.random.default_rng(0)
    boxes = np.sort(g.uniform(0, 64, (6, 3, 2, 2)), axis=2).reshape(6, 3, 4).astype(np.float32)              # x0, y0, x1, y1
    got = box_map(boxes, 64, 8)
    assert got.shape == (6, 3, 8, 8) and got.dtype == np.float32
    for place in np.ndindex(6, 3):
        x0, y0, x1, y1 = boxes[place]
        for r, c in np.ndindex(8, 8):
            touches = x0 < 8 * (c + 1) and x1 > 8 * c and y0 < 8 * (r + 1) and y1 > 8 * r
            assert got[(*place, r, c)] == touches
    assert box_map(np.float32([8, 16, 16, 24]), 64, 8).sum() == 1        # a box that is a cell touches no neighbour


def test_per_latent_by_brute_force():
    x = np.random.default_rng(0).uniform(size=(2, 13, 3)).astype(np.float32)
    windows = [slice(0, 1)] + [slice(4 * k - 3, 4 * k + 1) for k in range(1, 4)]
    np.testing.assert_array_equal(per_latent(x), np.stack([x[:, w].max(1) for w in windows], 1))
