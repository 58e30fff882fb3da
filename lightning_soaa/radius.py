"""Rules that turn what a step did to the loss into the next radius. Plain numbers only: no tensor is known here.

A rule is a frozen dataclass of options. Its running numbers are a flat dict of floats and ints, ``"radius"`` among
them, which the optimizer keeps and saves; a rule maps numbers and :class:`Evidence` to new numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_soaa._checks import check_between, check_count, check_positive

Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a step once it has been proposed.

    Args:
        base: loss at the point the step starts from, mean over ranks; finite.
        trial: loss of the same batch at the proposed point, mean over ranks, maybe not finite; None without a trial.
        predicted: predicted reduction of the proposed step, in units of the loss.
        attempt: how many trials this step has had, this one included.
        noise: what two evaluations of one loss may differ by (rounding, and the loss closure's own noise), in units
            of the loss.
        fresh: what the gradient of the next batch found along the last accepted check's step: its slope there, over
            the slope of that check's own batch at the start of the step. None if there is no such gradient.
        parameter_rms: root mean square of all parameters at the point the step starts from.
        resolution: machine epsilon of the coarsest parameters.
        schedule: what the learning-rate schedulers multiply the step by.
        beta1: decay of the first moment, in the optimizer's defaults.
        eps: the constant of the optimizer's defaults.
    """

    base: float
    trial: float | None = None
    predicted: float
    attempt: int = 1
    noise: float = 0.0
    fresh: float | None = None
    parameter_rms: float = 0.0
    resolution: float = 0.0
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
            ``radius * (lr / largest initial lr of all groups)``. Otherwise the group's lr multiplies the step as in
            the published rule.
        cautious: coordinates whose direction does not descend along the gradient of the batch stay where they are.
        fisher_limits: the Fisher limits the step (step 4). Otherwise only the radius does, and eps is relative to the
            root mean square gradient, so that a step does not depend on the unit of the loss.
        fresh_slopes: the gradient that follows an accepted check is held against that check's step.
        portions: what it finds for each parameter moves portions of their own, see :mod:`lightning_soaa.portions`;
            needs fresh slopes.
        gated: gradients far outside their recent distribution are left out.
        betas: decays of the two moments where the user names none.
    """

    needs_loss: ClassVar[bool] = False
    needs_trial: ClassVar[bool] = False
    folds_lr: ClassVar[bool] = False
    cautious: ClassVar[bool] = False
    fisher_limits: ClassVar[bool] = True
    fresh_slopes: ClassVar[bool] = False
    portions: ClassVar[bool] = False
    gated: ClassVar[bool] = False
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
