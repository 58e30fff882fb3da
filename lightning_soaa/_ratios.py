"""What a check measured, held against what was promised. Plain numbers only."""

from math import inf, isfinite

from lightning_soaa.radius import Evidence


def gained(evidence: Evidence) -> float:
    """Return the actual reduction of the loss; -inf without a trial whose loss is finite."""
    return evidence.base - evidence.trial if evidence.trial is not None and isfinite(evidence.trial) else -inf


def lost_in_noise(evidence: Evidence) -> bool:
    """Return whether the predicted reduction is no larger than what two evaluations of one loss may differ by."""
    return abs(evidence.predicted) <= evidence.noise


def eaten_share(evidence: Evidence) -> float | None:
    """Return the share of the predicted reduction that curvature ate, ``1 - rho``, clipped to [0, 2].

    None where the prediction is lost in noise: nothing is known of it then.
    """
    if lost_in_noise(evidence):
        return None
    return min(2.0, max(0.0, (evidence.predicted - gained(evidence)) / abs(evidence.predicted)))


def surplus(evidence: Evidence) -> float:
    """Return what a trial gained beyond twice the predicted reduction; negative if it did not gain as much.

    A loss whose slope doubles along the step is rare: what is gained beyond that was the loss closure's own noise.
    """
    return gained(evidence) - 2 * abs(evidence.predicted)


def falls_short(evidence: Evidence, wanted: float) -> bool:
    """Return whether a trial falls short of `wanted` times the predicted reduction.

    ``predicted - actual`` is the part of the reduction that curvature ate. It is compared with the share it may eat,
    ``(1 - wanted) |predicted|``, and never divided by: near convergence both sides are rounding error, which is why
    `noise` is forgiven. A trial that is not finite always falls short.
    """
    gain = gained(evidence)
    return not isfinite(gain) or evidence.predicted - gain > (1 - wanted) * abs(evidence.predicted) + evidence.noise
