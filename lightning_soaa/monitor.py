"""TrustRegionMonitor: logs what SOAA reports, in the rows that the trainer writes anyway, and says what looks wrong."""

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_soaa._checks import refuse
from lightning_soaa._compat import warn
from lightning_soaa.advice import TrustRegionWarning, Watch, advise
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

    Values join the row that the trainer writes for the batch, every ``log_every_n_steps`` optimizer steps; on other
    batches nothing is computed, and only numbers that are on the host are looked at. The keys are the same in all
    rows, ``nan`` where there is no value:

    ======================================  =============================================================
    ``trust_region/radius``                 what the next step starts from
    ``trust_region/acceptance_ratio``       actual over predicted reduction of the last check (rho)
    ``trust_region/acceptance_rate``        share of this epoch's checks whose step was accepted
    ``trust_region/predicted_reduction``    what the model of the loss promised at the last check
    ``trust_region/actual_reduction``       what the same batch's loss did
    ``trust_region/step_norm``              length of the last step; 0 if it was rejected or skipped
    ``trust_region/trials``                 trial losses evaluated in the last step
    ``trust_region/skipped_steps``          steps so far with a loss or gradient that was not finite
    ``trust_region/outlier_steps``          steps so far left out because the gradient was far outside the usual
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
        advice: warn (:class:`~lightning_soaa.advice.TrustRegionWarning`, on the first process) of what looks wrong,
            with a remedy: each kind of advice once a run, and not again after a resume.

    Raises:
        TypeError: `console` or `advice` is not a bool.
        ValueError: at fit start, if there is no SOAA optimizer or two parameter groups have one name.

    Example::

        >>> from lightning_soaa.monitor import TrustRegionMonitor
        >>> callbacks = [TrustRegionMonitor()]  # for Trainer(callbacks=callbacks)

    Without a logger there is only the line and the advice. Does not read ahead: where another callback stops the run
    after the monitor has seen the batch, the row written then repeats the values of the row before.
    """

    def __init__(self, console: bool = True, advice: bool = True) -> None:
        for name, value in (("console", console), ("advice", advice)):
            if not isinstance(value, bool):
                refuse("TrustRegionMonitor", name, "a bool", value, TypeError)
        self.console, self.advice = console, advice
        self._epoch_start: dict[str, Counts] = {}
        self._figures: dict[str, EpochFigures] = {}
        self._watches: dict[str, Watch] = {}
        self._said: dict[str, list[str]] = {}
        self._texts: dict[str, list[str]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what was said in the run before; a checkpoint to resume from is loaded after this."""
        if stage == "fit":
            self._said, self._texts = {}, {}

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
        """Start watching, and counting if the run goes on in mid-epoch and no checkpoint says where the epoch began."""
        for suffix, optimizer in find_optimizers(trainer.optimizers).items():
            counts = counts_of(optimizer)
            self._epoch_start.setdefault(suffix, counts)
            self._watches[suffix] = Watch(counts["checks"], counts["accepted_checks"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's figures. Lightning does not call this when it resumes in mid-epoch."""
        for suffix, optimizer in find_optimizers(trainer.optimizers).items():
            self._epoch_start[suffix] = counts_of(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the numbers on the host; add values to the row of this batch, if there will be one."""
        row_due = row_follows(trainer)
        # Under manual optimization the trainer writes rows for batches that only accumulate, too: no step, no report.
        stepped = row_due and not trainer.fit_loop._should_accumulate()
        values: dict[str, float] = {}
        for suffix, optimizer in find_optimizers(trainer.optimizers).items():
            report = optimizer.last_step if stepped else None
            if row_due:
                values |= self._row(suffix, optimizer, report)
            self._advise(trainer, suffix, optimizer, report)
        if row_due:
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
            self._advise(trainer, suffix, optimizer, report)
        if trainer.is_global_zero and getattr(bar, "is_enabled", True):  # a bar of the user's own may not say
            bar.print(render(epoch_lines(trainer.current_epoch, rows)))

    def state_dict(self) -> dict[str, Any]:
        """Return the counts at the start of the epoch, for the figures of a resumed run, and which advice was given."""
        return {
            "epoch_start": {suffix: dict(counts) for suffix, counts in self._epoch_start.items()},
            "said": {suffix: list(kinds) for suffix, kinds in self._said.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._epoch_start = {suffix: dict(counts) for suffix, counts in state_dict["epoch_start"].items()}
        self._said = {suffix: list(kinds) for suffix, kinds in state_dict.get("said", {}).items()}

    def advice_given(self) -> list[list[str]]:
        """Return the texts of the advice given in this fit, a list for each SOAA optimizer.

        Advice that a run gave before it was resumed is not repeated, and its text is not known.
        """
        return [list(self._texts.get(suffix, ())) for suffix in self._watches]

    def _row(self, suffix: str, optimizer: Monitored, report: StepReport | None) -> dict[str, float]:
        """Return what is logged of an optimizer; all processes must call it."""
        head = optimizer.param_groups[0]
        return {
            f"trust_region{suffix}/radius": head["radius"],
            f"trust_region{suffix}/acceptance_rate": self._epoch_so_far(suffix, optimizer)["acceptance_rate"],
            f"trust_region{suffix}/skipped_steps": head["skipped_steps"],
            f"trust_region{suffix}/outlier_steps": head.get("outlier_steps", 0),
            **report_values(report, suffix),
            **group_values(optimizer.param_groups, suffix),
        }

    def _advise(self, trainer: Trainer, suffix: str, optimizer: Monitored, report: StepReport | None) -> None:
        """Look at an optimizer's numbers, and at its report if there is one; warn of what has not been said yet."""
        if not self.advice:
            return
        watch = self._watches[suffix]
        watch.see_numbers(optimizer.param_groups[0])
        watch.see_report(report)
        for kind, text in advise(watch):
            said = self._said.setdefault(suffix, [])
            if kind not in said:
                said.append(kind)
                self._texts.setdefault(suffix, []).append(text)
                who = f"trust_region{suffix}: " if len(self._watches) > 1 else ""
                warn(trainer, f"TrustRegionMonitor: {who}{text}", TrustRegionWarning)

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
