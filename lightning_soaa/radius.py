"""Rules that turn what a step did to the loss into the next radius. Plain numbers only: no tensor is known here.

A rule is a frozen dataclass of options. Its running numbers are a flat dict of floats and ints, ``"radius"`` among
them, which the optimizer keeps and saves; a rule maps numbers and :class:`Evidence` to new numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from lightning_soaa._checks import check_between, check_count, check_positive, refuse

Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a step once it has been proposed.

    Args:
        base: loss at the point the step starts from, mean over ranks; finite.
        trial: loss of the same batch at the proposed point, mean over ranks, maybe not finite; None without a trial.
        predicted: predicted reduction of the proposed step, in units of the loss.
        attempt: how many trials this step has had, this one included.
        noise: rounding error of `base`, in units of the loss.
        parameter_rms: root mean square of all parameters at the point the step starts from.
        schedule: what the learning-rate schedulers multiply the step by.
        beta1: decay of the first moment, in the optimizer's defaults.
        eps: the constant of the optimizer's defaults.
    """

    base: float
    trial: float | None = None
    predicted: float
    attempt: int = 1
    noise: float = 0.0
    parameter_rms: float = 0.0
    schedule: float = 1.0
    beta1: float = 0.9
    eps: float = 1e-8


@dataclass(frozen=True)
class Decision:
    """What a rule makes of the evidence.

    Args:
        numbers: the rule's new running numbers.
        accepted: whether the proposed point is kept.
        retry: after a rejection, whether the same gradient is tried again at once with the new radius.
        reductions: (predicted, actual) reduction the decision rests on, where it is not that of the trial.
    """

    numbers: Numbers
    accepted: bool
    retry: bool = False
    reductions: tuple[float, float] | None = None


@dataclass(frozen=True)
class AbstractRadius(ABC):
    """What the optimizer asks of a radius rule. Concrete rules are final: to change one, write another.

    Attributes:
        needs_loss: the base loss of every step is read and handed to :meth:`update`.
        needs_trial: the rule makes checks, so every step must come with a loss closure.
        folds_lr: the radius replaces the learning rate, of which only the schedule remains: a group's bound is
            ``radius * lr / (largest initial lr of all groups)``. Otherwise the group's lr multiplies the step as in
            the published rule.
        cautious: coordinates whose direction does not descend along the gradient of the batch stay where they are.
        betas: decays of the two moments where the user names none.
    """

    needs_loss: ClassVar[bool] = False
    needs_trial: ClassVar[bool] = False
    folds_lr: ClassVar[bool] = False
    cautious: ClassVar[bool] = False
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    @abstractmethod
    def init(self, lr: float) -> Numbers:
        """Return the running numbers before the first step; `lr` is the largest learning rate of all groups."""

    def check_due(self, numbers: Mapping[str, float], unchecked_steps: int) -> bool:
        """Return whether the next step is a check, `unchecked_steps` after the last one (rules with trials)."""
        return self.needs_trial

    @abstractmethod
    def update(self, numbers: Mapping[str, float], evidence: Evidence) -> Decision:
        """Return the decision on a step. Called on checks, and on every step where `needs_loss`."""


@dataclass(frozen=True)
class FixedRadius(AbstractRadius):
    """A radius that never moves and never checks.

    With ``FixedRadius(1.0)`` the method is AdamW wherever the Fisher does not bind.

    Args:
        radius: d of step 5, > 0 (default: 1.0).
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        check_positive("FixedRadius", "radius", self.radius)

    def init(self, lr: float) -> Numbers:
        """Return the constant radius."""
        return {"radius": float(self.radius)}

    def update(self, numbers: Mapping[str, float], evidence: Evidence) -> Decision:
        """Return the same radius."""
        return Decision(dict(numbers), accepted=True)


@dataclass(frozen=True)
class PublishedRadius(AbstractRadius):
    """The radius rule as published (arXiv 2410.02293, steps 7 to 9), exactly.

    .. code-block:: text

        7  loss_ema <- b1 loss_ema + (1-b1) l ;  lh = loss_ema/(1-b1^t)
        8  rho = (lh - l)/max(p, eps)
        9  d <- min(1 + gamma^((t-1)/T), max((1-gamma)^((t-1)/T), d rho))

    It needs the loss of every step and reads it on the host. It accepts every step; since d cannot fall below
    ``1 - gamma`` it does not rescue a learning rate that is much too large.

    Args:
        total_steps: T, the number of steps of the run, >= 1; later steps keep to the formula.
        gamma: how far d may move, in (0, 1) (default: 0.25).
        initial_radius: d before the first step, > 0 (default: 1.0).
    """

    needs_loss: ClassVar[bool] = True

    total_steps: int
    gamma: float = 0.25
    initial_radius: float = 1.0

    def __post_init__(self) -> None:
        check_count("PublishedRadius", "total_steps", self.total_steps)
        check_between("PublishedRadius", "gamma", self.gamma, 0, 1, "in (0, 1)")
        check_positive("PublishedRadius", "initial_radius", self.initial_radius)

    def init(self, lr: float) -> Numbers:
        """Return d, the average of past losses, p and t."""
        return {"radius": float(self.initial_radius), "loss_average": 0.0, "predicted": 0.0, "updates": 0}

    def update(self, numbers: Mapping[str, float], evidence: Evidence) -> Decision:
        """Apply steps 7 to 9 with the p of the step before, then keep this step's p (step 10)."""
        updates = int(numbers["updates"]) + 1
        average = evidence.beta1 * numbers["loss_average"] + (1 - evidence.beta1) * evidence.base
        smoothed = average / (1 - evidence.beta1**updates)
        ratio = (smoothed - evidence.base) / max(numbers["predicted"], evidence.eps)
        progress = (updates - 1) / self.total_steps
        radius = min(1 + self.gamma**progress, max((1 - self.gamma) ** progress, numbers["radius"] * ratio))
        new = {"radius": radius, "loss_average": average, "predicted": evidence.predicted, "updates": updates}
        return Decision(new, accepted=True, reductions=(numbers["predicted"], smoothed - evidence.base))


@dataclass(frozen=True)
class RatioRadius(AbstractRadius):
    """A radius in place of the learning rate, moved by actual against predicted reduction on the same batch.

    It starts far too small and grows on every step, with a check on each (burn-in), up to `relative` times the root
    mean square of the parameters, or further while the acceptance ratio stays above `grow_above`, or less far if it
    falls below `shrink_below`. From then on every `interval`-th step is a check; the mean acceptance ratio of the
    checks lets the radius grow above the one and shrink below the other, and between them it drifts back to its prior,
    `relative` times the parameters' scale. A step that raises its own batch's loss by more than it promised to lower
    it is undone, and the radius halved.

    Where a scheduler multiplies the step by f < 1, curvature eats less of it; the radius grows only if it eats less
    than f times the share that `grow_above` allows, so that it does not work against the schedule.

    Coordinates on which the momentum points against the gradient of the batch stay where they are (arXiv 2411.16085):
    they promise no reduction.

    Args:
        start: the first radius, in units of lr, > 0 (default: 0.01). One that is too large shrinks before it moves.
        relative: the prior of the radius, in units of the parameters' root mean square, > 0 (default: 0.2).
        grow_above: mean acceptance ratio above which the radius grows beyond its prior, in (0, 1) (default: 0.7).
        shrink_below: mean acceptance ratio below which it shrinks, in (0, 1), < `grow_above` (default: 0.5).
        interval: steps from one check to the next after burn-in, >= 1 (default: 5).
        max_trials: trials of one step before it is given up, >= 1 (default: 4).

    Same-batch ratios see whether a step is too large for the batch's loss; they do not see overfitting.
    """

    needs_trial: ClassVar[bool] = True
    folds_lr: ClassVar[bool] = True
    cautious: ClassVar[bool] = True
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)

    start: float = 0.01
    relative: float = 0.2
    grow_above: float = 0.7
    shrink_below: float = 0.5
    interval: int = 5
    max_trials: int = 4

    def __post_init__(self) -> None:
        for name in ("start", "relative"):
            check_positive("RatioRadius", name, getattr(self, name))
        for name in ("grow_above", "shrink_below"):
            check_between("RatioRadius", name, getattr(self, name), 0, 1, "in (0, 1)")
        if self.shrink_below >= self.grow_above:
            refuse("RatioRadius", "shrink_below", f"< grow_above = {self.grow_above}", self.shrink_below)
        for name in ("interval", "max_trials"):
            check_count("RatioRadius", name, getattr(self, name))

    def init(self, lr: float) -> Numbers:
        """Return radius, phase, and the sums behind the mean share that curvature eats (1 - acceptance ratio).

        The phase is 2 before the first accepted step, 1 in burn-in, 0 after it.
        """
        return {"radius": self.start * lr, "phase": 2, "eaten": 0.0, "weight": 0.0}

    def check_due(self, numbers: Mapping[str, float], unchecked_steps: int) -> bool:
        """Return True on every step of burn-in, later on every `interval`-th."""
        return numbers["phase"] > 0 or unchecked_steps + 1 >= self.interval

    def update(self, numbers: Mapping[str, float], evidence: Evidence) -> Decision:
        """Undo a step that does harm; otherwise move the radius by the mean acceptance ratio."""
        radius, phase = numbers["radius"], int(numbers["phase"])
        if evidence.predicted == 0:  # nothing moved or nothing was promised: nothing to learn
            return Decision(dict(numbers), accepted=True)
        if falls_short(evidence, 0.5 if phase == 2 else -1.0):
            new = {**numbers, "radius": radius * (0.25 if phase == 2 else 0.5), "phase": 2 if phase == 2 else 0}
            return Decision(new, accepted=False, retry=evidence.attempt < self.max_trials)
        memory = 0.5 if phase else 0.8
        share = eaten_share(evidence)
        eaten = memory * numbers["eaten"] + (1 - memory) * share
        weight = memory * numbers["weight"] + (1 - memory)
        short_of = eaten / weight < (1 - self.grow_above) * max(evidence.schedule, 0.05)
        beyond = eaten / weight > 1 - self.shrink_below
        prior = self.relative * evidence.parameter_rms
        move = self._search if phase else self._follow
        radius, phase = move(radius, prior, short_of=short_of, beyond=beyond and weight > 0.5)
        return Decision({"radius": radius, "phase": phase, "eaten": eaten, "weight": weight}, accepted=True)

    def _search(self, radius: float, prior: float, *, short_of: bool, beyond: bool) -> tuple[float, int]:
        """Return radius and phase after a step of burn-in."""
        if beyond:
            return radius * 0.4, 0
        if radius >= prior and not short_of:
            return radius, 0
        return radius * 1.25, 1

    def _follow(self, radius: float, prior: float, *, short_of: bool, beyond: bool) -> tuple[float, int]:
        """Return radius and phase after a check that follows burn-in."""
        if beyond:
            return radius * 0.85, 0
        if short_of:
            return radius * 1.2, 0
        if radius < prior:
            return min(radius * 1.1, prior), 0
        return max(radius * 0.975, prior), 0


def eaten_share(evidence: Evidence) -> float:
    """Return the share of the predicted reduction that curvature ate, ``1 - rho``, clipped to [0, 2].

    Below rounding error nothing is known of it, and it counts as 0.
    """
    if evidence.trial is None or abs(evidence.predicted) <= evidence.noise:
        return 0.0
    eaten = evidence.predicted - (evidence.base - evidence.trial)
    return min(2.0, max(0.0, eaten / abs(evidence.predicted)))


def falls_short(evidence: Evidence, wanted: float) -> bool:
    """Return whether a trial falls short of `wanted` times the predicted reduction.

    ``predicted - actual`` is the part of the reduction that curvature ate. It is compared with the share it may eat,
    ``(1 - wanted) |predicted|``, and never divided by: near convergence both sides are rounding error, which is why
    `noise` is forgiven. A trial that is not finite always falls short.
    """
    if evidence.trial is None or not isfinite(evidence.trial):
        return True
    eaten = evidence.predicted - (evidence.base - evidence.trial)
    return eaten > (1 - wanted) * abs(evidence.predicted) + evidence.noise
