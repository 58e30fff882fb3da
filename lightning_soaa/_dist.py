"""Means over ranks, sums over shards. The only place that knows torch.distributed."""

import sys
from collections.abc import Hashable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

# The process groups over which a tensor is sharded, as DTensors of torch's fully_shard are; empty for all others.
Shards = tuple[Hashable, ...]


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


def is_sharded(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def shards_of(tensor: Tensor) -> Shards:
    """Return the groups over which the coordinates of `tensor` are spread.

    Raises:
        ValueError: it holds sums that are still to be formed.
    """
    if not is_sharded(tensor):
        return ()
    sharded: Any = tensor
    if any(placement.is_partial() for placement in sharded.placements):
        raise ValueError(f"SOAA: `params` must be sharded or replicated DTensors, got {tuple(sharded.placements)}")
    mesh, placements = sharded.device_mesh, sharded.placements
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, which shares its memory; any other tensor as it is."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def over_shards(values: Tensor, shards: Shards, op: str = "SUM") -> Tensor:
    """Return `values` summed (SUM), or the least (MIN) or largest (MAX) of them, over all shards."""
    if not shards:
        return values
    total = values.clone()
    for group in shards:
        dist.all_reduce(total, op=getattr(dist.ReduceOp, op), group=group)
    return total


def gathered(value: Any) -> list[Any]:
    """Return the `value` of each process, of any kind that can be pickled. Every rank must call it."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def reshard(module: nn.Module) -> None:
    """Have the next forward gather the parameters anew where torch's fully_shard has left gathered ones behind.

    After a forward without gradients it keeps those of the root, which a step would not reach.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not dist.is_initialized():
        return
    for part in module.modules():
        if isinstance(part, fsdp.FSDPModule):
            part.reshard()
