"""What gradients propose before a step is taken. Tensors only, no decision."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan, sqrt

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket
from lightning_soaa._dist import Shards, over_shards
from lightning_soaa._estimate import Fishers, Slopes, Unit
from lightning_soaa._sums import allowed, on_host, sent, square_sum, total, wide_dtype
from lightning_soaa.gate import Gate, pass_gate, pass_gate_on_host

# eps is a multiple of the gradients' root mean square, but of no less than this: in float32 it must not vanish.
SMALLEST_UNIT = 1e-15


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
        unit: root mean square of the gradients, by the second moments, a number or 0-d: that of the last check, or of
            this step if it is a check. None where the Fisher limits the step.
        left_over: slope that the gradient found along the last step, for each parameter, shape (n,), or numbers where
            the host need not wait; nan where not `ok`; None if it was not asked for.
        slopes: what the step promises, for each parameter, shape (n,); None where that was not asked for.
        left: share of the gradients that clipping left, 0-d; None for all.
        absorbed: the moments hold the gradients already.
        compiled: the compiled step is asked for.
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
    left_over: Tensor | list[float] | None = None
    slopes: Tensor | None = None
    left: Tensor | None = None
    absorbed: bool = False
    compiled: bool = False
    sizes: Sequence[StepSize] = ()
    square: Tensor | None = None

    @property
    def home(self) -> torch.device:
        """Return the device on which sums over buckets are formed."""
        return self.buckets[0].device

    @property
    def count(self) -> int:
        """Return the number of parameters that have a gradient."""
        return sum(len(bucket.owners) for bucket in self.buckets)

    def release(self) -> None:
        """Drop the gradients, so that a kept proposal holds no memory of its own."""
        self.blocks, self.slopes = [], None
        for bucket in self.buckets:
            bucket.grads = []


def propose(
    buckets: list[Bucket],
    base: Tensor | None,
    fisher: Fishers,
    *,
    gate: Gate | None,
    slope: bool,
    fisher_limits: bool,
    cautious: bool,
    unit: float | None = None,
    check: bool = False,
    left: Tensor | None = None,
    last_portions: Sequence[float] = (),
    compiled: bool = False,
) -> Proposal:
    """Look at all gradients: are they and the loss finite, and not far out, and what is the step to be measured in?

    Unless they absorb the gradients first (steps 1 and 3), moments are left for the step itself to update, which saves
    a pass and, on a check, a copy.

    Args:
        buckets: parameters, gradients and state.
        base: the loss, or None.
        fisher: the Fisher estimate.
        gate: what the outlier gate knows, None for no gate.
        slope: the gradient is to be held against the last step, which was a check.
        fisher_limits: whether the Fisher limits the step, or only the radius does.
        cautious: coordinates on which the last step did not descend were left out.
        unit: root mean square of the gradients at the last check, None if it is not known.
        check: find it anew.
        left: share of the gradients that clipping left, 0-d; None for all.
        last_portions: what the last step of each parameter was multiplied by besides; empty where all are 1.
        compiled: the compiled step is asked for, which forms nothing on the way; slopes and checks do without it.
    """
    blocks = [block for b in buckets for block in fisher.of(b.group).blocks(b, whole=compiled or on_host(b.device))]
    squares = [square_sum(block.grads, foreach=block.foreach) for block in blocks]
    square = total(squares, [block.shards for block in blocks])
    ok, outlier, gate = (admit_on_host if on_host(square.device) else admit)(square, base, gate)
    proposal = Proposal(buckets, blocks, base, ok, outlier, gate, None, None, left=left)
    if slope:
        found = fresh_slopes(proposal, fisher, unit or SMALLEST_UNIT, last_portions, masked=cautious)
        found, allows = found if left is None else found / left, allowed(ok, square.device)
        found = found if allows is None else torch.where(allows, found, nan)
        proposal.left_over = found.tolist() if on_host(found.device) else found
    proposal.compiled = compiled and not check and not slope
    if not fisher_limits:
        proposal.unit = gradient_rms(blocks, squares, ok, fisher) if check or unit is None else unit
    if fisher_limits:
        absorb(proposal, fisher)
        proposal.scale = fisher_scale(blocks, fisher)
    return proposal


def absorb(proposal: Proposal, fisher: Fishers) -> None:
    """Let the Fisher absorb the gradients (step 1), where the proposal is ok, unless it has."""
    if not proposal.absorbed:
        for block in proposal.blocks:
            for part in block.parts():
                fisher.of(block.group).update(part, allowed(proposal.ok, block.device))
            block.store()
    proposal.absorbed = True


def mark(proposal: Proposal, fisher: Fishers) -> None:
    """Have the Fisher keep which coordinates moved in a check; the moments have absorbed the gradients."""
    for block in proposal.blocks:
        for part in block.parts():
            fisher.of(block.group).mark(part)
        block.store()


def turn(proposal: Proposal, fisher: Fishers) -> None:
    """Let the Fisher's own coordinates follow the gradients, where the proposal is ok, once the step is over."""
    for block in proposal.blocks if fisher.rotates else ():
        fisher.of(block.group).turn(block, allowed(proposal.ok, block.device))


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


def fresh_slopes(
    proposal: Proposal, fisher: Fishers, unit: float, portions: Sequence[float], *, masked: bool
) -> Tensor:
    """Return ``-(g . s)`` of gradients not yet absorbed and the step s of the last check, for each parameter.

    The step is made anew from the moments, which have not moved since; nan for parameters that it did not move.

    Args:
        proposal: its blocks.
        fisher: knows the directions.
        unit: what eps was a multiple of.
        portions: what the step of each parameter was multiplied by besides; empty where all are 1.
        masked: coordinates were left out, which :meth:`AbstractFisher.mark` has kept.
    """
    found: list[tuple[Shards, Slopes]] = []
    for block in proposal.blocks:
        for part in block.parts() if block.step > 1 else ():
            old = part.but(step=part.step - 1)
            directions = fisher.of(block.group).direction(old, None, None, part.last_bound, unit, marked=masked)
            found.append((block.shards, (part.owners, part.slopes(directions))))
    slopes = by_owner(found, proposal.count, proposal.home)
    return slopes * sent(portions, slopes.device) if portions else slopes


def by_owner(found: Sequence[tuple[Shards, Slopes]], count: int, home: torch.device) -> Tensor:
    """Return figures of the parts of parameters summed for each parameter, over all shards, shape (count,).

    Args:
        found: over which processes the parts are spread, which parameters they belong to, and their figures.
        count: the number of parameters.
        home: the device of the result.
    """
    sums = torch.zeros(count, dtype=wide_dtype(home), device=home)
    for kind in dict.fromkeys(shards for shards, _ in found):
        here = [slopes for shards, slopes in found if shards == kind]
        places = sent([owner for owners, _ in here for owner in owners], home, torch.int64)
        values = torch.cat([figures.to(home) for _, figures in here])
        sums += over_shards(torch.zeros_like(sums).index_add_(0, places, values), kind)
    return sums


def fisher_scale(buckets: Sequence[Bucket], fisher: Fishers) -> Tensor:
    """Return c of step 3, 0-d."""
    sums = [fisher.of(bucket.group).sums(bucket) for bucket in buckets]
    mean, square, floor = total(sums, [bucket.shards for bucket in buckets])
    scale: Tensor = 1 + mean / (square + floor)
    return scale


def gradient_rms(
    blocks: Sequence[Bucket], squares: Sequence[Tensor], ok: Tensor | bool, fisher: Fishers
) -> Tensor | float:
    """Return the root mean square of the gradients, by the second moments, not below :data:`SMALLEST_UNIT`.

    0-d, or a number where the host need not wait for it.

    Args:
        blocks: their second moments have not absorbed the gradients.
        squares: sums of squares of the gradients, one a block, which are absorbed where `ok`.
        ok: 0-d bool, or a bool.
        fisher: knows the second moments.
    """
    parts = []
    for block, square in zip(blocks, squares, strict=True):
        allows, rise = allowed(ok, block.device), (1 - block.beta2) / block.correction2
        new = square if allows is None else torch.where(allows, square, 0.0)
        parts.append(block.beta2 * fisher.of(block.group).square(block) + rise * new)
    mean = total(parts, [block.shards for block in blocks]) / max(1, sum(block.coordinates for block in blocks))
    if on_host(mean.device):
        return max(SMALLEST_UNIT, sqrt(float(mean)))
    return mean.sqrt().clamp_min(SMALLEST_UNIT)
