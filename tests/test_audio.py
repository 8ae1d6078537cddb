"""audio: tokens of a stream are those of the whole clip, the look-ahead is enough and no more, silence is not absence."""
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tiny import stir
from tmlib.audio import HOP, RATE, LogMel, SpeechConfig, SpeechEncoder, cut, degrade, load_encoder, overheard, save_encoder
from tmlib.config import UserError

SMALL = dict(dim=8, hidden=12, layers=2, kernel=3, mels=16)
SHAPES = [{}, dict(context=0), dict(context=2, per_frame=1), dict(layers=3, kernel=5), dict(fps=25, per_frame=3), dict(past=(2, 4))]


def make(**changes):
    torch.manual_seed(0)
    return stir(SpeechEncoder(SpeechConfig(**{**SMALL, **changes})), 0.1).eval().requires_grad_(False)


def noise(seconds, seed=0):
    return 0.1 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def end_of(encoder, k):
    """The sample at which the last video frame of latent k ends."""
    return int((4 * k + 1) / encoder.cfg.fps * RATE)


# ---- the window rule ---------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_listen_in_their_latents_window(shape):
    encoder = make(**shape)
    c, seconds = encoder.cfg, encoder.times(0, 5)
    assert seconds.shape == (5, encoder.tokens_per_latent)
    for k in range(1, 5):
        lo, hi = 4 * k - 3 - c.context, 4 * k + 1 + c.context            # [4k - 3, 4k + 1), widened
        by_hand = [lo + (i + 0.5) / c.per_frame for i in range((hi - lo) * c.per_frame)]
        torch.testing.assert_close(seconds[k] * c.fps, torch.tensor(by_hand, dtype=torch.float64).clamp_min(0.5 / c.per_frame))
    first = seconds[0] * c.fps
    assert first.min() == 0.5 / c.per_frame and first.max() < 1 + c.context                 # [0, 1), widened to the right
    assert (first[:3 * c.per_frame] == first[0]).all()                   # before the clip its first moment repeats
    torch.testing.assert_close(encoder.times(3, 2), seconds[3:])


# ---- streams -----------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_of_a_moving_buffer_are_those_of_the_clip(shape):
    encoder, wave = make(**shape), noise(2)
    n = (int(2 * encoder.cfg.fps) - 1) // 4 + 1
    whole = encoder.tokens(wave, 0, n)
    assert whole.shape == (n, encoder.tokens_per_latent, 8) and whole.std() > 0.1
    for k in range(n):
        hi = end_of(encoder, k) + encoder.lookahead_samples              # nothing later is needed
        past = 4 / encoder.cfg.fps * RATE + encoder.history_samples
        lo = max(0, int(end_of(encoder, k) - past) // HOP * HOP)         # nor anything much earlier
        torch.testing.assert_close(encoder.tokens(wave[lo:hi], k, 1, start=lo), whole[k:k + 1], atol=2e-5, rtol=0)
    pieces = [encoder.tokens(wave, k, min(3, n - k)) for k in range(0, n, 3)]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_lookahead_suffices_and_is_not_wasteful(shape):
    encoder, k = make(**shape), 3
    poisoned = lambda at: torch.cat([noise(2)[:at], torch.full((RATE,), float("nan"))])
    known = end_of(encoder, k) + encoder.lookahead_samples
    assert encoder.tokens(poisoned(known), k, 1).isfinite().all()
    slack = 4 * HOP + RATE / encoder.cfg.fps / encoder.cfg.per_frame     # a few features, and half a token
    assert not encoder.tokens(poisoned(int(known - slack)), k, 1).isfinite().all()
    assert encoder.lookahead_samples < (encoder.cfg.context / encoder.cfg.fps + 0.4) * RATE


def test_start_says_where_the_wave_lies():
    encoder, wave = make(), noise(1)
    for start in (HOP, 10 * HOP, 37 * HOP):
        late = torch.cat([torch.zeros(start), wave])
        assert torch.equal(encoder.tokens(wave, 0, 6, start=start), encoder.tokens(late, 0, 6))
    assert not torch.equal(encoder.tokens(wave, 0, 6), encoder.tokens(wave, 0, 6, start=HOP))


def test_arrays_and_tensors_alike():
    encoder, wave = make(), noise(1)
    assert torch.equal(encoder.tokens(wave.numpy(), 0, 4), encoder.tokens(wave, 0, 4))


def test_silence_is_sound_and_absence_is_not():
    encoder = make()
    silence = encoder.tokens(torch.zeros(RATE), 0, 4)
    assert (silence.norm(dim=-1) > 0.5).all()
    torch.testing.assert_close(encoder.tokens(torch.zeros(0), 0, 4), silence)                # no samples count as silence
    assert (encoder.tokens(noise(1), 0, 4) - silence).abs().max() > 0.1


def test_features_reach_no_further_than_they_say():
    for layers, kernel, past in ((2, 3, ()), (3, 5, ()), (2, 3, (2, 4))):
        encoder = make(layers=layers, kernel=kernel, past=past)
        wave = noise(1)[None]
        assert encoder.features(wave).shape == (1, 50, 8) and encoder(wave).shape == (1, 50, 41)
        wave[:, 25 * HOP:26 * HOP] = float("nan")
        hit = (~encoder.features(wave).isfinite()).any(2)[0].nonzero()[:, 0]
        assert layers * (kernel // 2) <= 25 - hit.min() <= encoder.reach                     # what comes is known to those before
        assert layers * (kernel // 2) + (kernel - 1) * sum(past) <= hit.max() - 25 <= encoder.memory


def test_mel_frames_see_their_samples():
    mel, wave = LogMel(16), noise(0.5)[None]
    assert mel(wave).shape == (1, 50, 16) and mel(wave).isfinite().all() and mel(0 * wave).isfinite().all()
    for at in (0, 1000, 4321):
        poisoned = wave.clone()
        poisoned[0, at] = float("nan")
        hit = (~mel(poisoned).isfinite()).any(2)[0].nonzero()[:, 0].tolist()
        assert hit == [i for i in range(50) if 160 * i - 120 <= at < 160 * i + 280]


# ---- waveforms ---------------------------------------------------------------------------------

def test_cut_by_hand():
    wave = np.arange(1, 6, dtype=np.float32)
    at = lambda i: wave[i] if 0 <= i < 5 else 0.0
    for lo in range(-8, 9):
        for hi in range(lo, 10):
            by_hand = [at(i) for i in range(lo, hi)]
            assert cut(wave, lo, hi).tolist() == cut(torch.from_numpy(wave), lo, hi).tolist() == by_hand
    assert cut(np.zeros(0), -2, 3).tolist() == [0] * 5
    assert cut(wave.astype(np.float64), 0, 5).dtype == torch.float32


def test_degrade_adds_noise_within_its_range():
    wave = torch.randn(64, 16_000, generator=torch.Generator().manual_seed(0))            # everybody says something else
    out = degrade(wave, torch.Generator().manual_seed(1))
    assert torch.equal(out, degrade(wave, torch.Generator().manual_seed(1)))
    assert not torch.equal(out, degrade(wave, torch.Generator().manual_seed(2)))
    gain = (out * wave).sum(1) / wave.square().sum(1)
    db = lambda x: 20 * torch.log10(x)
    assert db(gain).min() > -12.5 and db(gain).max() < 6.5 and db(gain).std() > 2
    below = -db((out / gain[:, None] - wave).square().mean(1).sqrt() / wave.square().mean(1).sqrt())
    assert below.min() > -0.5 and below.max() < 30.5 and below.std() > 5
    rest, other = out / gain[:, None] - wave, wave.roll(1, 0)            # one other voice at least is in most of the noise
    crowded = (rest * other).sum(1) / rest.norm(dim=1) / other.norm(dim=1) > 0.3
    assert 32 < crowded.sum() < 58
    assert degrade(torch.zeros(2, 800), torch.Generator()).abs().max() == 0


# ---- files -------------------------------------------------------------------------------------

def test_save_and_load(tmp_path):
    encoder = make(context=2, past=(2,))
    save_encoder(encoder, tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.cfg == encoder.cfg and torch.equal(loaded.tokens(noise(1), 0, 4), encoder.tokens(noise(1), 0, 4))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_who_listens_overhears_those_who_speak_and_nobody_else():
    waves, speaks = torch.arange(200.0)[:, None].expand(200, 3), torch.arange(200) % 4 == 0
    g = torch.Generator().manual_seed(0)
    heard = overheard(waves, speaks, 0.5, g)
    assert torch.equal(heard[speaks], waves[speaks])
    changed = (heard != waves).any(1)
    assert 0.4 < changed[~speaks].float().mean() < 0.6 and set(heard[changed, 0].tolist()) <= set(waves[speaks, 0].tolist())
    assert len(set(heard[changed, 0].tolist())) > 20                        # different ones
    assert torch.equal(overheard(waves, speaks, 0.0, g), waves) and torch.equal(overheard(waves, torch.zeros(200, dtype=bool), 1.0, g), waves)


def test_files_that_do_not_fit_say_so_in_a_line(tmp_path):
    path = tmp_path / "speech.safetensors"

    def refused(match):
        with pytest.raises(UserError, match=match) as caught:
            load_encoder(tmp_path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("missing")
    path.write_bytes(b"\0" * 100)
    refused("no speech encoder")
    save_file({"x": torch.zeros(1)}, path, {"config": "{}"})
    refused("no speech encoder")
    save_file({"x": torch.zeros(1)}, path, {"config": '{"unknown": 1}'})
    refused("no speech encoder")
