"""Changes of a task under which every contender's rate is searched anew: horizon, schedule, batch size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.contenders import parse
from benchmarks.search import Plan, grid_of, reference_rate, spec_of, tuned
from benchmarks.specs import RunSpec, Store


@dataclass(frozen=True)
class Setting:
    """A change of a task under which AdamW is tuned anew."""

    name: str
    steps: float = 1.0
    batch: float = 1.0
    schedule: str = ""


HORIZONS = [Setting(f"steps x{factor:g}", steps=factor) for factor in (0.5, 2, 4)]
SHAPES = [Setting(name, schedule=name) for name in ("constant", "cosine", "warmup_linear", "one_cycle")]
BATCHES = [Setting(f"batch x{factor:g}", batch=factor) for factor in (0.25, 0.5, 2, 4)]


def changed(plan: Plan, setting: Setting, task: str, contender: str, lr: float, seed: int) -> RunSpec:
    """Return the run of `contender` on `task` under `setting`."""
    spec = spec_of(plan, task, contender, lr, seed)
    schedule = setting.schedule if setting.schedule and parse(contender)[0].reschedule else spec.schedule
    steps, batch = max(2, round(spec.steps * setting.steps)), max(1, round(spec.batch_size * setting.batch))
    return replace(spec, steps=steps, batch_size=batch, schedule=schedule)


def window(plan: Plan, store: Store, task: str, contender: str) -> list[float]:
    """Return the half-decades within one decade of the contender's best rate on the plain task."""
    grid, centre = grid_of(plan, store, task, contender), reference_rate(plan, store, task, contender)
    if len(grid) == 1 or centre is None:
        return grid
    return [rate for rate in grid if centre / 11 < rate < centre * 11]


def retuned(settings: list[Setting]) -> Callable[[Plan, Store], Iterator[RunSpec]]:
    """Return the experiment in which every contender is tuned anew under each of `settings`."""

    def experiment(plan: Plan, store: Store) -> Iterator[RunSpec]:
        for setting in settings:
            for contender in plan.contenders:
                for task in plan.tasks:
                    make = partial(changed, plan, setting, task, contender)
                    yield from tuned(store, contender, plan.seeds, make, window(plan, store, task, contender))

    return experiment
