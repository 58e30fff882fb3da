"""Runs as loggers have left them on disk: TensorBoard's event files and ``metrics.csv``, read into plain numbers."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress, count, islice
from math import isnan
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_soaa._points import Array, Column, Points, arrays, at, increases, last_known
from lightning_soaa._watch import Watch
from lightning_soaa.advice import Advice, advise
from lightning_soaa.report import StepReport

RADIUS = "trust_region/radius"
COUNTS = ("rejects", "skipped_steps", "outlier_steps")
MOST_READ = 100_000  # rows of a table that are read
CHUNK = 500  # rows of a table that are turned into numbers together
MOST_ROWS = 10_000  # that are gone through for advice, which is a matter of the last 24
OPTIMIZER = re.compile(r"trust_region(-\d+)?/radius")


class RunError(ValueError):
    """A path that holds no run with SOAA; the text names it and says what was looked for."""


@dataclass(frozen=True)
class Run:
    """What one run logged.

    Args:
        name: what tells it from others, its path by default.
        series: points by key.
        left_out: rows of the log that were not read.
    """

    name: str
    series: Mapping[str, Points]
    left_out: int = 0

    def losses(self) -> list[str]:
        """Return the keys whose last part speaks of a loss: a mean over an epoch gives way to the steps it is of."""
        keys = sorted(key for key in self.series if "loss" in key.rsplit("/", 1)[-1].lower())
        return [key for key in keys if not (key.endswith("_epoch") and f"{key[:-6]}_step" in keys)]


class Marks(NamedTuple):
    """What went wrong in one way.

    Args:
        steps: of the rows by which its count had grown since the row before, shape (n,).
        total: how often it happened in the whole run.
    """

    steps: Array
    total: int


class Events(NamedTuple):
    """What went wrong, and where.

    Args:
        rejects: checks whose step was rejected; in a log that does not count them, those that have a row.
        skipped: steps with a loss or gradient that was not finite.
        outliers: steps whose gradient was far outside its recent distribution.
    """

    rejects: Marks
    skipped: Marks
    outliers: Marks


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Return the run in a folder or file: ``metrics.csv`` if there is one, else TensorBoard's event files.

    Raises:
        RunError: nothing is there, no such file is in it, or no row in it comes from TrustRegionMonitor.
        ModuleNotFoundError: event files are all there is and tensorboard is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise RunError(f"no such file or folder: {path}")
    table, left_out = path if path.suffix == ".csv" else path / "metrics.csv", 0
    if table.is_file():
        series, left_out = read_csv(table)
    elif path.is_file() or any(path.glob("*tfevents*")):
        series = read_events(path)
    else:
        found = sorted({file.parent for file in path.rglob("*") if is_log(file)})[:5] if path.is_dir() else []
        hint = f"; runs are in {', '.join(map(str, found))}" if found else ""
        raise RunError(f"no run in {path}: neither metrics.csv nor an event file of TensorBoard{hint}")
    if RADIUS not in series:
        raise RunError(f"no `{RADIUS}` in {path}: it was not written by a run with TrustRegionMonitor")
    return Run(str(path) if name is None else name, series, left_out)


def by_optimizer(run: Run) -> list[Run]:
    """Return a run of several SOAA optimizers as one for each, keys without suffix, and any other run as it is."""
    suffixes = [key[len("trust_region") : -len("/radius")] for key in run.series if OPTIMIZER.fullmatch(key)]
    if len(suffixes) < 2:
        return [run]
    runs = []
    for suffix in sorted(suffixes, key=lambda suffix: int(suffix[1:] or 0)):
        series = {}
        for key, points in run.series.items():
            head, slash, tail = key.partition("/")
            if not head.startswith(("trust_region", "fisher")):
                series[key] = points
            elif head in {f"trust_region{suffix}", f"fisher{suffix}"}:
                series[head.removesuffix(suffix) + slash + tail] = points
        runs.append(Run(f"{run.name}, trust_region{suffix}", series, run.left_out))
    return runs


def is_log(file: Path) -> bool:
    """Return whether a file is one that :func:`read_run` reads."""
    return file.name == "metrics.csv" or "tfevents" in file.name


def read_csv(path: Path, most: int = MOST_READ) -> tuple[dict[str, Points], int]:
    """Return all columns of numbers but ``step``, and how many rows were left out.

    Rows without a step and fields without a number are left out; of two values for a step, the later one stands. Rows
    with as many gaps as most rows have are those of steps. Of more than `most` of them every second, third, ... is
    read, and all others: those of validation are few.
    """
    with open(path, newline="") as file:
        header = next(csv.reader([file.readline()]), [])
        gaps = Counter(line.count(",,") for line in file)
    usual, total = max(gaps.items(), key=itemgetter(1), default=(0, 0))
    every, turn = max(1, -(-total // most)), count()
    found: dict[str, list[tuple[Array, Array]]] = {}
    with open(path, newline="") as file:
        file.readline()
        rows = csv.reader(line for line in file if line.count(",,") != usual or next(turn) % every == 0)
        while "step" in header and (chunk := list(islice(rows, CHUNK))):
            columns = dict(zip(header, zip(*filled(chunk, len(header)), strict=True), strict=True))
            steps = columns.pop("step")
            for key, texts in columns.items():
                found.setdefault(key, []).append(numbers(steps, texts))
    joined = {key: [np.concatenate(parts) for parts in zip(*pairs, strict=True)] for key, pairs in found.items()}
    series: dict[str, Points] = {key: Column.of(steps, values) for key, (steps, values) in joined.items() if len(steps)}
    return series, total - -(-total // every)


def filled(rows: Iterable[list[str]], width: int) -> list[list[str]]:
    """Return rows of `width` fields, empty ones where there were fewer."""
    return [(row + [""] * width)[:width] for row in rows]


def numbers(steps: Sequence[str], texts: Sequence[str]) -> tuple[Array, Array]:
    """Return steps and numbers of the fields that hold a number, where there is a step."""
    with suppress(ValueError):
        # The usual case: numbers, or nothing.
        return np.array(list(map(float, compress(steps, texts)))), np.array(list(map(float, filter(None, texts))))
    known = [(float(step), float(text)) for step, text in zip(steps, texts, strict=True) if are_numbers(step, text)]
    return np.array([step for step, _ in known]), np.array([value for _, value in known])


def are_numbers(*texts: str) -> bool:
    """Return whether fields hold a number each."""
    with suppress(ValueError):
        return bool([float(text) for text in texts])
    return False


def read_events(path: Path) -> dict[str, Points]:
    """Return all scalars of an event file or of a folder's event files; of two values for a step, the later one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    found: dict[str, Points] = {}
    for key in events.Tags()["scalars"]:
        points = events.Scalars(key)
        found[key] = Column.of([point.step for point in points], [point.value for point in points])
    return found


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Return paths without the folders that all of them share, each at least by its last part."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return [str(Path(*part[shared:])) if len(paths) > 1 else part[-1] for part in parts]


def events_of(run: Run) -> Events:
    """Return the steps at which rows tell of a reject, a skipped step or an outlier, and how many there were."""
    counted = [run.series.get(f"trust_region/{name}", ()) for name in COUNTS]
    totals = [last_known(points) for points in counted]
    rejects, skipped, outliers = (
        Marks(increases(points), 0 if isnan(total) else int(total))
        for points, total in zip(counted, totals, strict=True)
    )
    if not counted[0]:  # a log from before rejects were counted
        steps, norms = arrays(run.series.get("trust_region/step_norm", ()))
        undone = (norms == 0) & (at(run.series.get("trust_region/trials", ()), steps) > 0)
        undone &= ~np.isin(steps, skipped.steps) & ~np.isin(steps, outliers.steps)
        rejects = Marks(steps[undone], int(undone.sum()))
    return Events(rejects, skipped, outliers)


def advice_for(run: Run) -> list[Advice]:
    """Return the advice that the rows of a run give, each kind once.

    Rows hold less than the monitor sees as the run goes: only checks that have a row count, and bounds of the radius
    and the gap of the first check are not logged.
    """
    watch, given = Watch(), dict[str, Advice]()
    for head, report in replay(run):
        watch.see_numbers(head)
        watch.see_report(report)
        for advice in advise(watch):
            given.setdefault(advice.kind, advice)
    return list(given.values())


def replay(run: Run) -> Iterator[tuple[dict[str, float], StepReport]]:
    """Go through the rows, every second, third, ... of a run that has more than `MOST_ROWS`.

    Yields:
        What the optimizer's first group and its report have held, as far as the row tells.
    """
    checks = accepted = 0
    for row in table_of(run):
        counts = {name: 0 if isnan(row[name]) else int(row[name]) for name in ("skipped_steps", "outlier_steps")}
        checks, accepted = checks + row["checked"], accepted + (row["checked"] and row["step_norm"] > 0)
        yield (
            {**row, "steps": row["step"] + 1, "checks": checks, "accepted_checks": accepted, **counts},
            StepReport(
                step=row["step"] + 1,
                radius=row["radius"],
                checked=row["checked"],
                accepted=row["step_norm"] > 0,
                skipped=False,
                trials=0 if isnan(row["trials"]) else int(row["trials"]),
                base_loss=row["base_loss"],
                predicted_reduction=row["predicted_reduction"],
                actual_reduction=row["actual_reduction"],
                fisher_max=row["fisher_max"],
                skipped_steps=counts["skipped_steps"],
            ),
        )


def table_of(run: Run) -> Iterator[dict[str, Any]]:
    """Go through what rows hold that advice is a matter of.

    Yields:
        Values by name; ``checked`` is whether the row has a check of its own.
    """
    names = ("trials", "step_norm", "skipped_steps", "outlier_steps", "predicted_reduction", "actual_reduction")
    steps = arrays(run.series[RADIUS])[0]
    steps = steps[:: max(1, -(-len(steps) // MOST_ROWS))]
    loss = next((key for key in run.losses() if "val" not in key and "test" not in key), "")
    keys = {name: f"trust_region/{name}" for name in names}
    keys |= {"radius": RADIUS, "fisher_max": "fisher/max", "base_loss": loss}
    columns = {name: at(run.series.get(key, ()), steps) for name, key in keys.items()}
    events = events_of(run)
    # A step that was left out is no check, even where a trial loss was evaluated.
    left_out = np.isin(steps, events.skipped.steps) | np.isin(steps, events.outliers.steps)
    columns["checked"] = (columns["trials"] > 0) & ~np.isnan(columns["predicted_reduction"]) & ~left_out
    columns["step"] = steps
    for values in zip(*(column.tolist() for column in columns.values()), strict=True):
        yield dict(zip(columns, values, strict=True))
