"""What the monitor has seen of one optimizer, kept for :mod:`~lightning_soaa.advice`: plain numbers only."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any, NamedTuple

from lightning_soaa.ratio import by_slopes
from lightning_soaa.report import StepReport

# How many of the last checks are judged. After burn-in they span about a hundred steps: long enough to tell a state
# from an episode, short enough to notice that a run has turned bad.
WINDOW = 24
# Radii move by 2 % and more a check, so that one within 1 % of its bound was held there.
PINNED_WITHIN = 0.01
# Losses of the first rows and of the last ones: medians of as many scatter little, and burn-in has begun by the last.
FIRST_LOSSES, LAST_LOSSES = 12, 24


class Check(NamedTuple):
    """What is known of a check once its step is done.

    Args:
        checks: how many there were since the last look, this one included; more than 1 where steps share a batch.
        accepted: how many of them were accepted.
        predicted: predicted reduction, in units of the loss.
        actual: actual reduction, in units of the loss.
        at_low: whether the radius is within 1 % of its floor or below it.
        at_high: whether it is within 1 % of its ceiling or above it.
    """

    checks: int
    accepted: int
    predicted: float
    actual: float
    at_low: bool
    at_high: bool


@dataclass
class Watch:
    """What has been seen of one optimizer, in plain numbers.

    Args:
        checks_seen: the optimizer's counter ``checks`` when watching starts.
        accepted_seen: likewise ``accepted_checks``.

    Example::

        >>> from lightning_soaa.advice import Watch, advise
        >>> watch = Watch()
        >>> watch.see_numbers({"radius": 0.1, "checks": 0, "accepted_checks": 0, "skipped_steps": 8, "steps": 40})
        >>> [advice.kind for advice in advise(watch)]
        ['skipped_steps']

    Does not remember what has been said.
    """

    checks_seen: int = 0
    accepted_seen: int = 0
    checks: deque[Check] = field(default_factory=lambda: deque(maxlen=WINDOW))
    radius: float = nan
    steps: int = 0
    not_finite: int = 0
    outliers: int = 0
    moved: bool = False  # whether any check saw the loss change
    unmoved_checks: int = 0  # checks that predicted a reduction and saw none
    zero_reports: int = 0
    report: StepReport | None = None
    rising: bool = False  # whether the loss is maximised
    by_slopes: bool = False  # whether RatioRadius has found the loss not to follow its gradient
    first_losses: list[float] = field(default_factory=list)  # finite ones, of the first reports
    last_losses: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_LOSSES))
    largest_loss: float = 0.0  # magnitude, of the reports; what goes into a loss rounds on this scale

    def see_news(self, head: Mapping[str, Any], report: StepReport | None) -> bool:
        """Look at an optimizer's first parameter group and at a report, if there is one; return whether either is new.

        Most steps have no check, are not left out and have no report: what there is to say is what it was.
        """
        known = (self.checks_seen, self.not_finite, self.outliers)
        if report is None and known == (head["checks"], head["skipped_steps"], head.get("outlier_steps", 0)):
            return False
        self.see_numbers(head)
        self.see_report(report)
        return True

    def see_numbers(self, head: Mapping[str, Any]) -> None:
        """Look at an optimizer's first parameter group, as often as there is time: only a new check counts as one.

        Args:
            head: holds the plain numbers ``radius``, ``checks``, ``accepted_checks`` and ``skipped_steps`` (counts of
                the whole run). May hold ``steps`` and ``outlier_steps``, ``predicted_reduction`` and
                ``actual_reduction`` of the last check, ``radius_low`` and ``radius_high``, and ``rule_doubts``.
                Without one of them, what it would tell is not told.
        """
        self.radius = float(head["radius"])
        self.steps, self.not_finite = int(head.get("steps", 0)), int(head["skipped_steps"])
        self.outliers, self.rising = int(head.get("outlier_steps", 0)), bool(head.get("maximize", False))
        self.by_slopes = by_slopes({"doubts": head.get("rule_doubts", 0.0)})
        checks, accepted = int(head["checks"]), int(head["accepted_checks"])
        new, taken = checks - self.checks_seen, accepted - self.accepted_seen
        self.checks_seen, self.accepted_seen = checks, accepted
        if new <= 0:  # none, or another state has been loaded
            return
        predicted, actual = (float(head.get(f"{name}_reduction", nan)) for name in ("predicted", "actual"))
        at_low = self.radius <= head.get("radius_low", nan) * (1 + PINNED_WITHIN)
        at_high = self.radius >= head.get("radius_high", nan) * (1 - PINNED_WITHIN)
        self.checks.append(Check(new, taken, predicted, actual, at_low, at_high))
        if actual != 0:  # nan as well
            self.moved = True
        elif predicted > 0:
            self.unmoved_checks += new

    def see_report(self, report: StepReport | None) -> None:
        """Look at a report that has been computed anyway; None, of no step at all, tells nothing."""
        if report is None or (self.report is not None and report.step == self.report.step):
            return
        self.report = report
        if isfinite(report.base_loss):
            self.largest_loss = max(self.largest_loss, abs(report.base_loss))
            losses = self.first_losses if len(self.first_losses) < FIRST_LOSSES else self.last_losses
            losses.append(report.base_loss)
        absorbed = report.step - report.skipped_steps > 0
        self.zero_reports = self.zero_reports + 1 if absorbed and report.fisher_max == 0 else 0
