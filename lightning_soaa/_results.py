"""What Lightning keeps of logged values from one row to the next.

Private names used here: ``_logger_connector`` with ``should_update_logs``, ``should_reset_tensors`` and
``_current_fx``; ``_results``; ``value``, ``_forward_cache``, ``_computed``, ``_update_count`` and ``has_reset`` of
what that holds; ``_current_fx_name`` of a module and ``epoch_loop._batches_that_stepped``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_soaa._compat import accumulating


def rows_possible(trainer: Any) -> bool:
    """Return whether `trainer` writes any rows."""
    return bool(trainer.loggers) and not trainer.barebones


def row_follows(trainer: Any) -> bool:
    """Return whether `trainer` will write a row after this batch, the same answer on all processes.

    These are the conditions of Lightning's ``_LoggerConnector.update_train_step_metrics``.
    """
    every, whole = trainer.log_every_n_steps, trainer.should_stop or getattr(trainer, "fast_dev_run", False)
    if not whole and every and (row_step(trainer) + 1) % every:
        return False  # what the next line says of most batches, without Lightning's walk to its active loop
    if not (trainer._logger_connector.should_update_logs or getattr(trainer, "fast_dev_run", False)):
        return False
    if not rows_possible(trainer):
        return False
    return not (accumulating(trainer) and trainer.lightning_module.automatic_optimization)


def row_step(trainer: Any) -> int:
    """Return the place on the x-axis of the row that `trainer` will write after this batch."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def log_row(trainer: Any, module: Any, row: Mapping[str, float]) -> list[Any]:
    """Add values to the row that `trainer` will write after this batch, as `module.log_dict` does.

    Lightning's ``log`` walks through all that it keeps of a key each time, which takes longer than everything else
    about a row. Keys that it knows, with what they were logged by, are given their new values.

    Returns:
        What Lightning keeps the values in, for :func:`pass_over`.
    """
    results, connector, place = trainer._results, trainer._logger_connector, module._current_fx_name
    # The numbers are on the host and stay there; float64 loses none of them, whatever the module's dtype.
    values = torch.tensor(list(row.values()), dtype=torch.float64, device="cpu").unbind()
    keys = [f"{place}.{name}" for name in row]
    if results.keys() >= set(keys):
        if connector.should_reset_tensors(place):  # else the next to log from here would, and with it this row
            results.reset(metrics=False, fx=place)
        connector._current_fx = place
        for key, value in zip(keys, values, strict=True):
            _give(results[key], value)
    else:
        named = dict(zip(row, values, strict=True))
        module.log_dict(named, on_step=True, on_epoch=False, rank_zero_only=False, batch_size=1)
    return [results[key] for key in keys]


def _give(metric: Any, value: torch.Tensor) -> None:
    """Do what Lightning does with a value of a key that is logged on steps only, and torchmetrics around it."""
    metric.value = metric._forward_cache = value
    metric._computed = None
    metric._update_count += 1
    metric.has_reset = False


class _UntilStop:
    """A bool that is true until `trainer` has been told to stop."""

    __slots__ = ("trainer",)

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __bool__(self) -> bool:
        return not self.trainer.should_stop


def pass_over(trainer: Any, kept: Iterable[Any]) -> None:
    """Have Lightning pass over the values of :func:`log_row` until there are new ones, or the run is to stop.

    It has entered them in ``callback_metrics`` and ``logged_metrics``, where they stay, and would enter them again
    after each batch. The row that ends a run that another callback has stopped repeats them.
    """
    mark = _UntilStop(trainer)
    for metric in kept:
        metric.has_reset = mark
