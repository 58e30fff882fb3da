"""TrustRegionMonitor: logs what SOAA reports, in the rows that the trainer writes anyway, and says what looks wrong."""

from collections.abc import Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_soaa._clock import CHECKED, OTHER, UNCHECKED, BatchClock
from lightning_soaa._compat import accumulating, say, shadow_bar, shards_flat, unshadow_bar, warn
from lightning_soaa._details import Details, make_details, refuse_parts, write_distributions, write_layout
from lightning_soaa._results import log_row, pass_over, row_follows, row_step, rows_possible
from lightning_soaa._rows import (
    Counts,
    Monitored,
    bar_rows,
    check_layers,
    check_switches,
    count_values,
    counts_of,
    find_optimizers,
    group_values,
    numbers_of,
    radius_of,
    report_values,
    require_optimizers,
    run_row,
    trials_of,
)
from lightning_soaa._watch import Watch
from lightning_soaa.advice import TrustRegionWarning, advise
from lightning_soaa.console import EpochRow, bar_entries, beside, epoch_lines, render, run_lines
from lightning_soaa.metrics import EpochFigures, figures_over
from lightning_soaa.report import StepReport


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
    ``trust_region/rejects``                checks so far whose step was rejected
    ``trust_region/skipped_steps``          steps so far with a loss or gradient that was not finite
    ``trust_region/outlier_steps``          steps so far left out because the gradient was far outside the usual
    ``trust_region/group_radius/<group>``   bound of the last step in units of the parameters, for each of
                                            several parameter groups
    ``fisher/mean``, ``min``, ``max``,      the diagonal Fisher over all coordinates
    ``fisher/trace``
    ``fisher/active_fraction``              share of coordinates that the Fisher limits, not the radius
    ``fisher/rotated_fraction``             with KroneckerFisher: share of coordinates whose parameter is rotated
    ``fisher/basis_age``                    with it: steps since the basis that has waited longest was refreshed
    ======================================  =============================================================

    Names follow :class:`~lightning.pytorch.callbacks.LearningRateMonitor`: with several SOAA optimizers the second has
    ``trust_region-1/...`` and ``fisher-1/...``; a parameter group is called by its ``"name"``, or ``pg1``, ``pg2``.
    Callbacks can monitor the keys; they see the values of the last row.

    Args:
        console: show radius and acceptance rate in the progress bar, print a line at the end of each epoch above it
            and a summary at the end of the fit. Without a bar nothing is printed.
        advice: warn (:class:`~lightning_soaa.advice.TrustRegionWarning`, on the first process) of what looks wrong,
            with a remedy: each kind of advice once a run, and not again after a resume.
        layers: log ``fisher/layer_trace/<module>`` and ``trust_region/layer_step/<module>``, the norm of a step,
            weight decay included, over that of the parameters: of this many modules, those with most parameters, or
            of the named ones (default: 0). A row then waits for the device once more and copies the parameters.
        histograms: write distributions of the Fisher (log10 of its second moment) and of the step to TensorBoard and
            W&B, for each of `layers` or for the whole model (default: False). On the first process.
        check_time: log ``trust_region/check_time_share``, the share of this fit's time that checks took (default:
            False); the summary has it anyway. ``nan`` until there have been steps without a check.
        layout: lay out a page "Trust region" in TensorBoard's tab of custom scalars (default: True).

    Raises:
        TypeError: a switch is not a bool, or `layers` neither a whole number nor names.
        ValueError: `layers` is negative; at fit start, if there is no SOAA optimizer, two parameter groups have one
            name, or no module has a name in `layers`.

    Example::

        >>> from lightning_soaa.monitor import TrustRegionMonitor
        >>> callbacks = [TrustRegionMonitor()]  # for Trainer(callbacks=callbacks)

    Without a logger there is only the line and the advice. Does not read ahead: where another callback stops the run
    after the monitor has seen the batch, the row written then repeats the values of the row before.
    """

    def __init__(
        self,
        console: bool = True,
        advice: bool = True,
        *,
        layers: int | Sequence[str] = 0,
        histograms: bool = False,
        check_time: bool = False,
        layout: bool = True,
    ) -> None:
        check_switches(console=console, advice=advice, histograms=histograms, check_time=check_time, layout=layout)
        self.layers = check_layers(layers)
        self.console, self.advice, self.histograms = console, advice, histograms
        self.check_time, self.layout = check_time, layout
        self._epoch_start: dict[str, Counts] = {}
        self._figures: dict[str, EpochFigures] = {}
        self._watches: dict[str, Watch] = {}
        self._said: dict[str, list[str]] = {}
        self._texts: dict[str, list[str]] = {}
        self._details: dict[str, Details] = {}
        self._range: dict[str, tuple[float, float]] = {}
        self._clock = BatchClock(torch.device("cpu"))
        self._trials = 0
        self._found: dict[str, Monitored] = {}
        self._numbers: list[tuple[Any, ...]] = []  # of the optimizers, where anything was last told
        self._bar: tuple[Any, dict[str, str]] = ({}, {})  # numbers that the bar shows, and their text
        self._kept: list[Any] = []  # what Lightning keeps the last row's values in, until it has written them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what was said in the run before; a checkpoint to resume from is loaded after this."""
        if stage == "fit":
            self._said, self._texts = {}, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers; refuse a run that has none, or options that need whole parameters."""
        self._found = found = require_optimizers(trainer.optimizers)
        suffixes = found if trainer.world_size > 1 else ()  # one process needs no sums over processes
        self._figures = {suffix: EpochFigures().to(pl_module.device) for suffix in suffixes}
        self._clock, self._range = BatchClock(pl_module.device), dict.fromkeys(found, (inf, -inf))
        if shards_flat(trainer):
            refuse_parts(self.layers, histograms=self.histograms)
        self._details = make_details(pl_module.named_parameters(), found, self.layers, histograms=self.histograms)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start watching, and counting if the run goes on in mid-epoch and no checkpoint says where the epoch began."""
        for suffix, optimizer in find_optimizers(trainer.optimizers).items():
            counts = counts_of(optimizer)
            self._epoch_start.setdefault(suffix, counts)
            self._watches[suffix] = Watch(counts["checks"], counts["accepted_checks"])
        self._numbers, self._trials = [], trials_of(self._found)
        if self.layout and trainer.is_global_zero and rows_possible(trainer):
            write_layout(trainer.loggers)
        bar = trainer.progress_bar_callback
        if self.console and bar is not None:
            shadow_bar(bar, partial(self._beside_the_bar, trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's figures. Lightning does not call this when it resumes in mid-epoch."""
        self._found = find_optimizers(trainer.optimizers)
        for suffix, optimizer in self._found.items():
            self._epoch_start[suffix] = counts_of(optimizer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, and take the last row's values out of what Lightning goes through after each batch."""
        if self._kept:
            pass_over(trainer, self._kept)
            self._kept = []
        self._clock.start()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Copy the parameters if the step will be in a row that shows more than the report."""
        if self._details and row_follows(trainer):
            for details in self._details.values():
                if details.optimizer is getattr(optimizer, "optimizer", optimizer):
                    details.remember()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the numbers on the host; add values to the row of this batch, if there will be one."""
        row_due, waiting, numbers = row_follows(trainer), accumulating(trainer), numbers_of(self._found)
        if numbers == self._numbers and not row_due:  # most batches: a step without a check
            self._clock.stop(OTHER if waiting else UNCHECKED)
            return
        trials, self._numbers = trials_of(self._found), numbers
        self._clock.stop(OTHER if waiting else CHECKED if trials > self._trials else UNCHECKED)
        self._trials = trials
        # Under manual optimization the trainer writes rows for batches that only accumulate, too: no step, no report.
        stepped = row_due and not waiting
        values: dict[str, float] = {}
        for suffix, optimizer in self._found.items():
            report, radius = optimizer.last_step if stepped else None, radius_of(optimizer)
            # Where there is no radius yet it is nan, which is neither smaller nor larger.
            self._range[suffix] = (min(self._range[suffix][0], radius), max(self._range[suffix][1], radius))
            if row_due:
                values |= self._row(suffix, optimizer, report)
            if stepped:
                self._write_distributions(trainer, suffix)
            self._advise(trainer, suffix, optimizer, report)
        if row_due:
            self._kept = log_row(trainer, pl_module, values)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line. All processes take part in its figures, one prints."""
        bar = trainer.progress_bar_callback
        if not self.console or bar is None:
            return
        rows = []
        for suffix, optimizer in find_optimizers(trainer.optimizers).items():
            report = optimizer.last_step  # brings what the host has not read yet into the counters
            figures = self._epoch_so_far(suffix, optimizer)
            rows.append(EpochRow(name=f"trust_region{suffix}", radius=radius_of(optimizer), **figures))
            self._advise(trainer, suffix, optimizer, report)
        if trainer.is_global_zero and getattr(bar, "is_enabled", True):  # a bar of the user's own may not say
            bar.print(render(epoch_lines(trainer.current_epoch, rows)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary of the fit, on the first process."""
        bar = trainer.progress_bar_callback
        if bar is None or not self.console or not trainer.is_global_zero or not getattr(bar, "is_enabled", True):
            return
        rows = [
            run_row(suffix, optimizer, self._range[suffix], self._clock.check_share(), self._said.get(suffix, []))
            for suffix, optimizer in find_optimizers(trainer.optimizers).items()
        ]
        say(bar, render(run_lines(rows)))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the progress bar as it was: teardown is not called."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the progress bar as it was, and let go of the optimizers."""
        self._found, self._kept = {}, []
        if trainer.progress_bar_callback is not None:
            unshadow_bar(trainer.progress_bar_callback)

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
        return {
            **count_values(optimizer, suffix),
            f"trust_region{suffix}/acceptance_rate": self._epoch_so_far(suffix, optimizer)["acceptance_rate"],
            **report_values(report, suffix, rotates=getattr(optimizer, "rotates", False)),
            **({f"trust_region{suffix}/check_time_share": self._clock.check_share()} if self.check_time else {}),
            **(self._details[suffix].values(suffix, report) if suffix in self._details else {}),
            **group_values(optimizer.param_groups, suffix),
        }

    def _advise(self, trainer: Trainer, suffix: str, optimizer: Monitored, report: StepReport | None) -> None:
        """Look at an optimizer's numbers, and at its report if there is one; warn of what has not been said yet."""
        watch = self._watches[suffix]
        if not (self.advice and watch.see_news(optimizer.param_groups[0], report)):
            return
        for kind, text in advise(watch):
            said = self._said.setdefault(suffix, [])
            if kind not in said:
                said.append(kind)
                self._texts.setdefault(suffix, []).append(text)
                who = f"trust_region{suffix}: " if len(self._watches) > 1 else ""
                warn(trainer, f"TrustRegionMonitor: {who}{text}", TrustRegionWarning)

    def _write_distributions(self, trainer: Trainer, suffix: str) -> None:
        """Write the distributions of a row, on the first process, and drop the copy of the parameters."""
        if suffix in self._details:
            details = self._details[suffix]
            if self.histograms and trainer.is_global_zero:
                write_distributions(trainer.loggers, details.distributions(suffix), row_step(trainer))
            details.forget()

    def _beside_the_bar(self, trainer: Trainer, shown: dict[str, Any]) -> dict[str, Any]:
        """Return what the progress bar shows, with radius and acceptance rate: numbers that are on the host already."""
        numbers = bar_rows(self._found or find_optimizers(trainer.optimizers), self._epoch_start)
        if numbers != self._bar[0]:
            self._bar = numbers, bar_entries(numbers)
        return beside(shown, self._bar[1])

    def _epoch_so_far(self, suffix: str, optimizer: Monitored) -> dict[str, float]:
        """Return the epoch's figures over all processes; all of them must call it."""
        start = self._epoch_start[suffix]
        counts = {name: count - start[name] for name, count in counts_of(optimizer).items()}
        return figures_over(self._figures.get(suffix), counts)
