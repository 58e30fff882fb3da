"""The outlier gate: which gradients are so far outside their recent distribution that they are left out.

Two figures of a step are followed, the logarithm of the gradient's norm and the loss: mean and variance of both, as
exponential averages. All is 0-d tensors on the device, so that the host need not wait to learn of it.
"""

from math import log

import torch
from torch import Tensor

# Gradients absorbed before the gate knows anything.
WARM_UP = 10
# A gradient is far out if its norm is this many standard deviations (of the logarithm) and this factor above the mean.
NORM_DEVIATIONS, NORM_FACTOR = 6.0, 3.0
# So is one whose loss is this many standard deviations, and whose norm is this factor, above the mean.
LOSS_DEVIATIONS, LOSS_FACTOR = 10.0, 2.0
# Of the averages of means and variances, the share of the newest.
MEAN_SHARE, VARIANCE_SHARE = 0.1, 0.01
# Each gradient that is taken earns this much of the right to leave one out, up to so many in a row: the gate never
# leaves out more than 1 in 11 for long, and lets a lasting change in after three steps.
EARNED, IN_A_ROW = 0.1, 3.0

SIZE = 6  # gradients seen, right to leave out, mean and variance of log norm, mean and variance of loss


def fresh_gate(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return what the gate knows before the first gradient, shape (6,)."""
    return torch.tensor([0.0, IN_A_ROW, 0.0, 0.0, 0.0, 0.0], dtype=dtype, device=device)


def pass_gate(known: Tensor, square: Tensor, loss: Tensor | None, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether a gradient is left out as far outside the recent distribution, and what the gate knows after it.

    An outlier widens the variance by no more than the limit it exceeded, so that what keeps coming is let in. One that
    may not be left out any more is a change of regime: the means start anew from it.

    Args:
        known: what the gate knows, shape (6,); not modified.
        square: squared norm of the gradient, 0-d.
        loss: the loss it belongs to, 0-d, or None where it is not known.
        finite: 0-d bool; where it is false the gradient is none of the gate's business.
    """
    seen, credit, *rest = known.unbind()
    mean, variance = torch.stack([rest[0], rest[2]]), torch.stack([rest[1], rest[3]])
    usable = finite & (square > 0)
    norm = square.to(known.dtype).log() / 2
    now = torch.stack([norm, mean[1] if loss is None else loss.to(known.dtype)])
    gap = torch.where(usable, now - mean, 0.0)
    spread = variance.sqrt()
    limit = torch.stack([NORM_DEVIATIONS * spread[0] + log(NORM_FACTOR), LOSS_DEVIATIONS * spread[1]])
    far = (gap[0] > limit[0]) | ((gap[1] > limit[1]) & (gap[0] > log(LOSS_FACTOR)))
    far = far & usable & (seen >= WARM_UP)
    outlier = far & (credit >= 1)
    mild = torch.where(seen >= WARM_UP, gap.clamp(-limit, limit), gap)
    share = (1 / (seen + 1)).clamp_min(MEAN_SHARE)
    moved = torch.where(far, torch.where(outlier, 0.0, gap), share * mild)
    share = (1 / (seen + 1)).clamp_min(VARIANCE_SHARE)
    # The first gradient has nothing to deviate from.
    widened = torch.where(seen > 0, (1 - share) * (variance + share * mild.square()), variance)
    mean, variance = mean + moved, torch.where(usable, widened, variance)
    counted = usable & ~outlier
    credit = torch.where(outlier, credit - 1, torch.where(counted, (credit + EARNED).clamp_max(IN_A_ROW), credit))
    seen = seen + counted.to(seen.dtype)
    return outlier, torch.stack([seen, credit, mean[0], variance[0], mean[1], variance[1]])
