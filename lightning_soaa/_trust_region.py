"""The loop that makes this a trust-region method: propose, evaluate, decide, keep or put back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_soaa._proposal import Proposal, linear_reduction, move, parameter_mean_square, read
from lightning_soaa._state import Snapshot
from lightning_soaa.radius import AbstractRadius, Evidence, Numbers


def search(
    proposal: Proposal,
    snapshot: Snapshot,
    rule: AbstractRadius,
    numbers: Numbers,
    *,
    aim: Callable[[Proposal, float], None],
    trial_loss: Callable[[], Tensor],
    evidence: Evidence,
    unread: Tensor | None,
) -> tuple[Numbers, dict[str, Any]]:
    """Try radii until `rule` keeps a point or gives up; the parameters are left at the kept or the first point.

    Reads the host once a trial. The trial point leaves weight decay out, since decay is no part of the loss.

    Args:
        proposal: gradients absorbed, no direction yet (its directions are set here).
        snapshot: the point the step starts from.
        rule: judges each trial.
        numbers: the rule's running numbers.
        aim: sets the proposal's directions at a radius.
        trial_loss: the loss at the current parameters, mean over ranks, 0-d.
        evidence: what is known before the first trial; its `noise` is relative to the base loss.
        unread: 0-d count to be read along with the first trial, or None.

    Returns:
        The rule's new numbers, and what is known of the step for its report.
    """
    attempt, home, mean_square = 0, proposal.home, parameter_mean_square(proposal)
    while True:
        attempt += 1
        aim(proposal, numbers["radius"])
        predicted = linear_reduction(proposal)
        move(proposal, decay=False)
        values = [proposal.base, trial_loss(), predicted, mean_square, proposal.ok, unread]
        base, trial, promised, square, ok, missed = read(values, home)
        known: dict[str, Any] = {"checked": bool(ok), "skipped": not ok, "accepted": False}
        known |= {"trials": attempt, "missed": int(missed)}
        if not ok:
            return numbers, known
        seen = replace(
            evidence,
            base=base,
            trial=trial,
            predicted=promised,
            attempt=attempt,
            noise=evidence.noise * abs(base),
            parameter_rms=square**0.5,
        )
        decision = rule.update(numbers, seen)
        numbers = decision.numbers
        known |= {"accepted": decision.accepted, "reductions": (promised, base - trial)}
        if not decision.accepted:
            snapshot.restore_params()
        elif any(size.decay for size in proposal.sizes):
            snapshot.restore_params()
            move(proposal, decay=True)
        if decision.accepted or not decision.retry:
            return numbers, known
