"""Means over ranks. The only place that knows torch.distributed."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the unweighted mean of `values` over all ranks, the same bits on each; nan on one rank is nan on all.

    A single process gets `values` back. Every rank must call it, with the same shape.
    """
    ranks = world_size()
    if ranks == 1:
        return values
    total = values.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total / ranks
