"""latents: prompts, batches, condition dropout, and what a split's file holds."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_latents

from tmlib import data, latents
from tmlib.config import UserError
from tmlib.data import box_map, per_latent, to_float
from tmlib.latents import Batch, Latents
from tmlib.vae import i2v_condition


def test_prompts_are_made_of_words():
    a, b, c = latents.prompt("flat", "speaking", 8), latents.prompt("line", "speaking", 8), latents.prompt(None, None, 8)
    assert a.shape == (3, 8) and torch.equal(a, latents.prompt("flat", "speaking", 8))
    assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and not torch.equal(a[1], b[1])
    assert torch.equal(c[1], c[2]) and torch.equal(c[0], a[0])           # "any"


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
    assert all(torch.equal(v, tensors(batch)[k][[2, 0]]) for k, v in tensors(batch.pick([2, 0])).items())


def test_silent_hears_nothing_and_keeps_the_rest(batch):
    silent = batch.silent()
    assert silent.audio is None and batch.audio is not None
    assert silent.repeat(2).audio is None and silent.pick([0]).to("cpu").audio is None
    assert all(torch.equal(v, tensors(batch)[k]) for k, v in tensors(silent).items())
    assert silent.conditions()["audio"] is None and silent.keep(text=torch.ones(len(silent)) > 0).audio is None


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
    vae, p = SimpleNamespace(encode=pooled), SimpleNamespace(condition="repeat", text_dim=10, mouth_weight=4.0)
    encoder = SimpleNamespace(tokens=lambda wave, first, count: torch.full((count, 2, 3), float(wave[0])))
    face = SimpleNamespace(tokens=lambda image: image.flatten(2).mT[:, :5], prompt=latents.prompt)
    store = latents.encode_split(clips, vae, encoder, face, p, "x")
    video = to_float(frames)
    assert torch.equal(store["z"], pooled(video)) and store["z"].shape == (9, 16, 4, 4, 4)
    assert torch.equal(store["cond"], i2v_condition(vae, video[:, :, :1], 4, "repeat"))
    assert torch.equal(store["image"], video[:, :, 0].flatten(2).mT[:, :5])
    assert store["audio"].shape == (9, 4, 2, 3) and store["audio"][:, 0, 0, 0].tolist() == list(range(9))
    assert store["face"].shape == (9, 4, 2, 2) and (store["face"] == 1).all()
    touched = torch.from_numpy(per_latent(box_map(box, 32, 4)))[:, None]
    assert store["weight"].shape == (9, 1, 4, 4, 4) and torch.equal(store["weight"], torch.where(touched > 0, 4.0, 1.0))
    assert 0 < touched.mean() < 1
    for i, mode in enumerate(("speaking", "listening", None)):
        assert torch.equal(store["text"][i], latents.prompt(data.STYLES[i], mode, 10))
    Batch(*[None] * 7)                                                   # the order of fields that `Latents.batch` relies on
    assert [f.name for f in dataclasses.fields(Batch)] == ["z", "cond", "audio", "face", "weight", "text", "image"]


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
