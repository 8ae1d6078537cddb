"""fast: the same outputs as the eager model and decoder, in less time on a GPU; graphs are replayed here by a recorder that does what CUDA does."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import IMAGE, PROMPT, WAVE, make_streamer
from tiny import WAN_VAE, make_dit, stir
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tmlib import attention as att
from tmlib import fast, flow, kernels, plan, stand_in
from tmlib.chain import CACHES, Chain
from tmlib.config import UserError
from tmlib.dit import WanDiT

SIZES = dict(text_dim=16, image_dim=16, audio_dim=16, audio_width=16, audio_hidden=32, freq_dim=32, ffn_dim=64, attention_head_dim=16)


def make(seed=0, **overrides):
    torch.manual_seed(seed)
    return stir(WanDiT.from_variant("smoke", **{**SIZES, **overrides})).eval().requires_grad_(False)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stream(dit, chunks=11, steps=2, prompts=None, cache="per_step", change_at=7, chunk=3, sound=True):
    """Latents (1, 16, 3 chunks, 4, 4) of a stream; the prompt changes at chunk `change_at`, or is each chunk the next of `prompts`."""
    texts, image, mask = [randn(1, 5, 16, seed=s) for s in (1, 2)], randn(1, 3, 16, seed=3), torch.rand(1, 3, 2, 2)[:, :1].expand(1, chunk, 2, 2) * 0 + 0.7
    chain = Chain(dit, randn(1, 20, 21, 4, 4, seed=4), flow.timesteps(steps, 5.0), cache=cache)
    out = []
    for i in range(chunks):
        out.append(chain.next(lambda step: randn(1, 16, chunk, 4, 4, seed=100 * i + step), text=prompts[i] if prompts else texts[i >= change_at], image=image,
                              audio=randn(1, chunk, 4, 16, seed=1000 + i) if sound else None, audio_mask=mask if sound else None).clone())
    return torch.cat(out, 2)


def error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def eager():
    return stream(make())


def test_fused_qkv_gives_the_same_stream(eager):
    fused = fast.fuse_qkv(make())
    assert not any(".attn1.to_q." in name or ".attn1.to_v." in name for name, _ in fused.named_parameters())
    assert error(stream(fused), eager) < 1e-5
    x, t = randn(1, 36, 6, 4, 4, seed=1), torch.tensor([500.0])
    with torch.no_grad():
        assert error(fused(x, t, mask="sparse_causal"), make()(x, t, mask="sparse_causal")) < 1e-5
    count = lambda dit: sum(p.numel() for p in dit.parameters())
    assert count(fused) == count(make()) and not any(p.requires_grad for p in fused.parameters())


def test_compiled_blocks_give_the_same_stream(eager):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    graphs = CompileCounter()
    assert error(stream(fast.compile_blocks(fast.fuse_qkv(make()), backend=graphs)), eager) < 1e-5
    assert graphs.frame_count == 2                          # the block's and the cache's writes: for contexts of two chunks, and for all layers


@pytest.mark.parametrize("cache", ["per_step", "next_step", "clean_pass"])
def test_a_compiled_step_gives_the_same_stream(cache):
    """One graph, from the third chunk on, whatever the prompt and wherever keys are written; a pass that writes nowhere is another."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    graphs = CompileCounter()
    assert error(stream(fast.compile_step(fast.fuse_qkv(make()), backend=graphs), cache=cache), stream(make(), cache=cache)) < 1e-5
    assert graphs.frame_count == (2 if cache == "clean_pass" else 1)


@pytest.mark.parametrize("kernel, most", [("flash3", 1e-5), ("flash3_fp8", 0.05)])
def test_a_kernel_of_its_own_serves_long_attention(eager, monkeypatch, kernel, most):
    """FlashAttention-3's place in the model, held here by the same sums: self-attention alone, compiled as one operation, e4m3 within its rounding."""
    from torch._dynamo.testing import CompileCounter
    keys, real = [], kernels.flash3
    monkeypatch.setattr(kernels, "find_spec", {"fa3_fwd": "installed"}.get)
    monkeypatch.setattr(att, "LONG", 30)                    # keys: 12 in chunk 0, 24 and 36 later; text and image have 5 and 3
    monkeypatch.setattr(kernels, "flash3", lambda q, k, v, low: keys.append(k.shape[2]) or real(q, k, v, low))
    try:
        kernels.use_attention(kernel)
        assert error(stream(make()), eager) < most and set(keys) == {36}
        monkeypatch.setattr(kernels, "flash3", real)
        kernels.use_attention(kernel)
        torch._dynamo.reset()
        graphs = CompileCounter()
        out = stream(fast.compile_blocks(make(), backend=graphs))
    finally:
        kernels.use_attention("auto")
    assert graphs.frame_count == 2 and att.long_attention is None and error(out, eager) < most and (error(out, eager) > 1e-4) == kernel.endswith("fp8")
    monkeypatch.setattr(kernels, "find_spec", {}.get)
    with pytest.raises(UserError, match="pip install fa3-fwd"):
        kernels.use_attention(kernel)


def test_attention_in_e4m3_is_attention_but_for_rounding(eager):
    q, k, v = (randn(1, 2, L, 16, seed=s) for s, L in ((1, 12), (2, 36), (3, 36)))
    assert 1e-3 < error(kernels.e4m3_attention(q, k, v), att.attention(q, k, v)) < 0.06
    with kernels.low_attention(30):
        assert 1e-5 < error(stream(make()), eager) < 0.05
    assert att.long_attention is None and att.LONG == 1024 and error(stream(make()), eager) == 0


def test_threads_leave_the_chosen_kernel_as_it_was():
    """The decoder attends with any kernel; two threads inside at a time, and the first to leave must not end it for the other."""
    on = lambda: [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()]
    kernels.use_attention("flash")
    try:
        with kernels.any_attention():
            other = kernels.any_attention()
            other.__enter__()
        assert on() == [True, True]
        other.__exit__(None, None, None)
        assert on() == [True, False]
    finally:
        kernels.use_attention("auto")


# FP8

def test_quantised_rows_come_back_within_e4m3s_rounding():
    x = randn(64, 128, seed=0) * torch.logspace(-6, 6, 64)[:, None]
    x[3] = 0
    q, scale = fast.quantise(x)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (64, 1) and q.float().abs().max() == 448
    back = q.float() * scale
    assert (back - x).abs().le(x.abs() / 16 + scale / 512).all() and (back[3] == 0).all()     # three bits of mantissa; subnormals
    huge, _ = fast.quantise(torch.full((1, 4), 3e4, dtype=torch.bfloat16))
    assert huge.float().isfinite().all()


def test_a_float8_linear_is_the_linear_of_its_rounded_operands():
    linear = torch.nn.Linear(32, 48)
    x = randn(2, 5, 32, seed=1)
    y = fast.Float8Linear(linear)(x)
    (a, scale_a), (b, scale_b) = fast.quantise(x.flatten(0, 1)), fast.quantise(linear.weight.detach())
    exact = ((a.double() * scale_a) @ (b.double() * scale_b).T + linear.bias.double()).detach()
    assert y.shape == (2, 5, 48) and error(y.flatten(0, 1).double(), exact) < 1e-6
    assert 1e-3 < error(y, linear(x).detach()) < 0.06


def test_the_scaled_product_fits_the_kernel():
    """Shapes, strides and precisions as torch checks them for CUDA, on fake tensors: no GPU is needed to be wrong there."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        x, weight = torch.empty(2, 24, 64, device="cuda", dtype=torch.bfloat16), torch.empty(48, 64, device="cuda")
        (a, scale_a), (b, scale_b) = fast.quantise(x.flatten(0, -2)), fast.quantise(weight)
        out = fast.scaled_product(a, b, scale_a, scale_b.T.contiguous(), torch.empty(48, device="cuda"), x.dtype)
        assert out.is_cuda and out.shape == (48, 48) and out.dtype == torch.bfloat16
        with pytest.raises((RuntimeError, AssertionError)):
            fast.scaled_product(a, b, scale_a.T, scale_b.T.contiguous(), torch.empty(48, device="cuda"), x.dtype)


def test_fp8_streams_with_a_bounded_error(eager):
    dit = fast.to_fp8(fast.fuse_qkv(make()))
    kinds = {name: type(m).__name__ for name, m in dit.blocks[0].named_modules()}
    assert kinds["attn1.to_qkv"] == kinds["attn2.to_q"] == kinds["ffn.net.2"] == kinds["ffn.net.0.proj"] == "Float8Linear"
    assert kinds["attn2.to_k"] == kinds["attn2.audio_out"] == kinds["attn2.audio_k"] == kinds["attn2.add_v_proj"] == "Linear"
    out = stream(dit)
    assert out.isfinite().all() and 1e-4 < error(out, eager) < 0.1
    assert fast.fp8_layers(make(ffn_dim=50).blocks[0]) == fast.fp8_layers(make().blocks[0])[:-2]      # sides of 50 do not fit the kernel


def test_the_plan_knows_what_fp8_weighs():
    dit = fast.to_fp8(make().bfloat16())
    tensors = [x for x in (*dit.parameters(), *dit.buffers())]
    scales = sum(x.nbytes for name, x in dit.named_buffers() if name.endswith("scale"))
    assert plan.streaming_memory(plan.build("smoke", **SIZES), 3, 4, 2, 1)["weights"] == sum(x.nbytes for x in tensors) - scales


# Graphs

class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: notes every operation and its memory, and repeats them there, without any Python."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Recording changes no buffer: the caches must still hold the past when the recording is replayed.
        out = args[0] if func._schema.is_mutable else func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views:                                       # a view follows its memory by itself
            self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.ops:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


def record(run, pool):
    """Like `fast.cuda_graph`: recording leaves no result, neither in the output nor in the caches."""
    with Tape() as tape:
        out = run()
    for func, _, _, made in tape.ops:
        if not func._schema.is_mutable:
            [x.fill_(float("nan")) for x in tree_leaves(made) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return out, tape.replay, pool


@pytest.mark.parametrize("how", [{}, dict(steps=1), dict(steps=4, chunks=10), dict(cache="clean_pass"), dict(cache="next_step"), dict(sound=False)])
def test_replayed_passes_give_the_same_stream(how):
    """14 chunks: 6 until positions are pinned, one more as it is, one recorded, the rest replayed; a new prompt at chunk 10 starts over."""
    recorded = []

    def counting(run, pool):
        recorded.append(run)
        return record(run, pool)
    how = {"chunks": 14, "change_at": 10, **how}
    assert torch.equal(stream(fast.Graphed(make(), counting), **how), stream(make(), **how))
    passes = how.get("steps", 2) + (how.get("cache") == "clean_pass")
    assert len(recorded) == passes * (1 if how["chunks"] == 10 else 2)


def test_recordings_of_prompts_that_come_back_are_kept_and_do_not_pile_up():
    recorded = []
    graphed = fast.Graphed(make(), lambda run, pool: recorded.append(run) or record(run, pool))
    words = [randn(1, 5, 16, seed=k) for k in range(5)]
    turns = [0] * 9 + [1] * 3 + [0, 1, 0] + [2] * 3 + [3] * 3 + [0, 3] + [1] * 3            # speaking and listening in turns; then others, one after another
    prompts = [words[k] for k in turns]
    assert torch.equal(stream(graphed, chunks=len(turns), prompts=prompts), stream(make(), chunks=len(turns), prompts=prompts))
    assert fast.PROMPTS == 3 and len(graphed.recordings) == 3 and all(len(steps) == 2 for steps in graphed.recordings.values())
    assert len(recorded) == 2 * 5                           # 0, 1, 2, 3, and 1 once more, which had to go for 3


@pytest.mark.parametrize("placement", ["serial", "overlap"])
def test_the_runtime_streams_with_recordings_as_without(placement):
    """Prompts that alternate, a new picture, and chunks that are taken back: the very same frames."""
    def frames(dit):
        with make_streamer(None, placement, dit, undo=2) as streamer:
            quiet = np.concatenate([np.tile(WAVE[:12_000], 9), np.zeros(48_000, np.float32), np.tile(WAVE[:12_000], 3)])     # its pauses are prompted otherwise
            chunks, out = streamer.chunks(IMAGE, quiet, **PROMPT, listening=-PROMPT["text"]), []
            for chunk in chunks:
                out.append(chunk.frames)
                if len(out) == 12:
                    break
            chunks.close()
            forgotten = streamer.rewind(streamer.settled)
            for chunk in streamer.resume(itertools.chain([forgotten], [np.tile(WAVE[:12_000], 12)])):
                out.append(chunk.frames)
                if len(out) == 18 and placement == "serial":            # elsewhere it is chance which of the next chunks is the first of the new picture
                    streamer.set_image(IMAGE[::-1].copy(), PROMPT["image_tokens"])
        return out
    recorded = []
    made = frames(fast.Graphed(make_dit().eval(), lambda run, pool: recorded.append(run) or record(run, pool)))
    assert recorded and all(np.array_equal(a, b) for a, b in zip(made, frames(make_dit().eval()), strict=True)) and len(made) > 22


def test_a_graphed_model_can_be_asked_what_any_can():
    dit = make()
    graphed = fast.Graphed(dit)
    assert (graphed.config, graphed.chunk, graphed.device, graphed.dtype) == (dit.config, dit.chunk, dit.device, dit.dtype)
    with pytest.raises(AttributeError):
        graphed.nothing
    assert copy.copy(graphed).module is dit                 # and not for ever for `module` itself


class OnDevice(TorchFunctionMode):
    """Notes what comes from the host: numbers made into tensors, and tensors of the CPU."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        cpu = any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves((args, kwargs, out)))
        if cpu or func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            self.met.append(func)
        return out


@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_a_whole_chunk_could_be_one_cuda_graph(cache):
    """In the steady state nothing is copied from the host, not even a number."""
    empty = lambda *shape: torch.empty(shape, device="meta")
    dit = plan.build("smoke", **SIZES, condition="repeat", prior_std=[[0.5, 0.6], [0.7, 0.8]])
    chain = Chain(dit, empty(1, 20, 21, 4, 4), flow.timesteps(2, 5.0), cache=cache)
    given = dict(text=empty(1, 5, 16), image=empty(1, 3, 16), audio_mask=empty(1, 3, 2, 2))
    play = lambda: chain.next(lambda step: empty(1, 16, 3, 4, 4), audio=empty(1, 3, 4, 16), **given)
    for _ in range(8):
        play()
    with OnDevice() as watch:
        assert play().is_meta
    assert watch.met == []


def test_attention_kernels_are_chosen_by_name():
    for name in (*kernels.ATTENTIONS, "auto"):
        kernels.use_attention(name)
        on = [getattr(torch.backends.cuda, f"{k}_sdp_enabled")() for k in kernels.ATTENTIONS]
        assert on == [name in (k, "auto") for k in kernels.ATTENTIONS]
    with pytest.raises(UserError, match="'best' is unknown"):
        kernels.use_attention("best")


# The video decoder

@pytest.mark.parametrize("known", [None, 1, 2])
@pytest.mark.parametrize("by_frames", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1)])
def test_convolutions_of_the_decoder_are_diffusers(kernel, by_frames, known):
    """Whatever is known of the past: nothing, one frame or two."""
    conv = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan").WanCausalConv3d(4, 6, kernel, padding=tuple(k // 2 for k in kernel))
    x, past = torch.randn(2, 4, 3, 5, 6), known and torch.randn(2, 4, known, 5, 6)
    torch.testing.assert_close(fast.causal_conv(conv, by_frames, x, past), conv(x, past))


def test_pictures_are_doubled_without_float32():
    pytest.importorskip("diffusers")
    vae, x = stand_in.random_vae(torch.device("cpu"), torch.bfloat16, **WAN_VAE), torch.randn(2, 3, 5, 6).bfloat16()
    doubled = [m for m in vae.net.decoder.modules() if isinstance(m, torch.nn.Upsample)]
    before = [m(x) for m in doubled]
    fast.decoder(vae, ("channels_last",), 2)
    assert len(doubled) == 3 and all(torch.equal(m(x), y) and m(x).dtype == torch.bfloat16 for m, y in zip(doubled, before))


@pytest.fixture(scope="module")
def pictures():
    return decoded(())


@torch.no_grad()
def decoded(switches):
    pytest.importorskip("diffusers")
    vae = stand_in.random_vae(torch.device("cpu"), torch.float32, **WAN_VAE)
    return stand_in.two_chunks(fast.decoder(vae, switches, 2, "eager"), 2, torch.device("cpu"), cells=2)


@pytest.mark.parametrize("switches", [("together",), ("channels_last",), ("by_frames", "channels_last"), ("together", "by_frames", "compile")], ids=str)
def test_other_forms_of_the_decoder_give_the_same_pictures(switches, pictures):
    torch._dynamo.reset()
    assert pictures.shape == (1, 3, 13, 16, 16) and error(decoded(switches), pictures) < 1e-4


def test_the_decoder_attends_whatever_kernel_the_model_was_given():
    """Its head of 384 fits neither flash nor cuDNN, and the choice holds for the whole process."""
    on = lambda: [getattr(torch.backends.cuda, f"{k}_sdp_enabled")() for k in kernels.ATTENTIONS]
    class Codec:
        net, wrong = SimpleNamespace(decoder=torch.nn.Identity()), False

        def decode(self, z, past=None):
            return 1 / 0 if self.wrong else (on(), past)

        def encode(self, video):
            return on()
    vae = Codec()
    kernels.use_attention("flash")
    try:
        assert fast.decoder(vae, (), 3).decode(None, past=1) == ([True] * 4, 1) and on() == [True, False, False, False]
        assert vae.encode(None) == [True] * 4 and on() == [True, False, False, False]
        vae.wrong = True
        with pytest.raises(ZeroDivisionError):
            fast.decoder(vae, (), 3).decode(None)
        assert on() == [True, False, False, False]
    finally:
        kernels.use_attention("auto")


def test_convolutions_are_tuned_for_as_long_as_asked():
    fast.autotune(True)
    assert torch.backends.cudnn.benchmark
    fast.autotune(False)
    assert not torch.backends.cudnn.benchmark
