"""plan: FLOPs are those that torch counts, bytes those of real tensors, and known estimates come out of the configuration."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from tmlib import attention as att
from tmlib import flow, plan, train
from tmlib.chain import Chain
from tmlib.config import UserError
from tmlib.dit import WanDiT

TINY = dict(text_dim=10, image_dim=12, audio_dim=6, audio_tokens=5, audio_width=16, audio_hidden=24, freq_dim=32, ffn_dim=48,
            num_attention_heads=2, attention_head_dim=16)


def tiny(**overrides):
    return plan.build("smoke", **{**TINY, **overrides})


def given(c, frames, rows, columns, batch=1, text=7, image=3, audio=4):
    """Inputs on the meta device: shapes alone, on which torch counts just as well."""
    randn = lambda n, *s: torch.empty(*s, device="meta") if n else None
    x = torch.empty(batch, c.in_channels, frames, 2 * rows, 2 * columns, device="meta")
    return x, torch.empty(batch, device="meta"), dict(
        text=randn(text, batch, text, c.text_dim), image=randn(image and c.image_dim, batch, image, c.image_dim or 0),
        audio=randn(audio and c.audio_dim, batch, frames, audio, c.audio_dim or 0),
        audio_mask=randn(audio and c.audio_dim, batch, frames, rows, columns))


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter


# FLOPs

SHAPES = [  # mask, frames, rows, columns, batch, tokens of text, image, audio; the model
    ("bidirectional", 4, 2, 3, 2, 7, 3, 4, {}),
    ("sparse_causal", 9, 2, 2, 1, 5, 3, 5, dict(num_layers=3, audio_every=2)),
    ("sparse_causal", 8, 3, 2, 2, 7, 3, 4, dict(chunk=3)),                               # the last chunk is shorter
    ("causal", 7, 2, 2, 1, 7, 3, 1, dict(chunk=7)),
    ("causal", 6, 2, 4, 3, 7, 3, 4, dict(chunk=2, num_attention_heads=3, audio_depth=3)),
    ("bidirectional", 3, 2, 2, 1, 7, 0, 0, dict(audio_dim=None, image_dim=None, in_channels=16)),
    ("bidirectional", 3, 2, 2, 2, 0, 0, 4, {}),
    ("bidirectional", 2, 2, 2, 1, 0, 0, 0, {}),
]


@pytest.mark.parametrize("mask,frames,rows,columns,batch,text,image,audio,model", SHAPES)
@torch.no_grad()
def test_a_forward_pass_costs_what_torch_counts(mask, frames, rows, columns, batch, text, image, audio, model):
    dit = tiny(**model)
    x, t, conditions = given(dit.config, frames, rows, columns, batch, text, image, audio)
    counter = counted(lambda: dit(x, t, mask=mask, **conditions))
    parts = plan.sequence_flops(dit.config, frames, rows * columns, mask, batch=batch, text=text, image=image, audio=audio)
    assert plan.total(parts) == counter.get_total_flops() > 0
    by_module = lambda name: sum(counter.get_flop_counts().get(f"WanDiT.{name}", {}).values())
    blocks = lambda name: sum(by_module(f"blocks.{i}.{name}") for i in range(dit.config.num_layers))
    assert parts["feed-forward"] == blocks("ffn")
    assert parts["self linear"] + parts["self products"] == blocks("attn1")
    assert sum(parts[p] for p in parts if p.startswith(("cross", "audio ")) or "k, v" in p or p in ("text products", "image products")) == blocks("attn2")
    embedders = ("time_embedder", "time_proj", "text_embedder", "image_embedder")
    assert sum(parts[p] for p in ("time", "time in", "text", "text in", "image")) == sum(by_module(f"condition_embedder.{e}") for e in embedders)
    assert parts["audio"] == by_module("audio_embedder") and parts["head"] == by_module("proj_out")
    assert plan.recomputed(parts) == sum(by_module(f"blocks.{i}") for i in range(dit.config.num_layers))


@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_a_streamed_step_costs_what_torch_counts(chunk):
    dit = tiny(chunk=chunk)
    c, tokens = dit.config, dict(text=7, image=3, audio=4)
    x, t, conditions = given(c, chunk, 2, 3)
    cache, costs = dit.new_cache(1, 4, 6), []
    for _ in range(4):
        conditions["audio"] = torch.empty_like(conditions["audio"])                     # each chunk has its own sound
        costs.append(counted(lambda: dit(x, t, cache=cache, **conditions)).get_total_flops())
    L = chunk * 6
    expected = [plan.flops(c, chunk, 6, L * L, **tokens)] + [plan.flops(c, chunk, 6, L * n * L, known=plan.KNOWN, **tokens) for n in (2, 3, 3)]
    assert costs == [plan.total(parts) for parts in expected]
    assert costs[-1] == plan.total(plan.step_flops(c, chunk, 6, known=plan.KNOWN, **tokens))


@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_a_chunk_of_the_chain_costs_what_torch_counts(steps):
    dit = tiny()
    _, _, conditions = given(dit.config, 3, 2, 2)
    chain = Chain(dit, torch.empty(1, 20, 21, 4, 4, device="meta"), flow.timesteps(steps, 5.0))
    noise = lambda step: torch.empty(1, 16, 3, 4, 4, device="meta")
    costs = []
    for _ in range(4):
        conditions["audio"] = torch.empty_like(conditions["audio"])
        costs.append(counted(lambda: chain.next(noise, **conditions)).get_total_flops())
    assert costs[-1] == costs[-2] == plan.total(plan.chunk_flops(dit.config, 3, 4, steps, text=7, image=3, audio=4))


@pytest.mark.parametrize("mask", ["bidirectional", "sparse_causal"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_costs_what_torch_counts(mask, checkpointing):
    torch.manual_seed(0)
    dit = WanDiT.from_variant("smoke", **{**TINY, "num_layers": 3, "audio_every": 2})
    dit.gradient_checkpointing = checkpointing
    x, t, conditions = given(dit.config, 6, 2, 2, batch=2)
    x, t, conditions = torch.randn_like(x, device="cpu"), torch.rand(2), {n: torch.randn_like(c, device="cpu") for n, c in conditions.items()}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def step():
        with sdpa_kernel(SDPBackend.MATH):                                              # torch does not count its CPU flash kernel
            dit(x, t, mask=mask, **conditions).square().mean().backward()
    parts = plan.sequence_flops(dit.config, 6, 4, mask, batch=2, text=7, image=3, audio=4)
    expected = plan.total(parts) + plan.backward(parts) + checkpointing * plan.recomputed(parts)
    assert counted(step).get_total_flops() == expected
    assert plan.training_flops(dit.config, 4, [(mask, True, False, 2)], frames=6) == 2 * plan.total(plan.sequence_flops(dit.config, 6, 4, mask))


def test_flash_attention_recomputes_scores_which_is_not_model_work():
    """Of the five products of a flash backward pass one makes the scores again: torch counts 2.5 forwards, the plan 2."""
    shape = (1, 2, 8, 16)
    assert sdpa_backward_flop_count(shape, shape, shape, shape) == 2.5 * (2 * 2 * 2 * 8 * 8 * 16)


@pytest.mark.parametrize("kind", att.MASKS)
@pytest.mark.parametrize("frames,tokens,chunk", [(21, 2, 3), (21, 1, 7), (8, 3, 3), (2, 2, 3)])
def test_a_mask_costs_its_true_pairs(kind, frames, tokens, chunk):
    assert plan.mask_pairs(kind, frames, tokens, chunk) == att.mask_matrix(kind, frames, tokens, chunk).sum()


def test_distillation_counts_its_passes():
    """One step: the student learns from two graphs and runs ahead of them; guided teacher and critic look on."""
    c = tiny().config
    forward = {m: plan.total(plan.sequence_flops(c, 21, 4, m)) for m in ("sparse_causal", "bidirectional")}
    trained = {m: n + plan.backward(plan.sequence_flops(c, 21, 4, m)) for m, n in forward.items()}
    passes = plan.stage_passes(steps=2, real_ratio=0.5)
    cost = {stage: plan.training_flops(c, 4, p, checkpointing=False) for stage, p in passes.items()}
    assert cost["student"] == 2 * trained["sparse_causal"] + 0.75 * forward["sparse_causal"] + 3 * forward["bidirectional"]
    assert cost["critic"] == 1.25 * forward["sparse_causal"] + trained["bidirectional"]
    assert cost["adaptation"] < cost["teacher"] == trained["bidirectional"]


# Parameters and bytes

def test_parameters_are_the_models():
    assert plan.parameters(plan.build("wan-i2v-14b")) == 16_394_878_784
    dit = plan.build("talkingmachines-18b")
    assert plan.parameters(dit) == 17_605_711_040 and dit.device.type == "meta"
    assert plan.parameters(dit) - plan.parameters(plan.build("talkingmachines-18b", audio_dim=None)) == 1_210_832_256


def test_training_memory_is_that_of_real_tensors():
    torch.manual_seed(0)
    dit = WanDiT.from_variant("smoke", **TINY)
    (adamw,) = train.build_optimisers(dit, train.Optim(lr=1e-3))
    dit(torch.randn(1, 36, 3, 4, 4), torch.rand(1), text=torch.randn(1, 7, 10), image=torch.randn(1, 3, 12), audio=torch.randn(1, 3, 4, 6)).mean().backward()
    for p in dit.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    adamw.step()
    size = lambda tensors: sum(x.nbytes for x in tensors)
    memory = plan.training_memory(dit, 1, 2, 2, width=4)
    assert memory["weights, float32"] == size(dit.parameters()) == memory["moving average, float32"]
    assert memory["gradients, float32"] == size(p.grad for p in dit.parameters())
    assert memory["AdamW moments, float32"] == size(s[m] for s in adamw.state.values() for m in ("exp_avg", "exp_avg_sq"))
    assert memory["gathered blocks"] == 3 * size(dit.blocks[0].parameters())
    shared = plan.training_memory(dit, 8, 2, 2, width=4)
    assert shared["gradients, float32"] == memory["gradients, float32"] / 8 and shared["activations"] == memory["activations"]


def kept_by_autograd(layers):
    """Bytes that a real forward pass keeps for its backward, weights aside."""
    dit = WanDiT.from_variant("smoke", **{**TINY, "num_layers": layers})
    c, kept = dit.config, {}
    x, t, conditions = given(c, 6, 2, 2, batch=2, text=plan.TEXT, image=plan.IMAGE, audio=c.audio_tokens)
    x, t, conditions = torch.randn_like(x, device="cpu"), torch.rand(2), {n: torch.randn_like(v, device="cpu") for n, v in conditions.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.setdefault(s.untyped_storage().data_ptr(), s), lambda s: s):
        out = dit(x, t, mask="sparse_causal", **conditions)                             # keeps the graph alive
    weights = {p.untyped_storage().data_ptr() for p in dit.parameters()}
    return out.shape[0] and sum(s.untyped_storage().nbytes() for at, s in kept.items() if at not in weights)


def test_activations_are_those_that_autograd_keeps():
    c = tiny().config
    fake = plan.activation_bytes(c, 6, 2, 2, "sparse_causal", batch=2, dtype=torch.float32)
    assert fake == kept_by_autograd(3) - kept_by_autograd(2)
    half = plan.activation_bytes(c, 6, 2, 2, "sparse_causal", batch=2)
    assert 0.5 * fake < half < fake
    dit = tiny()
    kept, again = (plan.training_memory(dit, 1, 2, 2, checkpointing=on)["activations"] for on in (False, True))
    assert kept == 2 * plan.activation_bytes(c, 21, 2, 2) and again == 2 * (21 * 4 * c.dim * 2) + kept / 2


@torch.no_grad()
def test_streaming_memory_is_that_of_real_tensors():
    dit = WanDiT.from_variant("smoke", **TINY)
    c = dit.config
    x, t, conditions = given(c, 3, 2, 3, text=plan.TEXT, image=plan.IMAGE, audio=c.audio_tokens)
    cache = dit.new_cache(1, 4, 6)
    dit(torch.randn_like(x, device="cpu"), torch.rand(1), cache=cache, **{n: torch.randn_like(v, device="cpu") for n, v in conditions.items()})
    assert plan.cache_bytes(c, 3, 6, 4) == cache.k.nbytes + cache.v.nbytes
    remembered = [value for key, entries in cache.memo.items() if isinstance(key, tuple) for _, value in entries]
    assert plan.memo_bytes(c, 3, 4) == sum(x.numel() * 4 for pair in remembered for x in pair)
    memory = plan.streaming_memory(dit, 3, 6, 2, 4)
    assert memory["weights"] == sum(p.nbytes for p in dit.parameters()) and memory["K/V caches of 2 steps"] == 2 * plan.cache_bytes(c, 3, 6, 4)
    assert plan.step_bytes(c, 100, 3, 6) == 200 + cache.k.nbytes // 2 * 3               # at two bytes: read k and v, write one slot of two


# Known estimates

def test_what_a_chunk_costs():
    silent = plan.build("talkingmachines-18b", audio_dim=None).config
    three, seven = plan.paper_rows(silent, 1024, 3).values()
    assert [round(x, n) for x, n in zip(three, (0, 0, 0, 2, 2, 0, 0))] == [99, 73, 25, 0.38, 0.77, 31, 16]
    assert [round(x, n) for x, n in zip(seven, (0, 0, 0, 2, 2, 0, 0))] == [278, 171, 107, 1.08, 2.17, 26, 13]


def test_what_fits_a_card():
    """Four caches of seven latent frames and 18 B weights are too much for 80 GB in bf16; in fp8 they are not."""
    dit = plan.build("talkingmachines-18b")
    table = plan.fits(dit, 1024)
    gb = sum(plan.streaming_memory(dit, 7, 1024, 4, 2).values()) / 1e9
    assert 80 < gb < 90 and table["chunk 7, 4 steps"] == [f"{gb:.1f}, fits 141", table["chunk 7, 4 steps"][1]]
    assert all(cell.endswith("fits 80") for name, cells in table.items() for cell in cells[name == "chunk 7, 4 steps":])
    assert plan.fits(dit, 8192)["chunk 7, 4 steps"][0].endswith("fits none")


# The command

def test_the_command_prints_its_tables(capsys):
    assert plan.main(["smoke", "--gpus", "2", "--size", "64x96", "--dtype", "fp8"]) == 0
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("Parameters", "GB on each of 2 GPUs", "Streaming memory", "PFLOP of one training step", "estimated without sound"))
    assert "24 tokens per latent frame" in printed
    rows = [line for line in printed.splitlines() if "3 latent = 12 frames" in line]
    assert len(rows) == 2 and len({len(row) for row in rows}) == 1


@pytest.mark.parametrize("argv,words", [(["huge"], "huge.*unknown.*talkingmachines-18b"), (["smoke", "--size", "500"], "size 500.*multiples of 16"),
                                        (["smoke", "--size", "64x"], "size 64x"), (["smoke", "--size", "64x64x64"], "size 64x64x64"), (["smoke", "--size", "big"], "size big"),
                                        (["smoke", "--gpus", "0"], "--gpus 0"), (["smoke", "--chunk", "-1"], "--chunk -1")])
def test_bad_input_gets_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        plan.main(argv)


def test_a_mistake_ends_the_command(python):
    done = python("-m", "tmlib.plan", "huge")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout
