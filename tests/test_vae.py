"""vae: chunk by chunk = whole, the future never leaks into the past, and files that do not fit say so."""
import pytest
import torch
from safetensors.torch import save_file

from tiny import stir
from tmlib import vae as v
from tmlib.config import UserError
from tmlib.vae import Past, VAEConfig, VideoVAE, fold, i2v_condition, load_vae, save_vae, unfold, whole_groups

SMALL = dict(encoder=(8, 12, 16), decoder=(8, 12, 16), blocks=1)


def make(seed=0, scale=0.03, **changes):
    torch.manual_seed(seed)
    vae = stir(VideoVAE(VAEConfig(**{**SMALL, **changes})), scale, seed).eval().requires_grad_(False)
    vae.mean.normal_(), vae.std.uniform_(0.5, 1.5)
    return vae


@pytest.fixture(scope="module")
def vae():
    return make()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def film(frames, side=16, seed=0):
    return randn(2, 3, frames, side, side, seed=seed).mul(0.3).clamp(-1, 1)


# ---- groups ------------------------------------------------------------------------------------

@pytest.mark.parametrize("patch", [1, 2, 8])
def test_groups_and_back(patch):
    video = film(9)
    x = fold(whole_groups(video), 4, patch)
    assert x.shape == (2, 12 * patch ** 2, 3, 16 // patch, 16 // patch)
    back = unfold(x, 4, patch)
    assert torch.equal(back[:, :, 3:], video)
    assert all(torch.equal(back[:, :, i], video[:, :, 0]) for i in range(3))


def test_latent_k_holds_its_own_frames():
    video = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 3, 9, 8, 8)
    held = [set(fold(whole_groups(video), 4, 2)[0, :, k].unique().tolist()) for k in range(3)]
    assert held == [{0}, {1, 2, 3, 4}, {5, 6, 7, 8}]                     # [0, 1), then [4k - 3, 4k + 1)


@pytest.mark.parametrize("shape", [(8, 16, 16), (9, 12, 16), (9, 16, 20), (0, 16, 16)])
def test_wrong_videos_are_refused(shape):
    with pytest.raises(ValueError, match="4k"):
        whole_groups(torch.zeros(1, 3, *shape))


def test_fold_and_unfold():
    x = randn(2, 5, 8, 4, 6)
    assert fold(x, 4, 2).shape == (2, 80, 2, 2, 3) and torch.equal(unfold(fold(x, 4, 2), 4, 2), x)
    assert torch.equal(fold(x, 4, 2)[0, 0, 0, 0, 0], x[0, 0, 0, 0, 0]) and torch.equal(fold(x, 1, 1), x)


# ---- time --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel_t, kernel_f", [(1, 1), (2, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 3, 1], [1, 2, 4], [2, 5], [6, 1]])
def test_chunks_decode_to_the_whole(chunks, kernel_t, kernel_f):
    vae, z = make(kernel_t=kernel_t, kernel_f=kernel_f), 0.5 * randn(2, 16, 7, 2, 2)
    whole, last = vae.decode(z)
    assert whole.shape == (2, 3, 25, 16, 16) and (whole.abs() < 1).float().mean() > 0.5     # the clamp hides nothing
    parts, cache = [], None
    for part in z.split(chunks, dim=2):
        video, cache = vae.decode(part, cache)
        assert video.shape[2] == 4 * part.shape[2] - (0 if parts else 3)
        parts.append(video)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=0)
    assert [c.shape for c in cache] == [c.shape for c in last]           # the cache never grows
    for a, b in zip(cache, last):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_cache_matters(vae):
    z = randn(1, 16, 4, 2, 2)
    _, cache = vae.decode(z[:, :, :3])
    fresh = vae.decode(z[:, :, 3:], [torch.zeros_like(c) for c in cache])[0]
    assert (vae.decode(z[:, :, 3:], cache)[0] - fresh).abs().max() > 1e-3


@pytest.mark.parametrize("t", [1, 3, 5])
def test_decoder_does_not_see_the_future(vae, t):
    z = randn(1, 16, 6, 2, 2)
    other = z.clone()
    other[:, :, t] += 1
    a, b = vae.decode(z)[0], vae.decode(other)[0]
    assert torch.equal(a[:, :, :4 * t - 3], b[:, :, :4 * t - 3])
    assert (a - b)[:, :, 4 * t - 3:4 * t + 1].abs().max() > 1e-3


@pytest.mark.parametrize("k", [1, 2, 3])
def test_encoder_does_not_see_the_future(vae, k):
    video = film(13)
    other = video.clone()
    other[:, :, 4 * k - 3:] *= -1
    a, b = vae.encode(video), vae.encode(other)
    assert a.shape == (2, 16, 4, 2, 2)
    assert torch.equal(a[:, :, :k], b[:, :, :k]) and (a - b)[:, :, k].abs().max() > 1e-3


def test_condition_is_a_picture_and_what_stands_behind_it(vae):
    image = film(1)
    grey, repeat = (i2v_condition(vae, image, 4, fill) for fill in ("grey", "repeat"))
    assert torch.equal(grey[:, 4:], vae.encode(torch.cat([image, torch.zeros(2, 3, 12, 16, 16)], 2)))
    torch.testing.assert_close(grey[:, 4:, :1], vae.encode(image), atol=1e-5, rtol=0)
    assert torch.equal(repeat[:, 4:], vae.encode(image).expand(-1, -1, 4, -1, -1))
    zero = i2v_condition(vae, image, 4, "zero")
    assert torch.equal(zero[:, 4:, :1], vae.encode(image)) and not zero[:, 4:, 1:].any()
    for cond in (grey, repeat, zero):
        assert (cond[:, :4, 0] == 1).all() and (cond[:, :4, 1:] == 0).all()
    with pytest.raises(UserError, match="'black' is unknown"):
        i2v_condition(vae, image, 4, "black")


# ---- numbers -----------------------------------------------------------------------------------

def test_statistics_normalise_and_cancel():
    vae, video = make(), film(9)
    vae.mean.zero_(), vae.std.fill_(1)
    raw, seen = vae.encode(video), vae.decode(vae.encode(video))[0]
    vae.set_statistics(raw)
    z = vae.encode(video)
    torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-5, rtol=0)
    assert z.std() == pytest.approx(1, abs=1e-4) and z.std((0, 2, 3, 4)).std() > 0.01    # one scale for all channels
    torch.testing.assert_close(vae.decode(z)[0], seen, atol=1e-5, rtol=0)


def test_a_channel_costs_what_its_errors_do_to_the_picture():
    """In a linear codec: nothing where it is not drawn, four times as much where it is drawn twice as strongly."""
    torch.manual_seed(0)
    vae, z = VideoVAE(VAEConfig(**SMALL)), 0.01 * randn(2, 16, 5, 8, 8)
    with torch.no_grad():
        vae.synthesis.weight.copy_(0.01 * randn(768, 1, 2, 1, 1).expand(-1, 16, -1, -1, -1)), vae.synthesis.bias.zero_()
        vae.synthesis.weight[:, 3] = 0
        vae.synthesis.weight[:, 5] *= 2
    cost = vae.costs(z)
    assert cost.mean() == pytest.approx(1) and cost[3] == 0 and cost[5] / cost[6] == pytest.approx(4, rel=0.1)
    vae.set_statistics(z + 7)
    torch.testing.assert_close(vae.cost, cost, atol=0.05, rtol=0.1)                      # the same in normalised latents


def test_start_is_a_linear_codec_of_pictures_and_of_motion():
    """Ten patterns of a standing picture come back exactly; a film comes back better than by two principal component analyses."""
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig(**SMALL, moving=6))
    patterns, share = randn(10, 3, 8, 8), 0.05 * randn(8, 10, 2, 2)
    still = torch.einsum("bkij,kcyx->bciyjx", share, patterns).reshape(8, 3, 1, 16, 16).expand(-1, -1, 5, -1, -1)
    vae.start_linear(still)
    z = vae.encode(still)
    torch.testing.assert_close(vae.decode(z)[0], still.clamp(-1, 1), atol=1e-3, rtol=0)
    half_white = vae.synthesis.weight[:, :10].sum(2).flatten(2).norm(dim=0).flatten()                          # deviation ** 0.5
    torch.testing.assert_close(z[:, :10].square().mean((0, 2, 3, 4)).sqrt(), half_white, atol=1e-3, rtol=0)

    film_ = film(9, side=32)
    vae.start_linear(film_)
    x = fold(whole_groups(film_), 4, 8).movedim(1, -1).reshape(-1, 3, 4, 64)                          # (patches, C, t, s)
    mean = x.mean(2, keepdim=True).expand_as(x)
    best = truncated(mean.flatten(1), 10) + truncated((x - mean).flatten(1), 6)
    best = unfold(best.view(2, 3, 4, 4, 768).movedim(-1, 1), 4, 8)                      # each group from its own latent alone
    got = vae.synthesise(vae.analyse(film_), Past(None))                             # and from the one before as well
    error = lambda video: (video - whole_groups(film_)).square().mean().item()
    assert 0.3 * error(best) < error(got) < 0.99 * error(best)


def test_least_squares_by_hand():
    x = torch.cat([randn(200, 3), torch.zeros(200, 1)], 1).double()                       # one direction has no content
    weight, bias = randn(4, 2, seed=1).double(), randn(2, seed=2).double()
    got, at_zero = v.least_squares(x, x @ weight + bias)
    torch.testing.assert_close(got[:3], weight[:3], atol=1e-4, rtol=0)
    torch.testing.assert_close(at_zero, bias, atol=1e-4, rtol=0)
    assert got[3].abs().max() == 0


def truncated(x, n):
    """The best approximation of x (m, d) around its mean with n directions."""
    u, s, w = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return x.mean(0) + (u[:, :n] * s[:n]) @ w[:n]


def test_start_on_too_few_patterns_is_finite():
    vae = VideoVAE(VAEConfig(**SMALL))
    flat = torch.full((2, 3, 5, 16, 16), 0.25)
    vae.start_linear(flat)
    torch.testing.assert_close(vae.decode(vae.encode(flat))[0], flat, atol=1e-3, rtol=0)


def test_loss_by_hand():
    vae = make(scale=0.01)
    video, noise = film(9).mul(0.3), randn(2, 16, 3, 2, 2, seed=1)
    weight = 1 + torch.rand(2, 1, 9, 16, 16, generator=torch.Generator().manual_seed(2))
    z = vae.analyse(video)
    z = z + noise * (z - z.mean((0, 2, 3, 4), keepdim=True)).std()
    out = vae.decode((z - vae.mean) / vae.std)[0]
    assert out.abs().max() < 1                                           # else the clamp would tell
    got = vae.loss(video, weight, noise)
    huber = lambda e: torch.where(e.abs() < v.TINY, e.square() / (2 * v.TINY), e.abs() - v.TINY / 2)
    error = out - video
    assert 0.1 < (error.abs() < v.TINY).float().mean() < 0.9             # both sides of it are met
    pixel = (huber(error) * weight).mean()
    edges = sum((huber(error.diff(dim=d)) * weight.narrow(d, 1, weight.shape[d] - 1)).mean() for d in (2, 3, 4))
    joins = torch.tensor([v.JOINS, 1, 1, 1, v.JOINS, 1, 1, 1])[:, None, None]             # frames 0 | 1 2 3 4 | 5 6 7 8
    motion = (error.diff(dim=2).square() * weight[:, :, 1:] * joins).mean()
    torch.testing.assert_close(got["pixel"], pixel)
    torch.testing.assert_close(got["loss"], pixel + 0.5 * edges + v.MOTION * motion)


def test_louder_latents_do_not_shout_the_noise_down():
    """The loss is the same for an encoder twice as loud, every channel around a value of its own, if its linear decoder takes both away."""
    vae, louder = make(scale=0.01), make(scale=0.01)
    shift = randn(16)
    with torch.no_grad():
        for model in (vae, louder):
            model.decoder.out.weight.zero_()                             # it pads with zeros: no shift can be taken away at the edge
        for part in (louder.analysis, louder.encoder.out):
            part.weight.mul_(2), part.bias.mul_(2)
        louder.analysis.bias.add_(shift)
        louder.synthesis.weight.div_(2)
        louder.synthesis.bias.sub_(louder.synthesis.weight.sum((2, 3, 4)) @ shift)
    video, noise = film(9).mul(0.3), randn(2, 16, 3, 2, 2, seed=1)
    losses = [model.loss(video, torch.ones(2, 1, 9, 16, 16), noise)["loss"] for model in (vae, louder)]
    torch.testing.assert_close(*losses)


# ---- files -------------------------------------------------------------------------------------

def test_save_and_load(vae, tmp_path):
    save_vae(vae, tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["vae.safetensors"]
    loaded, video = load_vae(tmp_path / "new"), film(5)
    assert torch.equal(loaded.encode(video), vae.encode(video)) and torch.equal(loaded.mean, vae.mean)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_files_that_do_not_fit_say_so_in_a_line(vae, tmp_path):
    path = tmp_path / "vae.safetensors"

    def refused(match):
        with pytest.raises(UserError, match=match) as caught:
            load_vae(tmp_path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("missing")
    path.write_bytes(b"not safetensors at all")
    refused("no codec")
    save_file({"x": torch.zeros(1)}, path)                               # no configuration
    refused("no codec")
    save_file({"x": torch.zeros(1)}, path, {"config": '{"z_dim": 16}'})  # other weights
    refused("no codec")
    save_vae(vae, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])                           # cut short
    refused("no codec")


@pytest.mark.parametrize("wrong", [dict(encoder=(8, 16)), dict(decoder=(8, 8, 8, 8)), dict(patch=4), dict(patch=8, encoder=(8,), decoder=(8,))])
def test_widths_must_end_at_an_eighth(wrong):
    with pytest.raises(UserError, match="1/8"):
        VAEConfig(**{**SMALL, **wrong})


def test_latents_have_a_clock_and_frames_another():
    for widths in ((8, 12, 16), (16, 16, 16)):                           # equal widths make no difference
        vae = VideoVAE(VAEConfig(encoder=widths, decoder=widths, blocks=1, kernel_t=3, kernel_f=2))
        taps = lambda net: [b[0].conv1.kernel_size[0] for b in net.stages]
        assert taps(vae.encoder) == [2, 2, 3] and taps(vae.decoder) == [3, 2, 2]
        assert vae.encoder.times == [1, 4] and vae.decoder.times == [4, 1]
