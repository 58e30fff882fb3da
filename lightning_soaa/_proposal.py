"""A step between its gradients and its report: absorb, walk, describe. Tensors only, no decision."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan, sqrt
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket, divide, dots, gated, on_host, square_sum, wide_dtype
from lightning_soaa._dist import over_shards
from lightning_soaa.fisher import AbstractFisher, Unit
from lightning_soaa.gate import Gate, pass_gate, pass_gate_on_host

# eps is a multiple of the gradients' root mean square, but of no less than this: in float32 it must not vanish.
SMALLEST_UNIT = 1e-15

# Takes a Fisher, a bucket and its directions, returns what they promise, 0-d.
Reduction = Callable[[AbstractFisher, Bucket, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class StepSize:
    """How far one group may go.

    Args:
        radius: d of the group's direction.
        lr: what multiplies the direction.
        decay: share of the parameters that decoupled weight decay takes.
        bound: what the box of the group measures in units of the parameters, where the metric is Adam's.
    """

    radius: float
    lr: float
    decay: float
    bound: float


@dataclass
class Proposal:
    """A proposed step. Its tensors stay on their devices; on an accelerator nothing here has been read by the host.

    Args:
        buckets: the parameters that have a gradient.
        blocks: the same, in the parts that are worked on one by one; dropped when the step is over.
        base: loss where the step starts, mean over ranks, 0-d, or None.
        ok: loss and gradients are finite and no outlier, 0-d bool, or a bool where the host need not wait for it.
            Where it is false the step moves nothing.
        outlier: the gate leaves the gradient out, as `ok`.
        gate: what the outlier gate knows once it has seen the gradient, or None without a gate.
        scale: c of step 3, 0-d; None where the Fisher does not limit the step.
        unit: root mean square of the gradients, by the second moments, a number or 0-d; None where the Fisher limits
            the step.
        fresh: slope along the last step that the gradient found, over the slope that step started from, 0-d; nan where
            not `ok`; None if it was not asked for.
        left: share of the gradients that clipping left, 0-d; None for all.
        sizes: one for each parameter group.
        square: squared norm of the step, weight decay apart, 0-d.
    """

    buckets: list[Bucket]
    blocks: list[Bucket]
    base: Tensor | None
    ok: Tensor | bool
    outlier: Tensor | bool
    gate: Gate | None
    scale: Tensor | None
    unit: Unit
    fresh: Tensor | None = None
    left: Tensor | None = None
    sizes: Sequence[StepSize] = ()
    square: Tensor | None = None

    @property
    def home(self) -> torch.device:
        """Return the device on which sums over buckets are formed."""
        return self.buckets[0].device

    def release(self) -> None:
        """Drop the gradients, so that a kept proposal holds no memory of its own."""
        self.blocks = []
        for bucket in self.buckets:
            bucket.grads, bucket.rotated = [], []


def allowed(ok: Tensor | bool, device: torch.device) -> Tensor | None:
    """Return `ok` as a tensor on `device`, or None where the host knows that it is true."""
    return None if ok is True else torch.as_tensor(ok, device=device)


def total(parts: Iterable[Tensor], buckets: Sequence[Bucket]) -> Tensor:
    """Return the sum of small tensors, one a bucket, over all shards, on the device of the first."""
    listed = list(parts)
    if len(listed) == 1 and not buckets[0].shards:
        return listed[0]
    listed = [part.to(listed[0].device) for part in listed]
    kinds = dict.fromkeys(bucket.shards for bucket in buckets)
    sums = []
    for shards in kinds:
        here = [part for part, bucket in zip(listed, buckets, strict=True) if bucket.shards == shards]
        sums.append(over_shards(torch.stack(here).sum(0), shards))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


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


def absorb(
    buckets: list[Bucket],
    base: Tensor | None,
    fisher: AbstractFisher,
    *,
    gate: Gate | None,
    slope: float,
    fisher_limits: bool,
    left: Tensor | None = None,
) -> Proposal:
    """Let the Fisher absorb all gradients, unless one of them or the loss is not finite or far out (steps 1 and 3).

    Args:
        buckets: parameters, gradients and state, which is modified in place.
        base: the loss, or None.
        fisher: absorbs.
        gate: what the outlier gate knows, None for no gate.
        slope: predicted reduction of the last step if the gradient is to be held against it, else 0.
        fisher_limits: whether the Fisher limits the step, or only the radius does.
        left: share of the gradients that clipping left, 0-d; None for all.
    """
    blocks = [block for bucket in buckets for block in (divide(bucket) if fisher.elementwise else [bucket])]
    square = total([square_sum(block.grads, foreach=block.foreach) for block in blocks], blocks)
    ok, outlier, gate = (admit_on_host if on_host(square.device) else admit)(square, base, gate)
    fresh = None
    if slope:
        fresh = fresh_slope(blocks, fisher).to(square.device) / (slope if left is None else slope * left)
        fresh = fresh if ok is True else torch.where(torch.as_tensor(ok, device=square.device), fresh, nan)
    for block in blocks:
        fisher.update(block, allowed(ok, block.device))
        block.store()
    scale = fisher_scale(blocks, fisher) if fisher_limits else None
    unit = None if fisher_limits else gradient_rms(blocks, fisher)
    return Proposal(buckets, blocks, base, ok, outlier, gate, scale, unit, fresh, left)


def admit(square: Tensor, base: Tensor | None, gate: Gate | None) -> tuple[Tensor, Tensor, Gate | None]:
    """Return whether a gradient is absorbed, whether it is left out as an outlier, and what the gate knows after it.

    Args:
        square: squared norm of the gradient, 0-d.
        base: the loss, 0-d, or None.
        gate: what the gate knows, on the device of `square`, or None.
    """
    ok = square.isfinite() if base is None else square.isfinite() & base.isfinite()
    if not isinstance(gate, Tensor):
        return ok, torch.zeros_like(ok), gate
    outlier, gate = pass_gate(gate, square, base, ok)
    return ok & ~outlier, outlier, gate


def admit_on_host(square: Tensor, base: Tensor | None, gate: Gate | None) -> tuple[bool, bool, Gate | None]:
    """Do as :func:`admit` with numbers, where the host need not wait for them: a tenth of the time."""
    norm, loss, outlier = float(square), None if base is None else float(base), False
    ok = isfinite(norm) and (loss is None or isfinite(loss))
    if isinstance(gate, tuple):
        outlier, gate = pass_gate_on_host(gate, norm, loss, ok)
    return ok and not outlier, outlier, gate


def fresh_slope(blocks: Iterable[Bucket], fisher: AbstractFisher) -> Tensor:
    """Return ``-(g . s)`` of gradients not yet absorbed and the last step s, 0-d.

    The step is made anew from the moments, which have not moved since; as far as it was masked, that is not repeated.
    """
    old = [replace(block, step=block.step - 1) for block in blocks if block.step > 1]
    if not old:
        return torch.tensor(nan)
    unit, parts = gradient_rms(old, fisher), []
    for block in old:
        directions = fisher.direction(block, None, None, block.last_bound, near(unit, block.device))
        parts.append(dots(block.grads, directions))
    return total(parts, old)


def fisher_scale(buckets: Sequence[Bucket], fisher: AbstractFisher) -> Tensor:
    """Return c of step 3, 0-d."""
    mean, square, floor = total([fisher.sums(bucket) for bucket in buckets], buckets)
    scale: Tensor = 1 + mean / (square + floor)
    return scale


def gradient_rms(buckets: Sequence[Bucket], fisher: AbstractFisher) -> Tensor | float:
    """Return the root mean square of the gradients, by the second moments; not below :data:`SMALLEST_UNIT`.

    0-d, or a number where the host need not wait for it.
    """
    numel = max(1, sum(bucket.coordinates for bucket in buckets))
    square = total([fisher.square(bucket) for bucket in buckets], buckets)
    if on_host(square.device):
        return max(SMALLEST_UNIT, sqrt(float(square) / numel))
    return (square / numel).sqrt().clamp_min(SMALLEST_UNIT)


def near(value: Unit, device: torch.device) -> Unit:
    """Return a number as it is, a tensor on `device`."""
    return value.to(device) if isinstance(value, Tensor) else value


def linear_reduction(_: AbstractFisher, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
    """Return ``g . u`` over a bucket, for the gradients that were absorbed, 0-d."""
    return dots(bucket.grads, directions)


def published_reduction(fisher: AbstractFisher, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
    """Return ``sum(mh u) - 1/2 sum(vh u^2)`` over a bucket, 0-d.

    Times lr it is step 10. The step is ``lr u``, so a consistent model has lr^2 before the second sum; this is the rule
    as published.
    """
    return fisher.model_reduction(bucket, directions)


def walk(
    proposal: Proposal,
    sizes: Sequence[StepSize],
    fisher: AbstractFisher,
    *,
    cautious: bool,
    decay: bool = True,
    moves: bool = True,
    reduction: Reduction | None = None,
) -> Tensor | None:
    """Find the directions for the given sizes (steps 4 and 5) and move the parameters along them (step 6).

    Block by block, so that no direction outlives its block. Sets the norm of the step; nothing moves where the proposal
    is not ok.

    Args:
        proposal: its parameters are modified in place.
        sizes: one for each parameter group.
        fisher: knows the directions.
        cautious: leave out coordinates on which the direction does not descend.
        decay: with weight decay.
        moves: False to only look.
        reduction: what a bucket's directions promise, without its lr.

    Returns:
        The predicted reduction, 0-d, if `reduction` is given.
    """
    proposal.sizes, squares, promised = sizes, [], []
    for block in proposal.blocks:
        size, device = sizes[block.group], block.device
        ok = allowed(proposal.ok, device)
        scale = None if proposal.scale is None else proposal.scale.to(device)
        unit = near(proposal.unit, device)
        directions = fisher.direction(block, scale, ok, size.radius, unit, cautious=cautious)
        squares.append(square_sum(directions, foreach=block.foreach) * size.lr**2)
        if reduction is not None:
            promised.append(reduction(fisher, block, directions) * size.lr)
        if moves:
            move(block, block.spread(directions), size, ok, decay=decay)
        del directions  # before the next are formed
    proposal.square = total(squares, proposal.blocks)
    return None if reduction is None else total(promised, proposal.blocks)


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


def parameter_mean_square(proposal: Proposal) -> Tensor:
    """Return the mean square of all parameters of the proposal, 0-d; nan without coordinates."""
    squares = [square_sum(bucket.params, foreach=bucket.foreach) for bucket in proposal.buckets]
    return total(squares, proposal.buckets) / sum(bucket.coordinates for bucket in proposal.buckets)


def read(values: Sequence[Tensor | float | None], device: torch.device) -> list[float]:
    """Bring numbers and 0-d tensors to the host, None as 0, from an accelerator packed into one.

    The only place where a step waits for its device.
    """
    if on_host(device):
        return [0.0 if value is None else float(value) for value in values]
    wide = wide_dtype(device)
    zero = torch.zeros((), dtype=wide, device=device)
    packed = torch.stack([zero if value is None else torch.as_tensor(value).to(device, wide) for value in values])
    return [float(value) for value in packed.tolist()]


def statistics(bucket: Bucket, scale: Tensor, limit: float, fisher: AbstractFisher) -> Tensor:
    """Return the Fisher's statistics of a bucket over all shards, of which this rank may hold none, shape (4,)."""
    if bucket.numel:
        here = fisher.statistics(bucket, scale, limit)
    else:
        here = torch.tensor([inf, -inf, 0, 0], dtype=scale.dtype, device=scale.device)
    least, most = over_shards(here[:1], bucket.shards, "MIN"), over_shards(here[1:2], bucket.shards, "MAX")
    return torch.cat((least, most, over_shards(here[2:], bucket.shards)))


def describe(proposal: Proposal, fisher: AbstractFisher, *, moved: bool, skipped: bool) -> dict[str, float]:
    """Return what a :class:`StepReport` says of loss, step and state, which needs a pass over the state."""
    base = torch.tensor(nan) if proposal.base is None else proposal.base
    buckets = proposal.buckets
    if skipped:  # the moments have not absorbed the gradient that the age counts
        buckets = [replace(bucket, step=bucket.step - 1) for bucket in buckets if bucket.step > 1]
    buckets = [bucket for bucket in buckets if bucket.coordinates]
    if not buckets:
        return {"base_loss": read([base], proposal.home)[0], "step_norm": 0.0}
    scale, rows = fisher_scale(buckets, fisher), []
    for bucket in buckets:
        limit = 0.0 if proposal.scale is None else proposal.sizes[bucket.group].radius
        rows.append(statistics(bucket, scale.to(bucket.device), limit, fisher).to(proposal.home))
    table = torch.stack(rows)
    columns = [table[:, 0].min(), table[:, 1].max(), table[:, 2].sum(), table[:, 3].sum(), proposal.square]
    low, high, trace, active, square, base_loss = read([*columns, base], proposal.home)
    numel = sum(bucket.coordinates for bucket in buckets)
    return {
        "base_loss": base_loss,
        "step_norm": square**0.5 if moved else 0.0,
        "fisher_mean": trace / numel,
        "fisher_min": low,
        "fisher_max": high,
        "fisher_trace": trace,
        "active_fraction": active / numel,
    }
