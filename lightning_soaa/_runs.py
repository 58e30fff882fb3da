"""Runs as loggers have left them on disk: TensorBoard's event files and ``metrics.csv``, read into plain numbers."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, isnan, nan
from pathlib import Path

from lightning_soaa._watch import Watch
from lightning_soaa.advice import Advice, advise
from lightning_soaa.report import StepReport

Points = list[tuple[int, float]]  # (step of the trainer, value), in the order of steps

RADIUS = "trust_region/radius"
OPTIMIZER = re.compile(r"trust_region(-\d+)?/radius")


class RunError(ValueError):
    """A path that holds no run with SOAA; the text names it and says what was looked for."""


@dataclass(frozen=True)
class Run:
    """What one run logged.

    Args:
        name: what tells it from others, its path by default.
        series: points by key.
    """

    name: str
    series: Mapping[str, Points]

    def at(self, key: str) -> dict[int, float]:
        """Return a key's values by step, empty if it was not logged."""
        return dict(self.series.get(key, ()))

    def losses(self) -> list[str]:
        """Return the keys whose last part speaks of a loss: a mean over an epoch gives way to the steps it is of."""
        keys = sorted(key for key in self.series if "loss" in key.rsplit("/", 1)[-1].lower())
        return [key for key in keys if not (key.endswith("_epoch") and f"{key[:-6]}_step" in keys)]


@dataclass(frozen=True)
class Events:
    """Steps at which something went wrong, as far as rows tell.

    Args:
        rejects: steps of a check whose step was rejected. Those between two rows are not seen.
        skipped: steps by which the count of steps that were not finite had grown since the row before.
        outliers: likewise of those far outside the recent distribution.
    """

    rejects: list[int]
    skipped: list[int]
    outliers: list[int]


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Return the run in a folder or file: ``metrics.csv`` if there is one, else TensorBoard's event files.

    Raises:
        RunError: nothing is there, no such file is in it, or no row in it comes from TrustRegionMonitor.
        ModuleNotFoundError: event files are all there is and tensorboard is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise RunError(f"no such file or folder: {path}")
    table = path if path.suffix == ".csv" else path / "metrics.csv"
    if table.is_file():
        series = read_csv(table)
    elif path.is_file() or any(path.glob("*tfevents*")):
        series = read_events(path)
    else:
        found = sorted({file.parent for file in path.rglob("*") if is_log(file)})[:5] if path.is_dir() else []
        hint = f"; runs are in {', '.join(map(str, found))}" if found else ""
        raise RunError(f"no run in {path}: neither metrics.csv nor an event file of TensorBoard{hint}")
    if RADIUS not in series:
        raise RunError(f"no `{RADIUS}` in {path}: it was not written by a run with TrustRegionMonitor")
    return Run(str(path) if name is None else name, series)


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
        runs.append(Run(f"{run.name}, trust_region{suffix}", series))
    return runs


def is_log(file: Path) -> bool:
    """Return whether a file is one that :func:`read_run` reads."""
    return file.name == "metrics.csv" or "tfevents" in file.name


def read_csv(path: Path) -> dict[str, Points]:
    """Return all columns of numbers but ``step``; rows without a step and fields without a number are left out.

    Of two values for a step, the later one.
    """
    series: dict[str, dict[int, float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if step := row.pop("step", None):
                for key, text in row.items():
                    if text and isinstance(text, str):
                        with suppress(ValueError):
                            series.setdefault(key, {})[int(float(step))] = float(text)
    return {key: sorted(points.items()) for key, points in series.items()}


def read_events(path: Path) -> dict[str, Points]:
    """Return all scalars of an event file or of a folder's event files; of two values for a step, the later one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return {
        key: sorted({point.step: point.value for point in events.Scalars(key)}.items())
        for key in events.Tags()["scalars"]
    }


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Return paths without the folders that all of them share, each at least by its last part."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return [str(Path(*part[shared:])) if len(paths) > 1 else part[-1] for part in parts]


def events_of(run: Run) -> Events:
    """Return the steps at which a row tells of a reject, a skipped step or an outlier."""
    skipped, outliers = (increases(run.series.get(f"trust_region/{name}_steps", [])) for name in ("skipped", "outlier"))
    left_out = {*skipped, *outliers}
    norms = run.at("trust_region/step_norm")
    trials = run.at("trust_region/trials")
    rejects = [step for step, norm in norms.items() if norm == 0 and trials.get(step, 0) > 0 and step not in left_out]
    return Events(rejects, skipped, outliers)


def extremes(points: Points) -> tuple[float, float]:
    """Return the smallest and the largest finite value, nan if there is none."""
    values = [value for _, value in points if isfinite(value)]
    return (min(values), max(values)) if values else (nan, nan)


def last_known(points: Points) -> float:
    """Return the last value that is not nan, nan if there is none."""
    return next((value for _, value in reversed(points) if not isnan(value)), nan)


def increases(points: Points) -> list[int]:
    """Return the steps at which a count is higher than in the row before; the first row is compared with 0."""
    return [after[0] for before, after in pairwise([(-1, 0.0), *points]) if after[1] > before[1]]


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
    """Go through the rows.

    Yields:
        What the optimizer's first group and its report have held, as far as the row tells.
    """
    names = (
        *("trust_region/radius", "trust_region/trials", "trust_region/step_norm", "trust_region/skipped_steps"),
        *("trust_region/outlier_steps", "trust_region/predicted_reduction", "trust_region/actual_reduction"),
        "fisher/max",
    )
    values = {name: run.at(name) for name in names}
    losses = run.at(next((key for key in run.losses() if "val" not in key and "test" not in key), ""))
    events = events_of(run)
    no_check = {*events.skipped, *events.outliers}  # even where a trial loss was evaluated
    checks = accepted = 0
    for step, radius in values[RADIUS].items():
        row = {name.split("/")[-1]: values[name].get(step, nan) for name in names}
        checked = row["trials"] > 0 and not isnan(row["predicted_reduction"]) and step not in no_check
        checks, accepted = checks + checked, accepted + (checked and row["step_norm"] > 0)
        counts = {name: int(row[name]) if row[name] == row[name] else 0 for name in ("skipped_steps", "outlier_steps")}
        yield (
            {**row, "steps": step + 1, "checks": checks, "accepted_checks": accepted, **counts},
            StepReport(
                step=step + 1,
                radius=radius,
                checked=checked,
                accepted=row["step_norm"] > 0,
                skipped=False,
                trials=0 if isnan(row["trials"]) else int(row["trials"]),
                base_loss=losses.get(step, nan),
                predicted_reduction=row["predicted_reduction"],
                actual_reduction=row["actual_reduction"],
                fisher_max=row["max"],
                skipped_steps=counts["skipped_steps"],
            ),
        )
