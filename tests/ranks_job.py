"""What `test_ranks` runs on one process and on two:  python tests/ranks_job.py FOLDER OUT [--die STEP]

A split's latents, stage 1 with audio and Muon, stage 3 with its two players, the streamed student and a loss of clips; all of it into OUT.
FOLDER: latents.safetensors and a model `start`. --die: end of this process, at once, in the middle of that training step.
"""
import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from test_latents import encoded
from tiny import distillation

from tmlib import config, distill, evaluate, ranks, sampling, train
from tmlib.dit import WanDiT
from tmlib.latents import Latents
from tmlib.pretrain import flow_matching_loss
from tmlib.train import Optim, Player

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--die", type=int)
args = parser.parse_args()
config.seed_everything(0, 1)
latents, state = Latents(args.folder / "latents.safetensors"), args.out / "state"
load = lambda: WanDiT.from_pretrained(args.folder / "start")
optim = Optim(1e-3, muon=1e-3, warmup=1, ema=0.9)

# Latents: three batches of clips, dealt
encoded(args.out / "split.safetensors")

# Stage 1: one player, in parts; a new audio path is initialised alike on all
dit = WanDiT.from_pretrained(args.folder / "bare", audio_dim=6, audio_width=16, audio_hidden=24)
p = SimpleNamespace(batch=4, at_once=1, repeats=2, shift=3.0, drop_audio=0.3, drop_text=0.1, sway_weight=20)
before = evaluate.flow_loss(dit, latents.first(2), True)                   # as notebook 30: what an optimiser is then made of must still be pieces
losses = flow_matching_loss(dit, latents, p)
if args.die is not None:
    kill = lambda loss: lambda g, step: os._exit(9) if step == args.die and ranks.RANK else loss(g, step)
    losses = [kill(loss) for loss in losses]
history = train.train([Player("dit", dit, losses, optim)], 5, 0, state / "one", "one", save_share=float("inf"), log_every=1)
dit.eval().requires_grad_(False)
dit.save_pretrained(args.out / "one", max_shard_bytes=20_000)

# Stage 3: solutions of the teacher, then student against critic
p = distillation(batch=2, at_once=1, pairs=5, real_ratio=0.5)
teacher, student, critic = load().eval().requires_grad_(False), load(), load()
pairs = distill.solve(teacher, latents, p, state / "kept.safetensors", args.out / "pairs.safetensors")
for_student, for_critic = distill.matching_losses(student, critic, teacher, latents, pairs, p)
players = [Player("student", student, for_student, optim, p.critic_steps), Player("critic", critic, for_critic, Optim(1e-3, warmup=1))]
matching = train.train(players, 4, 0, state / "two", "two", log_every=1)
student.eval().requires_grad_(False)
student.save_pretrained(args.out / "two")

# Evaluation: an odd number of clips
made = ranks.spread(torch.arange(3), lambda mine: sampling.student(student, latents.batch(mine), mine.tolist(), p))
config.save_json(args.out / "numbers.json", {"history": history, "matching": matching, "made": made, "before": before, "loss": evaluate.flow_loss(dit, latents.first(3), True)})
train.finish(state)
print(json.dumps({"rank": ranks.RANK}))
