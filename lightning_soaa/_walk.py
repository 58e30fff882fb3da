"""Taking a proposed step: directions, moves and what they promise. Tensors only, no decision."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket, Pace
from lightning_soaa._dist import Shards
from lightning_soaa._estimate import AbstractFisher, Fishers, Slopes
from lightning_soaa._moments import move as move_along
from lightning_soaa._proposal import Proposal, StepSize, by_owner
from lightning_soaa._sums import allowed, gated, near, square_sum, stacked, total, wide_dtype

# Takes a Fisher, a bucket and its directions, returns what they promise: 0-d, or for each parameter, shape (n,).
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
    fisher: Fishers,
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
    proposal.sizes, squares, shards = sizes, [], []
    slopes: list[tuple[Shards, Slopes]] = []
    at_once = moves and not proposal.absorbed and reduction in (None, linear_reduction)
    for block in proposal.blocks:
        size, own = sizes[block.group], fisher.of(block.group)
        compiled = proposal.compiled and keeps and block.whole
        pace = Pace(size.lr, size.decay if decay else 0.0, cautious, keeps, reduction is not None, compiled)
        if at_once and own.strides(block, proposal.unit, pace):
            ok = allowed(proposal.ok, block.device)
            square, found = own.stride(block, ok, size.radius, proposal.unit, pace)
        else:
            square, found = in_parts(block, proposal, size, own, pace, moves=moves, reduction=reduction)
        if keeps and not proposal.absorbed:
            block.store()
        squares.append(square)
        slopes += [(block.shards, each) for each in found]
        shards.append(block.shards)
    proposal.absorbed = proposal.absorbed or keeps
    proposal.square = total(squares, shards)
    if reduction is linear_reduction:
        proposal.slopes = by_owner(slopes, proposal.count, proposal.home)
        return proposal.slopes.sum()
    return None if reduction is None else total([each for _, (_, each) in slopes], [kind for kind, _ in slopes])


def in_parts(
    block: Bucket,
    proposal: Proposal,
    size: StepSize,
    fisher: AbstractFisher,
    pace: Pace,
    *,
    moves: bool,
    reduction: Reduction | None,
) -> tuple[Tensor, list[Slopes]]:
    """Walk a block part by part, one thing after the other; return the squared norm and what is promised, if asked."""
    ok, unit = allowed(proposal.ok, block.device), near(proposal.unit, block.device)
    scale = None if proposal.scale is None else proposal.scale.to(block.device)
    squares, promised = [], list[Slopes]()
    for part in block.parts():
        worked = part if pace.keeps or proposal.absorbed else part.tentative()
        if proposal.absorbed:
            directions = fisher.direction(part, scale, ok, size.radius, unit, cautious=pace.cautious)
        else:
            directions = fisher.advance(worked, ok, size.radius, unit, cautious=pace.cautious)
        spread = part.spread(directions)
        part.shorten(spread, part.owners)
        squares.append(square_sum(directions, foreach=block.foreach) * pace.lr**2)
        if reduction is not None:
            promised.append((part.owners, reduction(fisher, worked, directions) * pace.lr))
        if moves:
            move(part, spread, pace, ok)
        del directions, spread, worked  # before the next are formed
    return stacked(squares).sum(), promised


def move(bucket: Bucket, directions: list[Tensor], pace: Pace, ok: Tensor | None) -> None:
    """Move the parameters of a bucket (step 6), which decay where `ok`, if at all.

    Args:
        bucket: its parameters are modified in place.
        directions: u of step 5, zero where not `ok`.
        pace: how far.
        ok: 0-d bool; None for true.
    """
    keep: Tensor | None = None
    if pace.decay:
        keep = torch.as_tensor(gated(ok, 1 - pace.decay, 1.0), dtype=wide_dtype(bucket.device), device=bucket.device)
    move_along(bucket.params, directions, lr=pace.lr, keep=keep, foreach=bucket.foreach)


def linear_reduction(_: AbstractFisher, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
    """Return ``g . u`` for each parameter of a bucket, for the gradients that were absorbed, shape (n,)."""
    return bucket.slopes(directions)


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
