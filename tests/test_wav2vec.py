"""wav2vec: transformers' own features, tokens of a stream are those of the clip, context costs what is measured."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tmlib.audio import RATE, SpeechConfig, SpeechEncoder
from tmlib.config import UserError
from tmlib.wav2vec import Wav2VecConfig, Wav2VecEncoder, context_error, load_speech, load_wav2vec

SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, conv_dim=(8,) * 7, num_feat_extract_layers=7,
             num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=5)
BASE, LARGE = dict(feat_extract_norm="group"), dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
NETS = [BASE, LARGE, dict(feat_extract_norm="layer"), {**BASE, "num_hidden_layers": 1, "num_conv_pos_embeddings": 5}]
SHORT = dict(past_s=0.3, ahead_s=0.1)


def make_net(seed=0, **changes):
    """A Wav2Vec2Model of the real seven convolutions (hop 320, 400 samples), everything else small and stirred."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    torch.manual_seed(seed)
    net = Wav2Vec2Model(Wav2Vec2Config(**{**SMALL, **changes}))
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return make_net(**LARGE)


def noise(seconds, seed=0):
    """Noise whose loudness and colour change, so that where one listens matters."""
    x = torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed))
    t = torch.arange(len(x)) / RATE
    return 0.1 * (1.2 + torch.sin(7 * t)) * (x + torch.sin(2000 * t * (1 + t)))


def end_of(encoder, k):
    """The sample at which the last video frame of latent k ends."""
    return int((4 * k + 1) / encoder.cfg.fps * RATE)


# ---- transformers' numbers ---------------------------------------------------------------------

@pytest.mark.parametrize("shape", NETS, ids=str)
def test_features_are_the_hidden_states_of_transformers(shape):
    from transformers import Wav2Vec2FeatureExtractor
    net, wave = make_net(**shape), 3 * noise(0.7) + 0.05                     # neither centred nor of unit variance
    inputs = Wav2Vec2FeatureExtractor()(wave.numpy(), sampling_rate=RATE, return_tensors="pt").input_values
    out = net(inputs, output_hidden_states=True)
    states = [*out.hidden_states[:-1], out.last_hidden_state]                # the same, but for the last norm of large models
    for layers in ((-1,), (0, 1), tuple(range(len(states)))):
        want = torch.cat([states[i][0] for i in layers], -1)
        got = Wav2VecEncoder(net, Wav2VecConfig(layers=layers)).features(wave)
        assert got.shape == ((len(wave) - 400) // 320 + 1, 16 * len(layers)) and got.std() > 0.1
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        mean = Wav2VecEncoder(net, Wav2VecConfig(layers=layers, join="mean")).features(wave)
        torch.testing.assert_close(mean, torch.stack([states[i][0] for i in layers]).mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(Wav2VecEncoder(net).features(wave), out.last_hidden_state[0], atol=1e-5, rtol=0)
    plain = Wav2VecEncoder(net, Wav2VecConfig(normalise=False)).features(wave)
    torch.testing.assert_close(plain, net(wave[None]).last_hidden_state[0], atol=1e-5, rtol=0)


def test_a_feature_hears_the_samples_it_says(net):
    encoder = Wav2VecEncoder(net)
    assert (encoder.hop, encoder.sees) == (320, 400)
    for at in (0, 399, 400, 5000):
        wave = noise(0.5)
        wave[at] = float("nan")
        hit = (~net.feature_extractor(wave[None]).isfinite()).any(1)[0].nonzero()[:, 0].tolist()
        assert hit == [i for i in range(24) if 320 * i <= at < 320 * i + 400]


def test_quiet_windows_are_made_no_louder_than_asked(net):
    wave = noise(0.5)
    loud, quiet = (Wav2VecEncoder(net, Wav2VecConfig(quiet=q)) for q in (0.0, 0.05))
    assert torch.equal(loud.features(wave), quiet.features(wave))            # its deviation is above 0.05
    torch.testing.assert_close(loud.features(wave * 1e-1), loud.features(wave), atol=1e-3, rtol=0)
    faint = 1e-3 * wave
    want = net(((faint - faint.mean()) / 0.05)[None]).last_hidden_state[0]
    torch.testing.assert_close(quiet.features(faint), want, atol=1e-5, rtol=0)


# ---- the clock ---------------------------------------------------------------------------------

@pytest.mark.parametrize("clock", [{}, dict(context=0), dict(context=2, per_frame=1), dict(fps=25, per_frame=3)], ids=str)
def test_the_clock_is_that_of_the_miniature(net, clock):
    ours, theirs = Wav2VecEncoder(net, Wav2VecConfig(**clock)), SpeechEncoder(SpeechConfig(dim=8, hidden=8, layers=1, mels=8, **clock))
    assert torch.equal(ours.times(0, 9), theirs.times(0, 9)) and ours.tokens_per_latent == theirs.tokens_per_latent


@pytest.mark.parametrize("shape", NETS[:2], ids=str)
@pytest.mark.parametrize("clock", [{}, dict(context=0), dict(fps=25, per_frame=3, group=2)], ids=str)
def test_whole_clip_tokens_are_transformers_features_at_the_clock(shape, clock):
    """Context that covers the clip: the features of one pass over all of it, between whose centres tokens are interpolated."""
    net, wave, n = make_net(**shape), noise(2.0), 6
    encoder = Wav2VecEncoder(net, Wav2VecConfig(layers=(1, -1), past_s=2, ahead_s=2, **clock))
    feats = encoder.features(wave)                                           # transformers' own, see above
    centre = (np.arange(len(feats)) * 320 + 200) / RATE
    at = encoder.times(0, n).numpy()
    want = np.stack([np.interp(at, centre, f) for f in feats.double().numpy().T], -1)       # (n, tokens, dim), ends held
    np.testing.assert_allclose(encoder.tokens(wave, 0, n).numpy(), want, atol=1e-5)
    assert context_error(encoder, wave, n) == 0


# ---- streams -----------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(group=1), dict(group=2, context=0), dict(fps=25, ahead_s=0.0), dict(past_s=0.0)], ids=str)
def test_tokens_of_a_moving_buffer_are_those_of_the_clip(net, changes):
    encoder, wave = Wav2VecEncoder(net, Wav2VecConfig(**{**SHORT, **changes})), noise(2.5)
    g, chunks = encoder.cfg.group, 2
    n = g * chunks
    clip = wave[:end_of(encoder, n - 1) + encoder.lookahead_samples]
    whole = encoder.tokens(clip, 0, n)
    assert whole.shape == (n, encoder.tokens_per_latent, 16) and whole.std() > 0.1
    for k in range(0, n, g):
        hi = end_of(encoder, k + g - 1) + encoder.lookahead_samples          # nothing later is needed,
        lo = max(0, (end_of(encoder, k - 1) if k else 0) - encoder.history_samples)         # nor anything earlier
        assert torch.equal(encoder.tokens(wave[lo:hi], k, g, start=lo), whole[k:k + g])
        assert torch.equal(encoder.tokens(wave, k, g), whole[k:k + g])       # later sound changes nothing
    each = [encoder.tokens(wave, k, 1) for k in range(n)]                    # however it is asked for
    assert torch.equal(torch.cat(each), whole) and torch.equal(encoder.tokens(wave, 1, n - 1), whole[1:])


@pytest.mark.parametrize("changes", [{}, dict(group=1), dict(fps=25, ahead_s=0.0), dict(context=0)], ids=str)
def test_lookahead_suffices_and_is_not_wasteful(net, changes):
    encoder = Wav2VecEncoder(net, Wav2VecConfig(**{**SHORT, **changes}))
    g = encoder.cfg.group
    known = end_of(encoder, 2 * g - 1) + encoder.lookahead_samples
    poisoned = lambda at: torch.cat([noise(4)[:at], torch.full((RATE,), float("nan"))])
    assert encoder.tokens(poisoned(known), g, g).isfinite().all()
    assert not encoder.tokens(poisoned(known - 321), g, g).isfinite().all()  # one feature


@pytest.mark.parametrize("past", [0.0, 0.3, 1.0])
def test_a_window_holds_the_context_it_promises(net, past):
    encoder = Wav2VecEncoder(net, Wav2VecConfig(past_s=past, ahead_s=0.1))
    for k in range(1, 9):
        seconds = encoder.times(3 * k, 3)
        lo, hi = encoder.window(seconds, 10 ** 9)
        first, last = ((t.item() * RATE - 200) // 320 * 320 for t in (seconds.min(), seconds.max()))     # left neighbours
        assert lo % 320 == 0 and (lo == 0 or first - past * RATE - 320 < lo <= first - past * RATE)
        assert hi == last + 320 + 400 + 1600                                 # the right neighbour's end, and the look-ahead


def test_forgotten_sound_is_not_silence(net):
    encoder, wave = Wav2VecEncoder(net, Wav2VecConfig(**SHORT)), noise(2)
    with pytest.raises(UserError, match=r"keep .* s or lower past_s"):
        encoder.tokens(wave[RATE:], 3, 3, start=RATE)


def test_behind_the_end_there_is_silence(net):
    """Tokens that listen there hear it; what only gave them context stops at the end."""
    encoder = Wav2VecEncoder(net, Wav2VecConfig(**SHORT))
    silence = encoder.tokens(torch.zeros(0), 0, 3)
    assert silence.isfinite().all() and (silence.norm(dim=-1) > 0.1).all()   # silence is sound, its tokens are not null
    wave = noise(0.3)
    long = torch.cat([wave, torch.zeros(RATE)])
    need = encoder.window(encoder.times(0, 3), 0)[1]
    torch.testing.assert_close(encoder.tokens(wave, 0, 3), encoder.tokens(long[:need], 0, 3))
    assert (encoder.tokens(wave, 0, 3) - encoder.tokens(long, 0, 3)).abs().max() > 1e-5


def test_arrays_and_tensors_alike(net):
    encoder, wave = Wav2VecEncoder(net, Wav2VecConfig(**SHORT)), noise(1)
    assert torch.equal(encoder.tokens(wave.numpy(), 0, 3), encoder.tokens(wave, 0, 3))


@pytest.mark.parametrize("shape", NETS[:2], ids=str)
def test_the_cost_of_bounded_context_is_measured(shape):
    """Nothing where the window holds the clip, something elsewhere: by hand, and less with more of the clip in sight."""
    net, wave, n = make_net(**shape), noise(3.0), 9
    at = lambda past, ahead: context_error(Wav2VecEncoder(net, Wav2VecConfig(past_s=past, ahead_s=ahead)), wave, n)
    errors = [at(0.0, 0.0), at(0.5, 0.2), at(2.0, 1.0), at(3.0, 3.0)]
    assert errors[0] > errors[1] > errors[2] > 1e-4 and errors[3] == 0
    bounded = Wav2VecEncoder(net, Wav2VecConfig(past_s=0.5, ahead_s=0.2)).tokens(wave, 0, n)
    whole = Wav2VecEncoder(net, Wav2VecConfig(past_s=9, ahead_s=9)).tokens(wave, 0, n)
    assert errors[1] == pytest.approx(((bounded - whole).norm() / whole.norm()).item(), rel=1e-5)


def test_full_size_parts_serve_the_runtime():
    """Wan's codec and Wav2Vec2 in the streamer, as they are: pieces of any size give the frames of the whole, on the clip's tokens."""
    from fakes import make_streamer
    from test_wan_vae import make_net as make_codec
    from tmlib.wan_vae import WanVAE
    ears = Wav2VecEncoder(make_net(hidden_size=6), Wav2VecConfig(**SHORT))
    heard, tokens = [], ears.tokens
    ears.tokens = lambda *how: heard.append(tokens(*how)) or heard[-1]
    streamer = make_streamer(WanVAE(make_codec()), ears=ears)
    image, wave = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), noise(2.5).numpy()
    prompt = dict(text=torch.ones(1, 3, 10), image_tokens=torch.ones(1, 2, 12), audio_mask=torch.ones(2, 2))
    whole = list(streamer.stream(image, wave, **prompt))
    assert [f.shape for f in whole] == [(9, 32, 32, 3)] + [(12, 32, 32, 3)] * 3 and whole[1].std() > 1
    clip = np.concatenate([wave, np.zeros(2 * RATE, np.float32)])            # the silence that a streamer adds
    assert torch.equal(torch.cat(heard), tokens(clip, 0, 12))
    pieces = list(streamer.stream(image, (wave[i:i + 777] for i in range(0, len(wave), 777)), **prompt))
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))


# ---- parameters and files ----------------------------------------------------------------------

def test_parameters_that_cannot_be_are_refused(net):
    for wrong in (dict(layers=()), dict(join="sum"), dict(past_s=-1), dict(ahead_s=-0.1), dict(group=0), dict(fps=0)):
        with pytest.raises(UserError, match="wav2vec"):
            Wav2VecConfig(**wrong)
    for layers in ((4,), (-5,), (0, 9)):
        with pytest.raises(UserError, match="does not exist: this model has 4, 0 to 3"):
            Wav2VecEncoder(net, Wav2VecConfig(layers=layers))
    assert Wav2VecConfig(layers=[1, 2]).layers == (1, 2)                     # as params.yaml gives them


def save_model(net, folder, prefix="", old_names=True):
    """As public files are: a head's checkpoint has a prefix, and weight norm its names of before parametrizations."""
    net.save_pretrained(folder)
    path, state = folder / "model.safetensors", {}
    for name, value in load_file(path).items():
        for old, new in (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1")):
            name = name.replace(new, old) if old_names else name.replace(old, new)
        state[prefix + name] = value
    if prefix:                                                               # as wav2vec2-base-960h: a head, no mask embedding
        state = {k: v for k, v in state.items() if "masked_spec_embed" not in k}
        state |= {"lm_head.weight": torch.zeros(5, 16), "lm_head.bias": torch.zeros(5)}
    save_file(state, path, {"format": "pt"})
    return state


@pytest.mark.parametrize("shape", NETS[:2], ids=str)
@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
@pytest.mark.parametrize("old_names", [True, False])
def test_load_public_names(shape, prefix, old_names, tmp_path):
    net = make_net(**shape)
    state = save_model(net, tmp_path, prefix, old_names)
    assert any(k.endswith("conv.weight_g") for k in state) == old_names
    cfg = Wav2VecConfig(layers=(1, 2), **SHORT)
    loaded = load_wav2vec(str(tmp_path), cfg)
    assert torch.equal(loaded.tokens(noise(1), 0, 3), Wav2VecEncoder(net, cfg).tokens(noise(1), 0, 3))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_load_asks_how_loud_the_model_wants_it(tmp_path):
    save_model(make_net(), tmp_path)
    assert load_wav2vec(tmp_path).cfg.normalise
    how = tmp_path / "preprocessor_config.json"
    how.write_text(json.dumps({"do_normalize": False, "sampling_rate": 16000}))
    assert load_wav2vec(tmp_path, Wav2VecConfig(fps=25)).cfg == replace(Wav2VecConfig(fps=25), normalise=False)
    assert load_wav2vec(tmp_path, dtype=torch.bfloat16).tokens(noise(1), 0, 3).dtype == torch.float32
    how.write_text(json.dumps({"sampling_rate": 8000}))
    with pytest.raises(UserError, match="8000 samples per second"):
        load_wav2vec(tmp_path)


def test_folders_that_do_not_fit_say_so_in_a_line(tmp_path):
    good = tmp_path / "good"
    save_model(make_net(), good)

    def refused(match, change, names):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad)
        with pytest.raises(UserError, match=match) as caught:
            load_wav2vec(bad)
        assert str(bad / names) in str(caught.value) and "\n" not in str(caught.value)

    def setting(**values):
        return lambda bad: (bad / "config.json").write_text(json.dumps({**json.loads((good / "config.json").read_text()), **values}))

    def without(part):
        def change(bad):
            state = {k: v for k, v in load_file(good / "model.safetensors").items() if part not in k}
            save_file(state, bad / "model.safetensors", {"format": "pt"})
        return change

    refused("model.safetensors: missing", lambda bad: (bad / "model.safetensors").unlink(), "model.safetensors")
    refused("missing", lambda bad: (bad / "config.json").unlink(), "config.json")
    refused("not a complete", lambda bad: (bad / "model.safetensors").write_bytes(b"\0" * 9), "model.safetensors")
    refused("not of a wav2vec2", setting(model_type="hubert"), "config.json")
    refused("weights", setting(hidden_size=32), "")
    refused("weights missing", setting(num_hidden_layers=4), "")
    refused("1 weights missing, such as feature_projection.projection.bias", without("projection.bias"), "")


def test_a_folder_of_models_has_the_ears_it_says(tmp_path):
    from tmlib.audio import save_encoder
    from tmlib.hub import link
    save_encoder(SpeechEncoder(SpeechConfig(hidden=8, layers=1)), tmp_path)
    assert isinstance(load_speech(tmp_path), SpeechEncoder)
    save_model(make_net(), tmp_path / "w2v")
    link(tmp_path / "speech.safetensors", tmp_path / "w2v", layers=[1, 2], join="mean", per_frame=3, **SHORT)
    cfg = Wav2VecConfig(layers=(1, 2), join="mean", per_frame=3, **SHORT)
    assert torch.equal(load_speech(tmp_path).tokens(noise(1), 0, 3), Wav2VecEncoder(make_net(), cfg).tokens(noise(1), 0, 3))
    link(tmp_path / "speech.safetensors", tmp_path / "w2v", layer=1)
    with pytest.raises(UserError, match="speech.wav2vec in params.yaml"):
        load_speech(tmp_path)
