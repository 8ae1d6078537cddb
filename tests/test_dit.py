"""dit: the same numbers as diffusers, cached = masked = brute force, and an audio path that stays in its own window."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tmlib import attention as att
from tmlib.config import UserError
from tmlib.dit import OUR_DEFAULTS, VARIANTS, DiTConfig, WanDiT
from tmlib.layers import Context
from tmlib.weights import FLOAT32, read_config, renamed

TINY = dict(text_dim=10, image_dim=12, audio_dim=6, audio_tokens=5, audio_width=16, audio_hidden=24, freq_dim=32, ffn_dim=48,
            num_attention_heads=2, attention_head_dim=16)


def tiny(**overrides):
    """A 2-layer model with every weight alive, those that start at zero included."""
    torch.manual_seed(0)
    dit = WanDiT.from_variant("smoke", **{**TINY, **overrides})
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return dit


def inputs(dit, frames=6, size=4, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    c, randn = dit.config, lambda *s: torch.randn(*s, generator=g)
    x, t = randn(batch, c.in_channels, frames, size, size), 1000 * torch.rand(batch, generator=g)
    given = dict(text=randn(batch, 7, c.text_dim), image=randn(batch, 3, c.image_dim), audio=randn(batch, frames, 4, c.audio_dim),
                 audio_mask=torch.rand(batch, frames, size // 2, size // 2, generator=g))
    return x, t, given


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# Parity with diffusers

PARITY = [  # heads, head_dim, in, image_dim, freq_dim, ffn, frames, H, W
    (1, 8, 16, None, 32, 48, 1, 4, 4), (2, 16, 36, 24, 256, 96, 4, 4, 6), (3, 16, 36, 40, 32, 48, 7, 6, 4), (5, 32, 16, None, 256, 64, 2, 4, 4),
    (3, 12, 36, 24, 64, 50, 5, 8, 4), (4, 64, 36, 7, 256, 96, 3, 4, 10), (7, 10, 36, 24, 32, 48, 2, 6, 6), (2, 128, 36, 24, 256, 48, 2, 4, 4),
    (2, 22, 20, None, 16, 33, 6, 2, 8), (1, 6, 36, 24, 32, 48, 21, 4, 4)]


def drawn(seed):
    """One more row of PARITY, at random: any number of heads, odd frame counts, uneven sides."""
    r = random.Random(seed)
    return (r.randint(1, 9), 2 * r.randint(3, 24), r.choice([16, 36]), r.choice([None, r.randint(5, 40)]), 2 * r.randint(4, 64), r.randint(16, 120),
            r.randint(1, 13), 2 * r.randint(1, 5), 2 * r.randint(1, 5))


def reference(heads, head_dim, channels, image_dim, freq_dim, ffn, layers=2):
    from diffusers import WanTransformer3DModel
    model = WanTransformer3DModel(num_attention_heads=heads, attention_head_dim=head_dim, in_channels=channels, text_dim=20, freq_dim=freq_dim,
                                  ffn_dim=ffn, num_layers=layers, image_dim=image_dim, added_kv_proj_dim=heads * head_dim if image_dim else None)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return model.eval()


def ours(ref, **more):
    c = ref.config
    same = {k: c[k] for k in ("num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "freq_dim", "ffn_dim", "num_layers", "image_dim")}
    return WanDiT.from_variant("smoke", **{**same, "audio_dim": None, **more})


@pytest.mark.parametrize("heads,head_dim,channels,image_dim,freq_dim,ffn,frames,H,W", [*PARITY, *map(drawn, range(20))])
@torch.no_grad()
def test_equals_diffusers(heads, head_dim, channels, image_dim, freq_dim, ffn, frames, H, W):
    torch.manual_seed(heads * head_dim)
    ref = reference(heads, head_dim, channels, image_dim, freq_dim, ffn)
    dit = ours(ref)
    dit.load_state_dict(ref.state_dict())                                               # strict: names and shapes
    x, t, text = torch.randn(2, channels, frames, H, W), torch.tensor([999.0, 123.4]), torch.randn(2, 512, 20)
    image = torch.randn(2, 9, image_dim) if image_dim else None
    close(dit(x, t, text=text, image=image), ref(x, t, text, image, return_dict=False)[0])


@pytest.mark.parametrize("heads,image_dim", [(3, 24), (4, None)])
@torch.no_grad()
def test_equals_diffusers_in_half_precision(tmp_path, monkeypatch, heads, image_dim):
    """Four blocks in bfloat16, norms, time embedder and modulation in float32, as diffusers keeps them."""
    torch.manual_seed(heads)
    ref = reference(heads, 16, 36, image_dim, 32, 64, layers=4)
    monkeypatch.setattr(type(ref), "_keep_in_fp32_modules", None)                       # or it asks for `accelerate`
    ref.save_pretrained(tmp_path)
    dit = WanDiT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    x, t, text = torch.randn(2, 36, 5, 6, 4), torch.tensor([999.0, 123.4]), torch.randn(2, 512, 20)
    image = torch.randn(2, 9, image_dim) if image_dim else None
    exact = ref(x, t, text, image, return_dict=False)[0]
    for name, p in ref.named_parameters():
        if not any(part in name for part in FLOAT32):
            p.data = p.data.bfloat16()
    half = lambda y: None if y is None else y.bfloat16()
    want = ref(half(x), t, half(text), half(image), return_dict=False)[0].float()
    got = dit(half(x), t, text=half(text), image=half(image)).float()
    close(got, want, 2e-2)
    assert want.std() > 0.2 and (want - exact).abs().max() > 1e-3                       # it is half precision, and something comes out


@torch.no_grad()
def test_per_frame_time_equals_diffusers_per_token_time():
    torch.manual_seed(0)
    ref = reference(2, 16, 36, None, 32, 48)
    dit = ours(ref)
    dit.load_state_dict(ref.state_dict())
    x, t, text = torch.randn(2, 36, 5, 4, 4), 1000 * torch.rand(2, 5), torch.randn(2, 512, 20)
    close(dit(x, t, text=text), ref(x, t.repeat_interleave(4, 1), text, return_dict=False)[0])


@torch.no_grad()
def test_constant_per_frame_time_equals_one_time():
    dit = tiny()
    x, t, given = inputs(dit)
    close(dit(x, t[:, None].expand(-1, 6), **given), dit(x, t, **given), 1e-6)


def test_gradients_and_checkpointing():
    dit = tiny()
    x, t, given = inputs(dit)
    grads = []
    for dit.gradient_checkpointing in (False, True):
        dit.zero_grad()
        dit(x, t, mask="sparse_causal", **given).square().mean().backward()
        grads.append({n: p.grad for n, p in dit.named_parameters()})
    assert all(g is not None and g.abs().sum() > 0 for n, g in grads[0].items() if "norm" not in n and "to_k.bias" not in n)
    for n, g in grads[0].items():
        close(grads[1][n], g, 1e-6)


# Masks and caches

@torch.no_grad()
def stream(dit, x, t, given, chunk):
    cache, out = dit.new_cache(x.shape[0], *x.shape[-2:], chunk=chunk), []
    for c in range(x.shape[2] // chunk):
        f = slice(c * chunk, (c + 1) * chunk)
        part = {**given, "audio": given["audio"][:, f], "audio_mask": given["audio_mask"][:, f]}
        out.append(dit(x[:, :, f], t, cache=cache, **part))
    return torch.cat(out, 2)


@pytest.mark.parametrize("chunk,frames", [(3, 21), (7, 21), (1, 4), (3, 3)])
def test_cached_chunks_equal_the_masked_sequence(chunk, frames):
    dit = tiny(chunk=chunk)
    x, t, given = inputs(dit, frames)
    with torch.no_grad():
        close(stream(dit, x, t, given, chunk), dit(x, t, mask="sparse_causal", **given))
        assert (dit(x, t, **given) - dit(x, t, mask="sparse_causal", **given)).abs().max() > 1e-3 or frames <= chunk


@torch.no_grad()
def by_brute_force(dit, x, t, text, image, chunk):
    """Every chunk through every block with a dense call on [chunk 0 | previous | own], positions written out by hand."""
    rows = x.shape[-1] // 2
    hs = [dit.patchify(part) for part in x.split(chunk, dim=2)]
    temb, mod = dit.condition_embedder.time(t[:, None], x.dtype)
    text, image = dit.condition_embedder.text_embedder(text), dit.condition_embedder.image_embedder(image)
    table = lambda frames: att.rope_table(frames, rows, rows, dit.config.attention_head_dim)
    for block in dit.blocks:
        after = []
        for i, h in enumerate(hs):
            p = min(chunk * i, 21 - chunk)
            seen = [(0, 0)] * (i > 0) + [(i - 1, p - chunk)] * (i > 1) + [(i, p)]
            places = [f for _, first in seen for f in range(first, first + chunk)]
            joined = torch.cat([hs[j] for j, _ in seen], dim=1)
            ctx = Context(table(places), table(places), text, image, None, None, "bidirectional", chunk)
            # Only this chunk's rows are kept: the others see too much here, but their *input* is what keys are made of.
            after.append(block(joined, mod, ctx)[0][:, -chunk:])
        hs = after
    shift, scale = (dit.scale_shift_table + temb).chunk(2, dim=1)
    h = dit.norm_out(torch.cat(hs, 1)) * (1 + scale[:, None]) + shift[:, None]
    return dit.unpatchify(dit.proj_out(h), rows, rows)


@pytest.mark.parametrize("chunks", [5, 11])
@torch.no_grad()
def test_endless_stream_equals_brute_force(chunks):
    dit = tiny()
    x, t, given = inputs(dit, 3 * chunks)
    given = {"text": given["text"], "image": given["image"]}
    cache = dit.new_cache(2, 4, 4)
    out = torch.cat([dit(part, t, cache=cache, **given) for part in x.split(3, dim=2)], 2)
    close(out, by_brute_force(dit, x, t, given["text"], given["image"], 3))


@torch.no_grad()
def test_positions_matter_and_can_be_given():
    dit = tiny()
    x, t, given = inputs(dit)
    base = dit(x, t, **given)
    close(dit(x, t, positions=range(6), **given), base, 1e-6)
    close(dit(x, t, positions=torch.arange(10, 16), **given), base, 1e-4)               # RoPE knows distances only
    assert (dit(x, t, positions=[0, 1, 2, 15, 16, 17], **given) - base).abs().max() > 1e-4


@torch.no_grad()
def test_the_stream_computes_constant_conditions_once():
    dit = tiny()
    x, t, given = inputs(dit, 12)
    calls = []
    hooks = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in
             (dit.condition_embedder.text_embedder, dit.condition_embedder.image_embedder, dit.blocks[1].attn2.to_k, dit.blocks[0].attn2.add_v_proj,
              dit.condition_embedder.time_proj)]
    cached = stream(dit, x, t, given, 3)
    assert len(calls) == len(hooks)                                                     # four chunks, one call each
    calls.clear()
    text = given["text"] * 2                                                            # a new prompt is noticed
    cache = dit.new_cache(2, 4, 4)
    for prompt in (given["text"], text):
        out = dit(x[:, :, :3], t, text=prompt, cache=cache)
    assert calls.count(dit.condition_embedder.text_embedder) == 2
    assert (cached[:, :, :3] - out).abs().max() > 1e-4


@torch.no_grad()
def test_blocks_compile_without_a_graph_break():
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()                                                               # graphs of other tests would count as known
    dit, graphs = tiny(num_layers=3), CompileCounter()
    x, t, given = inputs(dit, 12)
    ref = stream(dit, x, t, given, 3)
    for block in dit.blocks:
        block.compile(fullgraph=True, backend=graphs)
    close(stream(dit, x, t, given, 3), ref, 1e-6)
    assert graphs.frame_count == 3                                                      # context of none, one and two chunks


@torch.no_grad()
def test_autocast_streams():
    dit = tiny()
    x, t, given = inputs(dit, 9)
    exact = stream(dit, x, t, given, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (stream(dit, x, t, given, 3) - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_under_autocast_blocks_hand_on_half_precision():
    """With and without sound: what checkpointing keeps of each block is half as large."""
    dit, seen = tiny(num_layers=3), []
    x, t, given = inputs(dit, 9)
    for block in dit.blocks:
        block.register_forward_hook(lambda block, given, out: seen.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        dit(x, t, **given)
        dit(x, t, **given | {"audio": None})
    assert given["audio_mask"] is not None and seen == [torch.bfloat16] * 6


@torch.no_grad()
def test_autocast_leaves_the_time_alone():
    """As Wan2.1, whose time embedder runs in float32 whatever else does."""
    embedder = tiny().condition_embedder
    t = torch.tensor([[999.0], [1000.0]])
    plain = embedder.time(t, torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedder.time(t, torch.float32)[0], plain) and not torch.equal(*plain)


# Audio

def test_without_audio_it_is_the_image_model():
    dit = tiny()
    x, t, given = inputs(dit)
    image_model = WanDiT.from_variant("smoke", **{**TINY, "audio_dim": None})
    assert not any("audio" in n for n, _ in image_model.named_parameters())
    image_model.load_state_dict({n: p for n, p in dit.state_dict().items() if "audio" not in n})
    silent = {"text": given["text"], "image": given["image"]}
    base = dit(x, t, **silent)
    assert torch.equal(image_model(x, t, **silent), base)
    close(dit(x, t, **{**given, "audio_mask": torch.zeros_like(given["audio_mask"])}), base, 1e-6)   # a face of no size
    assert (dit(x, t, **given) - base).abs().max() > 1e-3


@torch.no_grad()
def test_audio_does_nothing_at_initialisation():
    dit = WanDiT.from_variant("smoke", **TINY)
    torch.nn.init.normal_(dit.proj_out.weight)
    x, t, given = inputs(dit)
    assert torch.equal(dit(x, t, **given), dit(x, t, **{**given, "audio": None}))


@torch.no_grad()
def test_audio_of_a_frame_reaches_that_frame_only():
    dit = tiny()
    x, t, given = inputs(dit)
    attn2, mine = dit.blocks[0].attn2, torch.randn(2, 6, 4, 32)
    residual = lambda audio, mask=None: attn2(mine, Context(None, None, None, None, dit.audio_embedder(audio), mask, "", 3))
    louder = given["audio"].clone()
    louder[:, 2] = louder[:, 2].flip(-1)
    changed = (residual(louder) - residual(given["audio"])).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, False, False, False]
    mask = torch.zeros(2, 6, 4, 1)
    mask[:, :, 1] = 1                                                                   # the face is token 1
    assert ((residual(louder, mask).abs().amax((0, 1, 3)) > 0).tolist()) == [False, True, False, False]
    # in a stream, sound of chunk 2 leaves the chunks before it alone, to the last bit
    before, after = stream(dit, x, t, given, 2), stream(dit, x, t, {**given, "audio": louder}, 2)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before[:, :, 2:], after[:, :, 2:])


@torch.no_grad()
def test_null_audio_is_not_silence():
    embed = tiny().audio_embedder
    null, quiet = embed(torch.zeros(1, 1, 4, 6)), embed(1e-2 * torch.randn(1, 1, 4, 6))
    assert (null - quiet).abs().max() > 0.1
    assert (embed(torch.zeros(1, 1, 4, 6)).std(dim=2) > 1e-3).any()                     # tokens know their place in the window


@torch.no_grad()
def test_without_any_condition_cross_attention_adds_nothing():
    dit = tiny()
    assert torch.equal(dit.blocks[0].attn2(torch.randn(1, 2, 4, 32), Context(*[None] * 6, "", 3)), torch.zeros(1, 2, 4, 32))
    x, t, given = inputs(dit)
    assert (dit(x, t, audio=given["audio"]) - dit(x, t)).abs().max() > 1e-4             # audio needs no text


def test_audio_layers_only_where_asked():
    dit = WanDiT.from_variant("smoke", **TINY, num_layers=5, audio_every=2)
    assert [b.attn2.has_audio for b in dit.blocks] == [True, False, True, False, True]


# Sizes and initialisation

def count(name, **overrides):
    with torch.device("meta"):
        dit = WanDiT.from_variant(name, **overrides)
    return sum(p.numel() for p in dit.parameters()), len(dit.state_dict())


def test_parameter_counts():
    assert count("wan-i2v-14b") == (16_394_878_784, 1303)
    assert 17.5e9 < count("talkingmachines-18b")[0] < 18.5e9
    assert count("wan-i2v-14b", in_channels=16, image_dim=None)[0] == 14_288_491_584    # Wan2.1-T2V-14B
    assert count("wan-1.3b-i2v", in_channels=16, image_dim=None)[0] == 1_418_996_800    # Wan2.1-T2V-1.3B
    assert 1e6 < count("mini")[0] < 4e6 and 1e8 < count("small")[0] < 1.5e9
    assert set(VARIANTS) >= {"smoke", "mini", "small", "wan-1.3b-i2v", "wan-i2v-14b", "talkingmachines-18b"}


def test_initialisation_is_seeded_and_starts_at_zero_velocity():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(WanDiT.from_variant("smoke"))
    a, b, c = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(a, b) and not torch.equal(a, c) and a.isfinite().all()
    x, t, _ = inputs(models[0])
    assert models[0](x, t).abs().max() == 0


@torch.no_grad()
def test_one_block_of_the_paper_runs_at_full_width_on_the_meta_device():
    with torch.device("meta"):
        dit = WanDiT.from_variant("talkingmachines-18b", num_layers=1).to(torch.bfloat16)
        x, t = torch.empty(1, 36, 3, 64, 64), torch.empty(1)
        given = dict(text=torch.empty(1, 512, 4096), image=torch.empty(1, 257, 1280), audio=torch.empty(1, 3, 32, 768), audio_mask=torch.empty(1, 3, 32, 32))
    cache = dit.new_cache(1, 64, 64)
    for _ in range(3):
        out = dit(x.bfloat16(), t, cache=cache, **{n: c.bfloat16() for n, c in given.items()})
    assert out.shape == (1, 16, 3, 64, 64) and out.dtype == torch.bfloat16 and out.device.type == "meta"
    assert 40 * (cache.k.nbytes + cache.v.nbytes) == 5_033_164_800                      # 5.0 GB, for ever


# Files

@pytest.mark.parametrize("shard", [10**9, 20_000])
@torch.no_grad()
def test_save_and_load(tmp_path, shard):
    dit = tiny()
    dit.save_pretrained(tmp_path, max_shard_bytes=shard)
    assert (len(list(tmp_path.glob("diffusion*.safetensors"))) > 1) == (shard < 10**9)
    back = WanDiT.from_pretrained(tmp_path)
    assert back.config == dit.config
    x, t, given = inputs(dit)
    assert torch.equal(back(x, t, **given), dit(x, t, **given))
    dit.save_pretrained(tmp_path)                                                       # over a save with other shards
    assert len(list(tmp_path.glob("*.safetensors*"))) == 2
    assert torch.equal(WanDiT.from_pretrained(tmp_path)(x, t, **given), dit(x, t, **given))


@pytest.mark.parametrize("shard", [10**9, 20_000])
@torch.no_grad()
def test_diffusers_reads_what_we_write_and_we_read_what_it_writes(tmp_path, shard, monkeypatch):
    from diffusers import WanTransformer3DModel
    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", None)           # or it asks for `accelerate`
    dit = tiny()
    dit.save_pretrained(tmp_path / "ours", max_shard_bytes=shard)
    ref, info = WanTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x, t, given = inputs(dit)
    text = torch.randn(2, 512, 10)
    out = ref(x, t, text, given["image"], return_dict=False)[0]
    close(dit(x, t, text=text, image=given["image"]), out)
    ref.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size=shard)
    close(WanDiT.from_pretrained(tmp_path / "pipeline")(x, t, text=text, image=given["image"]), out)
    grown = WanDiT.from_pretrained(str(tmp_path / "pipeline"), audio_dim=6, audio_tokens=5)     # audio, silent until trained
    assert torch.equal(grown(x, t, text=text, image=given["image"], audio=given["audio"]), grown(x, t, text=text, image=given["image"]))
    assert grown.audio_embedder.proj.net[0].proj.weight.std() > 0


@torch.no_grad()
def test_half_precision_keeps_the_delicate_parts(tmp_path):
    tiny().save_pretrained(tmp_path)
    dit = WanDiT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {n for n, p in dit.named_parameters() if p.dtype == torch.float32}
    assert kept and all("norm2" in n or "time_embedder" in n or "scale_shift_table" in n or "image_embedder.norm1" in n for n in kept)
    x, t, given = inputs(dit)
    out = dit(x.bfloat16(), t, **given)
    exact = WanDiT.from_pretrained(tmp_path)(x, t, **given)
    assert out.dtype == torch.bfloat16 and dit(x, t, **given).dtype == torch.float32 and (out - exact).abs().max() < 0.05 * exact.abs().max()


# Wan2.1's own checkpoints

def test_original_names_are_those_that_diffusers_converts():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    state = {n: t for n, t in tiny().state_dict().items() if "audio" not in n}
    wan = {renamed(n, back=True): t for n, t in state.items()}
    assert len(wan) == len(state) and not set(wan) & set(state) - {"patch_embedding.weight", "patch_embedding.bias"}
    assert {"blocks.1.self_attn.norm_q.weight", "blocks.1.cross_attn.o.bias", "blocks.0.cross_attn.k_img.weight", "blocks.0.cross_attn.norm_k_img.weight",
            "blocks.0.norm3.weight", "blocks.0.ffn.2.bias", "blocks.0.modulation", "head.modulation", "head.head.weight", "img_emb.proj.4.bias",
            "time_projection.1.weight", "text_embedding.2.weight"} <= set(wan)              # as the public files have them
    converted = convert_wan_transformer_to_diffusers(dict(wan))
    assert set(converted) == set(state) and all(torch.equal(converted[n], t) for n, t in state.items())
    assert {renamed(n): t.data_ptr() for n, t in wan.items()} == {n: t.data_ptr() for n, t in state.items()}
    assert all(renamed(n) == n for n in tiny().state_dict())                            # ours stay, audio included


def save_original(dit, folder, shards=2, **changes):
    """A folder as Wan-AI publishes it: config.json of a WanModel, shards with an index; no text_dim or image_dim in the real ones."""
    c, folder = dit.config, Path(folder)
    folder.mkdir()
    state = {renamed(n, back=True): t.contiguous() for n, t in dit.state_dict().items() if "audio" not in n}
    names, stem = list(state), "diffusion_pytorch_model"
    parts = {f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    for part, some in parts.items():
        save_file({n: state[n] for n in some}, folder / part)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": {n: part for part, some in parts.items() for n in some}}))
    wan = {"_class_name": "WanModel", "dim": c.dim, "eps": c.eps, "ffn_dim": c.ffn_dim, "freq_dim": c.freq_dim, "in_dim": c.in_channels,
           "model_type": "i2v" if c.image_dim else "t2v", "num_heads": c.num_attention_heads, "num_layers": c.num_layers, "out_dim": c.out_channels,
           "text_len": 512, "text_dim": c.text_dim, "image_dim": c.image_dim, **changes}
    (folder / "config.json").write_text(json.dumps(wan))
    return folder


@pytest.mark.parametrize("image_dim", [12, None])
@torch.no_grad()
def test_original_checkpoints_are_read(tmp_path, image_dim):
    dit = tiny(audio_dim=None, image_dim=image_dim)
    folder = save_original(dit, tmp_path / "Wan2.1")
    back = WanDiT.from_pretrained(folder)
    assert back.config == dataclasses.replace(dit.config, **OUR_DEFAULTS)
    x, t, _ = inputs(tiny())
    given = dict(text=torch.randn(2, 7, 10), image=torch.randn(2, 3, 12) if image_dim else None)
    assert torch.equal(back(x, t, **given), dit(x, t, **given))
    grown = WanDiT.from_pretrained(folder, audio_dim=6, audio_tokens=5)
    assert torch.equal(grown(x, t, **given, audio=torch.randn(2, 6, 4, 6)), dit(x, t, **given))
    path = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    whole = load_file(path)
    last = list(whole)[-1]
    save_file({n: w for n, w in whole.items() if n != last}, path)
    with pytest.raises(UserError, match=f"1 weights missing, such as {re.escape(renamed(last))}"):
        WanDiT.from_pretrained(folder)
    save_file({**whole, "blocks.0.cross_attn.k_vid.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="unexpected weight blocks.0.cross_attn.k_vid.weight"):
        WanDiT.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 32}))
    with pytest.raises(UserError, match="not a Wan configuration .'num_heads' is missing"):
        WanDiT.from_pretrained(folder)


def test_the_public_configuration_is_that_of_the_variant(tmp_path):
    """config.json as Wan2.1-I2V-14B publishes it."""
    public = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 5120, "eps": 1e-06, "ffn_dim": 13824, "freq_dim": 256, "in_dim": 36,
              "model_type": "i2v", "num_heads": 40, "num_layers": 40, "out_dim": 16, "text_len": 512}
    (tmp_path / "config.json").write_text(json.dumps(public))
    assert read_config(tmp_path, DiTConfig, OUR_DEFAULTS) == DiTConfig(**VARIANTS["wan-i2v-14b"])


def broken(tmp_path, name, edit):
    tiny().save_pretrained(tmp_path)
    edit(tmp_path / name)
    with pytest.raises(UserError) as error:
        WanDiT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_folders_get_one_line(tmp_path):
    weights = "diffusion_pytorch_model.safetensors"

    def without(name):
        return lambda path: save_file({n: t for n, t in load_file(path).items() if n != name}, path)

    def with_more(path):
        save_file({**load_file(path), "blocks.9.extra": torch.zeros(1)}, path)

    assert "1 weights missing, such as proj_out.bias" in broken(tmp_path / "a", weights, without("proj_out.bias"))
    assert "unexpected weight blocks.9.extra" in broken(tmp_path / "b", weights, with_more)
    assert weights in broken(tmp_path / "c", weights, lambda path: path.unlink())
    assert "not a complete safetensors" in broken(tmp_path / "d", weights, lambda path: path.write_bytes(path.read_bytes()[:1000]))
    assert "config.json" in broken(tmp_path / "e", "config.json", lambda path: path.write_text("{"))
    assert "config.json" in broken(tmp_path / "f", "config.json", lambda path: path.unlink())
    edit = lambda path, **new: path.write_text(json.dumps({**json.loads(path.read_text()), **new}))
    assert "config.json says" in broken(tmp_path / "g", "config.json", lambda path: edit(path, ffn_dim=50))
    assert "cross_attn_norm = False is not supported" in broken(tmp_path / "h", "config.json", lambda path: edit(path, cross_attn_norm=False))
    assert "not a Wan configuration" in broken(tmp_path / "i", "config.json", lambda path: path.write_text("{}"))
    # audio weights may be missing: they are made
    tiny().save_pretrained(tmp_path / "j")
    (tmp_path / "j" / "tm_audio.safetensors").unlink()
    assert WanDiT.from_pretrained(tmp_path / "j").blocks[0].attn2.audio_out.weight.abs().max() == 0
    assert WanDiT.from_pretrained(tmp_path / "j", chunk=7).chunk == 7
    with pytest.raises(UserError, match="'audio_dmi' is unknown"):
        WanDiT.from_pretrained(tmp_path / "j", audio_dmi=7)
    with pytest.raises(UserError, match="no such folder"):
        WanDiT.from_pretrained(tmp_path / "nothing")


def test_wrong_inputs_get_one_line():
    dit = tiny()
    x, t, given = inputs(dit)
    plain = WanDiT.from_variant("smoke", **{**TINY, "audio_dim": None, "image_dim": None})
    cases = [
        (dit, (x[:, :16], t), {}, "expected (B, 36, F, H, W)"), (dit, (x[0], t), {}, "expected (B, 36, F, H, W)"),
        (dit, (x[..., :3], t), {}, "patches"), (dit, (x, t[:1]), {}, "t is (1,), expected (2,) or (2, 6)"),
        (dit, (x, t), {"text": torch.zeros(2, 3, 9)}, "text is (2, 3, 9), expected (2, tokens, 10)"),
        (dit, (x, t), {"audio": given["audio"][:, :5]}, "audio is (2, 5, 4, 6), expected (2, 6, <= 5, 6)"),
        (dit, (x, t), {"audio": given["audio"], "audio_mask": torch.ones(2, 6, 4, 4)}, "expected (2, 6, 2, 2)"),
        (plain, (x, t), {"audio": given["audio"]}, "without an audio path"), (plain, (x, t), {"image": given["image"]}, "without an image embedder"),
        (dit, (x, t), {"positions": range(5)}, "5 positions given for 6"), (dit, (x, t), {"text": given["text"][:1]}, "expected (2, tokens, 10)"),
        (dit, (x, t), {"mask": "sparse"}, "'sparse' is unknown"), (dit, (x, t), {"cache": dit.new_cache(2, 4, 4)}, "make a new cache")]
    for model, args, more, line in cases:
        with pytest.raises(UserError) as error:
            model(*args, **more)
        assert line in str(error.value) and "\n" not in str(error.value)
    for make in (lambda: WanDiT.from_variant("huge"), lambda: WanDiT.from_variant("mini", depth=3), lambda: tiny(patch_size=(2, 2, 2)),
                 lambda: tiny(attention_head_dim=7)):
        with pytest.raises(UserError):
            make()


def test_config_is_comparable():
    assert DiTConfig(**VARIANTS["mini"]) == WanDiT.from_variant("mini").config


# The prior around the reference picture: a network that says nothing already gives the reference

PRIOR = [[0.05, 0.3, 0.3, 0.05]] * 4


@torch.no_grad()
def test_with_a_prior_a_silent_network_draws_the_reference():
    from tmlib import flow
    dit = tiny(condition="repeat", prior_std=PRIOR)
    for p in dit.proj_out.parameters():
        p.zero_()
    x, _, given = inputs(dit, frames=21, batch=1)
    cond, noise = torch.cat([x[:, 16:20], 2 * x[:, 20:21].expand(-1, 16, -1, -1, -1)], 1), torch.randn(1, 16, 21, 4, 4)
    made = flow.sample(lambda x_t, t: dit(torch.cat([x_t, cond], 1), t, **given), noise, flow.timesteps(100))
    off = (made - cond[:, 4:]).square().mean((0, 1, 2)).sqrt()
    close(off, torch.tensor(PRIOR), atol=0.03)


@torch.no_grad()
def test_prior_is_a_change_of_variables():
    """The same inner network, asked directly: v = guess + deviation x net(seen)."""
    from tmlib import flow
    dit, plain = tiny(condition="repeat", prior_std=PRIOR), tiny()
    plain.load_state_dict(dit.state_dict())                               # no parameters of its own
    x, t, given = inputs(dit)
    seen, guess, left = flow.reference_prior(x[:, :16], x[:, -16:], torch.tensor(PRIOR), t)
    close(dit(x, t, **given), guess + left * plain(torch.cat([seen, x[:, 16:]], 1), t, **given))
    assert (dit(x, t, **given) - plain(x, t, **given)).abs().max() > 0.1
    assert plain.loss_weight(x, t) == 1.0 and torch.equal(dit.loss_weight(x, t), flow.prior_variance(x, torch.tensor(PRIOR), t))


def test_prior_goes_through_files(tmp_path):
    dit = tiny(condition="repeat", prior_std=PRIOR)
    dit.save_pretrained(tmp_path)
    again = WanDiT.from_pretrained(tmp_path)
    assert again.config == dit.config and hash(again.config)
    x, t, given = inputs(dit)
    assert torch.equal(again(x, t, **given), dit(x, t, **given))
    with pytest.raises(UserError, match="needs the picture on every frame"):
        tiny(prior_std=PRIOR)
    assert "prior_std" not in json.loads((tmp_path / "config.json").read_text())
