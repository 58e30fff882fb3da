"""What a run's own numbers say is wrong with it, in words with a remedy: plain numbers in, text out."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite, isnan, nan, sqrt
from statistics import quantiles
from typing import Any, NamedTuple

from lightning_soaa.report import StepReport

# How many of the last checks are judged. After burn-in they span about a hundred steps: long enough to tell a state
# from an episode, short enough to notice that a run has turned bad.
WINDOW = 24
# A radius on its way through a bound, or at one for a few bad batches, is there for fewer checks than this.
PINNED_CHECKS = 20
# Radii move by 2 % and more a check, so that one within 1 % of its bound was held there.
PINNED_WITHIN = 0.01
# Healthy runs accept more than nine checks in ten; a fair coin falls below a third in 12 throws once in 14 times.
LOW_RATE = 1 / 3
RATE_CHECKS = 12
# One bad batch in twenty is more than data sets have by accident; 40 steps, so that three are needed and not one.
SKIPPED_SHARE = 0.05
SKIPPED_AMONG = 40
# Radius rules act on mean ratios that differ by tenths. A mean known to +-1 says nothing that they could act on.
RATIO_ERROR = 1.0
RATIO_CHECKS = 12
# Interquartile range of a normal distribution over its standard deviation. Quartiles, so that the one batch on which a
# step went far wrong (ratios of -100 occur) does not pass for scatter.
QUARTILES_OF_NORMAL = 1.349
# Losses equal up to this share are equal: 8 units in the last place of float32.
ROUNDING = 1e-6
# The gap is one draw of a random difference, which can by chance be several times smaller than a typical one: 1 % seen
# may be 5 % in the ratios, of which radius rules resolve about 10 %.
GAP_SHARE = 0.01
# Where a run starts below the resolution of its loss, a growing radius (1.25 a check) leaves it within 20 checks if the
# first predicted reduction was more than 1/70 of the loss's last place.
STUCK_CHECKS = 20
# The Fisher is exactly 0 only if no gradient so far was anything else; three rows, so that no first row decides alone.
ZERO_REPORTS = 3


class TrustRegionWarning(UserWarning):
    """Advice of :class:`~lightning_soaa.TrustRegionMonitor`; a category of its own, for ``warnings.filterwarnings``."""


class Advice(NamedTuple):
    """One thing to tell the user.

    Args:
        kind: what tells it from other advice, the same in all runs.
        text: what was seen, with its numbers, and the remedy.
    """

    kind: str
    text: str


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
    largest_loss: float = 0.0  # magnitude, of the reports; what goes into a loss rounds on this scale

    def see_numbers(self, head: Mapping[str, Any]) -> None:
        """Look at an optimizer's first parameter group, as often as there is time: only a new check counts as one.

        Args:
            head: holds the plain numbers ``radius``, ``checks``, ``accepted_checks`` and ``skipped_steps`` (counts of
                the whole run). May hold ``steps`` and ``outlier_steps``, ``predicted_reduction`` and
                ``actual_reduction`` of the last check, ``radius_low`` and ``radius_high``. Without one of them, what
                it would tell is not told.
        """
        self.radius = float(head["radius"])
        self.steps, self.not_finite = int(head.get("steps", 0)), int(head["skipped_steps"])
        self.outliers = int(head.get("outlier_steps", 0))
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
        absorbed = report.step - report.skipped_steps > 0
        self.zero_reports = self.zero_reports + 1 if absorbed and report.fisher_max == 0 else 0


def advise(watch: Watch) -> list[Advice]:
    """Return all that there is to say now; the same again as long as it is so."""
    return [advice for rule in RULES if (advice := rule(watch)) is not None]


def beyond_rounding(watch: Watch, check: Check) -> bool:
    """Return whether a check is about more than rounding of the loss, as far as reports have told the loss."""
    return max(abs(check.predicted), abs(check.actual)) > ROUNDING * watch.largest_loss


def radius_at_bound(watch: Watch) -> Advice | None:
    """Say that the radius has been at its floor or ceiling for `PINNED_CHECKS` checks.

    Silent about a floor where other advice names the cause, and where a check did not see the loss change by more than
    rounding, as in a run that has converged: such a step is not too large.
    """
    last = list(watch.checks)[-PINNED_CHECKS:]
    if len(last) < PINNED_CHECKS:
        return None
    seen = f"{watch.radius:.3g}, for {PINNED_CHECKS} checks or more"
    if all(check.at_low and check.actual != 0 and beyond_rounding(watch, check) for check in last):
        if low_acceptance_rate(watch) or loss_not_repeatable(watch):
            return None
        return Advice(
            "radius_floor",
            f"the radius is at its floor, {seen}: even the smallest step looks too large. Make sure that the loss "
            "closure computes the loss that the gradients are of: the same batch, dropout masks, reduction and sign. "
            "If it does, keep parameters in float32, as precision='bf16-mixed' does, since the floor is not below "
            "their resolution; or lower the prior of the radius, as in RatioRadius(relative=0.02).",
        )
    if all(check.at_high for check in last):
        return Advice(
            "radius_ceiling",
            f"the radius is at its ceiling, {seen}: no step looks too large, so the ceiling decides, not the checks. "
            "If training is slow, raise the prior of the radius, as in RatioRadius(relative=2.0): the ceiling is 10 "
            "times that.",
        )
    return None


def low_acceptance_rate(watch: Watch) -> Advice | None:
    """Say that fewer than `LOW_RATE` of the last checks, `RATE_CHECKS` at least, were accepted.

    Silent where other advice names the cause.
    """
    checks, accepted = (sum(getattr(check, name) for check in watch.checks) for name in ("checks", "accepted"))
    if checks < RATE_CHECKS or accepted >= LOW_RATE * checks or loss_not_repeatable(watch):
        return None
    return Advice(
        "acceptance_rate",
        f"the acceptance rate is {accepted / checks:.2g}: {accepted} of the last {checks} checks were accepted, the "
        "others were rejects that cost trials and moved nothing. Make sure that the loss closure computes the loss "
        "that the gradients are of, the same batch, dropout masks, reduction and sign, and that it is finite. If it "
        "does, lower the prior of the radius, as in RatioRadius(relative=0.02).",
    )


def many_skipped_steps(watch: Watch) -> Advice | None:
    """Say that more than `SKIPPED_SHARE` of the run's steps, `SKIPPED_AMONG` at least, were skipped, and why."""
    skipped = watch.not_finite + watch.outliers
    if watch.steps < SKIPPED_AMONG or skipped <= SKIPPED_SHARE * watch.steps:
        return None
    text = (
        f"{skipped} of {watch.steps} steps were skipped: {watch.not_finite} with a loss or gradient that was not "
        f"finite, {watch.outliers} with one far outside the recent distribution."
    )
    if watch.not_finite:
        text += (
            " Not finite: look for nan in the data, for log, sqrt and division near 0 in the loss, and for 16-bit "
            "overflow, which precision='bf16-mixed' avoids."
        )
    if watch.outliers:
        text += (
            " Far outside: look for broken or unscaled samples and shuffle the data; if such batches are what the data "
            "are like, use a larger batch or clip the gradients."
        )
    return Advice("skipped_steps", text)


def noisy_ratios(watch: Watch) -> Advice | None:
    """Say that the mean acceptance ratio of the last checks is known to `RATIO_ERROR` at best.

    Silent where other advice names the cause, and of reductions that are rounding of the loss, as far as reports have
    told the loss: those of a run that has converged.
    """
    ratios = [
        check.actual / check.predicted
        for check in watch.checks
        if check.predicted != 0 and isfinite(check.predicted + check.actual) and beyond_rounding(watch, check)
    ]
    if len(ratios) < RATIO_CHECKS or low_acceptance_rate(watch) or loss_not_repeatable(watch):
        return None
    low, _, high = quantiles(ratios, n=4)
    error = (high - low) / QUARTILES_OF_NORMAL / sqrt(len(ratios))
    if error <= RATIO_ERROR:
        return None
    return Advice(
        "ratio_noise",
        f"the acceptance ratios of the last {len(ratios)} checks scatter so widely, the middle half from {low:.2g} to "
        f"{high:.2g}, that their mean is known to +-{error:.2g} only, and the radius follows noise. Make sure that the "
        "loss closure computes the loss that the gradients are of: the same batch, dropout masks, reduction and sign. "
        "If it does, the loss of a batch changes less by the step than by chance: use a larger batch or "
        "accumulate_grad_batches, or FixedRadius(), which makes no checks.",
    )


def loss_not_repeatable(watch: Watch) -> Advice | None:
    """Say that the first check's trial at the point it started from had another loss.

    The gap disturbs actual reductions, so it is measured by the predicted one of the last check; rounding is forgiven.
    """
    if watch.report is None:
        return None
    gap, base, predicted = (
        abs(value) for value in (watch.report.repeat_gap, watch.report.base_loss, watch.report.predicted_reduction)
    )
    if not (gap > GAP_SHARE * predicted and gap > ROUNDING * (0.0 if isnan(base) else base)):  # nan: not measured
        return None
    return Advice(
        "repeat_gap",
        f"the loss closure is not deterministic: at the same parameters it returned a loss that differs by {gap:.3g} "
        f"from the base loss, and the predicted reduction is {predicted:.3g}. Make it compute the same loss twice: the "
        "same batch, dropout masks and augmentation, no statistics updated in between. SOAAMixin replays the random "
        "streams of torch, numpy and python; a generator of your own has to be seeded anew in training_step.",
    )


def loss_unmoved(watch: Watch) -> Advice | None:
    """Say that no check so far, `STUCK_CHECKS` at least, saw the loss change, though a reduction was predicted."""
    if watch.moved or watch.unmoved_checks < STUCK_CHECKS:
        return None
    return Advice(
        "loss_unmoved",
        f"the actual reduction was exactly 0 in all {watch.unmoved_checks} checks so far, although the gradients "
        "predict one. Either the loss closure does not use the parameters: make it run the model anew, not return a "
        "loss that was computed before. Or the steps are below the resolution of the loss or of the parameters: keep "
        "both in float32, as precision='bf16-mixed' does.",
    )


def zero_gradients(watch: Watch) -> Advice | None:
    """Say that the Fisher is exactly 0 in `ZERO_REPORTS` reports in a row."""
    if watch.zero_reports < ZERO_REPORTS or watch.report is None:
        return None
    return Advice(
        "zero_gradients",
        f"all gradients of all {watch.report.step} steps so far are exactly 0, so nothing can move: the loss does not "
        "depend on the parameters. Look for detach(), no_grad(), argmax or rounding between parameters and loss, for a "
        "factor of 0, and for units that are all saturated.",
    )


RULES: tuple[Callable[[Watch], Advice | None], ...] = (
    radius_at_bound,
    low_acceptance_rate,
    many_skipped_steps,
    noisy_ratios,
    loss_not_repeatable,
    loss_unmoved,
    zero_gradients,
)
