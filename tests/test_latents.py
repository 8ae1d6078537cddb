"""latents: prompts, batches, condition dropout, and what a split's file holds."""
import dataclasses
import os
import shutil
import signal
import warnings
import weakref
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_latents

from tmlib import config, data, latents
from tmlib.config import UserError
from tmlib.data import box_map, per_latent, to_float
from tmlib.latents import Batch, Latents
from tmlib.vae import i2v_condition


def test_prompts_are_made_of_words():
    a, b, c = latents.prompt("flat", "speaking", 8), latents.prompt("line", "speaking", 8), latents.prompt(None, None, 8)
    assert a.shape == (3, 8) and torch.equal(a, latents.prompt("flat", "speaking", 8))
    assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and not torch.equal(a[1], b[1])
    assert torch.equal(c[0], a[0]) and torch.equal(c[1], torch.stack([latents.prompt(style, None, 8)[1] for style in data.STYLES]).mean(0))      # unsaid: no word that training never met
    with pytest.raises(UserError, match="'cartoon' is unknown.*flat, line, soft3d"):
        latents.prompt("cartoon", "speaking", 8)


# ---- batches -----------------------------------------------------------------------------------

@pytest.fixture
def batch(tmp_path):
    return make_latents(tmp_path).batch(torch.arange(4))


def tensors(batch):
    return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if getattr(batch, f.name) is not None}


def test_repeat_and_pick(batch):
    thrice = batch.repeat(3)
    assert len(batch) == 4 and len(thrice) == 12
    for name, v in tensors(thrice).items():
        assert all(torch.equal(v[3 * i + j], tensors(batch)[name][i]) for i in range(4) for j in range(3)), name
    assert all(torch.equal(v, tensors(batch)[k][[2, 0]]) for k, v in tensors(batch.each(lambda v: v[[2, 0]])).items())


def test_silent_hears_nothing_and_keeps_the_rest(batch):
    silent = batch.silent()
    assert silent.audio is None and batch.audio is not None
    assert silent.repeat(2).audio is None and silent.each(lambda v: v[[0]]).to("cpu").audio is None
    assert all(torch.equal(v, tensors(batch)[k]) for k, v in tensors(silent).items())
    assert silent.conditions()["audio"] is None and silent.keep(text=torch.ones(len(silent)) > 0).audio is None


def test_deployed_knows_the_face_of_the_first_picture_alone(batch):
    from dataclasses import replace
    moved = replace(batch, face=torch.rand(batch.face.shape, generator=torch.Generator().manual_seed(0)))
    known = moved.deployed()
    assert known.face.shape == batch.face.shape
    assert all(torch.equal(known.face[:, k], moved.face[:, 0]) for k in range(batch.face.shape[1]))
    assert all(getattr(known, name) is getattr(moved, name) for name in ("z", "cond", "audio", "weight", "text", "image"))


def test_keep_zeroes_whole_conditions(batch):
    many, g = batch.repeat(10), torch.Generator().manual_seed(0)
    keep = {k: torch.rand(len(many), generator=g) < 0.5 for k in ("audio", "text")}
    out = many.keep(**keep)
    for k, some in keep.items():
        assert torch.equal(getattr(out, k)[some], getattr(many, k)[some]) and not getattr(out, k)[~some].any()     # all of it or nothing
    assert all(torch.equal(getattr(out, k), getattr(many, k)) for k in ("z", "cond", "face", "weight", "image"))
    assert torch.equal(many.keep(text=keep["text"]).audio, many.audio)


def test_conditions_are_what_the_model_takes(batch):
    given = batch.conditions()
    assert set(given) == {"text", "image", "audio", "audio_mask"}
    assert given["audio_mask"] is batch.face and given["image"] is batch.image


# ---- latents -----------------------------------------------------------------------------------

def test_draw_is_a_function_of_the_generator(tmp_path):
    split = make_latents(tmp_path)
    g = torch.Generator().manual_seed(1)
    a, after = split.draw(6, g), split.draw(6, g)
    again = split.draw(6, torch.Generator().manual_seed(1))
    assert len(split) == 4 and len(a) == 6 and split.shape == tuple(split.batch([0]).z.shape[1:])
    assert torch.equal(again, a) and not torch.equal(a, after)
    assert set(split.draw(100, g).tolist()) == {0, 1, 2, 3}


def test_missing_or_broken_latents_are_told(tmp_path):
    with pytest.raises(UserError, match="train.safetensors is missing"):
        Latents(tmp_path / "train.safetensors")
    make_latents(tmp_path)
    path = tmp_path / "latents.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="latents.safetensors cannot be read") as caught:
        Latents(path)
    assert "\n" not in str(caught.value)


def test_a_file_is_mapped_as_it_is(tmp_path):
    """The values of `load_file`, without a copy and without a warning; broken ones are refused."""
    path, g = tmp_path / "x.safetensors", torch.Generator().manual_seed(0)
    made = {"a": torch.randn(3, 5, generator=g), "b": torch.randn(7, generator=g).bfloat16(), "c": torch.arange(4), "d": torch.randn(1, 3, generator=g).half()}
    save_file(made, path, {"some": "words"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = latents.mapped(path)
    assert set(got) == set(made) and all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in load_file(path).items())
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in got.values()}
    assert list(storages.values()) == [path.stat().st_size]
    assert {line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))} == {"r--s"}
    whole = path.read_bytes()
    for broken in (b"", whole[:5], whole[:-1], b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]):
        path.unlink()                                                    # a new file: the old one is still mapped
        path.write_bytes(broken)
        with pytest.raises(UserError, match="x.safetensors cannot be read"):
            Latents(path)


def test_a_file_larger_than_memory_opens(tmp_path):
    """Four terabytes, nearly all of them a hole."""
    path, n = tmp_path / "x.safetensors", 1 << 40
    head, at = latents.layout({"z": torch.empty(n, device="meta")})
    path.write_bytes(head)
    os.truncate(path, at["z"] + 4 * n)
    split = Latents(path)
    assert len(split) == n and split.store["z"][-3:].tolist() == [0, 0, 0]


P = SimpleNamespace(seed=0, condition="repeat", text_dim=10, mouth_weight=4.0, eye_weight=2.0, picture_weight=0.5, sway=False)


class FakeClips:
    """Two batches and a bit of clips, of 13 frames."""
    n, T = 19, 13

    def __init__(self):
        g = np.random.default_rng(0)
        corner = g.uniform(0, 24, (self.n, self.T, 2))
        self.mouth = np.concatenate([corner, corner + 8], -1).astype(np.float32)
        self.face = np.tile(np.float32([4, 4, 28, 28]), (self.n, self.T, 1))
        self.meta = [{"style": data.STYLES[i % 3], "kind": ("speaking", "listening", "generic")[i % 3]} for i in range(self.n)]
        self.frames = g.integers(0, 256, (self.n, self.T, 32, 32, 3), dtype=np.uint8)

    def __len__(self):
        return self.n

    def wave(self, i):
        return np.full(100, i, np.float32)


def pooled(video):
    """Latents by a network that only relabels what it sees."""
    return torch.nn.functional.avg_pool3d(video, (1, 8, 8))[:, :, ::4].repeat(1, 6, 1, 1, 1)[:, :16]


COST = torch.arange(16.0).square()


def encoded(path, encode=pooled):
    """A split made by such networks; `encode` is the codec's."""
    encoder = SimpleNamespace(tokens=lambda wave, first, count: torch.full((count, 2, 3), float(wave[0])))
    face = SimpleNamespace(tokens=lambda image: image.flatten(2).mT[:, :5], prompt=latents.prompt)
    latents.encode_split(FakeClips(), SimpleNamespace(encode=encode, cost=COST), encoder, face, P, path)
    return path


def test_encode_split_by_hand(tmp_path):
    split, clips, n = Latents(encoded(tmp_path / "made" / "x.safetensors")), FakeClips(), FakeClips.n
    b, video = split.batch(torch.arange(n)), to_float(clips.frames)
    assert len(split) == n and torch.equal(b.z, pooled(video)) and b.z.shape == (n, 16, 4, 4, 4)
    assert torch.equal(b.cond, i2v_condition(SimpleNamespace(encode=pooled), video[:, :, :1], 4, "repeat"))
    assert torch.equal(split.told("zero").batch(torch.arange(n)).cond, i2v_condition(SimpleNamespace(encode=pooled), video[:, :, :1], 4, "zero"))
    assert split.told("repeat") is split and torch.equal(split.batch(torch.arange(n)).cond, b.cond)
    assert torch.equal(b.image, video[:, :, 0].flatten(2).mT[:, :5])
    assert b.audio.shape == (n, 4, 2, 3) and b.audio[:, 0, 0, 0].tolist() == list(range(n))
    assert b.face.shape == (n, 4, 2, 2) and (b.face == 1).all()
    touched = torch.from_numpy(per_latent(box_map(clips.mouth, 32, 4)))[:, None]
    eyes = torch.zeros(4, 4)
    eyes[1] = 1                                                          # the band of the eyes lies between 10.7 and 16 pixels
    channels = (torch.arange(16.0) / 7.5).view(16, 1, 1, 1)                              # the cost's square root, over its mean
    assert b.weight.shape == (n, 16, 4, 4, 4)
    torch.testing.assert_close(b.weight, torch.where(touched > 0, 4.0, torch.where(eyes > 0, 2.0, 1.0)) * channels)
    assert 0 < touched.mean() < 1
    for i, text in enumerate(b.text):
        assert torch.equal(text, latents.prompt(data.STYLES[i % 3], ("speaking", "listening", None)[i % 3], 10))
    assert split.store["text"].shape == (3, 3, 10)                       # each prompt once
    few = split.first(2)
    assert len(few) == 2 and torch.equal(few.batch([1, 0]).text, b.text[[1, 0]]) and len(split) == n
    Batch(*[None] * 8)                                                   # the order of fields that `Latents.batch` relies on
    assert [f.name for f in dataclasses.fields(Batch)] == ["z", "cond", "audio", "face", "weight", "text", "image", "sway"] and b.sway is None


def test_the_directions_of_sway():
    """Orthonormal; a face moved a little to any side lies between them, what does not move in neither."""
    y, x = np.mgrid[:32, :32]
    def drawn(dx, dy):
        face = np.exp(-((x - 16 - dx) ** 2 + (y - 15 - dy) ** 2) / 20)
        wall = np.stack([x, y, x + y], -1) / 64
        return to_float((255 * (0.5 * wall + 0.5 * face[..., None])).round().astype(np.uint8)[None, None])[:, :, 0]
    vae = SimpleNamespace(encode=pooled)
    made = latents.sway(vae, drawn(0, 0), (6, 5, 26, 25))
    assert made.shape == (1, 2, 16, 4, 4)
    flat = made[0].flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(2), atol=1e-5, rtol=1e-5)
    still = lambda picture: pooled(picture[:, :, None].expand(-1, -1, 9, -1, -1))[:, :, 2].flatten()
    for dx, dy in ((0.5, 0), (0, 0.5), (-0.3, 0.4)):
        change = still(drawn(dx, dy)) - still(drawn(0, 0))
        assert (flat @ change).norm() > 0.9 * change.norm()


def test_clips_may_be_heard_otherwise(tmp_path):
    """In noise: the same each time, another in each batch and from another seed, and nothing but their sound changes."""
    clips = FakeClips()
    heard = SimpleNamespace(tokens=lambda wave, first, count: wave[:3].expand(count, 2, 3))
    face = SimpleNamespace(tokens=lambda image: image.flatten(2).mT[:, :5], prompt=latents.prompt)

    def store(name, hear=None, seed=0):
        p = SimpleNamespace(**{**vars(P), "seed": seed})
        latents.encode_split(clips, SimpleNamespace(encode=pooled, cost=COST), heard, face, p, tmp_path / name, hear)
        return Latents(tmp_path / name).store

    which = []
    noise = lambda waves, index, g: which.extend(index) or waves + torch.rand(len(waves), 1, generator=g)
    clean, noisy, again, other = store("a"), store("b", noise), store("c", noise), store("d", noise, seed=1)
    added = (noisy["audio"] - clean["audio"])[:, 0, 0, 0]
    assert torch.equal(noisy["audio"], again["audio"]) and (added > 0).all() and len(added.round(decimals=4).unique()) == FakeClips.n
    assert all(torch.equal(clean[k], noisy[k]) for k in clean if k != "audio") and which == 3 * list(range(FakeClips.n))
    assert not any(torch.equal(a, b) for a, b in zip(noisy["audio"], other["audio"]))


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    path = encoded(tmp_path / "x.safetensors")
    save_file(load_file(path), tmp_path / "theirs.safetensors")
    assert path.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    half = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "c": torch.randn(2, 2)}
    head, at = latents.layout({k: v.to("meta") for k, v in half.items()})
    save_file(half, path)
    theirs = path.read_bytes()
    assert theirs.startswith(head) and all(theirs[at[k]:at[k] + v.nbytes] == bytes(v.view(torch.uint8).flatten().tolist()) for k, v in half.items())


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_split_that_was_killed_goes_on_to_the_same_bytes(tmp_path, batches):
    """kill -9 as the codec is about to see batch `batches`, counted from 0; then once more, and nothing is encoded twice."""
    seen = []

    def dies(video):
        if video.shape[2] > 1 and len(seen) == batches:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.extend([len(video)] if video.shape[2] > 1 else [])
        return pooled(video)

    def counts(video):
        seen.extend([len(video)] if video.shape[2] > 1 else [])
        return pooled(video)

    path, whole = tmp_path / "x.safetensors", encoded(tmp_path / "whole.safetensors").read_bytes()
    child = get_context("fork").Process(target=encoded, args=(path, dies))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not path.exists()
    encoded(path, counts)
    assert seen == [8, 8, 3][batches:] and path.read_bytes() == whole
    encoded(path, counts)
    assert len(seen) == 3 - batches and sorted(p.name for p in tmp_path.iterdir()) == ["whole.safetensors", "x.safetensors"]


def test_memory_holds_one_batch(tmp_path):
    alive, most = [], []

    def watched(video):
        most.append(sum(ref() is not None for ref in alive))
        z = pooled(video)
        alive.append(weakref.ref(z))
        return z

    encoded(tmp_path / "x.safetensors", watched)
    assert len(alive) == 6 and max(most) <= 2                            # the batch before, and this one's latents beside its condition


@pytest.mark.parametrize("links", [True, False])
def test_finished_splits_are_published_without_losing_them(tmp_path, monkeypatch, links):
    work, folder = tmp_path / "work", tmp_path / "data" / "latents"
    encoded(work / "x.safetensors")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    for _ in range(2):                                                   # the second time over the first
        latents.publish(work, folder)
        assert [p.name for p in folder.iterdir()] == ["x.safetensors"] and (work / "x.safetensors").samefile(folder / "x.safetensors") == links
    made = (work / "x.safetensors").read_bytes()
    shutil.rmtree(work)
    assert (folder / "x.safetensors").read_bytes() == made and len(Latents(folder / "x.safetensors")) == FakeClips.n


def test_other_inputs_are_other_work(tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("clips/a", "model"):
        (tmp_path / name).write_text("x")
    inputs = tmp_path / "clips", tmp_path / "model"
    mine = latents.work_folder(P, *inputs)
    assert mine == latents.work_folder(P, *inputs) and mine.parent == config.SCRATCH
    assert latents.work_folder(SimpleNamespace(**vars(P), more=1), *inputs) != mine
    for name in ("clips/a", "model"):
        before = latents.work_folder(P, *inputs)
        os.utime(tmp_path / name, (1, 1))
        assert latents.work_folder(P, *inputs) != before, name


# ---- the prior ---------------------------------------------------------------------------------

def test_spread_is_the_deviation_from_the_reference_place_by_place(tmp_path):
    split = make_latents(tmp_path, n=2)
    split.store["z"] = split.store["cond"][:, 4:] + 0.3
    assert split.spread() == [[0.3] * 4] * 4
    split.store["z"][..., 3, 3] += 1.0                                   # one place that moves lends some to its neighbours
    rows = split.spread()
    assert rows[0][0] == 0.3 and rows[3][3] > rows[2][2] > 0.3
    split.store["z"] = split.store["cond"][:, 4:]
    assert split.spread() == [[0.05] * 4] * 4                            # never certain
