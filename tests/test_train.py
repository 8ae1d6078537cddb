"""train: a run that was killed and resumed is the run that was not, bit for bit, and what keys its state notices every change."""
import itertools
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tiny import make_dit, make_latents
from tmlib import config, plan, train
from tmlib.audio import SpeechEncoder
from tmlib.pretrain import flow_matching_loss
from tmlib.train import Optim, Player, fingerprint, generator, schedule
from tmlib.vae import VAEConfig, VideoVAE


class Net(nn.Module):
    """One matrix for Muon, one too small for it, a bias, a head and a buffer."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 4, bias=False), nn.Linear(4, 16)])
        self.head = nn.Linear(16, 16)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


class Killed(Exception):
    pass


def two_players(die_at=None, seed=0):
    """A student that plays every second step against a critic, as in distillation: each one's loss needs the other."""
    student, critic = Net(seed), Net(seed + 1)

    def student_loss(g, step):
        x = torch.randn(8, 16, generator=g)
        loss = (student(x) - critic(x).detach()).square().mean()
        return {"loss": loss, "double": 2 * loss}

    def critic_loss(g, step):
        if step == die_at:
            raise Killed
        x = torch.randn(8, 16, generator=g)
        return {"loss": (critic(x) - x - student(x).detach()).square().mean()}

    muon = Optim(lr=1e-2, muon=2e-2, warmup=2, ema=0.9)
    return [Player("student", student, student_loss, muon, every=2), Player("critic", critic, critic_loss, Optim(lr=1e-2, warmup=1))]


def one_player(optim, seed=0):
    net = Net(seed)

    def loss(g, step):
        x = torch.randn(8, 16, generator=g)
        return {"loss": (net(x) - x).square().mean()}
    return Player("net", net, loss, optim)


def weights(players):
    return {f"{p.name}.{k}": v.clone() for p in players for k, v in p.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- resume ------------------------------------------------------------------------------------

@pytest.fixture
def straight(tmp_path):
    players = two_players()
    history = train.train(players, 6, 0, tmp_path / "straight", "x", log_every=1)
    return weights(players), history


@pytest.mark.parametrize("at", [1, 3, 5])
def test_stopped_and_resumed_is_straight(straight, tmp_path, at):
    train.train(two_players(), 6, 0, tmp_path / "state", "x", log_every=1, stop_at=at)
    players = two_players(seed=50)                                       # whatever the new process begins with
    history = train.train(players, 6, 0, tmp_path / "state", "x", log_every=1)
    assert same(weights(players), straight[0])
    assert history == straight[1]


@pytest.mark.parametrize("at", [3, 4])
def test_killed_in_the_middle_of_a_step(straight, tmp_path, at):
    """Step 4: the student has moved already when the critic dies."""
    with pytest.raises(Killed):
        train.train(two_players(die_at=at), 6, 0, tmp_path / "state", "x", save_share=float("inf"), log_every=1)
    players = two_players(seed=50)
    history = train.train(players, 6, 0, tmp_path / "state", "x", log_every=1)
    assert same(weights(players), straight[0]) and history == straight[1]


def test_killed_before_any_state_begins_anew(straight, tmp_path):
    with pytest.raises(Killed):
        train.train(two_players(die_at=3), 6, 0, tmp_path / "state", "x", log_every=1)
    players = two_players()
    train.train(players, 6, 0, tmp_path / "state", "x", log_every=1)
    assert same(weights(players), straight[0])


def test_a_finished_run_is_not_run_again(straight, tmp_path):
    players = two_players(die_at=0, seed=50)
    history = train.train(players, 6, 0, tmp_path / "straight", "x", log_every=1)
    assert same(weights(players), straight[0]) and history == straight[1]


def test_the_seed_matters(straight, tmp_path):
    players = two_players()
    train.train(players, 6, 1, tmp_path / "other", "x")
    assert not same(weights(players), straight[0])


def test_players_play_when_it_is_their_turn(tmp_path):
    turns = []
    players = two_players()
    for p in players:
        p.loss = (lambda name, loss: lambda g, step: turns.append((name, step)) or loss(g, step))(p.name, p.loss)
    history = train.train(players, 5, 0, tmp_path, "x", log_every=2)
    s, c = "student", "critic"
    assert turns == [(s, 0), (c, 0), (c, 1), (s, 2), (c, 2), (c, 3), (s, 4), (c, 4)]
    assert [h["step"] for h in history] == [2, 4, 5]
    assert set(history[0]) == {"step", "student_double", *(f"{p}_{k}" for p in (s, c) for k in ("loss", "grad_norm"))}
    single = train.train([one_player(Optim(1e-3))], 2, 0, tmp_path / "single", "x")
    assert set(single[0]) == {"step", "loss", "grad_norm"}


def test_the_log_holds_means_since_its_last_entry(tmp_path):
    each = train.train([one_player(Optim(1e-3))], 6, 0, tmp_path / "each", "x", log_every=1)
    some = train.train([one_player(Optim(1e-3))], 6, 0, tmp_path / "some", "x", log_every=4)
    loss = [h["loss"] for h in each]
    assert [h["loss"] for h in some] == pytest.approx([sum(loss[:4]) / 4, sum(loss[4:]) / 2]) and len(set(loss)) == 6
    rare = train.train(two_players(), 4, 0, tmp_path / "rare", "x", log_every=1)
    assert rare[1]["student_loss"] == rare[0]["student_loss"] != rare[2]["student_loss"]      # it plays every other step


# ---- optimisers --------------------------------------------------------------------------------

def test_schedule():
    o = Optim(1.0, warmup=4)
    assert [schedule(s, 100, o) for s in range(4)] == pytest.approx([0.25, 0.5 * 0.99, 0.75 * 0.98, 0.97])
    assert schedule(50, 100, o) == pytest.approx(0.5) and schedule(99, 100, o) == pytest.approx(0.01)
    flat = Optim(1.0, warmup=0, decay=False)
    assert schedule(0, 10, flat) == schedule(9, 10, flat) == 1


def test_learning_rates_follow_the_schedule(tmp_path):
    p = one_player(Optim(lr=0.1, muon=0.3, warmup=2))
    seen, loss = [], p.loss
    p.loss = lambda g, step: seen.append([o.param_groups[0]["lr"] for o in p.optimisers]) or loss(g, step)
    train.train([p], 4, 0, tmp_path, "x")
    assert [s[0] for s in seen] == pytest.approx([0.05, 0.075, 0.05, 0.025])
    assert [s[1] for s in seen] == pytest.approx([3 * s[0] for s in seen])
    seen.clear()
    p.every = 2
    train.train([p], 7, 0, tmp_path / "rare", "x")
    assert [s[0] for s in seen] == pytest.approx([0.05, 0.075, 0.05, 0.025])                   # by its own steps, of which there are four


def test_muon_takes_hidden_matrices_and_kernels_only():
    net = Net(0)
    net.blocks[2].weight.requires_grad_(False)
    names = {id(p): n for n, p in net.named_parameters()}
    held = lambda optimiser: {names[id(p)] for g in optimiser.param_groups for p in g["params"]}
    adam, muon = train.build_optimisers(net, Optim(1e-3, muon=1e-3))
    assert held(muon) == {"blocks.0.weight"}
    assert held(adam) == {"blocks.0.bias", "blocks.1.weight", "blocks.2.bias", "head.weight", "head.bias"}
    alone, = train.build_optimisers(net, Optim(1e-3))
    assert held(alone) == held(adam) | held(muon)


@pytest.mark.parametrize("net, taken, left", [
    (VideoVAE(VAEConfig(patch=4, encoder=(16, 16), decoder=(16, 16), blocks=1)), ("encoder.", "decoder."), {"analysis.weight", "synthesis.weight", "decoder.norm.weight"}),
    (SpeechEncoder(), ("convs.",), {"inp.weight", "norms.0.weight", "out.weight", "head.weight"})], ids=["codec", "speech"])
def test_muon_takes_kernels_too(net, taken, left):
    names = {id(p): n for n, p in net.named_parameters()}
    adam, muon = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in train.build_optimisers(net, Optim(1e-3, muon=1e-3)))
    assert muon == {n for n in names.values() if n.startswith(taken) and n.endswith("weight") and "norm" not in n}
    assert left <= adam


def test_average_by_hand(tmp_path):
    p = one_player(Optim(1e-2, warmup=1, ema=0.5))
    after, loss = [], p.loss
    p.loss = lambda g, step: after.append(weights([p])) or loss(g, step)                    # weights before each step
    train.train([p], 4, 0, tmp_path, "x")
    raw = torch.load(tmp_path / "state-4-0-of-1.pt", weights_only=True)["players"]["net"]["model"]
    after = after[1:] + [{f"net.{k}": v for k, v in raw.items()}]
    first = Net(0).state_dict()
    for k, v in p.model.state_dict().items():
        average = first[k]
        for step, w in enumerate(after):
            decay = min(0.5, (step + 1) / (step + 10))
            average = decay * average + (1 - decay) * w[f"net.{k}"] if v.is_floating_point() else w[f"net.{k}"]
        torch.testing.assert_close(v, average)
    assert not torch.equal(p.model.head.weight, after[-1]["net.head.weight"])


def test_a_gradient_that_explodes_is_told(tmp_path):
    p = one_player(Optim(1e-2))
    loss = p.loss
    p.loss = lambda g, step: {k: v * (float("inf") if step == 2 else 1) for k, v in loss(g, step).items()}
    with pytest.raises(FloatingPointError, match="net: gradient is .* at step 2.*learning rate"):
        train.train([p], 5, 0, tmp_path, "x")
    assert all(q.isfinite().all() for q in p.model.parameters())         # the bad step was not taken


def test_gradients_are_clipped(tmp_path):
    p = one_player(Optim(1e-2, clip=0.1, warmup=1))
    loss = p.loss
    p.loss = lambda g, step: {k: 1000 * v for k, v in loss(g, step).items()}
    history = train.train([p], 1, 0, tmp_path, "x")
    assert history[0]["grad_norm"] > 10                                  # told as it was
    assert not p.optimisers and not p.average and all(q.grad is None for q in p.model.parameters())          # room for what comes next
    p.optimisers = train.build_optimisers(p.model, p.optim)
    train.play(p, 0, 1, 0)
    norm = torch.stack([q.grad.norm() for q in p.model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.1, rel=1e-3)


# ---- keys --------------------------------------------------------------------------------------

def test_fingerprint_of_parameters():
    base = fingerprint({"a": 1, "b": [1, 2]})
    assert len(base) == 12 and base == fingerprint({"b": [1, 2], "a": 1}) == fingerprint(SimpleNamespace(b=[1, 2], a=1))
    different = [{"a": 2, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": 1}, {"a": "1", "b": [1, 2]}, {"a": {"a": 1, "b": [1, 2]}}]
    assert len({base, *map(fingerprint, different)}) == 6
    assert fingerprint(1, 2) != fingerprint(12) and fingerprint("a", "b") != fingerprint("ab")
    assert fingerprint(Optim(1e-3)) != fingerprint(Optim(1e-3, ema=0.9))


def test_fingerprint_of_files(tmp_path):
    path = tmp_path / "in" / "a.bin"
    path.parent.mkdir()
    path.write_bytes(b"one")
    file, folder = fingerprint(path), fingerprint(path.parent)
    assert (file, folder) == (fingerprint(path), fingerprint(path.parent))
    path.write_bytes(b"two")
    assert fingerprint(path) != file and fingerprint(path.parent) != folder
    folder = fingerprint(path.parent)
    (path.parent / "deeper").mkdir()
    (path.parent / "deeper" / "b.bin").write_bytes(b"three")
    assert fingerprint(path.parent) != folder
    path.rename(path.with_name("c.bin"))
    assert fingerprint(path.parent / "c.bin") != fingerprint(path.parent / "deeper" / "b.bin") != file


def test_large_files_are_known_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LARGE", 10)
    path, seen = tmp_path / "x", set()
    for text, time in (("a" * 11, 1), ("a" * 11, 2), ("a" * 12, 2)):
        path.write_text(text)
        os.utime(path, ns=(time, time))
        seen.add(fingerprint(path))
    assert len(seen) == 3
    path.write_text("b" * 12)
    os.utime(path, ns=(2, 2))
    assert fingerprint(path) in seen                                     # not read


def test_state_folder_is_keyed_by_parameters_and_inputs(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    a = train.state_folder("codec", {"lr": 1}, tmp_path / "x")
    assert a.parent == train.SCRATCH and a.name.startswith("codec-") and a == train.state_folder("codec", {"lr": 1}, tmp_path / "x")
    assert train.state_folder("codec", {"lr": 2}, tmp_path / "x") != a
    (tmp_path / "x").write_bytes(b"2")
    assert train.state_folder("codec", {"lr": 1}, tmp_path / "x") != a


def test_state_that_is_left_is_named_with_what_to_do(tmp_path, monkeypatch, capsys):
    """Another stage's is not, nor any once the new folder is there; and `mv` does what the line says."""
    monkeypatch.setattr(train, "SCRATCH", tmp_path)
    old = train.state_folder("teacher", {"lr": 1})
    (tmp_path / "teacher-by-hand").mkdir()
    (tmp_path / "other_teacher-0123456789ab").mkdir()
    assert capsys.readouterr().out == ""
    train.train([one_player(Optim(1e-3))], 2, 0, old, "x")
    train.train([one_player(Optim(1e-3))], 1, 0, old / "dmd", "x")
    assert train.state_folder("teacher", {"lr": 1}) == old and capsys.readouterr().out == ""
    new = train.state_folder("teacher", {"lr": 2})
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(config.NOTE) and f"{old} (dmd at step 1 of 1 process, step 2 of 1 process, " in line and f"rm -rf {new}; mv OLD {new}`" in line
    assert "by-hand" not in line and "other_teacher" not in line
    old.rename(new)
    assert train.state_folder("teacher", {"lr": 2}) == new and capsys.readouterr().out == ""
    train.train([one_player(Optim(1e-3))], 3, 0, new, "x")
    assert "x: going on from step 2 of 3" in capsys.readouterr().out
    (new / "state-3-0-of-1.pt").rename(new / "state-3-0-of-8.pt")
    train.train([one_player(Optim(1e-3))], 1, 0, new, "x")
    assert capsys.readouterr().out.startswith(f"note: x begins at step 0: the state in {new} is of 8 processes, and this run has 1. To go on")


def test_another_notebook_begins_anew(monkeypatch):
    """Losses live in notebooks."""
    before = train.state_folder("codec", {})
    monkeypatch.setenv("TM_NOTEBOOK", "its code's hash")
    assert train.state_folder("codec", {}) != before


def test_generators_depend_on_their_key_alone():
    draw = lambda *key: torch.randn(4, generator=generator(*key)).tolist()
    assert draw(0, 1, "a") == draw(0, 1, "a")
    torch.randn(100)
    assert draw(0, 1, "a") == draw(0, 1, "a")
    assert len({tuple(draw(*key)) for key in itertools.product((0, 1), (0, 1), "ab")}) == 8


def test_what_is_measured_before_training_is_measured_once(tmp_path):
    calls = []
    make = lambda: calls.append(1) or {"film": np.arange(12, dtype=np.uint8).reshape(3, 4), "loss": np.float32([0.1, 0.2])}
    first, again = (train.once(tmp_path / "state" / "before.npz", make) for _ in range(2))
    assert calls == [1] and all(np.array_equal(first[k], v) and first[k].dtype == v.dtype for k, v in again.items()) and set(again) == set(first)


def test_finish_removes_the_state(tmp_path):
    train.train([one_player(Optim(1e-3))], 1, 0, tmp_path / "state", "x")
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["state-1-0-of-1.pt"]                 # nothing half-written beside it
    train.finish(tmp_path / "state")
    train.finish(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_too_small_a_card_is_told_at_once(monkeypatch, capsys):
    """By less than `plan` counts, so never in vain; at full size on eight GPUs stage 3 says so on cards of 80 and 96 GB, not of 141."""
    dit, shape, how = plan.build("talkingmachines-18b"), (16, 21, 64, 64), dict(trained=2, frozen=1, graphs=2)
    monkeypatch.setattr(train.ranks, "in_pieces", lambda t: True)
    monkeypatch.setattr(torch.Tensor, "to_local", lambda t: torch.empty(t.numel() // 8, device="meta"), raising=False)
    least, all_of_it = train.least_memory(dit, shape, 1, **how), sum(plan.training_memory(dit, 8, 32, 32, mask="sparse_causal", **how).values())
    assert 100e9 < least < all_of_it < 141e9 and train.least_memory(dit, shape, 1) < sum(plan.training_memory(dit, 8, 32, 32).values()) < 80e9
    for card, told in ((85e9, True), (96e9, True), (150e9, False)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=card))
        for device in ("cuda", "cpu"):
            small = SimpleNamespace(device=device, parameters=dit.parameters, config=dit.config)
            train.heed_memory("matching", small, shape, 1, **how)
            line = capsys.readouterr().out
            assert line == (f"note: matching will run out of memory: it takes more than {least / 1e9:.0f} GB on each GPU, and this one has {card / 1e9:.0f} GB; "
                            "use larger cards, or more of them (`processes` in params.yaml)\n" if told and device == "cuda" else "")


def test_the_real_model_resumes(tmp_path):
    latents, optim = make_latents(tmp_path), Optim(1e-3, muon=1e-3, warmup=1, ema=0.9)
    p = SimpleNamespace(batch=3, at_once=None, repeats=4, shift=3.0, drop_audio=0.3, drop_text=0.0, sway_weight=20)

    def player(seed):
        dit = make_dit(seed)
        return [Player("dit", dit, flow_matching_loss(dit, latents, p), optim)]

    straight, first, second = player(0), player(0), player(9)
    train.train(straight, 4, 0, tmp_path / "a", "x")
    train.train(first, 4, 0, tmp_path / "b", "x", stop_at=2)
    train.train(second, 4, 0, tmp_path / "b", "x")
    assert same(weights(straight), weights(second))
