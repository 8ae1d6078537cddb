"""attention: predicates against brute force, RoPE's algebra, gathered = dense attention, a cache that cannot grow."""

import math

import pytest
import torch

from tmlib import attention as att
from tmlib.config import UserError


def brute(kind, q, k, chunk):
    q, k = q // chunk, k // chunk
    return {"bidirectional": True, "causal": k <= q, "sparse_causal": k in (0, q - 1, q), "first": k in (0, q), "previous": k in (q - 1, q)}[kind]


@pytest.mark.parametrize("kind", att.MASKS)
@pytest.mark.parametrize("frames,tokens,chunk", [(21, 2, 3), (21, 1, 7), (7, 3, 3), (1, 1, 3)])
def test_mask_matrix_is_the_brute_force_one(kind, frames, tokens, chunk):
    expected = [[brute(kind, q // tokens, k // tokens, chunk) for k in range(frames * tokens)] for q in range(frames * tokens)]
    assert att.mask_matrix(kind, frames, tokens, chunk).tolist() == expected


def test_sparse_causal_is_the_papers_figure():
    rows = ["#......", "##.....", "###....", "#.##...", "#..##..", "#...##.", "#....##"]      # as the paper's figure has it
    mask = att.mask_matrix("sparse_causal", 21, 1, 3)[::3, ::3]
    assert ["".join(".#"[seen] for seen in row) for row in mask.tolist()] == rows


def test_unknown_mask_is_one_line():
    with pytest.raises(UserError, match="'sparse' is unknown; choose one of bidirectional"):
        att.mask_matrix("sparse", 3)


@pytest.mark.parametrize("kind", att.MASKS)
@pytest.mark.parametrize("frames,chunk", [(21, 3), (21, 7), (8, 3), (2, 3)])
def test_gathered_attention_equals_dense_with_gradients(kind, frames, chunk):
    g = torch.Generator().manual_seed(frames)
    a, b = ([torch.randn(2, 3, frames * 4, 8, generator=g.manual_seed(i), requires_grad=True) for i in range(3)] for _ in "ab")
    out = att.masked_attention(*a, kind, frames, chunk)
    ref = att.attention(*b, att.mask_matrix(kind, frames, 4, chunk))
    torch.testing.assert_close(out, ref, atol=1e-6, rtol=1e-5)
    weight = torch.randn(out.shape, generator=g)
    (out * weight).sum().backward()
    (ref * weight).sum().backward()
    for x, y in zip(a, b):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-6, rtol=1e-5)


# RoPE

def test_rope_dims_are_wans():
    assert att.rope_dims(128) == (44, 42, 42)
    for head_dim in range(6, 130, 2):
        assert sum(att.rope_dims(head_dim)) == head_dim and all(d > 0 and d % 2 == 0 for d in att.rope_dims(head_dim))


def test_rope_turns_pairs_by_position_times_frequency():
    table = att.rope_table([5], 2, 3, 12)                                               # dims 4, 4, 4
    x = torch.zeros(1, 1, 6, 12)
    x[..., 0::2] = 1.0
    out = att.apply_rope(x, table)[0, 0]
    for r in range(2):
        for c in range(3):
            angles = [p * 10000 ** (-i / 4) for p in (5, r, c) for i in (0, 2)]
            expected = [f(a) for a in angles for f in (math.cos, math.sin)]
            torch.testing.assert_close(out[3 * r + c], torch.tensor(expected), atol=1e-6, rtol=0)


def test_rope_scores_depend_on_distance_only():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 32, generator=g) for _ in range(2))
    place = lambda x, p: att.apply_rope(x, att.rope_table([p], 1, 1, 32))
    score = lambda a, b: (place(q, a) * place(k, b)).sum()
    torch.testing.assert_close(score(3, 1), score(18, 16), atol=1e-4, rtol=0)
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3


def test_rope_complex_and_real_forms_agree():
    x, table = torch.randn(2, 3, 8, 16), att.rope_table([0, 7], 2, 2, 16)
    cos, sin = table
    a, b = x[..., 0::2], x[..., 1::2]
    real = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    torch.testing.assert_close(att.apply_rope(x, table), real, atol=1e-6, rtol=0)
    assert att.apply_rope(x.bfloat16(), table).dtype == torch.bfloat16


def test_rope_table_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        att.rope_table([101, 103], 1, 1, 16)
    x = torch.randn(1, 1, 2, 16, requires_grad=True)
    att.apply_rope(x, att.rope_table(torch.tensor([101, 103]), 1, 1, 16)).sum().backward()
    assert x.grad is not None


def test_under_autocast_a_cpu_attends_in_float32():
    q, k, v = (torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = att.attention(q, k, v)
    assert got.dtype == torch.bfloat16 and torch.equal(got, att.attention(q.float(), k.float(), v.float()).bfloat16())


# The cache

def fill(cache, value, grad=False):
    """One forward pass whose keys are `value` + layer; returns what each layer's queries would see."""
    k = torch.full(cache.k.shape[1:3] + cache.k.shape[4:], float(value), requires_grad=grad)
    seen = []
    for layer in range(cache.k.shape[0]):
        past = cache.read(layer)
        seen.append([torch.cat([p, own], 2) for p, own in zip(past, (k + layer, -k))])
        att.store(cache.room(layer), k + layer, -k)
    cache.advance()
    return seen


def test_cache_holds_the_reference_and_the_previous_chunk():
    cache = att.KVCache(2, 1, 1, 3, 4, chunk=3)
    seen = []
    for c in range(5):
        k, v = fill(cache, 10 * c)[1]
        seen.append(k[0, 0, ::3, 0].tolist())
        assert torch.equal(v, 1 - k)
    assert seen == [[1], [1, 11], [1, 11, 21], [1, 21, 31], [1, 31, 41]]                # layer 1: {0, previous, own}
    assert cache.read(0)[0].data_ptr() == cache.k.data_ptr()                            # no copy


@pytest.mark.parametrize("mask, want", [("previous", [[0], [0, 10], [10, 20], [20, 30], [30, 40]]), ("first", [[0], [0, 10], [0, 20], [0, 30], [0, 40]])])
def test_cache_shows_what_its_mask_allows(mask, want):
    cache, seen, places = att.KVCache(1, 1, 1, 3, 4, chunk=3, mask=mask), [], []
    for c in range(5):
        places.append(cache.context_positions(cache.positions()))
        seen.append(fill(cache, 10 * c)[0][0][0, 0, ::3, 0].tolist())
    assert seen == want
    assert places == [[], [0, 1, 2], *([0, 1, 2] if mask == "first" else [3 * c - 3, 3 * c - 2, 3 * c - 1] for c in (2, 3, 4))]


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_a_mask_that_needs_more_than_the_cache_holds_is_refused(mask):
    with pytest.raises(UserError, match=f"'{mask}' is none that a stream can keep"):
        att.KVCache(1, 1, 1, 3, 4, chunk=3, mask=mask)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_cache_goes_back_to_where_it_was_saved(chunks):
    """Chunk 0 is not copied: nothing writes over it."""
    cache = att.KVCache(1, 1, 1, 3, 4, chunk=3)
    for c in range(chunks):
        fill(cache, 10 * c)
    saved, want = cache.saved(), [x.clone() for x in fill(cache, 1000)[0]]
    fill(cache, 77), cache.restore(saved)
    assert cache.filled == chunks and all(map(torch.equal, fill(cache, 1000)[0], want))


def test_pairs_turn_the_same_whichever_way():
    torch.manual_seed(0)
    x, table = torch.randn(2, 3, 12, 16), att.rope_table(range(3), 2, 2, 16)
    pairs = x.unflatten(-1, (-1, 2))
    assert torch.equal(att.mirrored(pairs, *table), att.stacked(pairs, *table))
    torch.testing.assert_close(att.stacked(pairs, *table).flatten(-2), att.apply_rope(x, table))


def test_positions_are_anchored_to_the_window():
    cache = att.KVCache(1, 1, 1, 1, 2, chunk=3)
    firsts, contexts = [], []
    for _ in range(10):
        p = cache.positions()
        firsts.append(p[0])
        contexts.append(cache.context_positions(p))
        fill(cache, 0)
    assert firsts == [0, 3, 6, 9, 12, 15, 18, 18, 18, 18]
    assert contexts[:3] == [[], [0, 1, 2], [0, 1, 2, 3, 4, 5]] and contexts[9] == [0, 1, 2, 15, 16, 17]
    wide = att.KVCache(1, 1, 1, 1, 2, chunk=7, window=21)
    for _ in range(5):
        fill(wide, 0)
    assert wide.positions() == range(14, 21)


def test_cache_detaches_and_never_grows():
    cache = att.KVCache(1, 1, 1, 1, 2, chunk=1)
    pointers = cache.k.data_ptr(), cache.v.data_ptr()
    for c in range(50):
        (k, _), = fill(cache, c, grad=True)
        k.sum().backward()                                                              # own keys have gradients
        assert not cache.k.requires_grad and cache.k.grad_fn is None
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == pointers and k.shape[2] == 3


def test_cache_can_be_read_only_or_write_elsewhere():
    a, b = (att.KVCache(1, 1, 1, 1, 2, chunk=1) for _ in range(2))
    a.writes_to = None
    fill(a, 1)
    assert a.filled == 0 and a.k.abs().sum() == 0
    a.writes_to = b
    fill(a, 2)
    assert (a.filled, b.filled) == (0, 1) and b.k[..., 0, :, :].unique().tolist() == [2.0]
    assert a.fits(1, 1) and not a.fits(2, 1) and not a.fits(1, 2)


def test_memo_follows_the_tensor_and_stays_small():
    cache, calls = att.KVCache(1, 1, 1, 1, 2, chunk=1), []
    compute = lambda x: calls.append(1) or x + 1
    text, other = torch.zeros(1), torch.ones(1)
    with torch.no_grad():
        for source, n in ((text, 1), (text, 1), (other, 2), (other, 2), (text, 3)):
            assert torch.equal(cache.remember("text", source, compute), source + 1) and len(calls) == n
        for _ in range(100):
            cache.remember("time", torch.zeros(1), compute, keep=4)
        assert len(cache.memo["time"]) == 4 and len(cache.memo["text"]) == 1
    n = len(calls)
    cache.remember("text", text, compute)                                               # gradients on: never reused
    assert len(calls) == n + 1
