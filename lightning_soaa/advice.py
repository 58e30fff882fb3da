"""What a run's own numbers say is wrong with it, in words with a remedy: plain numbers in, text out."""

from collections.abc import Callable
from math import isfinite, isnan, sqrt
from statistics import median, quantiles
from typing import NamedTuple

from lightning_soaa._watch import LAST_LOSSES, Check, Watch
from lightning_soaa.ratio import ROUNDING

# A radius on its way through a bound, or at one for a few bad batches, is there for fewer checks than this.
PINNED_CHECKS = 20
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
# The gap is one draw of a random difference, which can by chance be several times smaller than a typical one: 1 % seen
# may be 5 % in the ratios, of which radius rules resolve about 10 %.
GAP_SHARE = 0.01
# Where a run starts below the resolution of its loss, a growing radius (1.35 a check) leaves it within 20 checks if the
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


def advise(watch: Watch) -> list[Advice]:
    """Return all that there is to say now; the same again as long as it is so."""
    return [advice for rule in RULES if (advice := rule(watch)) is not None]


def beyond_rounding(watch: Watch, check: Check) -> bool:
    """Return whether a check is about more than rounding of the loss, as far as reports have told the loss."""
    return max(abs(check.predicted), abs(check.actual)) > ROUNDING * watch.largest_loss


def radius_at_bound(watch: Watch) -> Advice | None:
    """Say that the radius has been at its floor or ceiling for `PINNED_CHECKS` checks.

    Silent where slopes steer, about a floor where other advice names the cause, and where a check did not see the loss
    change by more than rounding, as in a run that has converged: such a step is not too large.
    """
    last = list(watch.checks)[-PINNED_CHECKS:]
    if len(last) < PINNED_CHECKS or watch.by_slopes:
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
    if len(watch.checks) < RATIO_CHECKS or watch.by_slopes or low_acceptance_rate(watch) or loss_not_repeatable(watch):
        return None
    ratios = [
        check.actual / check.predicted
        for check in watch.checks
        if check.predicted != 0 and isfinite(check.predicted + check.actual) and beyond_rounding(watch, check)
    ]
    if len(ratios) < RATIO_CHECKS:
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


def loss_unlike_gradient(watch: Watch) -> Advice | None:
    """Say that RatioRadius goes by slopes, since the loss does not follow its gradient.

    Silent where other advice names the cause.
    """
    if not (watch.by_slopes and watch.moved) or loss_not_repeatable(watch):
        return None
    return Advice(
        "loss_unlike_gradient",
        "the loss does not follow its gradient: by steps that are too short for curvature to matter it falls by less "
        "than the gradient promises, or rises. So acceptance ratios mean nothing; from now on the radius goes by the "
        "slopes that fresh gradients find, and a step is undone only if its loss is not finite. That is as it should "
        "be for detached targets or codes and for straight-through estimators. If there are none, make sure that the "
        "loss closure computes the loss that the gradients are of: the same batch, dropout masks, reduction and sign.",
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


def loss_risen(watch: Watch) -> Advice | None:
    """Say that the loss of the last `LAST_LOSSES` reports is over twice that of the first, though steps are accepted.

    Silent where other advice names the cause, and under rules without checks.
    """
    if len(watch.last_losses) < LAST_LOSSES or not watch.checks or low_acceptance_rate(watch):
        return None
    sign = -1 if watch.rising else 1
    first, last = sign * median(watch.first_losses), sign * median(watch.last_losses)
    if last - first <= abs(first) or loss_not_repeatable(watch) or many_skipped_steps(watch):
        return None
    return Advice(
        "loss_risen",
        f"the loss has become worse, {sign * last:.3g} in the median of the last rows after {sign * first:.3g} in the "
        "first, although steps are accepted. A check sees the loss of its own batch only, so steps may do good to it "
        "and harm to all others: use a larger batch or accumulate_grad_batches, or lower the prior of the radius, as "
        "in RatioRadius(relative=0.02). Ignore this where the loss is not meant to improve, as with adversaries.",
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
    loss_unlike_gradient,
    loss_unmoved,
    loss_risen,
    zero_gradients,
)
