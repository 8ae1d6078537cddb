"""distill: the training layout = the deployed rollout, gradients reach the right step and player, pairs survive a kill."""
import pytest
import torch

from tiny import distillation, make_dit, make_latents
from tmlib import chain, distill, flow, losses, sampling
from tmlib.config import UserError
from tmlib.dit import WanDiT
from tmlib.sampling import clip_noise


@pytest.fixture
def dit():
    return make_dit()


@pytest.fixture
def latents(tmp_path):
    return make_latents(tmp_path, frames=12)                             # four chunks: the last must not see all before it


def noise_of(batch, seed=0):
    return distill.drawn(batch.z.shape, torch.Generator().manual_seed(seed), slice(None))


class Calls:
    """Notes times and gradient mode of a network's calls."""

    def __init__(self, net):
        self.seen, self.x = [], []
        net.register_forward_pre_hook(self.note)

    def note(self, net, args):
        self.seen.append((args[1][0].item(), torch.is_grad_enabled()))
        self.x.append(args[0])


def gradients(*nets):
    """Which networks hold gradients; all of them must be finite."""
    got = [[p.grad for p in net.parameters() if p.grad is not None] for net in nets]
    assert all(g.isfinite().all() for grads in got for g in grads)
    return [any(g.any() for g in grads) for grads in got]


# ---- the student -------------------------------------------------------------------------------

@pytest.mark.parametrize("steps, mask", [(1, "sparse_causal"), (2, "sparse_causal"), (3, "sparse_causal"), (2, "first"), (2, "previous")])
def test_student_is_the_rollout(latents, steps, mask):
    """One masked pass over all chunks equals chunk by chunk with caches: what is trained is what runs."""
    dit, batch, p = make_dit(mask=mask), latents.batch(torch.arange(2)), distillation(steps=steps)
    noise = noise_of(batch)
    whole = distill.student(dit, batch, noise, p)
    rolled = chain.rollout(dit, batch.cond, timesteps=flow.timesteps(steps, p.shift), chunk=3, cache="per_step", noise=noise,
                            **batch.conditions())
    torch.testing.assert_close(whole, rolled, atol=2e-5, rtol=0)
    assert not whole.requires_grad and (whole - batch.z).abs().max() > 0.1


def test_trained_student_is_the_deployed_one(dit, latents):
    batch, p = latents.batch(torch.arange(2)), distillation()
    seeds = [4, 5]
    noise = [clip_noise([100_003 * s + i for s in seeds], batch.z.shape[1:]) for i in range(3)]
    torch.testing.assert_close(distill.student(dit, batch, noise.__getitem__, p), sampling.student(dit, batch, seeds, p), atol=2e-5, rtol=0)


@pytest.mark.parametrize("cache", ["next_step", "clean_pass"])
def test_other_caches_roll(dit, latents, cache):
    batch, p = latents.batch(torch.arange(2)), distillation(cache=cache)
    noise = noise_of(batch)
    out = distill.student(dit, batch, noise, p, grad=1)
    rolled = chain.rollout(dit, batch.cond, timesteps=flow.timesteps(2, p.shift), chunk=3, cache=cache, noise=noise, **batch.conditions())
    torch.testing.assert_close(out.detach(), rolled, atol=2e-5, rtol=0)
    assert (rolled - distill.student(dit, batch, noise, distillation())).abs().max() > 1e-3
    out.square().mean().backward()
    assert gradients(dit) == [True]


def test_rolled_gives_the_same_and_its_gradients_end_at_chunk_borders(dit, latents):
    """The ablation `rolled` changes nothing but how far gradients reach."""
    batch, found = latents.batch(torch.arange(1)), []
    for rolled in (False, True):
        p = distillation(rolled=rolled, steps=1)
        x = torch.zeros(1, *latents.shape).requires_grad_()
        out = distill.student(dit, batch, lambda i: noise_of(batch)(i) + x, p, grad=0)
        out[:, :, 3:6].square().sum().backward()
        found.append((out.detach(), x.grad.abs().amax((0, 1, 3, 4)) > 0))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=0)
    assert found[0][1][:6].all() and found[1][1].tolist() == 3 * [False] + 3 * [True] + (latents.shape[1] - 6) * [False]


@pytest.mark.parametrize("grad", [0, 1, 2])
def test_gradient_at_the_chosen_step_alone(dit, latents, grad):
    batch, p = latents.batch(torch.arange(1)), distillation(steps=3)
    calls = Calls(dit)
    out = distill.student(dit, batch, noise_of(batch), p, grad=grad)
    assert calls.seen == [(pytest.approx(t), i == grad) for i, t in enumerate(flow.timesteps(3, p.shift)[:grad + 1])]
    out.sum().backward()
    assert gradients(dit) == [True]


def test_start_noises_real_video(dit, latents):
    batch, p = latents.batch(torch.arange(2)), distillation(steps=3)
    noise, ts, calls = noise_of(batch), flow.timesteps(3, 3.0), Calls(dit)
    out = distill.student(dit, batch, noise, p, grad=2, start=batch.z)
    assert calls.seen == [(pytest.approx(ts[2]), True)]                  # one call, from real video
    s = ts[2] / 1000
    torch.testing.assert_close(calls.x[0][:, :16], (1 - s) * batch.z + s * noise(2))
    v = dit(calls.x[0], torch.full((2,), ts[2]), mask="sparse_causal", **batch.conditions())
    torch.testing.assert_close(out, calls.x[0][:, :16] - s * v, atol=1e-5, rtol=0)
    a, b = (distill.student(dit, batch, noise_of(batch), p, grad=0, start=start) for start in (None, batch.z))
    assert torch.equal(a, b)                                             # at step 0 all is noise, real or not


def test_noise_is_drawn_once_a_step():
    g, first = torch.Generator().manual_seed(0), torch.ones(2, 3)
    noise = distill.drawn((2, 3), g, slice(None), first)
    assert noise(0) is first and noise(1) is noise(1) and not torch.equal(noise(1), noise(2))


# ---- pairs -------------------------------------------------------------------------------------

def test_pairs_are_the_teachers_solutions(dit, latents, tmp_path):
    p, kept, path = distillation(pairs=6, batch=4), tmp_path / "state" / "pairs.safetensors", tmp_path / "out" / "pairs.safetensors"
    pairs = distill.solve(dit, latents, p, kept, path)
    assert set(pairs["index"].tolist()) == set(range(4)) and len(pairs["seed"].unique()) == 6        # all clips, all noises new
    for i in (0, 5):
        batch = latents.batch(pairs["index"][i:i + 1])
        alone = sampling.teacher(dit, batch, pairs["seed"][i:i + 1], p.pair_steps, p.pair_shift, p.guidance)
        torch.testing.assert_close(pairs["target"][i:i + 1], alone, atol=1e-5, rtol=0)
    for where in (kept, path):
        assert all(torch.equal(v, pairs[k]) for k, v in distill.load_pairs(where).items())
    other = distill.solve(dit, latents, distillation(pairs=6, batch=4, seed=1), tmp_path / "other")
    assert not set(other["seed"].tolist()) & set(pairs["seed"].tolist())     # another run's noises are others
    path.unlink()
    again = distill.solve(None, latents, p, kept, path)                  # after a kill: no teacher is asked
    assert all(torch.equal(v, pairs[k]) for k, v in again.items()) and path.exists()


def test_the_same_teachers_solutions_are_shared(dit, latents, tmp_path, monkeypatch):
    """With another notebook, by content of the weights' folder; another configuration or noise shares none."""
    monkeypatch.setattr(distill, "SCRATCH", tmp_path)
    dit.save_pretrained(tmp_path / "teacher")
    read, p = lambda **how: WanDiT.from_pretrained(tmp_path / "teacher", **how), distillation(pairs=3)
    place = distill.shared(read(), p, tmp_path / "teacher")
    assert place == distill.shared(read(condition=dit.config.condition, prior_std=None), p, tmp_path / "teacher")
    others = [distill.shared(read(condition="zero"), p, tmp_path / "teacher"), distill.shared(read(), distillation(pairs=3, seed=1), tmp_path / "teacher"),
              distill.shared(read(), p)]
    assert len({place, *others}) == 4 and {path.parent for path in (place, *others)} == {tmp_path}
    pairs = distill.solve(dit, latents, p, tmp_path / "state" / "pairs.safetensors", place)
    again = distill.solve(None, latents, p, place, tmp_path / "plain_pairs.safetensors")          # no teacher is asked
    assert all(torch.equal(v, pairs[k]) for k, v in again.items()) and (tmp_path / "plain_pairs.safetensors").exists()


def test_a_killed_solution_goes_on_with_the_batch_that_is_missing(dit, latents, tmp_path, monkeypatch):
    p, whole = distillation(pairs=6, batch=2), distill.solve(dit, latents, distillation(pairs=6, batch=2), tmp_path / "whole" / "pairs.safetensors")
    solved, asked = sampling.teacher, []

    def dying(teacher, batch, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(batch))
        return solved(teacher, batch, *rest)

    monkeypatch.setattr(sampling, "teacher", dying)
    with pytest.raises(KeyboardInterrupt):
        distill.solve(dit, latents, p, tmp_path / "cut" / "pairs.safetensors")
    asked.clear()
    again = distill.solve(dit, latents, p, tmp_path / "cut" / "pairs.safetensors")
    assert asked == [2] and all(torch.equal(v, whole[k]) for k, v in again.items())


def test_missing_or_broken_pairs_say_so(tmp_path):
    with pytest.raises(UserError, match="pairs.safetensors is missing"):
        distill.load_pairs(tmp_path / "pairs.safetensors")
    (tmp_path / "pairs.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="pairs.safetensors"):
        distill.load_pairs(tmp_path / "pairs.safetensors")


# ---- losses ------------------------------------------------------------------------------------

def pairs_of(latents, n=5, scale=1.0):
    index = torch.arange(n) % len(latents)
    return {"index": index, "seed": torch.arange(n) + 100, "target": scale * latents.store["z"][index]}


def test_regression_by_hand(dit, latents):
    p, pairs = distillation(batch=3, border_weight=0.7), pairs_of(latents)
    [loss] = distill.regression_loss(dit, latents, pairs, p)
    got = loss(torch.Generator().manual_seed(0), 0)                      # step 0: straight from the pair's own noise
    j = torch.randint(5, (3,), generator=torch.Generator().manual_seed(0))
    batch, target = latents.batch(pairs["index"][j]), pairs["target"][j]
    x_t = clip_noise(pairs["seed"][j], target.shape[1:])
    v = dit(torch.cat([x_t, batch.cond], 1), torch.full((3,), 1000.0), mask="sparse_causal", **batch.conditions())
    regression = losses.weighted_mse(x_t - v, target, batch.weight)
    border = losses.border(x_t - v, target, 3, batch.weight)
    torch.testing.assert_close(got["regression"], regression)
    torch.testing.assert_close(got["border"], border)
    torch.testing.assert_close(got["loss"], regression + 0.7 * border)
    calls = Calls(dit)
    assert [len(calls.seen) for step in range(4) if loss(torch.Generator(), step)] == [1, 3, 4, 6]   # 1 call, 2 calls, in turn


def test_regression_learns(dit, latents):
    [loss] = distill.regression_loss(dit, latents, pairs_of(latents, scale=0.2), distillation(batch=4))
    optimiser, seen = torch.optim.Adam(dit.parameters(), 1e-2), []
    for step in range(40):
        optimiser.zero_grad()
        out = loss(torch.Generator().manual_seed(step), step)["loss"]
        out.backward()
        optimiser.step()
        seen.append(out.item())
    assert sum(seen[-4:]) < 0.6 * sum(seen[:4])


@pytest.mark.parametrize("changed, named", [({"cache": "clean_pass"}, "cache clean_pass"), ({"rolled": True}, "rolled")])
def test_rolling_students_cannot_start_from_real_video(latents, changed, named):
    p = distillation(**changed, real_ratio=1.0)
    with pytest.raises(UserError, match=f"real_ratio must be 0 with {named}"):
        distill.matching_losses(*(make_dit(seed) for seed in range(3)), latents, pairs_of(latents), p)


@pytest.mark.parametrize("cache,real_ratio", [("per_step", 0.0), ("per_step", 1.0), ("clean_pass", 0.0)])
def test_matching_reaches_its_own_player_alone(latents, cache, real_ratio):
    student, critic, teacher = (make_dit(seed) for seed in range(3))
    p = distillation(cache=cache, real_ratio=real_ratio)
    [for_student], [for_critic] = distill.matching_losses(student, critic, teacher, latents, pairs_of(latents), p)
    judges = Calls(critic), Calls(teacher)
    for step in (0, 3):                                                  # both denoising steps: step // critic_steps % steps
        out = for_student(torch.Generator().manual_seed(step), step)
        assert set(out) == {"loss", "dmd", "regression", "gap"} and all(v.isfinite() for v in out.values())
        out["loss"].backward()
        assert gradients(student, critic, teacher) == [True, False, False]
        student.zero_grad()
    assert not any(grad for judge in judges for _, grad in judge.seen)   # no graph is kept of those who only judge
    for_critic(torch.Generator().manual_seed(0), 1)["loss"].backward()
    assert gradients(student, critic, teacher) == [False, True, False]


def test_matching_by_hand(latents):
    """The guided teacher against the critic, both on the student's sample, noised anew."""
    student, critic, teacher = (make_dit(seed).requires_grad_(seed == 0) for seed in range(3))
    p = distillation(real_ratio=0.0, regression_weight=0.5, guidance=3.0)
    pairs, seeded = pairs_of(latents), lambda: torch.Generator().manual_seed(4)
    got = distill.matching_losses(student, critic, teacher, latents, pairs, p)[0][0](seeded(), 0)
    g = seeded()
    batch, _ = latents.batch(latents.draw(2, g)), torch.rand((), generator=g)
    x = distill.student(student, batch, distill.drawn(batch.z.shape, g, slice(None)), p, 0)
    t = flow.random_timesteps(2, p.shift, g, 20, 980)
    x_t = flow.add_noise(x, torch.randn(x.shape, generator=g), t)
    run = lambda net, **sound: net(torch.cat([x_t, batch.cond], 1), t, **{**batch.conditions(), **sound})
    null = run(teacher, audio=torch.zeros_like(batch.audio))
    real = flow.x0_from_v(x_t, null + 3 * (run(teacher) - null), t)
    fake = flow.x0_from_v(x_t, run(critic), t)
    torch.testing.assert_close(got["gap"], (fake - real).abs().mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got["dmd"], losses.dmd(x, real, fake, batch.weight), atol=1e-5, rtol=1e-4)
    regression = distill.regression_loss(student, latents, pairs, p)[0](g, 0)["loss"]
    torch.testing.assert_close(got["loss"], got["dmd"] + 0.5 * regression)


def test_every_denoising_step_is_trained(latents):
    """The student plays on every second step; its gradients, of matching and of regression, still visit all denoising steps."""
    student, critic, teacher = (make_dit(seed) for seed in range(3))
    p = distillation(critic_steps=2, steps=2, real_ratio=0.0)
    [loss] = distill.matching_losses(student, critic, teacher, latents, pairs_of(latents), p)[0]
    trained = []
    for step in range(0, 8, 2):
        calls = Calls(student)
        loss(torch.Generator().manual_seed(step), step)
        trained.append([t for t, grad in calls.seen if grad])
    assert trained == [pytest.approx([t, t]) for t in flow.timesteps(2, 3.0) * 2]


@pytest.mark.parametrize("real_ratio", [0.0, 1.0])
def test_the_critic_learns_what_the_student_is_judged_by(latents, real_ratio):
    """All denoising steps in turn, and with the student's starts: with real video a later step needs none before it."""
    student, critic, teacher = (make_dit(seed) for seed in range(3))
    [loss] = distill.matching_losses(student, critic, teacher, latents, pairs_of(latents), distillation(steps=2, real_ratio=real_ratio))[1]
    ran = []
    for step in range(2):
        calls = Calls(student)
        loss(torch.Generator().manual_seed(step), step)
        ran.append([t for t, _ in calls.seen])
        assert not any(grad for _, grad in calls.seen)
    first, second = flow.timesteps(2, 3.0)
    assert ran == [pytest.approx([first]), pytest.approx([second] if real_ratio else [first, second])]


def test_a_student_as_good_as_its_teacher_rests(latents):
    """With the critic equal to an unguided teacher the scores agree, and matching has nothing to say."""
    student, critic, teacher = make_dit(0), make_dit(1), make_dit(1)
    p = distillation(guidance=1.0, regression_weight=0.0)
    distill.matching_losses(student, critic, teacher, latents, pairs_of(latents), p)[0][0](torch.Generator(), 0)["loss"].backward()
    assert gradients(student) == [False]
