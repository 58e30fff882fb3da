"""A step between its gradients and its report: gather, absorb, aim, move, describe. Tensors only, no decision."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket, dots, gated, square_sum, wide_dtype
from lightning_soaa._dist import over_shards
from lightning_soaa.fisher import AbstractFisher
from lightning_soaa.gate import pass_gate

# Its square must not overflow in float32. Gradients below one over it are no longer scaled up to 1.
LARGEST_GAIN = 1e15

Entry = tuple[int, Tensor]  # index of the parameter group, parameter


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
    """A proposed step. Its tensors stay on their devices; nothing here has been read by the host.

    Args:
        buckets: the parameters that have a gradient.
        base: loss where the step starts, mean over ranks, 0-d, or None.
        ok: 0-d bool: loss and gradients are finite and no outlier. Where it is false the step moves nothing.
        outlier: 0-d bool: the gate leaves the gradient out.
        gate: what the outlier gate knows once it has seen the gradient, or None without a gate.
        scale: c of step 3, 0-d; None where the Fisher does not limit the step.
        gain: one over the root mean square of the gradients, by the second moments, 0-d; None where it does.
        fresh: slope along the last step that the gradient found, over the slope that step started from, 0-d; nan where
            not `ok`; None if it was not asked for.
        sizes: one for each parameter group.
        directions: u of step 5, one list a bucket; dropped when the step is over.
        square: squared norm of the step, weight decay apart, 0-d.
    """

    buckets: list[Bucket]
    base: Tensor | None
    ok: Tensor
    outlier: Tensor
    gate: Tensor | None
    scale: Tensor | None
    gain: Tensor | None
    fresh: Tensor | None = None
    sizes: Sequence[StepSize] = ()
    directions: list[list[Tensor]] = field(default_factory=list)
    square: Tensor | None = None

    @property
    def home(self) -> torch.device:
        """Return the device on which sums over buckets are formed."""
        return self.buckets[0].device

    def release(self) -> None:
        """Drop gradients and directions, so that a kept proposal holds no memory of its own."""
        self.directions = []
        for bucket in self.buckets:
            bucket.grads = []


def total(parts: Iterable[Tensor], buckets: Sequence[Bucket]) -> Tensor:
    """Return the sum of small tensors, one a bucket, over all shards, on the device of the first."""
    listed = list(parts)
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
    gate: Tensor | None,
    slope: float,
    fisher_limits: bool,
) -> Proposal:
    """Let the Fisher absorb all gradients, unless one of them or the loss is not finite or far out (steps 1 and 3).

    Args:
        buckets: parameters, gradients and state, which is modified in place.
        base: the loss, or None.
        fisher: absorbs.
        gate: what the outlier gate knows, None for no gate.
        slope: predicted reduction of the last step if the gradient is to be held against it, else 0.
        fisher_limits: whether the Fisher limits the step, or only the radius does.
    """
    square = total([square_sum(bucket.grads, foreach=bucket.foreach) for bucket in buckets], buckets)
    ok = square.isfinite() if base is None else square.isfinite() & base.isfinite()
    outlier = torch.zeros_like(ok)
    if gate is not None:
        outlier, gate = pass_gate(gate, square, base, ok)
        ok = ok & ~outlier
    fresh = torch.where(ok, fresh_slope(buckets, fisher).to(ok.device) / slope, nan) if slope else None
    for bucket in buckets:
        fisher.update(bucket, ok.to(bucket.device))
    scale, gain = (fisher_scale(buckets, fisher), None) if fisher_limits else (None, gradient_gain(buckets, fisher))
    return Proposal(buckets, base, ok, outlier, gate, scale, gain, fresh)


def fresh_slope(buckets: Iterable[Bucket], fisher: AbstractFisher) -> Tensor:
    """Return ``-(g . s)`` of gradients not yet absorbed and the last step s, 0-d.

    The step is made anew from the moments, which have not moved since; as far as it was masked, that is not repeated.
    """
    old = [replace(bucket, step=bucket.step - 1) for bucket in buckets if bucket.step > 1]
    if not old:
        return torch.tensor(nan)
    gain, parts = gradient_gain(old, fisher), []
    for bucket in old:
        device = bucket.device
        ok = torch.ones((), dtype=torch.bool, device=device)
        parts.append(dots(bucket.grads, fisher.direction(bucket, None, ok, bucket.last_bound, gain.to(device))))
    return total(parts, old)


def fisher_scale(buckets: Sequence[Bucket], fisher: AbstractFisher) -> Tensor:
    """Return c of step 3, 0-d."""
    mean, square, floor = total([fisher.sums(bucket) for bucket in buckets], buckets)
    scale: Tensor = 1 + mean / (square + floor)
    return scale


def gradient_gain(buckets: Sequence[Bucket], fisher: AbstractFisher) -> Tensor:
    """Return one over the root mean square of the gradients, by the second moments, 0-d."""
    numel = max(1, sum(bucket.coordinates for bucket in buckets))
    square = total([fisher.square(bucket) for bucket in buckets], buckets) / numel
    gain: Tensor = square.rsqrt().clamp_max(LARGEST_GAIN)
    return gain


def aim(proposal: Proposal, sizes: Sequence[StepSize], fisher: AbstractFisher, *, cautious: bool) -> None:
    """Set the directions for the given sizes, one for each group (steps 4 and 5), and the norm of the step."""
    proposal.sizes, proposal.directions, squares = sizes, [], []
    for bucket in proposal.buckets:
        size, device = sizes[bucket.group], bucket.device
        scale, gain = (None if x is None else x.to(device) for x in (proposal.scale, proposal.gain))
        directions = fisher.direction(bucket, scale, proposal.ok.to(device), size.radius, gain, cautious=cautious)
        squares.append(square_sum(directions, foreach=bucket.foreach) * size.lr**2)
        proposal.directions.append(directions)
    proposal.square = total(squares, proposal.buckets)


def move(proposal: Proposal, *, decay: bool) -> None:
    """Move the parameters (step 6), with or without weight decay; nothing moves where the proposal is not ok."""
    for bucket, directions in zip(proposal.buckets, proposal.directions, strict=True):
        size = proposal.sizes[bucket.group]
        keep = gated(proposal.ok.to(bucket.device), 1 - size.decay, 1.0) if decay and size.decay else None
        if bucket.foreach:
            if keep is not None:
                torch._foreach_mul_(bucket.params, keep)
            torch._foreach_add_(bucket.params, directions, alpha=-size.lr)
            continue
        for param, direction in zip(bucket.params, directions, strict=True):
            if keep is not None:
                param.mul_(keep)
            param.add_(direction, alpha=-size.lr)


def linear_reduction(proposal: Proposal) -> Tensor:
    """Return ``-(g . s)`` for the gradient that was absorbed and the step without weight decay, 0-d."""
    parts = [
        dots(bucket.grads, directions) * proposal.sizes[bucket.group].lr
        for bucket, directions in zip(proposal.buckets, proposal.directions, strict=True)
    ]
    return total(parts, proposal.buckets)


def published_reduction(proposal: Proposal, fisher: AbstractFisher) -> Tensor:
    """Return ``lr (sum(mh u) - 1/2 sum(vh u^2))`` (step 10), 0-d.

    The step is ``lr u``, so a consistent model has lr^2 before the second sum; this is the rule as published.
    """
    parts = [
        fisher.model_reduction(bucket, directions) * proposal.sizes[bucket.group].lr
        for bucket, directions in zip(proposal.buckets, proposal.directions, strict=True)
    ]
    return total(parts, proposal.buckets)


def parameter_mean_square(proposal: Proposal) -> Tensor:
    """Return the mean square of all parameters of the proposal, 0-d; nan without coordinates."""
    squares = [square_sum(bucket.params, foreach=bucket.foreach) for bucket in proposal.buckets]
    return total(squares, proposal.buckets) / sum(bucket.coordinates for bucket in proposal.buckets)


def read(values: Sequence[Tensor | None], device: torch.device) -> list[float]:
    """Bring 0-d tensors to the host, packed into one, None as 0. The only place where a step waits for its device."""
    wide = wide_dtype(device)
    zero = torch.zeros((), dtype=wide, device=device)
    packed = torch.stack([zero if value is None else value.to(device, wide) for value in values])
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
