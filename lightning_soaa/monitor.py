"""TrustRegionMonitor: logs what SOAA reports, in the rows that the trainer writes anyway."""

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_soaa._checks import refuse
from lightning_soaa.console import EpochRow, epoch_lines, render
from lightning_soaa.metrics import FIGURES, EpochFigures
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

Counts = dict[str, int]


class Monitored(Protocol):
    """What is read of an optimizer."""

    param_groups: list[dict[str, Any]]

    @property
    def last_step(self) -> StepReport | None:
        """Return what the last step did; computed when read."""


class TrustRegionMonitor(Callback):
    """Log radius, acceptance and Fisher statistics of :class:`~lightning_soaa.SOAA` to the Trainer's loggers.

    Values join the row that the trainer writes for the batch, every ``log_every_n_steps`` optimizer steps; nothing is
    computed or read on other batches. The keys are the same in all rows, ``nan`` where there is no value:

    ======================================  =============================================================
    ``trust_region/radius``                 what the next step starts from
    ``trust_region/acceptance_ratio``       actual over predicted reduction of the last check (rho)
    ``trust_region/acceptance_rate``        share of this epoch's checks whose step was accepted
    ``trust_region/predicted_reduction``    what the model of the loss promised at the last check
    ``trust_region/actual_reduction``       what the same batch's loss did
    ``trust_region/step_norm``              length of the last step; 0 if it was rejected or skipped
    ``trust_region/trials``                 trial losses evaluated in the last step
    ``trust_region/skipped_steps``          steps so far with a loss or gradient that was not finite
    ``trust_region/group_radius/<group>``   bound of the last step in units of the parameters, for each of
                                            several parameter groups
    ``fisher/mean``, ``min``, ``max``,      the diagonal Fisher over all coordinates
    ``fisher/trace``
    ``fisher/active_fraction``              share of coordinates that the Fisher limits, not the radius
    ======================================  =============================================================

    Names follow :class:`~lightning.pytorch.callbacks.LearningRateMonitor`: with several SOAA optimizers the second has
    ``trust_region-1/...`` and ``fisher-1/...``; a parameter group is called by its ``"name"``, or ``pg1``, ``pg2``.
    Callbacks can monitor the keys; they see the values of the last row.

    Args:
        console: print a line at the end of each epoch, above the progress bar. Without a bar there is no line.

    Raises:
        TypeError: `console` is not a bool.
        ValueError: at fit start, if there is no SOAA optimizer or two parameter groups have one name.

    Example::

        >>> from lightning_soaa.monitor import TrustRegionMonitor
        >>> callbacks = [TrustRegionMonitor()]  # for Trainer(callbacks=callbacks)

    Does nothing without a logger, except for the line. Does not read ahead: where another callback stops the run after
    the monitor has seen the batch, the row written then repeats the values of the row before.
    """

    def __init__(self, console: bool = True) -> None:
        if not isinstance(console, bool):
            refuse("TrustRegionMonitor", "console", "a bool", console, TypeError)
        self.console = console
        self._epoch_start: dict[str, Counts] = {}
        self._figures: dict[str, EpochFigures] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers; refuse a run that has none."""
        found = find_optimizers(trainer.optimizers)
        if not found:
            names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise ValueError(
                f"TrustRegionMonitor: `optimizers` must be one SOAA at least, got {names}; add SOAAMixin to the "
                "LightningModule, return SOAA(...) from configure_optimizers, or leave the monitor out"
            )
        for optimizer in found.values():
            group_names(optimizer.param_groups)
        self._figures = {suffix: EpochFigures().to(pl_module.device) for suffix in found}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting here if the run goes on in mid-epoch and its checkpoint does not say where the epoch began."""
        for suffix, optimizer in find_optimizers(trainer.optimizers).items():
            self._epoch_start.setdefault(suffix, counts_of(optimizer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's figures. Lightning does not call this when it resumes in mid-epoch."""
        for suffix, optimizer in find_optimizers(trainer.optimizers).items():
            self._epoch_start[suffix] = counts_of(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the values to the row of this batch, if there will be one."""
        if not row_follows(trainer):
            return
        # Under manual optimization the trainer writes rows for batches that only accumulate, too: no step, no report.
        stepped = not trainer.fit_loop._should_accumulate()
        values: dict[str, float] = {}
        for suffix, optimizer in find_optimizers(trainer.optimizers).items():
            report = optimizer.last_step if stepped else None
            head = optimizer.param_groups[0]
            values |= {
                f"trust_region{suffix}/radius": head["radius"],
                f"trust_region{suffix}/acceptance_rate": self._epoch_so_far(suffix, optimizer)["acceptance_rate"],
                f"trust_region{suffix}/skipped_steps": head["skipped_steps"],
                **report_values(report, suffix),
                **group_values(optimizer.param_groups, suffix),
            }
        # The numbers are on the host and stay there; float64 loses none of them, whatever the module's dtype.
        row = {key: torch.tensor(value, dtype=torch.float64, device="cpu") for key, value in values.items()}
        pl_module.log_dict(row, on_step=True, on_epoch=False, rank_zero_only=False, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line. All processes take part in its figures, one prints."""
        bar = trainer.progress_bar_callback
        if not self.console or bar is None:
            return
        rows = []
        for suffix, optimizer in find_optimizers(trainer.optimizers).items():
            report = optimizer.last_step  # brings what the host has not read yet into the counters
            figures = self._epoch_so_far(suffix, optimizer)
            radius = nan if report is None else report.radius
            rows.append(EpochRow(name=f"trust_region{suffix}", radius=radius, **figures))
        if trainer.is_global_zero and getattr(bar, "is_enabled", True):  # a bar of the user's own may not say
            bar.print(render(epoch_lines(trainer.current_epoch, rows)))

    def state_dict(self) -> dict[str, Any]:
        """Return the counts at the start of the epoch, so that a run resumed in mid-epoch knows the epoch's figures."""
        return {"epoch_start": {suffix: dict(counts) for suffix, counts in self._epoch_start.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._epoch_start = {suffix: dict(counts) for suffix, counts in state_dict["epoch_start"].items()}

    def _epoch_so_far(self, suffix: str, optimizer: Monitored) -> dict[str, float]:
        """Return the epoch's figures over all processes; all of them must call it.

        Filled anew each time from the optimizer's own counters, so that they are the only truth across checkpoints.
        """
        figures, start = self._figures[suffix], self._epoch_start[suffix]
        figures.reset()
        figures.update(**{name: count - start[name] for name, count in counts_of(optimizer).items()})
        return dict(zip(FIGURES, figures.compute().tolist(), strict=True))


def row_follows(trainer: Trainer) -> bool:
    """Return whether the trainer will write a row after this batch, the same answer on all processes.

    These are the conditions of Lightning's ``_LoggerConnector.update_train_step_metrics``.
    """
    if trainer.barebones or not trainer.loggers:
        return False
    if trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization:
        return False
    return trainer._logger_connector.should_update_logs or bool(getattr(trainer, "fast_dev_run", False))


def find_optimizers(optimizers: Iterable[Any]) -> dict[str, Monitored]:
    """Return the SOAA optimizers by the suffix of their keys: ``""``, ``"-1"``, ``"-2"``."""
    raw = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]  # Lightning and DeepSpeed wrap
    found = [optimizer for optimizer in raw if optimizer.param_groups[0].keys() >= NUMBERS]
    return {f"-{index}" if index else "": optimizer for index, optimizer in enumerate(found)}


def counts_of(optimizer: Monitored) -> Counts:
    """Return the counters of the whole run. Plain ints in a group: reading them waits for no device."""
    return {name: int(optimizer.param_groups[0][name]) for name in COUNTERS}


def report_values(report: StepReport | None, suffix: str) -> dict[str, float]:
    """Return what is logged of a report, with the same keys if there is none."""
    return {
        f"{prefix}{suffix}/{key}": nan if report is None else float(getattr(report, field))
        for prefix, fields in STEP_FIELDS.items()
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
