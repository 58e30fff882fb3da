"""The arithmetic of the tables: from runs to losses, ratios, and what a budget would have bought."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import exp, inf, log
from operator import attrgetter
from statistics import mean, stdev
from typing import Any

from benchmarks.search import Plan, average, common_rates, grid_of, spec_of, winner
from benchmarks.specs import RunSpec, Store

Record = dict[str, Any]
Budget = Callable[[Record], float]


@dataclass(frozen=True)
class Cell:
    """The runs behind one entry of a table."""

    records: tuple[Record, ...]

    @property
    def losses(self) -> list[float]:
        """Return the best validation loss of each run, infinity for one that never had any."""
        return [inf if record["best"] is None else record["best"] for record in self.records]

    @property
    def mean(self) -> float:
        """Return the mean loss over seeds."""
        return mean(self.losses)

    @property
    def last(self) -> float:
        """Return the mean over seeds of the loss after the last step, infinity if one was not finite."""
        return mean(inf if record["final"] is None else record["final"] for record in self.records)

    @property
    def spread(self) -> float:
        """Return the standard deviation over seeds, 0 for a single one."""
        return stdev(self.losses) if len(self.losses) > 1 and self.mean < inf else 0.0

    @property
    def rate(self) -> float:
        """Return the learning rate of the runs."""
        return self.records[0]["spec"]["lr"]

    def on_seeds_of(self, other: "Cell") -> "Cell":
        """Return the runs on the seeds that `other` has too, or all of them if the two share none."""
        seeds = {record["spec"]["seed"] for record in other.records}
        shared = tuple(record for record in self.records if record["spec"]["seed"] in seeds)
        return Cell(shared) if shared else self

    def within(self, limit: Callable[[int], float], cost: Callable[[list[float]], float]) -> float:
        """Return the mean over seeds of the lowest loss among evaluations that cost at most `limit` of the seed."""
        found = []
        for record in self.records:
            cap = limit(record["spec"]["seed"])
            losses = [row[1] for row in record["evaluations"] if row[1] is not None and cost(row) <= cap * 1.0001]
            found.append(min(losses, default=inf))
        return mean(found)

    def reached(self, loss: float) -> float:
        """Return the share of a run's steps after which the mean over seeds of its lowest loss is at most `loss`.

        Told by the evaluations, so to a twentieth; infinity if it never is.
        """
        lows = [inf] * len(self.records)
        for rows in zip(*(record["evaluations"] for record in self.records), strict=False):
            lows = [low if row[1] is None else min(low, row[1]) for low, row in zip(lows, rows, strict=True)]
            if mean(lows) <= loss:
                return float(rows[0][0] / self.records[0]["evaluations"][-1][0])
        return inf


def cell(store: Store, specs: Iterable[RunSpec]) -> Cell | None:
    """Return the runs of `specs`, or None if there are none or one is missing."""
    records = [store.get(spec) for spec in specs]
    return None if not records or None in records else Cell(tuple(record for record in records if record))


def geometric_mean(values: Iterable[float]) -> float:
    """Return exp(mean(log)), infinity if one value is infinite."""
    values = list(values)
    return inf if inf in values else exp(mean(log(value) for value in values))


def passes(row: list[float]) -> float:
    """Return the cost of an evaluation row in forward passes: a forward counts 1, a backward 2."""
    return row[2] + 2 * row[3]


def cpu(row: list[float]) -> float:
    """Return the cost of an evaluation row in CPU seconds."""
    return row[4]


BUDGETS: dict[str, Callable[[list[float]], float]] = {"passes": passes, "CPU time": cpu}


def common_rate(plan: Plan, store: Store) -> float | None:
    """Return AdamW's rate of lowest geometric mean loss over all tasks."""
    scored = []
    for rate in common_rates(plan, store):
        means = [average(store, [spec_of(plan, t, "adamw", rate, s) for s in range(plan.seeds)]) for t in plan.tasks]
        if None not in means:
            scored.append((geometric_mean(value for value in means if value is not None), rate))
    return min(scored)[1] if scored else None


def at_rate(plan: Plan, store: Store, task: str, contender: str, rate: float) -> Cell | None:
    """Return the runs of `contender` at `rate`, over as many seeds as have run."""
    for count in range(plan.seeds, 0, -1):
        found = cell(store, [spec_of(plan, task, contender, rate, seed) for seed in range(count)])
        if found:
            return found
    return None


def tuned_cell(plan: Plan, store: Store, task: str, contender: str) -> Cell | None:
    """Return the runs of `contender` at its best rate on `task`."""
    make = partial(spec_of, plan, task, contender)
    return cell(store, winner(store, contender, plan.seeds, make, grid_of(plan, store, task, contender)))


def regret_columns(plan: Plan, store: Store) -> dict[str, dict[str, Cell]]:
    """Return contender -> task -> runs; AdamW comes tuned per task, at 1e-3 and at one rate for all tasks."""
    columns: dict[str, dict[str, Cell | None]] = {}
    for contender in plan.contenders:
        columns[contender] = {task: tuned_cell(plan, store, task, contender) for task in plan.tasks}
        if contender == "adamw":
            shared = common_rate(plan, store)
            for label, rate in (("adamw 1e-3", 1e-3), (f"adamw {shared or 0:g} for all", shared)):
                if rate:
                    columns[label] = {task: at_rate(plan, store, task, contender, rate) for task in plan.tasks}
    return {name: {task: found for task, found in column.items() if found} for name, column in columns.items()}


def ratios(
    column: dict[str, Cell], bar: dict[str, Cell], loss: Callable[[Cell], float] = attrgetter("mean")
) -> dict[str, float]:
    """Return task -> `loss` over the bar's mean loss on the same seeds, for tasks that both have."""
    return {task: loss(column[task]) / bar[task].on_seeds_of(column[task]).mean for task in bar if task in column}


def budget_ratio(
    column: dict[str, Cell], bar: dict[str, Cell], cost: Callable[[list[float]], float]
) -> dict[str, float]:
    """Return the ratios with every run stopped where it has cost as much as the bar's whole run of the same seed."""
    found = {}
    for task in bar:
        if task in column:
            base = bar[task].on_seeds_of(column[task])
            limits = {each["spec"]["seed"]: cost(each["evaluations"][-1]) for each in base.records}
            typical = mean(limits.values())
            found[task] = column[task].within(lambda seed, m=limits, d=typical: m.get(seed, d), cost) / base.mean
    return found


def planned(plan: Plan, store: Store, task: str, contender: str, kind: str) -> list[RunSpec]:
    """Return the runs of `contender` at its best rate with so few steps that they cost what AdamW's whole run costs.

    The share of the steps is rounded to 5 %, since CPU times vary a little, and is at most 1.
    """
    mine, bar = tuned_cell(plan, store, task, contender), tuned_cell(plan, store, task, "adamw")
    if mine is None or bar is None or contender == "adamw":
        return []
    costs = [mean(BUDGETS[kind](record["evaluations"][-1]) for record in each.records) for each in (mine, bar)]
    share = min(1.0, max(0.05, round(20 * costs[1] / costs[0]) / 20))
    steps = max(2, round(mine.records[0]["spec"]["steps"] * share))
    return [spec_of(plan, task, contender, mine.rate, seed, steps=steps) for seed in range(plan.seeds)]
