"""RatioRadius: the radius that replaces the learning rate. Plain numbers only, as in :mod:`lightning_soaa.radius`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import exp, inf, isclose, isfinite
from typing import ClassVar

from lightning_soaa._checks import check_between, check_count, check_positive
from lightning_soaa._ratios import eaten_share, falls_short, gained, lost_in_noise, surplus
from lightning_soaa.radius import AbstractRadius, Decision, Evidence, Numbers

# Bounds of the radius, in units of its prior. Three decades below it AdamW is slow on every task that was measured;
# ten times above it one step is twice as long as the parameters.
FLOOR, CEILING = 1e-3, 10.0
# Beyond so many times its prior, checks after burn-in grow the radius only where fresh slopes are positive: in noise,
# curvature eats little of what a step's own batch promises, though the next batch finds the slope turned.
GROWN = 3.0
# Below this share of the schedule's peak a step is too small to tell what the radius is worth at the peak.
LATE = 0.05
# Below this share burn-in does not pass the prior: the peak that a warm-up leads to is for the prior.
WARM = 0.5
# Parameters smaller than this count as this large: where they start at zero they have no scale of their own yet.
SMALLEST_RMS = 1e-3
# Checks of burn-in in which a radius may be held, in steps of full length. Parameters from zero take some to grow.
HELD = 20
# Share of a slope that a check adds to the logarithm of what annealing leaves of the prior; the least that is left.
ANNEALS, LEAST = 0.2, 0.01
# Steady checks after which the distance between checks grows by `interval`, and how often it does so.
STEADY, STRETCHES = 4, 3
# Below this share of its prior the radius takes up burn-in again where curvature eats next to nothing: what had ended
# it was no curvature, but a jump of the loss.
LOST = 1 / 100
# Below this share of its prior a check may find the loss not to follow its gradient; slopes begin there.
FAR = 1 / 30
# Checks, beyond those that do not, that find the loss not to follow its gradient; from then on slopes steer.
DOUBTS = 3
# Up to so many times the floor, curvature that eats too much is none.
NEAR = 3.0
# Above that, the least slope that is then left, and the least sum of it and twice the share eaten, which is 1 on a
# quadratic and less in noise. Steps that curvature or a rugged loss limits were not seen to leave as much so far below.
LEFT, SUM = 0.6, 1.5
# A reduction below this share of the largest loss so far raises no doubt: what goes into a loss rounds on that scale,
# by 8 units in the last place of float32.
ROUNDING = 1e-6


@dataclass(frozen=True)
class RatioRadius(AbstractRadius):
    """A radius in place of the learning rate, moved by what steps do to the loss.

    It starts at its floor and grows on every step, with a check on each (burn-in), up to its prior, `relative` times
    the root mean square of the parameters; the learning rate plays no part in that. Curvature eats a share of every
    predicted reduction, ``1 - rho``; a check measures it on the batch of the step. The mean share moves the radius:

    - Less than ``1 - target``: the step is short, and the radius grows, after burn-in to more than 3 times its prior
      only where the next batch finds a slope that is left. Where a scheduler multiplies the step by f < 1, curvature
      eats less by as much; the share is held against ``f (1 - target)``, so that growth does not work against the
      schedule, and below 5 % of its peak the radius does not grow at all.
    - More, and the next batch finds no slope back: the model of the loss does not hold over a step this long, and the
      radius shrinks. (The slope that a fresh gradient finds at the end of the step, in units of the slope at its start,
      is ``2 rho - 1`` on a quadratic. Where the mean of slope and share is above ``1 - target``, curvature raises the
      loss without turning the slope, as it does where the loss is rugged on the scale of the step.)
    - Otherwise it drifts back to its prior.

    Without a scheduler, or while it leaves the learning rate at its peak, the radius anneals by itself: where the next
    batch finds the slope turned further than curvature explains, steps are lost in the batches' noise. The prior is
    multiplied by ``exp(0.2 s)`` a check, with s the mean slope left, less ``1 - 2`` times the share eaten where that is
    negative (it is the slope left on a quadratic), down to 1/100, and up again where slopes are left. A scheduler that
    takes over later starts from there: the step is the smaller of the two, not their product.

    A step that raises its own batch's loss by more than it promised to lower it is undone, and the radius halved. The
    radius stays within 1/1000 and 10 times its prior; at its floor every step to a finite loss is taken, so that no run
    gets stuck. Two causes of a far too small radius are not the step's length:

    - A loss with jumps (a choice between experts) can end burn-in far too early. Where the radius is below 1/100 of
      its prior and curvature eats next to nothing, burn-in is taken up again, up to the prior.
    - A loss may not follow its gradient, as where a target or a code is detached or an estimator is straight-through.
      Curvature cannot eat ``1 - target`` of a step at the floor; nor, on a quadratic, a share that is more than half of
      what is missing from the slope. Where it seems to in three more checks than not, close to the floor, or with most
      of the slope left below 1/30 of the prior, ratios mean nothing. From then on the slopes that the next batches find
      stand in for them, ``(1 - slope) / 2`` for the share eaten: burn-in is taken up from 1/30 of the prior, the radius
      shrinks where the mean slope is below -1, and a step is undone only if its loss is not finite.

    A gradient far outside the recent distribution is left out, see :mod:`lightning_soaa.gate`.

    Coordinates on which the momentum points against the gradient of the batch stay where they are (arXiv 2411.16085):
    they promise no reduction. The Fisher does not limit the step and eps is relative to the gradients' root mean
    square at the last check: the loss may come in any unit.

    Args:
        relative: the prior of the radius, in units of the parameters' root mean square, > 0 (default: 0.2).
        target: acceptance ratio that the radius is moved toward, in (0, 1) (default: 0.6).
        interval: steps from one check to the next after burn-in, >= 1 (default: 5). It stretches, up to four times,
            while the radius neither grows nor shrinks.
        max_trials: trials of one step before it is given up, >= 1 (default: 4).

    Same-batch ratios see whether a step is too long for the batch's loss; they do not see overfitting.
    """

    needs_trial: ClassVar[bool] = True
    folds_lr: ClassVar[bool] = True
    cautious: ClassVar[bool] = True
    fisher_limits: ClassVar[bool] = False
    fresh_slopes: ClassVar[bool] = True
    portions: ClassVar[bool] = True
    gated: ClassVar[bool] = True
    anneals: ClassVar[bool] = True
    doubts: ClassVar[bool] = True
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)

    relative: float = 0.2
    target: float = 0.6
    interval: int = 5
    max_trials: int = 4

    def __post_init__(self) -> None:
        check_positive("RatioRadius", "relative", self.relative)
        check_between("RatioRadius", "target", self.target, 0, 1, "in (0, 1)")
        for name in ("interval", "max_trials"):
            check_count("RatioRadius", name, getattr(self, name))

    def init(self, lr: float) -> Numbers:
        """Return radius, phase, and the sums behind the means of eaten shares and fresh slopes.

        The radius is 0 until the first check knows the size of the parameters. The phase is 1 in burn-in, 0 after it.
        `scale` is the parameters' root mean square when burn-in ended, 0 before; `steady` counts checks that neither
        grew nor shrank the radius; `noise` is that of the loss closure, as far as checks have shown it; `annealing` is
        what is left of the prior; `doubts` counts checks that found the loss not to follow its gradient,
        `largest` is the largest loss so far.
        """
        means = {"eaten": 0.0, "eaten_weight": 0.0, "fresh": 0.0, "fresh_weight": 0.0}
        others = {"scale": 0.0, "steady": 0.0, "noise": 0.0, "annealing": 1.0, "doubts": 0.0, "largest": 0.0}
        return {"radius": 0.0, "phase": 1, **others, **means}

    def check_due(self, numbers: Mapping[str, float], unchecked_steps: int) -> bool:
        """Return True on every step of burn-in and in doubt, else on every `interval`-th, or less often if steady."""
        stretch = 1 + min(STRETCHES, int(numbers["steady"] // STEADY))
        searching = numbers["phase"] > 0 or 0 < numbers["doubts"] < DOUBTS
        return searching or unchecked_steps + 1 >= self.interval * stretch

    def update(self, numbers: Mapping[str, float], evidence: Evidence) -> Decision:
        """Undo a step that does harm; otherwise move the radius by eaten shares and fresh slopes."""
        low, prior, high = self.bounds(numbers, evidence)
        largest = max(numbers["largest"], abs(evidence.base))
        new = {**numbers, "largest": largest, "radius_low": low, "radius_high": high}
        radius = numbers["radius"]
        if radius == 0:
            return Decision({**new, "radius": low}, accepted=False, retry=True)
        if evidence.predicted == 0:  # no gradient, no schedule, or all masked: nothing to learn
            return Decision(new, accepted=True)
        new["noise"] = max(0.9 * numbers["noise"], surplus(evidence))
        evidence = replace(evidence, noise=evidence.noise + new["noise"])
        at_floor = radius <= low
        spared = (at_floor or by_slopes(numbers)) and isfinite(gained(evidence))
        if falls_short(evidence, -1.0) and not spared:
            if numbers["phase"] and not at_floor:
                new |= {"phase": 0, "scale": numbers["scale"] or prior / self.relative}
            new |= {"radius": max(low, 0.5 * radius), "steady": 0.0}
            return Decision(new, accepted=False, retry=not at_floor and evidence.attempt < self.max_trials)
        new |= self._means(numbers, evidence, at_floor=at_floor)
        new |= self._move(new, evidence, low=low, prior=prior, high=high)
        told = not lost_in_noise(evidence) and abs(evidence.predicted) > ROUNDING * largest
        if self.doubts and told and not by_slopes(new):
            new |= self._doubt(new, eaten_share(evidence) or 0.0, radius, prior=prior, high=high)
        at_peak = isclose(evidence.schedule, 1.0, rel_tol=1e-6)  # a warm-up may leave it at 1 less a rounding
        if self.anneals and not numbers["phase"] and at_peak:  # else a scheduler does it
            new |= _anneal(new, evidence, low=low)
        return Decision(new, accepted=True)

    def bounds(self, numbers: Mapping[str, float], evidence: Evidence) -> tuple[float, float, float]:
        """Return floor, prior and ceiling of the radius, in units of the parameters.

        The prior does not follow parameters that grow after burn-in: radius and parameters would push each other up.
        A step below the parameters' resolution would not arrive, so the floor is not below that.
        """
        scale = numbers["scale"] or inf
        rms = evidence.parameter_rms if isfinite(evidence.parameter_rms) else min(1.0, scale)
        rms = max(rms, SMALLEST_RMS)
        whole = self.relative * min(rms, scale)
        prior = whole * annealed(numbers["annealing"], evidence.schedule)
        return max(FLOOR * whole, evidence.resolution * rms), prior, CEILING * whole

    def _means(self, numbers: Mapping[str, float], evidence: Evidence, *, at_floor: bool) -> Numbers:
        """Return the sums behind both means with this check's evidence; on the way up from the floor it has none."""
        memory = 0.5 if numbers["phase"] else 0.8
        share = None if at_floor and numbers["phase"] else eaten_share(evidence)
        fresh = None if evidence.fresh is None else max(-2.0, min(2.0, evidence.fresh))
        if by_slopes(numbers):
            share = None if fresh is None else max(0.0, (1 - fresh) / 2)
        new: Numbers = {}
        for name, value in (("eaten", share), ("fresh", fresh)):
            keep, add = (memory, 1 - memory) if value is not None else (1.0, 0.0)
            new[name] = keep * numbers[name] + add * (value or 0.0)
            new[f"{name}_weight"] = keep * numbers[f"{name}_weight"] + add
        return new

    def _move(self, new: Numbers, evidence: Evidence, *, low: float, prior: float, high: float) -> Numbers:
        """Return radius, phase, scale and steady count after an accepted check."""
        excess, schedule = 1 - self.target, evidence.schedule
        eaten, fresh = _eaten_and_fresh(new)
        unknown, long = lost_in_noise(evidence), eaten > excess and fresh + eaten > excess
        if by_slopes(new):
            unknown, long = evidence.fresh is None, eaten > 1
        long = long and new["eaten_weight"] > 0.5 and not unknown
        short = eaten < excess * min(1.0, max(LATE, schedule))
        if new["phase"]:
            found = {"long": long, "short": short, "unknown": unknown}
            return self._burn_in(new, schedule, low=low, prior=prior, high=high, **found)
        radius, steady, phase = new["radius"], new["steady"], 0
        limit = (CEILING if fresh > 0 else GROWN) * prior
        short = short and (radius < 0.99 * limit or fresh > 0)  # not left to rounding where it is at its limit
        moves = long or (short and not unknown and schedule > LATE)
        steady = 0.0 if moves else steady + 1
        if long:
            radius *= 0.7
        elif moves:
            phase = int(radius < LOST * prior and eaten < excess / 2 * min(1.0, schedule))
            radius = min(1.2 * radius, max(radius, limit))
        else:
            radius = min(1.1 * radius, prior) if radius < prior else max(0.975 * radius, prior)
        return {"radius": max(radius, low), "phase": phase, "steady": steady}

    def _burn_in(
        self,
        new: Numbers,
        schedule: float,
        *,
        low: float,
        prior: float,
        high: float,
        long: bool,
        short: bool,
        unknown: bool,
    ) -> Numbers:
        """Return the same in burn-in; one that was taken up again ends at the prior."""
        radius, again, eaten = new["radius"], new["scale"] > 0, _eaten_and_fresh(new)[0]
        top = prior if again or unknown or schedule < WARM else high
        held = radius >= top
        steady = new["steady"] + min(1.0, schedule) if held else 0.0
        ends = long or steady > HELD or (radius >= prior and (again or not (short or unknown)))
        growth = 1.35 if eaten < (1 - self.target) / 2 else 1.1
        radius = 0.4 * radius if long else radius if ends or held else min(growth * radius, top)
        if not ends:
            return {"radius": max(radius, low), "phase": 1, "steady": steady}
        return {"radius": max(radius, low), "phase": 0, "steady": 0.0, "scale": new["scale"] or prior / self.relative}

    def _doubt(self, new: Numbers, share: float, radius: float, *, prior: float, high: float) -> Numbers:
        """Return how many more checks than not, with this one of `radius`, found the loss not to follow its gradient.

        The last of them begins anew by slopes.
        """
        if radius >= FAR * prior:
            return {"doubts": 0.0}
        eaten, fresh = _eaten_and_fresh(new)
        if radius <= NEAR * high * FLOOR / CEILING:  # a floor that is higher, at the parameters' resolution, is no such
            unlike = share > 1 - self.target
        else:
            unlike = share > (1 - self.target) / 2 and fresh > LEFT and fresh + 2 * eaten > SUM
        doubts = {"doubts": max(0.0, new["doubts"] + (1 if unlike else -1))}
        if not by_slopes(doubts):
            return doubts
        begun = {"phase": 1, "scale": new["scale"] or prior / self.relative, "radius": max(new["radius"], FAR * prior)}
        return {**doubts, **begun, "eaten": 0.0, "eaten_weight": 0.0, "steady": 0.0}


def by_slopes(numbers: Mapping[str, float]) -> bool:
    """Return whether the loss has been found not to follow its gradient, so that fresh slopes stand in for ratios."""
    return numbers["doubts"] >= DOUBTS


def _eaten_and_fresh(numbers: Mapping[str, float]) -> tuple[float, float]:
    """Return the means of eaten shares and fresh slopes, 0 where nothing is known."""
    eaten, fresh = (numbers[name] / (numbers[f"{name}_weight"] or 1.0) for name in ("eaten", "fresh"))
    return eaten, fresh


def _anneal(new: Numbers, evidence: Evidence, *, low: float) -> Numbers:
    """Return what is left of the prior after an accepted check, and the radius that takes its loss along."""
    if lost_in_noise(evidence):
        return {}
    eaten, fresh = _eaten_and_fresh(new)
    left = max(-1.0, min(1.0, fresh + max(0.0, 2 * eaten - 1))) * new["fresh_weight"]
    annealing = max(LEAST, min(1.0, new["annealing"] * exp(ANNEALS * left)))
    return {"annealing": annealing, "radius": max(low, new["radius"] * min(1.0, annealing / new["annealing"]))}


def annealed(annealing: float, schedule: float) -> float:
    """Return what annealing leaves of the prior beyond what the schedule takes anyway."""
    return min(1.0, annealing / schedule) if 0 < schedule < 1 else annealing
