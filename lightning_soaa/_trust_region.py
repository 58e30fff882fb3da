"""The loop that makes this a trust-region method: propose, evaluate, decide, keep or put back."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, isfinite
from typing import Any, TypeVar

from torch import Tensor

from lightning_soaa._checks import check_nonnegative
from lightning_soaa._proposal import Proposal
from lightning_soaa._state import RADIUS, Snapshot
from lightning_soaa._sums import read
from lightning_soaa._walk import linear_reduction, parameter_mean_square, published_reduction
from lightning_soaa.radius import AbstractRadius, Decision, Evidence, Numbers

Walk = Callable[..., Any]  # walks a proposal at a radius, with the keywords of `_walk.walk`
Known = dict[str, Any]


def judge(rule: AbstractRadius, numbers: Numbers, evidence: Evidence) -> Decision:
    """Return the rule's decision.

    Raises:
        ValueError: its radius is negative or not finite, and no step could be taken with it.
    """
    decision = rule.update(numbers, evidence)
    check_nonnegative(type(rule).__name__, f"update(...).numbers['{RADIUS}']", decision.numbers[RADIUS])
    return decision


def follow(
    proposal: Proposal, rule: AbstractRadius, numbers: Numbers, *, walk: Walk, beta1: float, eps: float
) -> tuple[Numbers, Known]:
    """Take a step without a trial. Reads nothing on the host unless the rule needs the loss.

    The rule decides before anything moves, so that an exception in it leaves the parameters where they are. It is told
    the `beta1` and `eps` of the optimizer's defaults.

    Returns:
        The rule's new numbers, and what is known of the step for its report.
    """
    known: Known = {"checked": False, "accepted": True, "trials": 0}
    radius = numbers[RADIUS]
    if rule.needs_loss:
        predicted = walk(proposal, radius, moves=False, keeps=False, reduction=published_reduction)
        base, promised, ok = read([proposal.base, predicted, proposal.ok], proposal.home)
        known |= {"skipped": not ok, "accepted": bool(ok)}
        if ok:
            decision = judge(rule, numbers, Evidence(base=base, predicted=promised, beta1=beta1, eps=eps))
            numbers, known["reductions"] = decision.numbers, decision.reductions
    walk(proposal, radius)
    return numbers, known


def search(
    proposal: Proposal,
    snapshot: Snapshot,
    rule: AbstractRadius,
    numbers: Numbers,
    *,
    walk: Walk,
    trial_loss: Callable[[], Tensor],
    evidence: Evidence,
    rounding: float,
    gap: float | None,
    pending: Sequence[Tensor | float | None],
    fresh: Callable[[Sequence[float]], float | None],
) -> tuple[Numbers, Known]:
    """Try radii until `rule` keeps a point or gives up; the parameters are left at the kept or the first point.

    Reads the host once a trial of a step. The trial point leaves weight decay out, since decay is no part of the loss.

    Args:
        proposal: what its moments have not absorbed they do not absorb here.
        snapshot: the point the step starts from.
        rule: judges each trial.
        numbers: the rule's running numbers.
        walk: takes the proposal's step at a radius.
        trial_loss: the loss at the current parameters, mean over ranks, 0-d.
        evidence: what is known before the first trial.
        rounding: rounding error of the base loss, relative to it.
        gap: what `trial_loss` differs from the base loss by where nothing has moved; None if it is to be measured.
            That is one more trial, unless the radius is 0 and the first trial does it.
        pending: numbers and small tensors to be read along with the trial.
        fresh: takes what was read of `pending` and returns the fresh slope of the last accepted check.

    Returns:
        The rule's new numbers, and what is known of the step for its report.
    """
    home, mean_square = proposal.home, parameter_mean_square(proposal)
    apart = gap is None and numbers[RADIUS] > 0
    repeat, attempt = trial_loss() if apart else None, 0
    while True:
        attempt += 1
        radius = numbers[RADIUS]
        predicted = walk(proposal, radius, decay=False, keeps=False, reduction=linear_reduction)
        slopes = proposal.slopes
        if proposal.left is not None and slopes is not None:
            predicted, slopes = predicted / proposal.left, slopes / proposal.left
        at = trial_loss()
        values = [proposal.base, at, predicted, mean_square, repeat, proposal.unit, proposal.ok, proposal.outlier]
        values += [*pending, slopes]
        base, trial, promised, square, repeated, unit, ok, outlier, *heard = read(values, home)
        heard, each = heard[: -proposal.count], heard[-proposal.count :]
        known: Known = {"checked": bool(ok), "skipped": not ok, "outlier": bool(outlier), "accepted": False}
        known |= {"trials": attempt + apart, "heard": heard}
        if not ok:
            return numbers, known
        proposal.unit = None if proposal.unit is None else unit
        gap = finite_or((repeated if apart else trial) - base, inf) if gap is None else gap
        seen = replace(
            evidence,
            base=base,
            trial=trial,
            predicted=promised,
            attempt=attempt,
            noise=rounding * abs(base) + finite_or(abs(gap), 0.0),
            fresh=fresh(heard),
            parameter_rms=square**0.5,
        )
        decision = judge(rule, numbers, seen)
        numbers, reductions = decision.numbers, (promised, finite_or(base - trial, -inf))
        known |= {"accepted": decision.accepted, "reductions": reductions, "repeat_gap": gap, "slopes": each}
        if not decision.accepted:
            snapshot.restore_params()
        elif any(size.decay for size in proposal.sizes):
            snapshot.restore_params()
            walk(proposal, radius, keeps=False)
        if decision.accepted or not decision.retry:
            return numbers, known


Other = TypeVar("Other")


def finite_or(value: float, otherwise: Other) -> float | Other:
    """Return `value` if it is finite."""
    return value if isfinite(value) else otherwise
