"""Portions: how far each parameter tensor goes within the radius. Plain numbers only: no tensor is known here.

The radius bounds the whole step; a portion is what the step of one tensor is multiplied by besides. They start at 1,
and move by what the gradient after a check finds along the check's step. For tensor i let p_i be what its part of the
step promised, ``-(g . s)_i``, and q_i what is left of that slope in the next batch's gradient, both as averages over
checks:

.. code-block:: text

    d_i = q_i / p_i - sum(q) / sum(p)                       beyond what is left of the slope of the whole step
    w_i = 1 if d_i > 0, else p_i / (p_i + 0.03 sum(p))      less where the tensor's part of the promise is small
    log c_i <- 0.99 log c_i + 0.3 w_i d_i                   less their mean, weighted by p

A tensor whose slope is left while that of the others has turned goes too short a way beside them, and its portion
grows; that of one whose slope has turned further shrinks. So the radius need not be that of the most curved layer. One
that promises next to nothing, as a bias or the scale of a norm, does not hold the radius down, and its slope is turned
by the steps of others: it may grow, but hardly shrinks. With one tensor its portion is exactly 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, isfinite, log

# Of the averages, the share of what was known; of the logarithm of a portion, what is kept, and what is added of d_i.
MEMORY, KEPT, GAIN = 0.8, 0.99, 0.3
# With this share of the whole promise a tensor shrinks half as fast.
SMALL_SHARE = 0.03
# A portion stays within 1/32 and 32.
WIDEST = 32.0
# Beyond this a slope says no more of a step than that it is far too short, or far too long.
STEEPEST = 2.0


@dataclass(frozen=True)
class Portion:
    """What is known of one parameter tensor.

    Args:
        portion: what its step is multiplied by.
        promised: average of the reduction of the loss that its part of checks promised, in units of the loss.
        left: average of what gradients after checks found along that part, in units of the loss.
    """

    portion: float = 1.0
    promised: float = 0.0
    left: float = 0.0


def move_portions(known: Sequence[Portion], promised: Sequence[float], left: Sequence[float]) -> list[Portion]:
    """Return what is known after a check, and the gradient that followed it.

    Args:
        known: what is known of each tensor.
        promised: what its part of the check's step promised.
        left: what the next gradient found along it. Where a figure is not finite nothing is learned; of a tensor that
            promised nothing nothing is, and its portion stays.
    """
    if not all(isfinite(value) for value in (*promised, *left)):
        return list(known)
    told = [p > 0 for p in promised]
    new = [
        Portion(each.portion, _average(each.promised, p), _average(each.left, q)) if p > 0 else each
        for each, p, q in zip(known, promised, left, strict=True)
    ]
    seen = [each for each, tells in zip(new, told, strict=True) if tells]
    if sum(each.promised for each in seen) <= 0:  # nothing, or too little for a number to hold
        return list(known)
    promise = sum(each.promised for each in seen)
    overall = _share(sum(each.left for each in seen), promise)
    logs = [
        _moved(each, promise, overall) if tells else log(each.portion) for each, tells in zip(new, told, strict=True)
    ]
    whole = sum(each.promised for each in new)
    mean = sum(each.promised / whole * value for each, value in zip(new, logs, strict=True))
    return [
        replace(each, portion=_within(value - mean)) if tells else each
        for each, value, tells in zip(new, logs, told, strict=True)
    ]


def _moved(each: Portion, promise: float, overall: float) -> float:
    """Return the logarithm of a portion, moved by what is known of its tensor and of the whole step."""
    beyond = _share(each.left, each.promised) - overall
    weight = 1.0 if beyond > 0 else each.promised / (each.promised + SMALL_SHARE * promise)
    return KEPT * log(each.portion) + GAIN * weight * beyond


def _average(known: float, new: float) -> float:
    """Return a running average with its newest figure."""
    return MEMORY * known + (1 - MEMORY) * new


def _within(logarithm: float) -> float:
    """Return the portion of a logarithm, within its bounds."""
    return exp(min(log(WIDEST), max(-log(WIDEST), logarithm)))


def _share(left: float, promised: float) -> float:
    """Return what is left of a slope, in units of it, within its bounds."""
    return max(-STEEPEST, min(STEEPEST, left / promised)) if promised > 0 else 0.0
