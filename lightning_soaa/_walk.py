"""Taking a proposed step: directions, moves and what they promise. Tensors only, no decision."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket
from lightning_soaa._proposal import Proposal, StepSize
from lightning_soaa._sums import allowed, dots, gated, near, square_sum, total, wide_dtype
from lightning_soaa.fisher import AbstractFisher

# Takes a Fisher, a bucket and its directions, returns what they promise, 0-d.
Reduction = Callable[[AbstractFisher, Bucket, Sequence[Tensor]], Tensor]


def step_sizes(groups: Sequence[Mapping[str, Any]], radius: float, lr_unit: float, *, folds_lr: bool) -> list[StepSize]:
    """Return how far each group may go at `radius`.

    Where the radius replaces the learning rate (`folds_lr`), lr only sets the groups' proportions and schedule, and
    weight decay, which no user could then bound, takes no more than all of the parameters.
    """
    sizes = []
    for group in groups:
        lr = float(group["lr"])
        if folds_lr:
            bound = radius * (lr / lr_unit) if lr_unit else 0.0  # exactly the radius where there is one lr
            sizes.append(StepSize(bound, 1.0, min(1.0, bound * group["weight_decay"]), bound))
        else:
            sizes.append(StepSize(radius, lr, lr * group["weight_decay"], radius * lr))
    return sizes


def walk(
    proposal: Proposal,
    sizes: Sequence[StepSize],
    fisher: AbstractFisher,
    *,
    cautious: bool,
    decay: bool = True,
    moves: bool = True,
    keeps: bool = True,
    reduction: Reduction | None = None,
) -> Tensor | None:
    """Find the directions for the given sizes (steps 4 and 5) and move the parameters along them (step 6).

    Block by block, so that no direction outlives its block. Sets the norm of the step; nothing moves where the proposal
    is not ok.

    Args:
        proposal: its parameters are modified in place.
        sizes: one for each parameter group.
        fisher: knows the directions, and absorbs the gradients if it has not.
        cautious: leave out coordinates on which the direction does not descend.
        decay: with weight decay.
        moves: False to only look.
        keeps: False to leave moments that have not absorbed the gradients as they are.
        reduction: what a bucket's directions promise, without its lr.

    Returns:
        The predicted reduction, 0-d, if `reduction` is given.
    """
    proposal.sizes, squares, promised = sizes, [], []
    for block in proposal.blocks:
        size, device = sizes[block.group], block.device
        ok, unit = allowed(proposal.ok, device), near(proposal.unit, device)
        if keeps and block.whole and isinstance(unit, float) and strides(block, proposal):
            share = size.decay if decay else 0.0
            square = fisher.stride(block, ok, size.radius, unit, lr=size.lr, decay=share, cautious=cautious)
            squares.append(square)
            continue
        worked = block if keeps or proposal.absorbed else block.tentative()
        if proposal.absorbed:
            scale = None if proposal.scale is None else proposal.scale.to(device)
            directions = fisher.direction(block, scale, ok, size.radius, unit, cautious=cautious)
        else:
            directions = fisher.advance(worked, ok, size.radius, unit, cautious=cautious)
        squares.append(square_sum(directions, foreach=block.foreach) * size.lr**2)
        if reduction is not None:
            promised.append(reduction(fisher, worked, directions) * size.lr)
        if moves:
            move(block, block.spread(directions), size, ok, decay=decay)
        if keeps and not proposal.absorbed:
            block.store()
        del directions, worked  # before the next are formed
    proposal.absorbed = proposal.absorbed or keeps
    shards = [block.shards for block in proposal.blocks]
    proposal.square = total(squares, shards)
    return None if reduction is None else total(promised, shards)


def strides(block: Bucket, proposal: Proposal) -> bool:
    """Return whether a block can take the compiled step: contiguous tensors whose moments are as they were."""
    tensors = (*block.params, *block.grads, *(x for kept in block.state.values() for x in kept))
    return not proposal.absorbed and all(tensor.is_contiguous() for tensor in tensors)


def move(bucket: Bucket, directions: list[Tensor], size: StepSize, ok: Tensor | None, *, decay: bool) -> None:
    """Move the parameters of a bucket (step 6), which decay where `ok`, if at all.

    Args:
        bucket: its parameters are modified in place.
        directions: u of step 5, zero where not `ok`.
        size: how far.
        ok: 0-d bool; None for true.
        decay: with weight decay.
    """
    if decay and size.decay:
        # A tensor, since multi-tensor operations round a number to the dtype of the parameters.
        keep = torch.as_tensor(gated(ok, 1 - size.decay, 1.0), dtype=wide_dtype(bucket.device), device=bucket.device)
        if bucket.foreach:
            torch._foreach_mul_(bucket.params, keep)
        else:
            for param in bucket.params:
                param.mul_(keep)
    if bucket.foreach:
        torch._foreach_add_(bucket.params, directions, alpha=-size.lr)
    else:
        for param, direction in zip(bucket.params, directions, strict=True):
            param.add_(direction, alpha=-size.lr)


def linear_reduction(_: AbstractFisher, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
    """Return ``g . u`` over a bucket, for the gradients that were absorbed, 0-d."""
    return dots(bucket.grads, directions)


def published_reduction(fisher: AbstractFisher, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
    """Return ``sum(mh u) - 1/2 sum(vh u^2)`` over a bucket, 0-d.

    Times lr it is step 10. The step is ``lr u``, so a consistent model has lr^2 before the second sum; this is the rule
    as published.
    """
    return fisher.model_reduction(bucket, directions)


def parameter_mean_square(proposal: Proposal) -> Tensor:
    """Return the mean square of all parameters of the proposal, 0-d; nan without coordinates."""
    buckets = proposal.buckets
    squares = [square_sum(bucket.params, foreach=bucket.foreach) for bucket in buckets]
    return total(squares, [bucket.shards for bucket in buckets]) / sum(bucket.coordinates for bucket in buckets)
