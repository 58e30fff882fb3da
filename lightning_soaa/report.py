"""What one optimizer step did, as plain numbers."""

from dataclasses import dataclass
from math import nan


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step of :class:`~lightning_soaa.SOAA`, in plain floats, ints and bools.

    Quantities of a check hold the values of the *last* check, and ``nan`` before the first one. Statistics of an
    empty set (no parameter has had a gradient yet) are ``nan`` as well.

    Args:
        step: optimizer steps taken so far, this one included.
        radius: the trust-region radius after this step, which the next step starts from.
        checked: whether this step was a check (its trial loss was evaluated).
        accepted: whether the parameters moved to the proposed point. ``False`` for a rejected and for a skipped step.
        skipped: whether the loss or a gradient was not finite, or far outside its recent distribution, so that neither
            parameters nor moments moved.
        trials: trial losses evaluated in this step.
        base_loss: the loss at the point the step started from, mean over ranks, or ``nan`` if the step was given none.
        acceptance_ratio: actual over predicted reduction (rho) of the last check; ``-inf`` if its trial loss was not
            finite.
        predicted_reduction: what the model of the loss promised at the last check, in units of the loss that is
            minimised (the negative of the user's under ``maximize=True``).
        actual_reduction: what the same batch's loss did at the last check, in the same units; ``-inf`` if the trial
            loss was not finite, be it ``nan``: such a step is as bad as can be, and not one of which nothing is known.
        repeat_gap: what the loss closure differed by from the base loss at the first check of all, where nothing had
            moved, in units of the loss that is minimised; ``inf`` if it was not finite. It is 0, or rounding, if the
            loss closure computes the same loss. If not (other dropout masks, another batch), checks measure this noise
            beside the step, and forgive as much.
        step_norm: Euclidean norm of the displacement of this step, weight decay apart; 0 if it did not move.
        fisher_mean: mean of the diagonal Fisher over all coordinates.
        fisher_min: smallest entry of the diagonal Fisher.
        fisher_max: largest entry of the diagonal Fisher.
        fisher_trace: sum of the diagonal Fisher.
        active_fraction: share of coordinates in [0, 1] where the Fisher, not the radius, limits the step.
        rotated_fraction: share of coordinates in [0, 1] whose parameter is rotated; ``nan`` without a KroneckerFisher.
        basis_age: steps since the basis that has waited longest was refreshed; ``nan`` where nothing is rotated.
        checks: checks so far.
        accepted_checks: checks so far whose step was accepted.
        skipped_steps: steps so far that were skipped because the loss or a gradient was not finite.
        outlier_steps: steps so far that were skipped because the gradient was far outside its recent distribution.
        total_trials: trial losses evaluated so far.

    Does not hold tensors and is not part of ``state_dict``.
    """

    step: int
    radius: float
    checked: bool
    accepted: bool
    skipped: bool
    trials: int
    base_loss: float = nan
    acceptance_ratio: float = nan
    predicted_reduction: float = nan
    actual_reduction: float = nan
    repeat_gap: float = nan
    step_norm: float = nan
    fisher_mean: float = nan
    fisher_min: float = nan
    fisher_max: float = nan
    fisher_trace: float = nan
    active_fraction: float = nan
    rotated_fraction: float = nan
    basis_age: float = nan
    checks: int = 0
    accepted_checks: int = 0
    skipped_steps: int = 0
    outlier_steps: int = 0
    total_trials: int = 0
