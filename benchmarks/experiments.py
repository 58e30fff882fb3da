"""The experiments: which runs each of them needs, given the runs that have finished."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.poison import KINDS
from benchmarks.search import Plan, common_rates, grid_of, reference_rate, spec_of, tuned
from benchmarks.settings import BATCHES, HORIZONS, SHAPES, retuned
from benchmarks.specs import RunSpec, Store
from benchmarks.summary import BUDGETS, planned
from benchmarks.tasks import SURROGATE, TASKS, UNSEEN, VARIANTS

OURS = "soaa_ratio"
PEERS = ("prodigy", "schedule_free", "momo", "dadapt")
Specs = Callable[[Plan, Store], Iterator[RunSpec]]
DECADES = tuple(10.0**power for power in range(-6, 2))


def regret(plan: Plan, store: Store) -> Iterator[RunSpec]:
    """Every contender on every task, rates tuned per task where a contender has several; AdamW also at 1e-3.

    Yields:
        The runs that the experiment needs next.
    """
    for contender in plan.contenders:
        for task in plan.tasks:
            make = partial(spec_of, plan, task, contender)
            yield from tuned(store, contender, plan.seeds, make, grid_of(plan, store, task, contender))
            if contender == "adamw":
                yield from (make(1e-3, seed) for seed in range(plan.seeds))
    if "adamw" in plan.contenders and (rates := common_rates(plan, store)):
        for rate in rates:
            yield from (spec_of(plan, task, "adamw", rate, seed) for task in plan.tasks for seed in range(plan.seeds))


def sensitivity(plan: Plan, store: Store) -> Iterator[RunSpec]:
    """Every contender at learning rates 1e-6 ... 10.

    Yields:
        The runs that the experiment needs next.
    """
    for contender in plan.contenders:
        for task in plan.tasks:
            yield from (spec_of(plan, task, contender, lr, s) for lr in DECADES for s in range(plan.seeds))


def _at_best(changes: list[dict[str, Any]]) -> Specs:
    """Return the experiment of every contender at its best rate, once with each of `changes`."""

    def experiment(plan: Plan, store: Store) -> Iterator[RunSpec]:
        for contender in plan.contenders:
            for task in plan.tasks:
                make = partial(spec_of, plan, task, contender)
                rate = reference_rate(plan, store, task, contender)
                if rate is None:
                    yield from (make(each, 0) for each in grid_of(plan, store, task, contender))
                    continue
                yield from (make(rate, seed, **change) for seed in range(plan.seeds) for change in changes)

    return experiment


def budget(plan: Plan, store: Store) -> Iterator[RunSpec]:
    """Every contender but AdamW at its best rate, planned for as many steps as AdamW's run would pay for.

    Yields:
        The runs that the experiment needs next: those of the regret experiment, then the shortened ones.
    """
    yield from regret(plan, store)
    for kind in BUDGETS:
        for contender in plan.contenders:
            yield from (spec for task in plan.tasks for spec in planned(plan, store, task, contender, kind))


@dataclass(frozen=True)
class Experiment:
    """A named set of runs.

    Args:
        name: unique name; results and table carry it.
        specs: yields the runs needed next, given what has finished; nothing new means done.
        contenders: who takes part unless told otherwise.
        tasks: on which tasks unless told otherwise.
    """

    name: str
    specs: Specs
    contenders: tuple[str, ...]
    tasks: tuple[str, ...] = tuple(TASKS)


# One constant of RatioRadius moved at a time, and one part of it left out at a time.
CONSTANTS = (
    OURS,
    *(f"{OURS}:radius.target={value}" for value in (0.5, 0.7)),
    *(f"{OURS}:radius.relative={value}" for value in (0.1, 0.4)),
    *(f"{OURS}:radius.interval={value}" for value in (1, 10)),
)
PARTS = (
    OURS,
    *(f"{OURS}_{part}" for part in ("unmasked", "adams_betas", "fisher", "ungated", "no_fresh_slopes", "no_portions")),
    f"{OURS}:radius.max_trials=1",
)
_EVERYONE = ("adamw", *PEERS, "adamw_clip", "soap", "muon", "lbfgs", OURS, "soaa_kronecker", "soaa_published")
_CORE = ("adamw", OURS)
_SURROGATE = ("adamw", *PEERS, "soap", "muon", OURS, f"{OURS}_no_doubts", "soaa_kronecker")
_UNSCHEDULED = (
    *(f"{OURS}_unscheduled", f"{OURS}_unannealed", "soaa_kronecker_unscheduled", "adamw_unscheduled"),
    *(f"{OURS}_averaged", "soaa_kronecker_averaged", "adamw_averaged"),
)
EXPERIMENTS: dict[str, Experiment] = {
    each.name: each
    for each in (
        Experiment("regret", regret, _EVERYONE),
        Experiment("sensitivity", sensitivity, ("adamw", "momo", OURS, "soaa_published")),
        Experiment("poison", _at_best([{"poison": kind} for kind in ("", *KINDS)]), ("adamw", "adamw_clip", OURS)),
        Experiment("horizon", retuned(HORIZONS + SHAPES), _CORE),
        Experiment("batch", retuned(BATCHES), _CORE),
        Experiment(
            "restart", _at_best([{}, {"restart": True}]), _CORE, ("digits_mlp", "char_transformer", "mnist_resnet")
        ),
        Experiment("budget", budget, ("adamw", *PEERS, OURS)),
        Experiment("constants", regret, ("adamw", *CONSTANTS)),
        Experiment("parts", regret, ("adamw", *PARTS)),
        Experiment("depth", regret, _CORE, tuple(VARIANTS)),
        Experiment("unseen", regret, _EVERYONE, tuple(UNSEEN)),
        Experiment("surrogate", regret, _SURROGATE, tuple(SURROGATE)),
        Experiment("unscheduled", regret, ("adamw", *_UNSCHEDULED, "schedule_free"), (*TASKS, *UNSEEN)),
    )
}
