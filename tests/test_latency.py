"""latency: the ladder's rungs do the work they claim to do, no less and no more. No timing is judged here."""
from types import SimpleNamespace

import torch
from tiny import make_dit

from tmlib import attention, latency
from tmlib.latency import Forgetful, dit_ladder

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
