"""One stage on several processes, one GPU each: for models that one GPU cannot hold, and batches that one cannot wait for.

Every process (a rank) runs the same notebook with the same random numbers, `python -m tmlib.notebook` starts them. What they share:
- the weights: each holds its piece of every tensor and gathers a block when the block runs (FSDP2; ZeRO-3), see `shard`;
- the batch: `parts` says which clips a rank computes, and how many at once; gradients are the mean over all;
- what is generated: `spread` deals out clips and puts the results together again, on every rank;
- files: `config.atomic` keeps what rank 0 wrote. Resume state is the exception: every rank keeps its own piece.
A stage of one process meets none of this.
"""
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import torch
from torch import Tensor, nn

from .config import RANK, WORLD, UserError

LONGEST = timedelta(hours=3)                     # that ranks wait for one another: rank 0 writes models of 70 GB, or hashes them


@cache
def mesh():
    """All processes in a row, each with its GPU, or on CPUs (gloo). They meet in a file, whose path the environment holds."""
    import torch.distributed as dist
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(0)                                             # each process sees one
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", f"file://{os.environ['TM_MEET']}", timeout=LONGEST, rank=RANK, world_size=WORLD)
    return dist.init_device_mesh("cuda" if gpu else "cpu", (WORLD,))


def shard(dit: nn.Module) -> nn.Module:
    """The same model, every tensor cut in WORLD pieces along its first dimension; blocks are computed again for their gradients."""
    if WORLD > 1:
        from torch.distributed.fsdp import fully_shard
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)       # a block's keys are a view, which nobody writes to
        for part in (*dit.blocks, dit):
            fully_shard(part, mesh=mesh(), reshard_after_forward=True)       # the root too: after an evaluation an optimiser would be given whole tensors, and train none
        dit.gradient_checkpointing = True
    return dit


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank holds, as `like` is held: this rank's piece of it, or just itself."""
    if not in_pieces(like):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(t: Tensor) -> Tensor:
    """A tensor with all its pieces; every rank must ask."""
    return t.full_tensor() if in_pieces(t) else t


def in_pieces(t: Tensor) -> bool:
    """Whether ranks share this tensor, a DTensor: known without importing its module, which takes most of a second."""
    return hasattr(t, "full_tensor")


def parts(batch: int, at_once: int | None = None) -> list[slice]:
    """The clips of a batch that this rank computes: slices of it, `at_once` clips each (None: all of its share)."""
    share = batch // WORLD
    rounds = share // (at_once or share) if share else 0
    if not rounds or rounds * (at_once or share) * WORLD != batch:
        raise UserError(f"params.yaml: a batch of {batch} cannot be dealt to {WORLD} processes, {at_once or share} clips at once: give multiples")
    return [slice(i, None, rounds * WORLD) for i in range(RANK, rounds * WORLD, WORLD)]


def spread(index: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(index) (n, ...), on the CPU, each rank making its share of the clips; every rank has all of them in the end.

    All make equally many, because a model in pieces runs everywhere or nowhere: the last clip may be made twice.
    """
    if WORLD == 1:
        return make(index)
    import torch.distributed as dist
    dealt = torch.cat([index, index[-1:].expand(-len(index) % WORLD)])
    mine = make(dealt[RANK::WORLD]).contiguous()
    made = [torch.empty_like(mine) for _ in range(WORLD)]
    mesh()
    dist.all_gather(made, mine)
    return torch.stack(made, 1).flatten(0, 1)[:len(index)]


def mean(numbers: dict[str, float]) -> dict[str, float]:
    """Numbers of a step, the mean over ranks."""
    if WORLD == 1:
        return numbers
    import torch.distributed as dist
    mesh()
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(numbers, (values / WORLD).tolist()))


def agreed(mine):
    """Whatever each rank found, as a list, on every rank."""
    if WORLD == 1:
        return [mine]
    import torch.distributed as dist
    mesh()
    found = [None] * WORLD
    dist.all_gather_object(found, mine)
    return found


def wait() -> None:
    """Until all ranks are here."""
    agreed(None)
