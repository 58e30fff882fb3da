"""Runs the missing runs of an experiment, in one process or in several side by side."""

import multiprocessing
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import plugins
from benchmarks.experiments import Experiment
from benchmarks.search import Plan
from benchmarks.specs import RunSpec, Store
from benchmarks.train import execute

Outcome = tuple[RunSpec, dict[str, Any] | None, str]


def prepare(plugin: str | None = None) -> None:
    """Make this process ready for runs: one thread, and the contenders of a plugin."""
    torch.set_num_threads(1)
    if plugin:
        plugins.load(plugin)


def attempt(spec: RunSpec) -> Outcome:
    """Return the spec with its record, or with the text of the error that ended it."""
    try:
        return spec, execute(spec), ""
    except Exception:  # one broken run must not end the others; the caller prints it and fails at the end
        return spec, None, traceback.format_exc()


def _outcomes(specs: list[RunSpec], jobs: int, plugin: str | None) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(attempt, specs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=prepare, initargs=(plugin,)) as pool:
        futures: list[Future[Outcome]] = [pool.submit(attempt, spec) for spec in specs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def describe(spec: RunSpec) -> str:
    """Return one line that names a run."""
    numbers = f"lr={spec.lr:g} seed={spec.seed} steps={spec.steps} batch={spec.batch_size}"
    words = (spec.task, spec.contender, numbers, spec.schedule, spec.poison, "restart" * spec.restart)
    return " ".join(word for word in words if word)


def run(experiment: Experiment, plan: Plan, store: Store, jobs: int, plugin: str | None, console: Console) -> list[str]:
    """Run whatever `experiment` still needs; return the errors of the runs that failed."""
    prepare(plugin if jobs == 1 else None)
    errors: list[str] = []
    failed: set[RunSpec] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        while todo := [spec for spec in store.missing(experiment.specs(plan, store)) if spec not in failed]:
            bar = progress.add_task(experiment.name, total=len(todo))
            for spec, record, error in _outcomes(todo, jobs, plugin):
                progress.update(bar, advance=1, description=spec.task)
                if record is not None and record["key"] != spec.key:
                    record, error = None, "the sources changed while the experiment ran: start it again"
                if record is None:
                    failed.add(spec)
                    errors.append(f"{describe(spec)}\n{error}")
                    console.print(errors[-1], style="red", markup=False)
                    continue
                store.add(record, experiment.name)
                if not console.is_terminal:
                    best = "nan" if record["best"] is None else f"{record['best']:.5g}"
                    console.print(f"{describe(spec)} best={best} cpu={record['cpu']:.1f}s", soft_wrap=True)
    return errors
