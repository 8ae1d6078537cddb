"""data: clips are functions of their specs, test clips share nothing with training, and batches are cut as promised."""
import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tiny import make_latents
from tmlib import avatar, data, stream
from tmlib.config import UserError
from tmlib.data import Batch, Clips, Spec, box_map, make_clip, per_latent, specs, to_float, to_uint8, write_split

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


def test_what_is_held_out_is_held_out():
    train, test = (specs(split, 30, KINDS, 30, seed=0) for split in ("train", "test"))
    assert not {s.identity for s in train} & {s.identity for s in test}
    assert not {s.seed for s in train} & {s.seed for s in test}
    lists = data.word_lists()
    spoken = {split: (set(v), set(s)) for split, (v, s) in lists.items()}
    for held in ("test", "natural"):
        assert spoken[held][0] and not spoken[held][0] & spoken["train"][0]
        assert spoken[held][1] and not spoken[held][1] & spoken["train"][1]
    looks = lambda made: {repr(avatar.sample_identity(np.random.default_rng([7, s.identity]), s.style)) for s in made}
    assert not looks(train) & looks(test)


# ---- clips -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clips():
    return {kind: make_clip(Spec(11, "test", kind, "flat", 5, **SMALL)) for kind in ("speaking", "listening", "generic")}


@pytest.mark.parametrize("kind", ["speaking", "listening", "generic"])
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


def test_generic_moves_its_mouth_to_no_speech(clips):
    clip = clips["generic"]
    assert np.abs(clip.wave).max() < 0.01 and not clip.phones
    assert clip.truth.std(0).min() > 0.1
    motion = data.babble(np.random.default_rng(0), 4000)
    assert motion.min() == 0 and motion.max() == 1
    assert np.corrcoef(motion[1:, 0], motion[:-1, 0])[0, 1] > 0.7 and abs(np.corrcoef(motion.T)[0, 1]) < 0.1     # smooth, in no step


def test_speech_is_heard_when_the_mouth_speaks(clips):
    clip = clips["speaking"]
    voices = {v.name for v in data.word_lists()["test"][0]}
    assert clip.voice in voices and clip.speaking.any()
    loud = np.sqrt((clip.wave[:33 * 1000].reshape(33, 1000) ** 2).mean(1))
    before = int(clip.phones[0][2] * 16)                                 # whole frames before the first word
    assert clip.phones[0][0] == "sil" and before >= 1
    assert loud[:before].max() < 0.003 and loud[clip.speaking].mean() > 0.03
    starts, ends = (np.array([p[i] for p in clip.phones]) for i in (1, 2))
    np.testing.assert_allclose(starts[1:], ends[:-1], atol=1e-3)         # no gaps, in order
    assert ends[-1] >= 33 / 16 - 0.4


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


def test_prompts_are_made_of_words():
    a, b, c = data.prompt("flat", "speaking", 8), data.prompt("line", "speaking", 8), data.prompt(None, None, 8)
    assert a.shape == (3, 8) and torch.equal(a, data.prompt("flat", "speaking", 8))
    assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and not torch.equal(a[1], b[1])
    assert torch.equal(c[1], c[2]) and torch.equal(c[0], a[0])           # "any"


# ---- batches -----------------------------------------------------------------------------------

@pytest.fixture
def batch(tmp_path):
    return make_latents(tmp_path).batch(torch.arange(4))


def tensors(batch):
    return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if getattr(batch, f.name) is not None}


def test_condition_is_the_streams(batch):
    assert batch.cond.shape == (4, 20, 6, 4, 4)
    assert torch.equal(batch.cond, stream.i2v_condition(batch.cond[:, 4:]))


def test_repeat_and_pick(batch):
    thrice = batch.repeat(3)
    assert len(batch) == 4 and len(thrice) == 12
    for name, v in tensors(thrice).items():
        assert all(torch.equal(v[3 * i + j], tensors(batch)[name][i]) for i in range(4) for j in range(3)), name
    assert all(torch.equal(v, tensors(batch)[k][[2, 0]]) for k, v in tensors(batch.pick([2, 0])).items())


def test_silent_hears_nothing_and_keeps_the_rest(batch):
    silent = batch.silent()
    assert silent.audio is None and batch.audio is not None
    assert silent.repeat(2).audio is None and silent.pick([0]).to("cpu").audio is None
    assert all(torch.equal(v, tensors(batch)[k]) for k, v in tensors(silent).items())
    assert silent.conditions()["audio"] is None and silent.drop(torch.Generator(), 0.5, 0.0).audio is None


def test_drop_zeroes_whole_conditions(batch):
    many = batch.repeat(100)
    out = many.drop(torch.Generator().manual_seed(0), audio=0.3, text=0.1)
    kept = {k: (getattr(out, k) != 0).flatten(1).any(1) for k in ("audio", "text")}
    lost = [(~kept[k]).float().mean().item() for k in ("audio", "text")]
    assert lost == [pytest.approx(0.3, abs=0.07), pytest.approx(0.1, abs=0.05)]
    for k, keep in kept.items():
        assert torch.equal(getattr(out, k)[keep], getattr(many, k)[keep])                   # all of it or nothing
    assert (kept["audio"] & ~kept["text"]).any() and (~kept["audio"] & kept["text"]).any()  # each by itself
    assert all(torch.equal(getattr(out, k), getattr(many, k)) for k in ("z", "cond", "face", "weight", "image"))
    same = many.drop(torch.Generator().manual_seed(0), 0.3, 0.1)
    assert torch.equal(same.audio, out.audio)
    whole, none = many.drop(torch.Generator(), 0.0, 0.0), many.drop(torch.Generator(), 1.0, 1.0)
    assert torch.equal(whole.audio, many.audio) and not none.audio.any() and not none.text.any()


def test_conditions_are_what_the_model_takes(batch):
    given = batch.conditions()
    assert set(given) == {"text", "image", "audio", "audio_mask"}
    assert given["audio_mask"] is batch.face and given["image"] is batch.image


# ---- latents -----------------------------------------------------------------------------------

def test_draw_is_a_function_of_the_generator(tmp_path):
    latents = make_latents(tmp_path)
    g = torch.Generator().manual_seed(1)
    a, after = latents.draw(6, g), latents.draw(6, g)
    again = latents.draw(6, torch.Generator().manual_seed(1))
    assert len(latents) == 4 and len(a) == 6
    assert all(torch.equal(v, tensors(a)[k]) for k, v in tensors(again).items())
    assert not torch.equal(a.z, after.z)
    seen = {latents.store["z"].flatten(1).eq(z.flatten()).all(1).nonzero().item() for z in latents.draw(100, g).z}
    assert seen == {0, 1, 2, 3}


def test_missing_or_broken_latents_are_told(tmp_path):
    with pytest.raises(UserError, match="train.safetensors is missing"):
        data.Latents(tmp_path / "train.safetensors")
    make_latents(tmp_path)
    path = tmp_path / "latents.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="latents.safetensors cannot be read") as caught:
        data.Latents(path)
    assert "\n" not in str(caught.value)


def test_encode_split_by_hand():
    """Nine clips, so that the last lies in a second group; networks that only relabel what they see."""
    g = np.random.default_rng(0)
    n, T = 9, 13
    corner = g.uniform(0, 24, (n, T, 2))
    box = np.concatenate([corner, corner + 8], -1).astype(np.float32)
    meta = [{"style": data.STYLES[i % 3], "kind": ("speaking", "listening", "generic")[i % 3]} for i in range(n)]
    frames = g.integers(0, 256, (n, T, 32, 32, 3), dtype=np.uint8)

    class Fake:
        frames, meta, mouth, face = None, None, box, np.tile(np.float32([4, 4, 28, 28]), (n, T, 1))
        wave = staticmethod(lambda i: np.full(100, i, np.float32))
        __len__ = lambda self: n

    clips = Fake()
    clips.frames, clips.meta = frames, meta
    pooled = lambda video: torch.nn.functional.avg_pool3d(video, (1, 8, 8))[:, :, ::4].repeat(1, 6, 1, 1, 1)[:, :16]
    vae = SimpleNamespace(encode=pooled, image_condition=lambda image, frames: pooled(image).expand(-1, -1, frames, -1, -1))
    encoder = SimpleNamespace(tokens=lambda wave, first, count: torch.full((count, 2, 3), float(wave[0])))
    face = SimpleNamespace(tokens=lambda image: image.flatten(2).mT[:, :5])
    store = data.encode_split(clips, vae, encoder, face, 10, 4.0, "x")
    video = to_float(frames)
    assert torch.equal(store["z"], pooled(video)) and store["z"].shape == (9, 16, 4, 4, 4)
    assert torch.equal(store["image_latents"], pooled(video[:, :, :1]).expand(-1, -1, 4, -1, -1))
    assert torch.equal(store["image"], video[:, :, 0].flatten(2).mT[:, :5])
    assert store["audio"].shape == (9, 4, 2, 3) and store["audio"][:, 0, 0, 0].tolist() == list(range(9))
    assert store["face"].shape == (9, 4, 2, 2) and (store["face"] == 1).all()
    touched = torch.from_numpy(per_latent(box_map(box, 32, 4)))[:, None]
    assert store["weight"].shape == (9, 1, 4, 4, 4) and torch.equal(store["weight"], torch.where(touched > 0, 4.0, 1.0))
    assert 0 < touched.mean() < 1
    for i, mode in enumerate(("speaking", "listening", None)):
        assert torch.equal(store["text"][i], data.prompt(data.STYLES[i], mode, 10))
    Batch(*[None] * 7)                                                   # the order of fields that `Latents.batch` relies on
    assert [f.name for f in dataclasses.fields(Batch)] == ["z", "cond", "audio", "face", "weight", "text", "image"]
