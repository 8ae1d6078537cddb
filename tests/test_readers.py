"""readers: the same measure at every size and batch, a world with an edge, and files that do not fit say so."""
import math

import pytest
import torch
from safetensors.torch import save_file

from tiny import stir
from tmlib.config import UserError
from tmlib.readers import FaceEncoder, LipReader, at_64, load_readers, save_readers


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(identities=5, dim=16):
    torch.manual_seed(0)
    return stir(LipReader()).eval(), stir(FaceEncoder(identities, dim)).eval()


def test_read_is_the_network_on_every_frame(monkeypatch):
    lips, video = make()[0], randn(2, 3, 5, 64, 64)
    read = lips.read(video)
    assert read.shape == (2, 5, 3) and not read.requires_grad
    for b in range(2):
        for t in range(5):
            torch.testing.assert_close(read[b, t], lips(video[b, :, t][None])[0], atol=1e-5, rtol=1e-4)
    assert read.std(dim=(0, 1)).min() > 0                                # it does look at the picture


def test_long_videos_are_read_in_parts():
    lips = make()[0]
    video = randn(1, 3, 4, 64, 64).repeat(1, 1, 130, 1, 1)               # 520 frames: more than one part
    torch.testing.assert_close(lips.read(video)[0, -4:], lips.read(video[:, :, :4])[0], atol=1e-5, rtol=1e-4)


def test_one_reader_serves_every_size():
    small = randn(2, 3, 64, 64)
    big = small.repeat_interleave(4, 2).repeat_interleave(4, 3)          # 256x256, the same picture
    assert at_64(small) is small
    torch.testing.assert_close(at_64(big), small)
    lips, face = make()
    torch.testing.assert_close(lips(big), lips(small), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(face.features(big), face.features(small), atol=1e-5, rtol=1e-4)


def test_tokens_are_pooled_first_then_patches():
    face, frames = make()[1], randn(2, 3, 64, 64)
    tokens, maps = face.tokens(frames), face.maps(frames)
    assert tokens.shape == (2, 17, 16) and maps.shape == (2, 16, 4, 4)
    torch.testing.assert_close(tokens[:, 0], face.features(frames))
    torch.testing.assert_close(tokens[:, 1:].mean(1), tokens[:, 0])
    torch.testing.assert_close(tokens[:, 1 + 4 * 2 + 3], maps[:, :, 2, 3])                  # row by row
    torch.testing.assert_close(face(frames), face.head(face.features(frames)))


def test_the_world_has_an_edge():
    face, pictures = make(dim=8)[1], 0.3 * randn(64, 3, 64, 64)
    assert face.in_world(randn(3, 64, 64), torch.zeros(3, 64, 64))       # nothing learnt: everything passes
    face.set_world(pictures, pictures + 0.02)
    torch.testing.assert_close(face.world, torch.tensor([10 * math.log10(4 / 0.02 ** 2) - 1.5, pictures.std((2, 3)).mean(1).min() / 2]), atol=1e-3, rtol=1e-3)
    assert all(face.in_world(x, x + 0.02) for x in pictures)             # all that it was shown
    assert not face.in_world(pictures[0], pictures[0] + 0.03)            # copied worse
    assert not face.in_world(torch.ones(3, 64, 64), torch.ones(3, 64, 64)), "a perfect copy of nothing"
    assert not face.in_world(torch.full((3, 64, 64), float("nan")), pictures[0])


# ---- files -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dim", [16, 64])
def test_save_and_load(tmp_path, dim):
    lips, face = make(7, dim)
    face.set_world(randn(5, 3, 64, 64), randn(5, 3, 64, 64, seed=1))
    save_readers(lips, face, tmp_path)
    lips_2, face_2 = load_readers(tmp_path)
    video = randn(1, 3, 2, 64, 64)
    assert torch.equal(lips_2.read(video), lips.read(video)) and torch.equal(face_2.tokens(video[:, :, 0]), face.tokens(video[:, :, 0]))
    assert torch.equal(face_2.world, face.world) and face.world.isfinite().all()
    assert not any(p.requires_grad or net.training for net in (lips_2, face_2) for p in net.parameters())


def test_files_that_do_not_fit_say_so_in_a_line(tmp_path):
    path = tmp_path / "readers.safetensors"

    def refused(match):
        with pytest.raises(UserError, match=match) as caught:
            load_readers(tmp_path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("missing")
    path.write_bytes(b"x")
    refused("does not hold")
    save_file({"lips.x": torch.zeros(1)}, path)
    refused("does not hold")
    save_file({"face.head.weight": torch.zeros(3, 64)}, path, {"identities": "3"})
    refused("does not hold")
