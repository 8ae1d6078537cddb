"""demo: half precision changes the precision alone, and what is committed is whole."""
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tmlib import config, demo
from tmlib.config import UserError


def test_halving_keeps_all_but_the_last_bits(tmp_path):
    given = {"w": torch.randn(3, 4), "tiny": torch.full((2,), 1e-9), "bf16": torch.ones(2, dtype=torch.bfloat16), "count": torch.arange(3)}
    save_file(given, tmp_path / "a.safetensors", {"config": "{}"})
    demo.cast(tmp_path / "a.safetensors", tmp_path / "new" / "a.safetensors", torch.float16)
    made = load_file(tmp_path / "new" / "a.safetensors")
    assert {k: v.dtype for k, v in made.items()} == {"w": torch.float16, "tiny": torch.float16, "bf16": torch.bfloat16, "count": torch.int64}
    for name, value in made.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), given[name].double(), rtol=1e-3, atol=1e-7)
    with safe_open(tmp_path / "new" / "a.safetensors", "pt") as f:
        assert f.metadata() == {"config": "{}"}


def test_a_number_that_half_precision_has_not_is_told(tmp_path):
    save_file({"w": torch.tensor([1.0, 70_000.0])}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a.safetensors: w holds numbers that half precision does not"):
        demo.cast(tmp_path / "a.safetensors", tmp_path / "b.safetensors", torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("name", [name for name in demo.FILES if name.endswith(".safetensors")])
def test_the_committed_models_are_finite(name):
    assert all(v.isfinite().all() for v in load_file(config.DATA / "demo" / name).values())


def test_the_committed_models_in_place_of_trained_ones(tmp_path, monkeypatch):
    from tmlib.talk import load_models

    monkeypatch.setattr(demo, "MODELS", tmp_path / "models")
    demo.use()
    ours, theirs = (load_models(folder) for folder in (tmp_path / "models", config.DATA / "demo"))
    assert all(w.dtype == torch.float32 for w in ours.dit.parameters())
    for a, b in zip(ours.dit.parameters(), theirs.dit.parameters()):
        torch.testing.assert_close(a, b.float(), rtol=0, atol=0)
    with pytest.raises(UserError, match="vae.safetensors is there already, of a run or of `make ready`; move data/models away first"):
        demo.use()


def test_the_committed_models_know_their_world():
    """The face beside them is of it; noise, nothing at all and a chart are not."""
    import numpy as np

    from tmlib import data, media
    from tmlib.talk import load_models
    m = load_models(config.DATA / "demo")
    def known(image):
        picture = data.to_float(image[None])[None]
        return m.face.in_world(picture[0, :, 0], m.vae.decode(m.vae.encode(picture))[0][0, :, 0])
    others = {"noise": np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8), "nothing": np.full((64, 64, 3), 255, np.uint8),
              "a chart": media.read_image(config.REPORTS / "figures" / "ablations.png", 64)}
    assert known(media.read_image(config.DATA / "demo" / "face.png", 64)) and not [name for name, image in others.items() if known(image)]
