"""Tables of an experiment, printed and written as Markdown."""

import platform
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from operator import attrgetter
from statistics import mean, median

from benchmarks.experiments import DECADES, Experiment
from benchmarks.fingerprint import package_versions
from benchmarks.grid import Grid, number, ratio, ratio_grid
from benchmarks.poison import KINDS, SCATTERED
from benchmarks.search import Plan, reference_rate, spec_of, winner
from benchmarks.settings import BATCHES, HORIZONS, SHAPES, Setting, changed, window
from benchmarks.specs import HARNESS, Store
from benchmarks.summary import (
    BUDGETS,
    Cell,
    Record,
    at_rate,
    budget_ratio,
    cell,
    geometric_mean,
    planned,
    ratios,
    regret_columns,
)

PACKAGES = ("torch", "prodigyopt", "schedulefree", "momo-opt", "dadaptation", "pytorch_optimizer")


def _loss(entry: Cell | None) -> str:
    if entry is None:
        return "-"
    seeds = f" ±{entry.spread:.2g}" if len(entry.losses) > 1 else ""
    return f"{number(entry.mean, 3)}{seeds}"


def _loss_grid(columns: dict[str, dict[str, Cell]], tasks: list[str]) -> Grid:
    rows = []
    for task in tasks:
        bar = columns["adamw"].get(task)
        entries = [_loss(column.get(task)) for column in columns.values()]
        rows.append([task, f"{bar.rate:g}" if bar else "-", str(len(bar.losses)) if bar else "0", *entries])
    note = "Lowest of about 20 validation losses in the run, mean over seeds ± standard deviation."
    return Grid("Losses", note, ["task", "AdamW's best rate", "seeds", *columns], rows)


def _cost_grid(columns: dict[str, dict[str, Cell]]) -> Grid:
    rows = []
    bar = columns["adamw"]
    for name, column in columns.items():
        both = [(column[task], bar[task]) for task in bar if task in column]
        if not both:
            continue
        forwards = [mean(r["forwards"] / r["spec"]["steps"] for r in mine.records) for mine, _ in both]
        times = [mean(r["cpu"] for r in mine.records) / mean(r["cpu"] for r in base.records) for mine, base in both]
        failed = sum(r["diverged"] for mine, _ in both for r in mine.records)
        equal = [geometric_mean(budget_ratio(column, bar, cost).values()) for cost in BUDGETS.values()]
        row = [mean(forwards), geometric_mean(times), *equal]
        rows.append([name, *(ratio(value) for value in row), str(failed)])
    header = ["contender", "forwards a step", "CPU time", "loss at equal passes", "loss at equal CPU time", "diverged"]
    note = (
        "CPU time and losses are geometric means of ratios to tuned AdamW. At an equal budget a run is stopped, with "
        "its schedule unfinished, at the last evaluation that AdamW's whole run would have paid for (a backward pass "
        "counts as two forward passes): an upper bound on the loss of a run planned for that budget."
    )
    return Grid("Cost", note, header, rows)


def _share(value: float | None) -> str:
    return "never" if value == inf else ratio(value)


def _reached_grid(columns: dict[str, dict[str, Cell]], tasks: list[str]) -> Grid:
    bar = columns["adamw"]
    shares = [
        {task: column[task].reached(bar[task].on_seeds_of(column[task]).mean) for task in tasks if task in column}
        for column in columns.values()
    ]
    rows = [[task, *(_share(column.get(task)) for column in shares)] for task in tasks]
    rows.append(["**median**", *(_share(median(column.values()) if column else None) for column in shares)])
    note = (
        "Share of its steps after which a run is where AdamW's whole run gets, by its 20 evaluations. Schedules are of "
        "the whole run: one planned to end there would get there sooner."
    )
    return Grid("Steps to tuned AdamW's loss", note, ["task", *columns], rows)


def regret_grids(plan: Plan, store: Store) -> list[Grid]:
    """Return ratios to tuned AdamW, losses, steps to its loss, and costs."""
    columns = regret_columns(plan, store)
    bar = columns.get("adamw", {})
    tasks = [task for task in plan.tasks if task in bar]
    note = "Mean loss over tuned AdamW's mean loss on the same seeds, with the same steps, initial weights and batches."
    main = {name: ratios(column, bar) for name, column in columns.items()}
    grids = [ratio_grid("Ratio to AdamW tuned per task", note, main, tasks)]
    if not bar:
        return grids
    own = {name: columns[name] for name in plan.contenders}  # without AdamW's other rates
    return [*grids, _loss_grid(columns, tasks), _reached_grid(own, tasks), _cost_grid(columns)]


def unscheduled_grids(plan: Plan, store: Store) -> list[Grid]:
    """Return ratios to tuned AdamW with its schedule: of the lowest losses, and of the losses at the end."""
    columns = regret_columns(plan, store)
    own = {name: columns[name] for name in plan.contenders}  # without AdamW's other rates
    bar = own.get("adamw", {})
    tasks = [task for task in plan.tasks if task in bar]
    lowest = {name: ratios(column, bar) for name, column in own.items()}
    last = {name: ratios(column, bar, attrgetter("last")) for name, column in own.items()}
    note = "Mean of the lowest validation losses over that of AdamW tuned per task with warm-up and cosine."
    ends = "Mean loss after the last step over AdamW's lowest: far above the lowest a run has wandered, or overfits."
    return [ratio_grid("Lowest loss", note, lowest, tasks), ratio_grid("Loss at the end", ends, last, tasks)]


def constant_grids(plan: Plan, store: Store) -> list[Grid]:
    """Return ratios to tuned AdamW, and for each task that of the contender which is best on all other tasks."""
    columns = regret_columns(plan, store)
    bar = columns.pop("adamw", {})
    tasks = [task for task in plan.tasks if task in bar]
    table = {name: ratios(columns[name], bar) for name in plan.contenders if name in columns}
    note = "Mean loss over tuned AdamW's mean loss on the same seeds."
    grids = [ratio_grid("Ratio to AdamW tuned per task", note, table, tasks)]
    whole = {name: column for name, column in table.items() if column.keys() == set(tasks)}
    left_out: dict[str, dict[str, float]] = {"left out": {}}
    chosen = {}
    for task in tasks if whole else []:
        others = {name: geometric_mean(v for t, v in column.items() if t != task) for name, column in whole.items()}
        chosen[task] = min(others, key=others.__getitem__)
        left_out["left out"][task] = whole[chosen[task]][task]
    note = "Each task with the contender that is best on all the others."
    grid = ratio_grid("One task left out", note, left_out, list(chosen))
    header = [*grid.header, "chosen without it"]
    rows = [[*row, chosen.get(row[0], "")] for row in grid.rows]
    return [*grids, replace(grid, header=header, rows=rows)]


def sensitivity_grids(plan: Plan, store: Store) -> list[Grid]:
    """Return one grid a contender: losses by learning rate, and the worst over the best."""
    grids = []
    for contender in plan.contenders:
        rows = []
        for task in plan.tasks:
            cells = [at_rate(plan, store, task, contender, lr) for lr in DECADES]
            found = [each.mean for each in cells if each]
            spread = max(found) / min(found) if found and min(found) < inf else None
            rows.append([task, *(number(each.mean, 3) if each else "-" for each in cells), ratio(spread)])
        header = ["task", *(f"{lr:g}" for lr in DECADES), "worst / best"]
        grids.append(Grid(f"{contender}, by learning rate", "Mean of the best validation losses.", header, rows))
    return grids


def _recovery(record: Record) -> float:
    """Return the steps until the validation loss is within 5 % of what it was before the poisoned batch."""
    before, *later = record["trace"]
    return next((float(offset) for offset, loss in later if loss is not None and loss <= 1.05 * before[1]), inf)


def _steps_back(entry: Cell | None) -> str:
    if entry is None:
        return "-"
    steps = mean(map(_recovery, entry.records))
    return "never" if steps == inf else f"{steps:.3g}"


def poison_grids(plan: Plan, store: Store) -> list[Grid]:
    """Return one grid a contender: loss over the clean run's loss and steps to recover, by kind of poison."""
    grids = []
    for contender in plan.contenders:
        rows = []
        for task in plan.tasks:
            rate = reference_rate(plan, store, task, contender)
            pick = partial(spec_of, plan, task, contender, lr=rate or 0.0)
            clean = cell(store, [pick(seed=seed) for seed in range(plan.seeds)])
            row = [task]
            for kind in KINDS:
                hit = cell(store, [pick(seed=seed, poison=kind) for seed in range(plan.seeds)])
                row.append(ratio(hit.last / clean.last) if hit and clean else "-")
                if kind not in SCATTERED:
                    row.append(_steps_back(hit))
            rows.append(row)
        header = ["task"]
        for kind in KINDS:
            header += [kind] if kind in SCATTERED else [kind, "steps back"]
        note = (
            "Final validation loss over that of the clean run (means over seeds); steps until it is within 5 % of what "
            "it was before the batch. A batch whose loss is nan is left out by all who look at it: what that costs is "
            "what the batch was worth, and how much the runs differ by chance."
        )
        grids.append(Grid(f"{contender}, poisoned batches", note, header, rows))
    return grids


def setting_grids(settings: list[Setting], plan: Plan, store: Store) -> list[Grid]:
    """Return, setting by setting, ratios to AdamW tuned for that setting."""
    grids = []
    for setting in settings:
        columns: dict[str, dict[str, Cell]] = {}
        for contender in plan.contenders:
            columns[contender] = {}
            for task in plan.tasks:
                make = partial(changed, plan, setting, task, contender)
                runs = winner(store, contender, plan.seeds, make, window(plan, store, task, contender))
                if found := cell(store, runs):
                    columns[contender][task] = found
        bar = columns.get("adamw", {})
        table = {name: ratios(column, bar) for name, column in columns.items()}
        note = "Mean loss over that of AdamW tuned for this setting."
        grids.append(ratio_grid(setting.name, note, table, [task for task in plan.tasks if task in bar]))
    return grids


def restart_grids(plan: Plan, store: Store) -> list[Grid]:
    """Return whether runs through a checkpoint end with the same bits, and the ratio of their losses."""
    rows = []
    for contender in plan.contenders:
        for task in plan.tasks:
            rate = reference_rate(plan, store, task, contender) or 0.0
            pairs = []
            for seed in range(plan.seeds):
                pick = partial(spec_of, plan, task, contender, rate, seed)
                pairs.append((store.get(pick()), store.get(pick(restart=True))))
            done = [(a, b) for a, b in pairs if a and b]
            same = sum(a["fingerprint"] == b["fingerprint"] for a, b in done)
            change = ratio(mean(b["final"] / a["final"] for a, b in done)) if done else "-"
            rows.append([contender, task, f"{same} of {len(done)}", change])
    note = "Runs through a checkpoint half-way against runs without one."
    return [Grid("Restart", note, ["contender", "task", "same bits", "final loss, ratio"], rows)]


def budget_grids(plan: Plan, store: Store) -> list[Grid]:
    """Return ratios to tuned AdamW of runs planned for AdamW's budget, by kind of budget."""
    bar = regret_columns(replace(plan, contenders=("adamw",)), store)["adamw"]
    grids = []
    for kind in BUDGETS:
        columns: dict[str, dict[str, float]] = {}
        for contender in plan.contenders:
            cells = {task: cell(store, planned(plan, store, task, contender, kind)) for task in plan.tasks}
            columns[contender] = ratios({task: found for task, found in cells.items() if found}, bar)
        columns.pop("adamw", None)
        note = f"Each run has as many steps as tuned AdamW's whole run pays for in {kind}; its schedule ends with them."
        grids.append(ratio_grid(f"Equal {kind}", note, columns, list(bar)))
    return grids


GRIDS: dict[str, Callable[[Plan, Store], list[Grid]]] = {
    "regret": regret_grids,
    "depth": regret_grids,
    "unseen": regret_grids,
    "surrogate": regret_grids,
    "unscheduled": unscheduled_grids,
    "constants": constant_grids,
    "parts": regret_grids,
    "sensitivity": sensitivity_grids,
    "poison": poison_grids,
    "horizon": partial(setting_grids, HORIZONS + SHAPES),
    "batch": partial(setting_grids, BATCHES),
    "restart": restart_grids,
    "budget": budget_grids,
}


def write(experiment: Experiment, plan: Plan, store: Store) -> str:
    """Write the tables of `experiment` beside its runs and return their text."""
    options = f"{experiment.name} --seeds {plan.seeds}"
    if plan.tasks != experiment.tasks:
        options += f" --tasks {','.join(plan.tasks)}"
    if plan.contenders != experiment.contenders:
        options += f' --contenders "{" ".join(plan.contenders)}"'
    versions = ", ".join(f"{name} {found}" for name, found in package_versions(PACKAGES).items())
    parts = [
        f"# {experiment.name}",
        f"`python -m benchmarks run {options}`, then `python -m benchmarks table {options}`.",
        f"Python {platform.python_version()}, {versions}; harness {HARNESS}; one thread a run.",
        *(grid.markdown() for grid in GRIDS[experiment.name](plan, store)),
    ]
    text = "\n\n".join(parts) + "\n"
    store.folder.mkdir(parents=True, exist_ok=True)
    (store.folder / f"{experiment.name}.md").write_text(text)
    return text
