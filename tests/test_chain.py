"""chain: chunk by chunk = the whole sequence, and gradients where they belong."""
import gc
import weakref

import pytest
import torch
from tiny import make_dit

from tmlib import chain, flow
from tmlib.chain import CACHES, Chain, full, rollout
from tmlib.config import UserError

TS = flow.timesteps(2, 5)


def setting(frames=21, batch=2, steps=3):
    g = torch.Generator().manual_seed(1)
    randn = lambda *s: torch.randn(*s, generator=g)
    given = dict(text=randn(batch, 5, 10), image=randn(batch, 3, 12), audio=randn(batch, frames, 4, 6),
                 audio_mask=torch.rand(batch, frames, 2, 2, generator=g))
    return randn(batch, 20, 21, 4, 4), randn(steps, batch, 16, frames, 4, 4), given


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# Conditions

def test_condition_channels():
    cond = torch.randn(1, 20, 21, 2, 2)
    assert torch.equal(chain.chunk_condition(cond, 0, 3), cond[:, :, :3])
    for index in (6, 7, 10_000):
        assert torch.equal(chain.chunk_condition(cond, index, 3), cond[:, :, 18:])
    short = cond[:, :, :6]                                                              # first chunk and one for all others
    assert torch.equal(chain.chunk_condition(short, 5, 3), cond[:, :, 3:6])


@torch.no_grad()
def test_guidance_pushes_away_from_null_audio():
    dit, (cond, noise, given) = make_dit(), setting(21)
    run = lambda guidance, conditions, t: chain.predict(dit, noise[0], cond, t, conditions, guidance)
    t, null = torch.full((2,), 1000.0), {**given, "audio": torch.zeros_like(given["audio"])}
    without = run(1, null, t)
    close(run(3, chain.with_null_audio(given), torch.cat([t, t])), without + 3 * (run(1, given, t) - without))
    with pytest.raises(UserError, match="guidance"):
        chain.with_null_audio({**given, "audio": None})


# The chain

@pytest.mark.parametrize("chunk", [3, 7])
def test_rollout_with_a_cache_per_step_is_the_whole_sequence(chunk):
    dit, (cond, noise, given) = make_dit(chunk=chunk), setting()
    for ts in (TS, flow.timesteps(3, 3)):
        how = dict(timesteps=ts, noise=noise, **given)
        a, b = rollout(dit, cond, chunks=21 // chunk, **how), full(dit, cond, **how)
        close(a, b, 2e-5)
        assert not a.requires_grad and not b.requires_grad
    assert (full(dit, cond, mask="bidirectional", **how) - b).abs().max() > 1e-3


@torch.no_grad()
def test_modes_by_hand_for_two_chunks():
    """Each mode's second chunk, written out: which time the context had is what tells them apart."""
    dit, (cond, noise, given) = make_dit(), setting(6)
    part = lambda f: dict(text=given["text"], image=given["image"], audio=given["audio"][:, f], audio_mask=given["audio_mask"][:, f])
    first, second = slice(0, 3), slice(3, 6)
    x_in = lambda x_t, f: torch.cat([x_t, cond[:, :, f]], 1)
    t = lambda v: torch.full((2,), v)

    x = noise[0][:, :, first]                                                           # chunk 0
    zero = flow.x0_from_v(x, dit(x_in(x, first), t(TS[0]), **part(first)), TS[0])
    x_1 = flow.add_noise(zero, noise[1][:, :, first], TS[1])
    zero = flow.x0_from_v(x_1, dit(x_in(x_1, first), t(TS[1]), **part(first)), TS[1])
    contexts = {"per_step": [(x, TS[0]), (x_1, TS[1])], "next_step": [(x_1, TS[1])] * 2, "clean_pass": [(zero, 0.0)] * 2}
    for mode, context in contexts.items():
        y = noise[0][:, :, second]
        for i, (x_c, t_c) in enumerate(context):
            cache = dit.new_cache(2, 4, 4)
            dit(x_in(x_c, first), t(t_c), cache=cache, **part(first))
            v = dit(x_in(y, second), t(TS[i]), cache=cache, **part(second))
            x_0 = flow.x0_from_v(y, v, TS[i])
            y = flow.add_noise(x_0, noise[i + 1][:, :, second], TS[1])
        out = rollout(dit, cond, chunks=2, timesteps=TS, noise=noise, cache=mode, **given)
        close(out[:, :, first], zero)
        close(out[:, :, second], x_0)


def test_an_unknown_cache_is_one_line():
    dit, (cond, noise, given) = make_dit(), setting(3)
    with pytest.raises(UserError, match="'none' is unknown"):
        rollout(dit, cond, chunks=1, timesteps=TS, cache="none", **given)


@pytest.mark.parametrize("mode", chain.CACHES)
@pytest.mark.parametrize("grad", [0, 1])
def test_gradient_only_through_the_chosen_step(mode, grad, monkeypatch):
    dit, (cond, noise, given) = make_dit(), setting(9)
    times = []
    inner = dit.forward
    monkeypatch.setattr(dit, "forward", lambda x, t, **k: times.append((t[0].item(), torch.is_grad_enabled())) or inner(x, t, **k))
    out = rollout(dit, cond, chunks=3, timesteps=TS, noise=noise, cache=mode, grad=grad, **given)
    assert {t for t, on in times if on} == {float(torch.tensor(TS[grad]))} and sum(on for _, on in times) == 3
    out[:, :, 6:].square().mean().backward()                                            # loss on the last chunk alone
    assert all(p.grad is not None for n, p in dit.named_parameters())
    with torch.no_grad():
        same = rollout(dit, cond, chunks=3, timesteps=TS, noise=noise, cache=mode, grad=grad, **given)
    assert not same.requires_grad and torch.equal(same, out)


def test_gradient_of_a_chunk_ignores_how_its_context_was_made():
    """The context is a constant: chunk 1's loss gives the same gradient whether or not chunk 0 was tracked."""
    dit, (cond, noise, given) = make_dit(), setting(6)
    grads = []
    for tracked in (True, False):
        chain = Chain(dit, cond, TS)
        for index in range(2):
            f = slice(3 * index, 3 * index + 3)
            with torch.set_grad_enabled(tracked or index == 1):
                out = chain.next(lambda i: noise[i][:, :, f], text=given["text"], audio=given["audio"][:, f], grad=1)
        dit.zero_grad()
        out.sum().backward()
        grads.append(dit.blocks[0].attn1.to_k.weight.grad.clone())
    assert torch.equal(*grads)


def test_full_gradient_step():
    dit, (cond, noise, given) = make_dit(), setting()
    out = full(dit, cond, timesteps=TS, noise=noise, grad=0, **given)
    close(out, full(dit, cond, timesteps=TS[:1], noise=noise, **given), 1e-6)
    out.sum().backward()
    assert dit.blocks[0].attn1.to_k.weight.grad is not None


@pytest.mark.parametrize("mode", chain.CACHES)
def test_an_endless_chain_keeps_its_buffers(mode):
    dit, (cond, _, given) = make_dit(), setting(3, batch=1)
    chain = Chain(dit, cond[:1], TS, cache=mode)
    g = torch.Generator().manual_seed(0)
    state = lambda: sorted({c.k.data_ptr() for pair in chain.caches.values() for c in pair if c} |
                           {c.v.data_ptr() for pair in chain.caches.values() for c in pair if c})
    size = lambda: sum(len(v) for c, _ in chain.caches.values() for v in c.memo.values())
    for c in range(30):
        with torch.no_grad():
            out = chain.next(lambda i: torch.randn(1, 16, 3, 4, 4, generator=g), text=given["text"][:1], image=given["image"][:1],
                             audio=given["audio"][:1].clone())
        if c == 3:
            pointers, entries = state(), size()
    assert state() == pointers and size() == entries and out.isfinite().all()
    read = chain.caches[TS[0]][0]
    assert read.filled == 30 and read.positions() == range(18, 21)


@pytest.mark.parametrize("mode", chain.CACHES)
@torch.no_grad()
def test_nothing_constant_is_computed_twice(mode):
    dit, (cond, noise, given) = make_dit(), setting(12)
    calls = {"time": [], "prompt": [], "sound": []}
    embed = dit.condition_embedder
    for name, module in (("time", embed.time_proj), ("prompt", embed.text_embedder), ("prompt", dit.blocks[1].attn2.to_v),
                         ("sound", dit.audio_embedder), ("sound", dit.blocks[0].attn2.audio_k)):
        module.register_forward_hook(lambda *_, name=name: calls[name].append(1))
    rollout(dit, cond, chunks=4, timesteps=TS, noise=noise, cache=mode, **given)
    assert {k: len(v) for k, v in calls.items()} == {"time": 3 if mode == "clean_pass" else 2, "prompt": 2, "sound": 8}


def test_noise_may_be_a_function_and_chunks_follow_the_condition():
    dit, (cond, noise, given) = make_dit(), setting()
    a = rollout(dit, cond, chunks=7, timesteps=TS, noise=noise, **given)
    assert torch.equal(a, rollout(dit, cond, timesteps=TS, noise=lambda step: noise[step], **given))


def test_a_generator_makes_the_noise():
    dit, (cond, _, given) = make_dit(), setting(6)
    run = lambda seed: rollout(dit, cond, chunks=2, timesteps=TS, generator=torch.Generator().manual_seed(seed), **given)
    a, b, c = run(0), run(0), run(1)
    assert torch.equal(a, b) and not torch.equal(a, c)


@torch.no_grad()
def test_caches_go_with_their_chain():
    """At once, not when Python next looks for cycles: the caches of the next stream need the room."""
    def buffers(cache):
        dit = make_dit(num_layers=1)
        chain = Chain(dit, torch.randn(1, 20, 21, 4, 4), [1000.0, 500.0], cache=cache)
        for _ in range(2):
            chain.next(lambda step: torch.randn(1, 16, 3, 4, 4))
        return [weakref.ref(read.k) for read, _ in chain.caches.values()]
    gc.collect(), gc.disable()
    try:
        assert [k() for cache in CACHES for k in buffers(cache)] == [None] * 6
    finally:
        gc.enable()
