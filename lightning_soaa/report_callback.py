"""TrustRegionReport: the page that shows what the trust region did, written where the run ends."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_soaa._checks import refuse
from lightning_soaa._compat import info, warn
from lightning_soaa._rows import is_kind
from lightning_soaa._runs import RunError
from lightning_soaa.monitor import TrustRegionMonitor


class TrustRegionReport(Callback):
    """Write a page about the trust region at the end of a fit, on the first process.

    It is made of what a :class:`~lightning.pytorch.loggers.TensorBoardLogger` or
    :class:`~lightning.pytorch.loggers.CSVLogger` has written, and of the advice that
    :class:`~lightning_soaa.TrustRegionMonitor` gave. ``python -m lightning_soaa.run_report`` makes the same page of a
    run that is over, and compares several.

    Args:
        path: the file; one that ends in ``.png`` is a picture, any other a page of HTML. None (default) for
            ``trust_region.html`` in the logger's folder.

    Raises:
        TypeError: `path` is neither None, a string nor a path.
        ModuleNotFoundError: at fit start, if matplotlib or, where there is no CSVLogger, tensorboard is not installed.
        ValueError: at fit start, if there is no such logger.

    Example::

        >>> from lightning_soaa import TrustRegionReport
        >>> callbacks = [TrustRegionReport("report.html")]  # for Trainer(callbacks=callbacks)

    Does nothing under ``fast_dev_run``, which has no logs.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        if path is not None and not isinstance(path, str | Path):
            refuse("TrustRegionReport", "path", "None, a string or a path", path, TypeError)
        self.path = None if path is None else Path(path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse at the start what would fail at the end."""
        if stage != "fit" or fast(trainer):
            return
        from lightning_soaa.run_report import needs

        needs("matplotlib")
        if logger_of(trainer) is None:
            names = [type(logger).__name__ for logger in trainer.loggers]
            raise ValueError(
                f"TrustRegionReport: `logger` must be a TensorBoardLogger or a CSVLogger at least, got {names}; add "
                "CSVLogger(...) to Trainer(logger=[...])"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page; a run that has logged nothing gets a warning."""
        logger = None if fast(trainer) else logger_of(trainer)
        if logger is None or not trainer.is_global_zero:
            return
        from lightning_soaa.run_report import load, write_report

        folder = Path(logger.log_dir)
        path = folder / "trust_region.html" if self.path is None else self.path
        logger.save()
        try:
            runs = load([folder])
        except RunError as error:
            warn(trainer, f"TrustRegionReport: nothing to show: {error}")
            return
        monitor = next((call for call in trainer.callbacks if isinstance(call, TrustRegionMonitor)), None)  # type: ignore[attr-defined]
        given = None if monitor is None or not monitor.advice else monitor.advice_given()
        kind = "png" if path.suffix == ".png" else "html"
        write_report(runs, given=given, **{kind: path})
        info(trainer, f"TrustRegionReport: wrote {path}")


def fast(trainer: Trainer) -> bool:
    """Return whether the run is a ``fast_dev_run`` or has no loggers by design."""
    return bool(getattr(trainer, "fast_dev_run", False)) or trainer.barebones


def logger_of(trainer: Trainer) -> Any:
    """Return the first logger whose files :func:`~lightning_soaa._runs.read_run` reads, CSV before TensorBoard."""
    for name in ("CSVLogger", "TensorBoardLogger"):
        for logger in trainer.loggers:
            if is_kind(logger, name):
                return logger
    return None
