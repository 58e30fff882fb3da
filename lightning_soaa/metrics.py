"""Epoch figures of the trust region, right across processes: sums and counts, nothing else."""

from collections.abc import Mapping
from math import nan
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

# What `EpochFigures.compute` returns, in this order.
FIGURES = ("acceptance_rate", "checks", "rejects", "skipped_steps")


def figures_of(*, checks: int, accepted_checks: int, skipped_steps: int, processes: int = 1) -> list[float]:
    """Return the figures in the order of `FIGURES` from sums over processes; the rate is nan before the first check."""
    rate = accepted_checks / checks if checks else nan
    return [rate, *(count / processes for count in (checks, checks - accepted_checks, skipped_steps))]


class EpochFigures(Metric):
    """Acceptance rate, checks, rejects and skipped steps of one optimizer, over processes and updates.

    All processes take the same step, so a check is one check on however many processes it ran: counts are sums over
    processes divided by their number. A count that is not whole says that processes took different decisions.

    Args:
        kwargs: keywords of :class:`torchmetrics.Metric`, such as ``dist_sync_fn``.

    Raises:
        ValueError: an unknown keyword, or in :meth:`update` a count that cannot be.

    Example::

        >>> from lightning_soaa.metrics import FIGURES, EpochFigures
        >>> figures = EpochFigures()
        >>> figures.update(checks=3, accepted_checks=2)
        >>> figures.update(checks=1, accepted_checks=1, skipped_steps=1)
        >>> dict(zip(FIGURES, figures.compute().tolist()))
        {'acceptance_rate': 0.75, 'checks': 4.0, 'rejects': 1.0, 'skipped_steps': 1.0}

    Does not average rates: the rate is that of the sums.
    """

    full_state_update = True  # `forward` must not merge two states of one process: that would count it twice
    higher_is_better = None
    is_differentiable = False

    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # processes, checks, accepted checks, skipped steps: one tensor, so that a sync is one gather
        self.add_state("sums", torch.tensor([1, 0, 0, 0]), dist_reduce_fx="sum")

    def update(self, *, checks: int, accepted_checks: int, skipped_steps: int = 0) -> None:
        """Add what happened since the last update.

        Raises:
            ValueError: a count is negative, or more checks are accepted than there were.
        """
        if not 0 <= accepted_checks <= checks or skipped_steps < 0:
            counts = f"{checks=}, {accepted_checks=}, {skipped_steps=}"
            raise ValueError(f"EpochFigures: `accepted_checks` must be in [0, checks] and no count < 0, got {counts}")
        self.sums += torch.tensor([0, checks, accepted_checks, skipped_steps], device=self.sums.device)

    def compute(self) -> Tensor:
        """Return the figures in the order of `FIGURES`, float64 on the CPU; the rate is nan before the first check."""
        processes, checks, accepted, skipped = self.sums.tolist()
        figures = figures_of(checks=checks, accepted_checks=accepted, skipped_steps=skipped, processes=processes)
        return torch.tensor(figures, dtype=torch.float64)


def figures_over(processes: EpochFigures | None, counts: Mapping[str, int]) -> dict[str, float]:
    """Return the figures by name, over all processes, all of which must call it; of one process where there is no sum.

    It is filled anew each time, so that the counters that `counts` come from are the only truth across checkpoints.
    """
    if processes is None:
        return dict(zip(FIGURES, figures_of(**counts), strict=True))
    processes.reset()
    processes.update(**counts)
    return dict(zip(FIGURES, processes.compute().tolist(), strict=True))
