"""What has happened on the device since the host last looked: small tensors that are read along with something else.

On the CPU these are numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._proposal import Proposal
from lightning_soaa._state import FRESH_SLOPE, GATE, OUTLIER_STEPS, SKIPPED_STEPS
from lightning_soaa._sums import on_host, read, wide_dtype
from lightning_soaa.gate import FRESH_GATE, Gate


@dataclass(frozen=True)
class Unread:
    """Counts and figures of steps that the host has not heard of. Numbers or 0-d; None where there is nothing.

    Args:
        skipped: steps whose loss or gradient was not finite.
        outliers: steps that the gate left out.
        fresh: slope of the gradient that followed the last check; nan if that step was left out.
        gate: what the outlier gate knows, shape (8,).
    """

    skipped: Tensor | int | None = None
    outliers: Tensor | int | None = None
    fresh: Tensor | None = None
    gate: Gate | None = None

    def gate_of(self, head: dict[str, Any], home: torch.device) -> Gate:
        """Return what the gate knows; `head`, the first group, has it where nothing is unread."""
        known = self.gate if self.gate is not None else tuple(head[GATE]) or FRESH_GATE
        if on_host(home):
            return tuple(known.tolist()) if isinstance(known, Tensor) else known
        return torch.as_tensor(known, dtype=wide_dtype(home), device=home)

    def after(self, proposal: Proposal) -> "Unread":
        """Return what is unread after a step that the host did not look at."""
        ok, outlier = (x.to(torch.int64) if isinstance(x, Tensor) else int(x) for x in (proposal.ok, proposal.outlier))
        skipped = 1 - ok - outlier
        return replace(
            self.beside(proposal),
            skipped=skipped if self.skipped is None else self.skipped + skipped,
            outliers=outlier if self.outliers is None else self.outliers + outlier,
        )

    def beside(self, proposal: Proposal) -> "Unread":
        """Return what is unread beside the outcome of a step that the host looks at."""
        fresh = self.fresh if proposal.fresh is None else proposal.fresh
        return Unread(self.skipped, self.outliers, fresh, proposal.gate)

    def figures(self) -> list[Tensor | float | None]:
        """Return what is to be read, for :func:`settle`."""
        return [
            self.skipped,
            self.outliers,
            nan if self.fresh is None else self.fresh,
            *(() if self.gate is None else self.gate),
        ]

    def read(self) -> list[float]:
        """Bring :meth:`figures` to the host; nothing, and no wait, if there has been no step since the last look."""
        if self.skipped is None:
            return []
        return read(self.figures(), self.skipped.device if isinstance(self.skipped, Tensor) else torch.device("cpu"))


def settle(head: dict[str, Any], figures: Sequence[float]) -> None:
    """Enter what :meth:`Unread.figures` listed, once it has been read, into the first group (modified in place)."""
    if not figures:
        return
    skipped, outliers, fresh, *gate = figures
    head[SKIPPED_STEPS] += int(skipped)
    head[OUTLIER_STEPS] += int(outliers)
    if not isnan(fresh):
        head[FRESH_SLOPE] = fresh
    if gate:
        head[GATE] = tuple(gate)
