"""What the monitor reads of an optimizer, and the keys it goes by. No Trainer is known here."""

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import Any, Protocol

from lightning_soaa._checks import refuse
from lightning_soaa.console import RunRow
from lightning_soaa.report import StepReport

# Counts in the first parameter group, plain ints of the whole run.
COUNTERS = ("checks", "accepted_checks", "skipped_steps")
# What tells SOAA from other optimizers. The monitor knows no optimizer's code: an optimizer that keeps these plain
# numbers in its first group and reports its last step can be monitored. (`last_step` is None before the first step.)
NUMBERS = frozenset({"radius", *COUNTERS})

# Key after the prefix, and the field of the report it shows.
STEP_FIELDS = {
    "trust_region": {
        name: name for name in ("acceptance_ratio", "predicted_reduction", "actual_reduction", "step_norm", "trials")
    },
    "fisher": {
        "mean": "fisher_mean",
        "min": "fisher_min",
        "max": "fisher_max",
        "trace": "fisher_trace",
        "active_fraction": "active_fraction",
    },
}

# The same, where a Fisher works in coordinates of its own.
BASIS_FIELDS = {"fisher": {name: name for name in ("rotated_fraction", "basis_age")}}

Counts = dict[str, int]
_MORE = ("outlier_steps", "total_trials")  # counts that an optimizer may keep as well


class Monitored(Protocol):
    """What is read of an optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def last_step(self) -> StepReport | None:
        """Return what the last step did; computed when read."""


def is_kind(obj: object, name: str) -> bool:
    """Return whether a class of `obj` has this name: Lightning comes as two packages, whose loggers may be missing."""
    return name in {kind.__name__ for kind in type(obj).__mro__}


def check_switches(**switches: Any) -> None:
    """Refuse a switch that is no bool.

    Raises:
        TypeError: one is not.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            refuse("TrustRegionMonitor", name, "a bool", value, TypeError)


def find_optimizers(optimizers: Iterable[Any]) -> dict[str, Monitored]:
    """Return the SOAA optimizers by the suffix of their keys: ``""``, ``"-1"``, ``"-2"``."""
    raw = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]  # Lightning and DeepSpeed wrap
    found = [optimizer for optimizer in raw if optimizer.param_groups[0].keys() >= NUMBERS]
    return {f"-{index}" if index else "": optimizer for index, optimizer in enumerate(found)}


def require_optimizers(optimizers: Sequence[Any]) -> dict[str, Monitored]:
    """Return what :func:`find_optimizers` does.

    Raises:
        ValueError: there is none, or two parameter groups of one have the same name.
    """
    found = find_optimizers(optimizers)
    if not found:
        names = [type(optimizer).__name__ for optimizer in optimizers]
        raise ValueError(
            f"TrustRegionMonitor: `optimizers` must be one SOAA at least, got {names}; add SOAAMixin to the "
            "LightningModule, return SOAA(...) from configure_optimizers, or leave the monitor out"
        )
    for optimizer in found.values():
        group_names(optimizer.param_groups)
    return found


def numbers_of(optimizers: Mapping[str, Monitored]) -> list[tuple[Any, ...]]:
    """Return of each optimizer the numbers that are others after a step that has anything to tell: no wait."""
    heads = [optimizer.param_groups[0] for optimizer in optimizers.values()]
    return [
        (head["radius"], head["checks"], head["accepted_checks"], head["skipped_steps"], *map(head.get, _MORE))
        for head in heads
    ]


def counts_of(optimizer: Monitored) -> Counts:
    """Return the counters of the whole run. Plain ints in a group: reading them waits for no device."""
    return {name: int(optimizer.param_groups[0][name]) for name in COUNTERS}


def radius_of(optimizer: Monitored) -> float:
    """Return the radius, nan before the first step. A report has it, too, but not where a run goes on."""
    head = optimizer.param_groups[0]
    return float(head["radius"]) if head.get("steps", 1) else nan


def trials_of(optimizers: Mapping[str, Monitored]) -> int:
    """Return how many trials there have been, or checks where trials are not counted: plain ints, no wait."""
    return sum(
        int(one.param_groups[0].get("total_trials", one.param_groups[0]["checks"])) for one in optimizers.values()
    )


def bar_rows(
    optimizers: Mapping[str, Monitored], epoch_start: Mapping[str, Counts]
) -> dict[str, tuple[float, int, int]]:
    """Return each optimizer's radius, and the epoch's checks and how many of them were accepted."""
    rows = {}
    for suffix, optimizer in optimizers.items():
        head, start = optimizer.param_groups[0], epoch_start[suffix]
        checks, accepted = (head[name] - start[name] for name in ("checks", "accepted_checks"))
        rows[suffix] = (head["radius"], checks, accepted)
    return rows


def run_row(
    suffix: str, optimizer: Monitored, radii: tuple[float, float], check_share: float, advice: Sequence[str]
) -> RunRow:
    """Return an optimizer's row of the summary; `radii` are the smallest and the largest of the fit."""
    head, counts = optimizer.param_groups[0], counts_of(optimizer)
    return RunRow(
        name=f"trust_region{suffix}",
        steps=head.get("steps", 0),
        checks=counts["checks"],
        rejects=counts["checks"] - counts["accepted_checks"],
        skipped_steps=counts["skipped_steps"],
        outlier_steps=head.get("outlier_steps", 0),
        radius=head["radius"],
        radius_low=radii[0],
        radius_high=radii[1],
        check_share=check_share,
        advice=advice,
    )


def check_layers(layers: Any) -> int | tuple[str, ...]:
    """Return `layers` as a whole number or names.

    Raises:
        TypeError: it is neither.
        ValueError: it is negative.
    """
    if isinstance(layers, int) and not isinstance(layers, bool):
        return layers if layers >= 0 else refuse("TrustRegionMonitor", "layers", ">= 0", layers)
    names = isinstance(layers, Sequence) and not isinstance(layers, str)
    if not names or not all(isinstance(name, str) for name in layers):
        refuse("TrustRegionMonitor", "layers", "a whole number or names of modules", layers, TypeError)
    return tuple(layers)


def count_values(optimizer: Monitored, suffix: str) -> dict[str, float]:
    """Return what is logged of the numbers in the first group."""
    head = optimizer.param_groups[0]
    return {
        f"trust_region{suffix}/radius": head["radius"],
        f"trust_region{suffix}/rejects": head["checks"] - head["accepted_checks"],
        f"trust_region{suffix}/skipped_steps": head["skipped_steps"],
        f"trust_region{suffix}/outlier_steps": head.get("outlier_steps", 0),
    }


def report_values(report: StepReport | None, suffix: str, *, rotates: bool = False) -> dict[str, float]:
    """Return what is logged of a report, with the same keys if there is none; `rotates` adds those of bases."""
    return {
        f"{prefix}{suffix}/{key}": nan if report is None else float(getattr(report, field))
        for table in (STEP_FIELDS, *((BASIS_FIELDS,) if rotates else ()))
        for prefix, fields in table.items()
        for key, field in fields.items()
    }


def group_values(groups: Sequence[Mapping[str, Any]], suffix: str) -> dict[str, float]:
    """Return each group's radius where there are several groups and the optimizer keeps one for each."""
    if len(groups) == 1:
        return {}
    return {
        f"trust_region{suffix}/group_radius/{name}": float(group["group_radius"])
        for name, group in zip(group_names(groups), groups, strict=True)
        if "group_radius" in group
    }


def group_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of parameter groups: their ``"name"``, or ``pg1``, ``pg2``.

    Raises:
        ValueError: two groups have the same name.
    """
    names = [str(group.get("name", f"pg{index}")) for index, group in enumerate(groups, start=1)]
    if len(set(names)) < len(names):
        refuse("TrustRegionMonitor", "name", "unique among the parameter groups of an optimizer", names)
    return names
