"""The search for a contender's best learning rate, one stage of runs after another."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import exp, inf, log
from statistics import mean

from benchmarks.contenders import HALF_DECADES, parse
from benchmarks.specs import RunSpec, Store
from benchmarks.tasks import get_task


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    tasks: tuple[str, ...]
    contenders: tuple[str, ...]
    seeds: int = 3
    step_factor: float = 1.0


def spec_of(plan: Plan, task: str, contender: str, lr: float, seed: int, **changes: object) -> RunSpec:
    """Return the run of `contender` on `task` with both at their defaults but for `changes`."""
    kind, known = parse(contender)[0], get_task(task)
    steps = max(2, round(known.steps * plan.step_factor))
    spec = RunSpec(task, contender, lr, seed, steps, known.batch_size, kind.schedule)
    return replace(spec, **changes)  # type: ignore[arg-type]


def quality(store: Store, spec: RunSpec) -> float | None:
    """Return the best validation loss of `spec`, infinity if it never had one, None if it has not run."""
    record = store.get(spec)
    if record is None:
        return None
    return inf if record["best"] is None else record["best"]


def average(store: Store, specs: list[RunSpec]) -> float | None:
    """Return the mean quality of `specs`, or None if one has not run."""
    found = [quality(store, spec) for spec in specs]
    return None if None in found else mean(found)  # type: ignore[type-var]


def best_rate(store: Store, rates: list[float], specs: Callable[[float], list[RunSpec]]) -> float | None:
    """Return the rate of lowest mean quality among those that have run completely."""
    scored = [(value, rate) for rate in rates if (value := average(store, specs(rate))) is not None]
    return min(scored)[1] if scored else None


def between(low: float, high: float) -> float:
    """Return the geometric mean of two rates, rounded to two digits."""
    return float(f"{exp((log(low) + log(high)) / 2):.2g}")


def near(rates: list[float], rate: float, reach: int = 1) -> list[float]:
    """Return `rate` and its neighbours in the sorted list `rates`."""
    index = rates.index(rate)
    return rates[max(0, index - reach) : index + reach + 1]


def candidate_rates(
    store: Store, contender: str, grid: list[float], make: Callable[[float, int], RunSpec]
) -> list[float]:
    """Return all rates to try: the grid and, for contenders that are refined, two more around the best at seed 0."""
    best = best_rate(store, grid, lambda rate: [make(rate, 0)])
    if best is None or not parse(contender)[0].refine or len(grid) < 2:
        return grid
    neighbours = near(grid, best)
    return sorted({*grid, *(between(a, b) for a, b in pairwise(neighbours))})


def tuned(
    store: Store, contender: str, seeds: int, make: Callable[[float, int], RunSpec], grid: list[float]
) -> list[RunSpec]:
    """Return the runs of a search: the grid at seed 0, then the best and its neighbours at every seed."""
    coarse = [make(rate, 0) for rate in grid]
    if store.missing(coarse):
        return coarse
    rates = candidate_rates(store, contender, grid, make)
    fine = [make(rate, 0) for rate in rates]
    if store.missing(fine):
        return fine
    best = best_rate(store, rates, lambda rate: [make(rate, 0)])
    complete = [make(rate, seed) for rate in near(rates, best) for seed in range(seeds)]
    if store.missing(complete):
        return complete
    winner = best_rate(store, rates, lambda rate: [make(rate, seed) for seed in range(seeds)])
    return [make(rate, seed) for rate in near(rates, winner) for seed in range(seeds)]


def common_rates(plan: Plan, store: Store) -> list[float]:
    """Return AdamW's rate of lowest geometric mean loss over all tasks and its neighbours, once seed 0 has run."""
    scores = [(score, rate) for rate in HALF_DECADES if (score := common_score(plan, store, rate, 1)) is not None]
    return near(list(HALF_DECADES), min(scores)[1]) if len(scores) == len(HALF_DECADES) else []


def common_score(plan: Plan, store: Store, rate: float, seeds: int) -> float | None:
    """Return the mean log loss of AdamW at `rate` over all tasks, or None if a run is missing."""
    means = [average(store, [spec_of(plan, t, "adamw", rate, s) for s in range(seeds)]) for t in plan.tasks]
    return None if None in means else mean(log(value) if value < inf else inf for value in means)  # type: ignore


def winner(
    store: Store, contender: str, seeds: int, make: Callable[[float, int], RunSpec], grid: list[float]
) -> list[RunSpec]:
    """Return the runs at the rate of lowest mean quality, over as many seeds as have run; empty if none has."""
    rates = candidate_rates(store, contender, grid, make)
    first = best_rate(store, rates, lambda rate: [make(rate, 0)])
    for count in range(seeds if first is not None else 0, 0, -1):
        if average(store, [make(first, seed) for seed in range(count)]) is None:
            continue
        rate = best_rate(store, rates, lambda rate, count=count: [make(rate, seed) for seed in range(count)])
        if rate is not None:
            return [make(rate, seed) for seed in range(count)]
    return []


def reference_rate(plan: Plan, store: Store, task: str, contender: str) -> float | None:
    """Return the rate at which `contender` does best on `task` in the regret experiment, or its only rate."""
    grid = grid_of(plan, store, task, contender)
    if len(grid) == 1:
        return grid[0]
    specs = winner(store, contender, plan.seeds, partial(spec_of, plan, task, contender), grid)
    return specs[0].lr if specs else None


def grid_of(plan: Plan, store: Store, task: str, contender: str) -> list[float]:
    """Return the learning rates that `contender` tries on `task`, fewer once AdamW's best rate there is known."""
    kind = parse(contender)[0]
    rates = sorted(kind.rates)
    if not kind.reach or (centre := reference_rate(plan, store, task, "adamw")) is None:
        return rates
    return near(rates, min(rates, key=lambda rate: abs(log(rate / centre))), kind.reach)
