"""latency: the ladder's rungs do the work they claim to do, no less and no more. No timing is judged here."""
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import IMAGE, PROMPT, TIMES, WAVE, FakeEars, FakeVAE, make_streamer
from tiny import make_dit
from torch._dynamo.testing import CompileCounter

from tmlib import attention, latency, soak
from tmlib.config import UserError
from tmlib.stand_in import of_diffusers
from tmlib.latency import Forgetful, dit_ladder
from tmlib.placement import PLACEMENTS, Chunk

P = SimpleNamespace(steps=2, shift=3.0, chunk=3, cache="per_step", seed=0)


def test_ladder_times_every_way_for_every_chunk(monkeypatch):
    dit, seen, embedded = make_dit(), [], []
    forward, text = dit.forward, dit.condition_embedder.text_embedder.forward

    def watched(x, t, **given):
        seen.append((x.shape[2], given.get("cache"), list(given.get("positions") or [])))
        return forward(x, t, **given)

    dit.forward = watched
    dit.condition_embedder.text_embedder.forward = lambda x: embedded.append(len(seen)) or text(x)
    seconds = dit_ladder(dit, 4, 4, P, 5)
    assert {name: len(s) for name, s in seconds.items()} == {"recompute": 5, "keys_and_values": 5, "everything": 5}
    assert all(s > 0 for way in seconds.values() for s in way)
    turn = seen[6:12]                                                    # the second chunk, two steps each way
    assert [(frames, cache is None) for frames, cache, _ in turn] == [(9, True)] * 2 + [(3, False)] * 4
    assert turn[0][2] == [0, 1, 2, 15, 16, 17, 18, 19, 20]
    made = [(i - 1) % 6 // 2 for i in embedded]                          # which way embedded the text, pass by pass
    assert made.count(0) == 10 and made.count(1) == 10 and made.count(2) == 1


@torch.no_grad()
def test_forgetting_changes_no_number():
    dit = make_dit()
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 36, 3, 4, 4, generator=g), torch.tensor([700.0])
    given = dict(text=torch.randn(1, 3, 10, generator=g), image=torch.randn(1, 3, 12, generator=g))
    out = []
    for memo in (None, Forgetful()):
        cache = dit.new_cache(1, 4, 4, memo=memo)
        out.append([dit(x, t, cache=cache, **given) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*out))
    assert not torch.equal(out[0][0], out[0][1])                         # the cache itself is at work
    assert attention.WINDOW == 21 and latency.Forgetful().setdefault("a", 1) == 1


# Streams

def run(times, **stages):
    """Chunks delivered at `times`, from 10.0 on; each stage took so many seconds, ending at the delivery."""
    began = [10.0, *times[:-1]]
    return [Chunk(i, 0, i == 0, marks={"out": (b, t), **{s: (t - d, t) for s, d in stages.items()}})
            for i, (b, t) in enumerate(zip(began, times))]


def test_summary_by_hand():
    calm = run([10.5, 10.9, 11.0, 11.2, 11.4], hear=0.01, dit=0.05, vae=0.1)
    noisy = run([10.7, 12.0, 13.0, 14.0, 15.0], hear=0.01, dit=0.15, vae=0.1)
    made = latency.summary([calm, noisy], frames=12, warmup=1)
    assert made["first_frame_ms"] == pytest.approx(600)                  # the median of two is their mean
    assert latency.rates([calm, noisy], 12, 1) == pytest.approx([12 * 3 / 0.5, 12 * 3 / 3])
    assert made["fps"] == pytest.approx((72 + 12) / 2)
    assert made["chunk_ms_p50"] == pytest.approx(600) and made["dit_ms_p50"] == pytest.approx(100)
    assert made["vae_busy"] == pytest.approx(6 * 0.1 / 3.5) and made["dit_busy"] == pytest.approx((3 * 0.06 + 3 * 0.16) / 3.5)
    assert "frames_ms_p50" not in made                                   # nothing was sent
    assert latency.bound({"dit_ms_p50": 20, "hear_ms_p50": 3, "vae_ms_p50": 40}, 12) == 300
    assert latency.bound({"dit_ms_p50": 50, "hear_ms_p50": 10, "vae_ms_p50": 40}, 12) == 200


def test_streams_are_timed_where_they_serve(tmp_path):
    streamer = make_streamer()
    runs = latency.in_turns({"serial": streamer}, IMAGE, chunks=5, rounds=2)["serial"]
    found, chunks = latency.summary(runs, 12, warmup=1), runs[-1]
    assert len(runs) == 2 and len(chunks) == 5 and all(c.frames is None for c in chunks)
    for a, b in zip(chunks, chunks[1:]):
        assert a.marks["out"][1] == b.marks["out"][0] < b.marks["hear"][0] < b.marks["dit"][0] < b.marks["vae"][0] < b.marks["out"][1]
    assert 0 < found["dit_busy"] + found["vae_busy"] <= 1
    latency.gantt(tmp_path / "gantt.png", {"serial": chunks}, first=1, n=3)
    assert (tmp_path / "gantt.png").stat().st_size > 2000


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux chooses cores")
def test_cores_are_given_back():
    before = os.sched_getaffinity(0)
    with latency.cores(1):
        assert len(os.sched_getaffinity(0)) == 1 == latency.free_cores()
    assert os.sched_getaffinity(0) == before


def test_the_matrix_has_every_combination():
    p = SimpleNamespace(sizes=[3, 7], steps=[1, 2], chunks_each=3, rounds_each=2, warmup_each=1)
    ears = FakeEars()
    ears.tokens_per_latent = 4
    rows = latency.matrix(make_dit(), FakeVAE(), ears, IMAGE, p, P)
    assert [(r["chunk"], r["steps"], r["placement"]) for r in rows] == [(c, s, name) for c in (3, 7) for s in (1, 2) for name in PLACEMENTS]
    assert all(len(r["fps_each"]) == 2 and min(r["fps_each"]) <= r["fps"] <= max(r["fps_each"]) for r in rows)
    assert all(r["fps"] > 0 and (r["placement"] == "two_process") == ("frames_ms_p50" in r) for r in rows)
    cost = {(r["chunk"], r["steps"]): r["gflop"] for r in rows}
    assert cost[3, 2] > 1.5 * cost[3, 1] and cost[7, 1] > cost[3, 1]


@pytest.mark.parametrize("overlapped", [False, True])
def test_only_a_waiting_dit_sleeps_on_the_emulated_link(monkeypatch, overlapped):
    streamer, slept, worked = make_streamer(placement="overlap"), [], []
    plain = [c.frames for c in make_streamer(dit=streamer.dit).chunks(IMAGE, [WAVE], **PROMPT)]
    made = streamer.made
    monkeypatch.setattr(latency.time, "sleep", lambda s: slept.append((s, threading.get_ident())))
    monkeypatch.setattr(streamer, "made", lambda *a: worked.append(threading.get_ident()) or made(*a))
    frames = [c.frames for c in latency.linked(streamer, 0.25, overlapped).chunks(IMAGE, [WAVE], **PROMPT)]
    assert len(frames) == len(plain) and all(np.array_equal(a, b) for a, b in zip(frames, plain))
    assert [s for s, _ in slept] == [0.25] * len(plain)
    assert ({thread for _, thread in slept} == set(worked)) == (not overlapped)


def test_the_emulated_link_knows_what_to_expect():
    p = SimpleNamespace(link=[0.0, 0.25, 1.0], chunks_each=3, rounds_each=2, warmup_each=1)
    ears = FakeEars()
    ears.tokens_per_latent = 4
    split = {"dit_ms_p50": 2.5, "hear_ms_p50": 0.5, "vae_ms_p50": 4.0}
    rows = latency.link(make_dit(), FakeVAE(), ears, IMAGE, p, {"chunk": 3, "timesteps": TIMES}, split)
    assert [r["link_ms"] for r in rows] == [0, 1, 4]
    assert [r["ideal_gain"] for r in rows] == pytest.approx([1, 1, 7 / 4])     # a decoder of 4 ms hides 1 ms after a DiT of 3
    assert all(r["gain_lo"] <= r["gain"] <= r["gain_hi"] and min(r["waiting_fps"], r["overlapped_fps"]) > 0 for r in rows)


@torch.no_grad()
def test_without_sound_and_prior_the_student_is_diffusers_model():
    dit = make_dit(audio_tokens=4, prior_std=((0.5, 0.2), (0.3, 0.4)), condition="repeat")
    ours = latency.without_sound(dit)
    theirs = of_diffusers(ours)
    g = torch.Generator().manual_seed(0)
    x, t, text, image = (torch.randn(*s, generator=g) for s in ((1, 36, 6, 4, 4), (1,), (1, 512, 10), (1, 3, 12)))
    a, b = ours(x, 500 + t, text=text, image=image), theirs(x, 500 + t, text, image, return_dict=False)[0]
    assert torch.allclose(a, b, atol=1e-4) and a.std() > 0.01
    assert latency.against_diffusers(dit, 4, 3).keys() == {"cached", "window"}
    graphs = CompileCounter()
    ways = latency.against_diffusers(dit, 4, 3, compiled=True, backend=graphs)
    assert graphs.frame_count == 1                          # the whole step, once its context is of two chunks
    assert {name: len(s) for name, s in latency.turns(ways, 3).items()} == {"cached": 3, "window": 3, "compiled": 3, "again": 3}
    assert torch.equal(ways["window"]()[0], ways["again"]()[0]) and torch.allclose(ways["compiled"](), ways["cached"](), atol=1e-5)


def test_a_compiler_that_errs_is_told():
    with pytest.raises(UserError, match="differs from the eager one"):
        latency.against_diffusers(make_dit(audio_tokens=4), 4, 3, compiled=True, backend=lambda graph, _: lambda *x: [2 * y for y in graph(*x)])


@pytest.mark.parametrize("placement", ["serial", "overlap"])
def test_a_soak_compares_an_old_stream_with_a_new_one_in_turns(monkeypatch, placement):
    monkeypatch.setattr(soak, "EACH", 3)
    monkeypatch.setattr(soak, "WARMUP", 2)
    made, dit = [], make_dit(num_layers=1)

    def make():
        made.append(make_streamer(None, placement, dit))
        return made[-1]
    found = soak.soak(make, IMAGE, 12, turns=3)
    assert found["chunks"] == 12 and found["last_over_first"] == pytest.approx(found["last_ms_p50"] / found["first_ms_p50"])
    assert found["old_over_new_lo"] <= found["old_over_new"] <= found["old_over_new_hi"] and len(found["thousands_ms_p50"]) == 1
    taken = 3 * (1 if placement == "serial" else 1 + soak.AHEAD)
    spare = 0 if placement == "serial" else soak.AHEAD      # made, but never asked for
    assert [s.take.index in range(n, n + spare + 1) for s, n in zip(made, (12 + taken, 2 + taken))] == [True, True]
    if os.path.exists("/proc/self/statm"):
        assert found["resident_mb_first"] > 10 and found["grown"] < 0.5


def test_turns_pass_over_what_was_made_ahead():
    """A stream that makes two chunks while the other is waited for gives them for nothing: only the third is on the clock."""
    def stream(cost):
        while True:
            yield from (None, None)
            time.sleep(cost)
            yield None
    pairs = soak.in_turns(stream(0.02), stream(0.01), 3, 2)
    assert pairs.shape == (3, 2) and (pairs[:, 0] >= 0.02).all() and (pairs[:, 1] >= 0.01).all()


def test_a_soak_says_what_it_needs():
    assert soak.resident("no such process") == 0
    with pytest.raises(soak.UserError, match="--chunks 7: give at least 300"):
        soak.main(["--chunks", "7"])
