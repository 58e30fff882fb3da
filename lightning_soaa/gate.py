"""The outlier gate: which gradients are so far outside their recent distribution that they are left out.

Two figures of a step are followed, the logarithm of the gradient's norm and the loss: mean and variance of both, as
exponential averages. On an accelerator all is 0-d tensors, so that the host need not wait to learn of it; on the CPU,
where it does not wait, the same is done with numbers.
"""

from math import log
from typing import TypeAlias

import torch
from torch import Tensor

# Gradients absorbed before the gate knows anything.
WARM_UP = 5
# A gradient is far out if its norm is this many standard deviations (of the logarithm) and this factor above the mean.
NORM_DEVIATIONS, NORM_FACTOR = 6.0, 3.0
# Where norms scatter widely that is too far: so is one whose norm is this factor above the highest of those taken.
PEAK_FACTOR = 4.0
# So is one whose loss is this many standard deviations above the mean, if its norm is this factor above the mean or
# its loss this factor above the mean's size: a wrong sample need not have a long gradient, and Adam's moments would
# make a step of ordinary length of it.
LOSS_DEVIATIONS, LOSS_NORM_FACTOR, LOSS_FACTOR = 10.0, 2.0, 10.0
# Of the averages of means and variances, the share of the newest; what the highest is forgotten by on each step, and
# how much of the way to the limit an outlier lifts it.
MEAN_SHARE, VARIANCE_SHARE, PEAK_LOSS, PEAK_LIFT = 0.1, 0.01, 0.001, 0.1
# Each gradient that is taken earns this much of the right to leave one out, up to so many in a row: the gate never
# leaves out more than 1 in 11 for long, and lets a lasting change in after three steps.
EARNED, IN_A_ROW = 0.1, 3.0

# What the gate knows, shape (8,): gradients seen, losses seen, right to leave out, mean and variance of the log norm,
# mean and variance of the loss, and how far the highest log norm lies above its mean.
Gate: TypeAlias = Tensor | tuple[float, ...]
SIZE = 8
# Before the first gradient.
FRESH_GATE = (0.0, 0.0, IN_A_ROW, 0.0, 0.0, 0.0, 0.0, 0.0)


def pass_gate_on_host(
    known: tuple[float, ...], square: float, loss: float | None, finite: bool
) -> tuple[bool, tuple[float, ...]]:
    """:func:`pass_gate` with numbers, the readable form."""
    if not finite or square <= 0:
        return False, known
    norms_seen, losses_seen, credit, norm_mean, norm_variance, loss_mean, loss_variance, peak = known
    norm = log(square) / 2
    gap = norm - norm_mean
    highest = min(NORM_DEVIATIONS * norm_variance**0.5 + log(NORM_FACTOR), peak + log(PEAK_FACTOR))
    worst = LOSS_DEVIATIONS * loss_variance**0.5
    far = norms_seen >= WARM_UP and gap > highest
    if loss is not None and losses_seen >= WARM_UP:
        far = far or (loss - loss_mean > worst and (gap > log(LOSS_NORM_FACTOR) or loss > LOSS_FACTOR * abs(loss_mean)))
    outlier = far and credit >= 1
    if norms_seen > 0:
        lifted = peak + PEAK_LIFT * max(0.0, min(gap, highest) - peak)
        peak = lifted if far else max((1 - PEAK_LOSS) * peak, gap)
    norms = _followed((norms_seen, norm_mean, norm_variance), norm, highest, far=far, outlier=outlier)
    losses = (losses_seen, loss_mean, loss_variance)
    if loss is not None:
        losses = _followed(losses, loss, worst, far=far, outlier=outlier)
    credit = credit - 1 if outlier else min(credit + EARNED, IN_A_ROW)
    return outlier, (norms[0], losses[0], credit, norms[1], norms[2], losses[1], losses[2], peak)


def _followed(
    known: tuple[float, float, float], value: float, limit: float, *, far: bool, outlier: bool
) -> tuple[float, float, float]:
    """Return count, mean and variance of a figure once `value` has been seen."""
    seen, mean, variance = known
    gap, newest = value - mean, 1 / (seen + 1)
    moved = (0.0 if outlier else gap) if far else max(newest, MEAN_SHARE) * gap
    if seen > 0:  # the first of them has nothing to deviate from
        share, bounded = max(newest, VARIANCE_SHARE), min(max(gap, -limit), limit) if far else gap
        variance = (1 - share) * (variance + share * (bounded * bounded))
    return seen + (not outlier), mean + moved, variance


def pass_gate(known: Tensor, square: Tensor, loss: Tensor | None, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether a gradient is left out as far outside the recent distribution, and what the gate knows after it.

    An outlier widens the variance by no more than the limit it exceeded, so that what keeps coming is let in. One that
    may not be left out any more is a change of regime: the means start anew from it.

    Args:
        known: what the gate knows, shape (8,); not modified.
        square: squared norm of the gradient, 0-d.
        loss: the loss it belongs to, 0-d, or None where it is not known.
        finite: 0-d bool; where it is false the gradient is none of the gate's business.
    """
    seen, credit, mean, variance, peak = known[:2], known[2], known[3:7:2], known[4:7:2], known[7]
    usable = finite & (square > 0)
    norm = square.to(known.dtype).log() / 2
    there = torch.stack([usable, usable if loss is not None else torch.zeros_like(usable)])
    gap = torch.where(there, torch.stack([norm, norm if loss is None else loss.to(known.dtype)]) - mean, 0.0)
    spread = variance.sqrt()
    highest = torch.minimum(NORM_DEVIATIONS * spread[0] + log(NORM_FACTOR), peak + log(PEAK_FACTOR))
    limit = torch.stack([highest, LOSS_DEVIATIONS * spread[1]])
    warm = usable & (seen >= WARM_UP)
    beyond = (gap[0] > log(LOSS_NORM_FACTOR)) | (gap[1] + mean[1] > LOSS_FACTOR * mean[1].abs())
    far = (warm[0] & (gap[0] > limit[0])) | (warm[1] & (gap[1] > limit[1]) & beyond)
    outlier = far & (credit >= 1)
    newest = 1 / (seen + 1)
    moved = torch.where(far, torch.where(outlier, 0.0, gap), newest.clamp_min(MEAN_SHARE) * gap)
    share = newest.clamp_min(VARIANCE_SHARE)
    widened = (1 - share) * (variance + share * torch.where(far, gap.clamp(-limit, limit), gap).square())
    # The first of them has nothing to deviate from.
    variance = torch.where(there & (seen > 0), widened, variance)
    counted = there & ~outlier
    credit = torch.where(outlier, credit - 1, torch.where(usable, (credit + EARNED).clamp_max(IN_A_ROW), credit))
    lifted = peak + PEAK_LIFT * (torch.minimum(gap[0], highest) - peak).clamp_min(0.0)
    higher = torch.where(far, lifted, torch.maximum((1 - PEAK_LOSS) * peak, gap[0]))
    peak = torch.where(usable & (seen[0] > 0), higher, peak)
    pairs = torch.stack([mean + moved, variance], dim=1).flatten()
    return outlier, torch.cat([seen + counted.to(seen.dtype), credit.reshape(1), pairs, peak.reshape(1)])
