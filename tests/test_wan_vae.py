"""wan_vae: diffusers' own numbers, chunk by chunk = whole, the past belongs to the caller, and folders that do not fit say so."""
import json
import shutil

import pytest
import torch

from tmlib.config import UserError
from tmlib.vae import i2v_condition
from tmlib.wan_vae import WanVAE, load_codec, load_wan_vae

SMALL = dict(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
SHAPES = [{}, dict(base_dim=8, dim_mult=[1, 2, 4, 4]), dict(num_res_blocks=2), dict(decoder_base_dim=6), dict(dim_mult=[1, 1, 1, 1]),
          dict(temperal_downsample=[True, False, True]), dict(temperal_downsample=[True, True, False])]


def make_net(seed=0, **changes):
    """An AutoencoderKLWan with nothing left at its start, and latents of about unit variance."""
    from diffusers import AutoencoderKLWan
    torch.manual_seed(seed)
    net = AutoencoderKLWan(**{**SMALL, **changes})
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def film(frames, h=16, w=16, batch=1, seed=0):
    return randn(batch, 3, frames, h, w, seed=seed).mul(0.3).clamp(-1, 1)


def statistics(net):
    per_channel = lambda values: torch.tensor(values).view(1, -1, 1, 1, 1)
    return per_channel(net.config.latents_mean), per_channel(net.config.latents_std)


@pytest.fixture(scope="module")
def vae():
    return WanVAE(make_net(base_dim=8))          # its norms are over few channels, where rounding errors grow


# ---- diffusers' numbers ------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode_and_decode_are_those_of_diffusers(shape):
    net = make_net(seed=len(str(shape)), **shape)
    vae, (mean, std) = WanVAE(net), statistics(net)
    for frames, h, w, batch in ((1, 16, 16, 2), (5, 8, 24, 1), (13, 16, 8, 1)):
        video = film(frames, h, w, batch)
        raw, z = net.encode(video).latent_dist.mode(), vae.encode(video)
        assert z.shape == (batch, 16, (frames - 1) // 4 + 1, h // 8, w // 8)
        assert torch.equal(z, (raw - mean) * (1 / std))                      # as WanImageToVideoPipeline normalises
        z = randn(*z.shape, seed=1)
        got, cache = vae.decode(z)
        assert got.shape == video.shape and got.std() > 0.02 and (got.abs() < 1).float().mean() > 0.5     # the clamp hides nothing
        assert torch.equal(got, net.decode(z / (1 / std) + mean).sample)     # as it denormalises
        assert isinstance(cache, list) and all(type(c) is torch.Tensor for c in cache)


def test_half_precision_networks_keep_latents_whole():
    net = make_net().bfloat16()
    vae, (mean, std) = WanVAE(net), statistics(net)
    video = film(5)
    z = vae.encode(video)
    assert z.dtype == torch.float32
    assert torch.equal(z, (net.encode(video.bfloat16()).latent_dist.mode().float() - mean) * (1 / std))
    frames, _ = vae.decode(z)
    assert frames.dtype == torch.float32
    assert torch.equal(frames, net.decode((z / (1 / std) + mean).bfloat16()).sample.float())


@pytest.mark.parametrize("shape", [(4, 16, 16), (6, 16, 16), (5, 12, 16), (5, 16, 20)])
def test_wrong_videos_are_refused(vae, shape):
    with pytest.raises(ValueError, match="4k"):
        vae.encode(torch.zeros(1, 3, *shape))


def test_condition_is_that_of_the_pipeline(vae):
    """Mask and latents, channel by channel: the four mask channels are the four sub-frames of a latent, all 1 on latent 0 alone."""
    from diffusers import WanImageToVideoPipeline
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
    pipe = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=vae.net, scheduler=FlowMatchEulerDiscreteScheduler())
    for frames, h, w in ((1, 16, 16), (4, 16, 24)):
        image = film(1, h, w)
        theirs = pipe.prepare_latents(image[:, :, 0], 1, 16, h, w, 4 * frames - 3, torch.float32, torch.device("cpu"))[1]
        assert torch.equal(i2v_condition(vae, image, frames, "grey"), theirs)
    assert i2v_condition(vae, image, 3, "repeat").shape == (1, 20, 3, 2, 3)


# ---- time --------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunks", [[1] * 7, [3, 3, 1], [1, 2, 4], [2, 5], [7]], ids=str)
@pytest.mark.parametrize("together", [1, 2, 3])
def test_chunks_decode_to_the_whole(vae, chunks, together):
    z = randn(2, 16, 7, 2, 2)
    whole, last = vae.decode(z)
    parts, cache, streaming = [], None, WanVAE(vae.net, together)
    for part in z.split(chunks, dim=2):
        video, cache = streaming.decode(part, cache)
        assert video.shape[2] == 4 * part.shape[2] - (0 if parts else 3)
        parts.append(video)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=0)
    assert [c.shape for c in cache] == [c.shape for c in last]
    after = randn(2, 16, 2, 2, 2, seed=1)                                    # both pasts have the same future
    torch.testing.assert_close(streaming.decode(after, cache)[0], vae.decode(after, last)[0], atol=1e-5, rtol=0)


def test_the_past_is_the_callers(vae):
    """Two streams through one module, turn by turn; a cache serves twice, and travels through a file."""
    z = randn(2, 16, 5, 2, 2)
    whole = [vae.decode(part)[0] for part in z.split(1)]
    caches, frames = [None, None], [[], []]
    for k in range(5):
        for i in (0, 1):
            old = caches[i] and [c.clone() for c in caches[i]]
            video, new = vae.decode(z[i:i + 1, :, k:k + 1], caches[i])
            if old:
                assert all(torch.equal(a, b) for a, b in zip(old, caches[i]))                # left as it was
                assert torch.equal(vae.decode(z[i:i + 1, :, k:k + 1], old)[0], video)
            caches[i] = new
            frames[i].append(video)
        vae.encode(film(5)), vae.net.decode(randn(1, 16, 2, 2, 2))                           # which clear what diffusers keeps
    for i in (0, 1):
        torch.testing.assert_close(torch.cat(frames[i], 2), whole[i], atol=1e-5, rtol=0)


def test_the_cache_matters_and_does_not_grow(vae):
    z, sizes, cache = randn(1, 16, 8, 2, 2), [], None
    for part in z.split(1, dim=2):
        before, (video, cache) = cache, vae.decode(part, cache)
        sizes.append([c.shape for c in cache])
    assert all(s == sizes[1] for s in sizes[1:])
    fresh = vae.decode(z[:, :, 7:], [torch.zeros_like(c) for c in before])[0]
    assert (video - fresh).abs().max() > 1e-3


def test_decoder_does_not_see_the_future(vae):
    z = randn(1, 16, 4, 2, 2)
    other = z.clone()
    other[:, :, 2] += 1
    a, b = vae.decode(z)[0], vae.decode(other)[0]
    assert torch.equal(a[:, :, :5], b[:, :, :5]) and (a - b)[:, :, 5:9].abs().max() > 1e-3


# ---- files -------------------------------------------------------------------------------------

def test_load_from_a_pipeline_or_the_part_itself(tmp_path):
    net = make_net()
    net.save_pretrained(tmp_path / "vae")
    video = film(5)
    want = WanVAE(net).encode(video)
    for source in (tmp_path, str(tmp_path / "vae")):
        loaded = load_wan_vae(source)
        assert torch.equal(loaded.encode(video), want)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    half = load_wan_vae(tmp_path, torch.bfloat16)
    assert half.net.dtype == torch.bfloat16 and half.mean.dtype == torch.float32 and half.together == 1


def test_full_size_is_what_the_paper_uses():
    """The configuration of Wan2.1 is diffusers' default: its size, and that it passes for Wan2.1's codec."""
    from diffusers import AutoencoderKLWan
    with torch.device("meta"):
        net = AutoencoderKLWan()
    assert sum(p.numel() for p in net.parameters()) == 126_892_531 and len(net.state_dict()) == 194
    assert net.config.base_dim == 96 and net.config.dim_mult == [1, 2, 4, 4] and net.config.temperal_downsample == [False, True, True]


def test_folders_that_do_not_fit_say_so_in_a_line(tmp_path):
    make_net().save_pretrained(tmp_path / "vae")
    good = tmp_path / "vae"
    weights, config = "diffusion_pytorch_model.safetensors", "config.json"

    def refused(match, change, names):
        bad = tmp_path / "bad" / "vae"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad)
        with pytest.raises(UserError, match=match) as caught:
            load_wan_vae(tmp_path / "bad")
        assert str(bad / names) in str(caught.value) and "\n" not in str(caught.value)

    def setting(**values):
        return lambda bad: (bad / config).write_text(json.dumps({**json.loads((good / config).read_text()), **values}))

    refused("missing", lambda bad: (bad / weights).unlink(), weights)
    refused("missing", lambda bad: (bad / config).unlink(), config)
    refused("not a complete", lambda bad: (bad / weights).write_bytes((good / weights).read_bytes()[:-100]), weights)
    refused("not a complete", lambda bad: (bad / weights).write_bytes(b"x"), weights)
    refused("not readable as JSON", lambda bad: (bad / config).write_text("{"), config)
    refused("not of AutoencoderKLWan", setting(_class_name="AutoencoderKL"), config)
    refused("z_dim = 48", setting(z_dim=48), config)
    refused("is_residual", setting(is_residual=True), config)
    refused("8 times in space", setting(dim_mult=[1, 2, 2]), config)
    refused("not those of its config.json", setting(base_dim=8), "")
    refused("weights missing", setting(num_res_blocks=2), "")
    with pytest.raises(UserError, match="no such folder"):
        load_wan_vae(tmp_path / "nowhere")


def test_a_folder_of_models_has_the_codec_it_says(tmp_path):
    from tmlib.hub import link
    from tmlib.vae import VAEConfig, VideoVAE, save_vae
    save_vae(VideoVAE(VAEConfig(encoder=(8, 8, 8), decoder=(8, 8, 8), blocks=1)), tmp_path)
    assert isinstance(load_codec(tmp_path), VideoVAE)
    net = make_net()
    net.save_pretrained(tmp_path / "Wan" / "vae")
    link(tmp_path / "vae.safetensors", tmp_path / "Wan")
    assert torch.equal(load_codec(tmp_path).encode(film(5)), WanVAE(net).encode(film(5)))
    shutil.rmtree(tmp_path / "Wan")
    with pytest.raises(UserError, match="Wan: no such folder"):
        load_codec(tmp_path)
    (tmp_path / "vae.safetensors").unlink()
    with pytest.raises(UserError, match="vae.safetensors is missing"):
        load_codec(tmp_path)
