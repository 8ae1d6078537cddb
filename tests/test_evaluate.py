"""evaluate: a perfect copy of the truth scores perfectly, and every fault that the scores are for lowers its own score."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tiny import make_dit, make_latents
from tmlib import evaluate, metrics
from tmlib.data import to_float
from tmlib.latents import Batch
from tmlib.sampling import clip_noise

T, SIDE = 33, 16


class Mouths:
    """A lip reader without fault: the frames below carry their mouth as the colour of three corners."""

    def read(self, video):                                               # (B, 3, T, H, W) -> (B, T, 3)
        corners = [video[:, 0, :, 0, 0], video[:, 0, :, 0, -1], video[:, 0, :, -1, 0]]
        return (torch.stack(corners, -1) + 1) / 2


class Biased(Mouths):
    """Reads every mouth a little too open."""

    def read(self, video):
        return super().read(video) + torch.tensor([0.1, 0.0, 0.0])


class Faces:
    """Features: the mean colour of four quarters of the picture."""

    def features(self, frames):
        return torch.nn.functional.avg_pool2d(frames, SIDE // 2).flatten(1)


def draw(truth, looks):
    """Frames uint8 (n, T, H, W, 3) that show `truth` (n, T, 3) on clips that differ in their looks and move a little."""
    g = np.random.default_rng(0)
    frames = np.repeat(looks[:, None], T, 1) + g.integers(-8, 9, (len(truth), T, SIDE, SIDE, 3))
    frames = np.clip(frames, 0, 255).astype(np.uint8)
    for i, (y, x) in enumerate(((0, 0), (0, -1), (-1, 0))):
        frames[:, :, y, x] = np.round(255 * truth[..., i, None])
    return frames


class FakeClips:
    def __init__(self, n=8):
        g = np.random.default_rng(1)
        self.meta = [{"kind": "listening" if i % 4 == 3 else "speaking", "style": ("flat", "line")[i % 2], "identity": i, "voice": "" if i % 4 == 3 else "ab"[i % 2]} for i in range(n)]
        noise = g.uniform(0, 1, (n, T + 2, 3)).astype(np.float32)
        self.truth = 0.2 + 0.6 * (noise[:, :-2] + noise[:, 1:-1] + noise[:, 2:]) / 3
        self.truth[self.where(kind="listening"), :, 0] = 0
        self.looks = g.integers(0, 256, (n, SIDE, SIDE, 3))
        self.frames = draw(self.truth, self.looks)
        self.face = np.broadcast_to(np.float32([0, 0, SIDE, SIDE]), (n, T, 4))

    def where(self, **wanted):
        return np.array([i for i, m in enumerate(self.meta) if all(m[k] == v for k, v in wanted.items())], int)


@pytest.fixture
def bench():
    return evaluate.Bench(FakeClips(), None, None, Mouths(), Faces())


def test_a_perfect_copy_scores_perfectly(bench):
    clips = bench.clips
    out, per_clip, read = evaluate.score(clips.frames, bench, 3)
    np.testing.assert_allclose(read, clips.truth, atol=0.003)
    r = per_clip["lip_r"]
    assert per_clip["voice"] == ["a", "b", "a", "a", "b", "a"] and len(per_clip["frechet_left_out"]) == 8 and per_clip["frechet"] == out["frechet"]
    assert len(r) == 6 and (r > 0.999).all() and out["lip_r"] == pytest.approx(r.mean())
    assert {"lip_r_lo", "lip_r_hi", "lip_r_flat", "lip_r_line"} <= set(out)
    assert out.pop("lip_r_soft3d") is None and "no clip" in out.pop("lip_r_soft3d_reason")
    assert out["lip_r_flat"] > 0.999 and out["lip_width_r"] > 0.999 and out["lip_opening_mae"] < 0.003
    assert abs(out["lip_r_shuffled"]) < 0.4 and out["lip_offset_frames"] == 0
    assert out["border_ratio"] == pytest.approx(out["border_ratio_real"]) and out["seam_ratio"] == pytest.approx(out["seam_ratio_real"]) and out["movement"] == pytest.approx(1)
    assert out["listening_opening_mean"] == out["reader_closed_bias"] == 0 and out["listening_excess"] == 0
    assert out["listening_movement"] == pytest.approx(1) and out["listening_eye_moves_per_s"] == pytest.approx(out["listening_eye_moves_per_s_real"])
    assert out["psnr_db"] > 100 and out["frechet"] == pytest.approx(0, abs=1e-3) and out["identity_distance"] < 0.01
    assert out["ssim"] == pytest.approx(1) == out["ssim_lo"] and (per_clip["ssim"] > 0.999).all() and per_clip["face"] == [m["identity"] for m in clips.meta] and (per_clip["movement"] == metrics.movement(clips.frames, clips.face)).all()
    assert out["n"] == 8 and all(np.isfinite(v) for v in out.values())


def test_first_pictures_standing_still(bench):
    """They are somewhat like the clips, and do not move; lips they have none."""
    out = evaluate.still_scores(bench, 3)
    assert out["movement"] == 0 and 0.5 < out["ssim"] < 1 and out["psnr_db"] < 100 and "frechet_lo" in out and not any("lip" in key for key in out)


def test_who_is_heard():
    """A voice; in real clips, which have none, the person."""
    clips = SimpleNamespace(meta=[{"voice": "a", "identity": 1}, {"voice": "", "identity": 2}])
    assert evaluate.speakers(clips, [1, 0]) == [2, "a"]


def test_late_and_foreign_lips_are_found(bench):
    clips = bench.clips
    late = draw(np.roll(clips.truth, 2, axis=1), clips.looks)            # the picture two frames behind the sound
    out = evaluate.score(late, bench, 3)[0]
    assert out["lip_offset_frames"] == 2 and out["lip_r"] < 0.6
    speaking, foreign = clips.where(kind="speaking"), clips.truth.copy()
    foreign[speaking] = np.roll(clips.truth[speaking], 1, axis=0)        # each says what another one should
    out = evaluate.score(draw(foreign, clips.looks), bench, 3)[0]
    assert out["lip_r"] < 0.4 and out["lip_r_shuffled"] > out["lip_r"] + 0.1     # found among the others


def test_other_faults_are_found(bench):
    clips = bench.clips
    jumps = clips.frames.copy()
    jumps[:, 9:21, 4:12] = 255 - jumps[:, 9:21, 4:12]                    # chunk 1 of chunks of 3 has other colours
    out = evaluate.score(jumps, bench, 3)[0]
    assert out["eye_moves_per_s"] > 0.5 + out["eye_moves_per_s_real"] and out["ssim"] < 0.95
    assert out["border_ratio"] > 2 * out["border_ratio_real"] and out["seam_ratio"] > 2 * out["seam_ratio_real"] and out["movement"] > 1.1 and out["psnr_db"] < 30
    open_mouth = clips.truth.copy()
    open_mouth[clips.where(kind="listening"), :, 0] = 0.25
    out = evaluate.score(draw(open_mouth, clips.looks), bench, 3)[0]
    assert out["listening_excess"] == pytest.approx(out["listening_opening_mean"] / out["speaking_opening_mean"])
    assert out["listening_opening_mean"] == pytest.approx(0.25, abs=0.01) and out["reader_closed_bias"] == 0
    bench.lips = Biased()
    biased = evaluate.score(draw(open_mouth, clips.looks), bench, 3)[0]
    assert biased["reader_closed_bias"] == pytest.approx(0.1) and biased["listening_opening_mean"] == pytest.approx(0.35, abs=0.01)
    assert biased["listening_excess"] * biased["speaking_opening_mean"] == pytest.approx(0.25, abs=0.01)     # the ruler's own error is not the model's
    others = draw(clips.truth, np.roll(clips.looks, 1, axis=0))
    out = evaluate.score(others, bench, 3)[0]
    assert out["identity_distance"] > 0.1 and out["frechet"] == pytest.approx(0, abs=0.01)          # the same people, the wrong places


def test_speech_alone_has_no_silence_scores(bench):
    for m in bench.clips.meta:
        m |= {"kind": "speaking", "voice": "a"}
    out = evaluate.score(bench.clips.frames, bench, 3)[0]
    assert {k: v for k, v in out.items() if k.startswith("listening")} == {
        "listening_opening_mean": None, "listening_opening_mean_reason": "nobody listens in this split"}


# ---- videos and losses -------------------------------------------------------------------------

class FakeVAE:
    """Latents to video: channel 0 becomes grey."""

    def decode(self, z):
        grey = z[:, :1].repeat(1, 3, 1, 1, 1)
        return torch.cat([grey[:, :, :1], grey[:, :, 1:].repeat_interleave(4, 2)], 2), None


def test_videos_come_in_order_whatever_the_batch(tmp_path):
    latents = make_latents(tmp_path, n=5)
    bench, seen = evaluate.Bench(None, latents, FakeVAE(), None, None), []

    def make(batch, indices):
        seen.append(indices)
        assert isinstance(batch, Batch) and torch.equal(batch.z, latents.store["z"][indices]) and not torch.is_grad_enabled()
        return batch.z

    video = bench.videos(make, 2, "x")
    assert seen == [[0, 1], [2, 3], [4]] and video.shape == (5, 21, 4, 4, 3) and video.dtype == np.uint8
    np.testing.assert_array_equal(video, bench.videos(lambda b, i: b.z, 5, "x"))
    torch.testing.assert_close(to_float(video)[:, 0, 0], latents.store["z"][:, 0, 0].clamp(-1, 1), atol=1 / 255, rtol=0)


def test_features_are_of_every_fourth_frame_another_in_each_clip(bench):
    features, frames = bench.features(bench.clips.frames), bench.clips.frames
    assert features.shape == (8, 8, 12) and bench.pictures().shape == (8, 12)
    alone = lambda i, t: Faces().features(to_float(frames[i][t:t + 1])[:, 0][None])[0].numpy()
    for i, t in ((0, 1), (2, 23), (3, 4), (3, 32), (5, 10)):
        np.testing.assert_allclose(features[i, (t - 1) // 4], alone(i, t), atol=1e-6)
    np.testing.assert_allclose(bench.pictures()[6], alone(6, 0), atol=1e-6)


def test_flow_loss_by_hand(tmp_path):
    latents, levels = make_latents(tmp_path), (200, 600)
    dit = lambda x, t, **conditions: torch.zeros_like(x[:, :16])
    dit.device = "cpu"
    got = evaluate.flow_loss(dit, latents, True, levels)
    for i in range(4):
        z, w = latents.store["z"][i], latents.store["weight"][i]
        error = [((clip_noise([1000 * i + t], z.shape)[0] - z) ** 2 * w).mean() / w.mean() for t in levels]
        assert got[i] == pytest.approx(float(sum(error) / 2), rel=1e-5)


def test_flow_loss_is_a_clips_own_and_hears_when_asked(tmp_path):
    latents, dit = make_latents(tmp_path), make_dit()
    got = evaluate.flow_loss(dit, latents, True)
    np.testing.assert_allclose(evaluate.flow_loss(dit, latents, True, batch_size=3), got, rtol=1e-5)
    assert np.abs(evaluate.flow_loss(dit, latents, False) - got).max() > 1e-4
    latents.store["audio"] = torch.zeros_like(latents.store["audio"])
    deaf = evaluate.flow_loss(dit, latents, False)
    latents.store["audio"] = torch.randn(latents.store["audio"].shape)
    np.testing.assert_array_equal(evaluate.flow_loss(dit, latents, False), deaf)            # sound does not leak in
