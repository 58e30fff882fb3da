"""What has happened on the device since the host last looked: small tensors that are read along with something else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._bucket import wide_dtype
from lightning_soaa._proposal import Proposal, read
from lightning_soaa._state import FRESH_SLOPE, GATE, OUTLIER_STEPS, SKIPPED_STEPS
from lightning_soaa.gate import fresh_gate


@dataclass(frozen=True)
class Unread:
    """Counts and figures of steps that the host has not heard of. All 0-d; None where there is nothing.

    Args:
        skipped: steps whose loss or gradient was not finite.
        outliers: steps that the gate left out.
        fresh: slope of the gradient that followed the last check; nan if that step was left out.
        gate: what the outlier gate knows, shape (8,).
    """

    skipped: Tensor | None = None
    outliers: Tensor | None = None
    fresh: Tensor | None = None
    gate: Tensor | None = None

    def gate_of(self, head: dict[str, Any], home: torch.device) -> Tensor:
        """Return what the gate knows; `head`, the first group, has it where nothing is unread."""
        if self.gate is not None:
            return self.gate
        known, wide = head[GATE], wide_dtype(home)
        return torch.tensor(known, dtype=wide, device=home) if known else fresh_gate(home, wide)

    def after(self, proposal: Proposal) -> "Unread":
        """Return what is unread after a step that the host did not look at."""
        skipped = (proposal.ok | proposal.outlier).logical_not().to(torch.int64)
        outlier = proposal.outlier.to(torch.int64)
        return replace(
            self.beside(proposal),
            skipped=skipped if self.skipped is None else self.skipped + skipped,
            outliers=outlier if self.outliers is None else self.outliers + outlier,
        )

    def beside(self, proposal: Proposal) -> "Unread":
        """Return what is unread beside the outcome of a step that the host looks at."""
        fresh = self.fresh if proposal.fresh is None else proposal.fresh
        return Unread(self.skipped, self.outliers, fresh, proposal.gate)

    def figures(self) -> list[Tensor | None]:
        """Return the 0-d tensors to be read, for :func:`settle`."""
        fresh = torch.tensor(nan) if self.fresh is None else self.fresh
        return [self.skipped, self.outliers, fresh, *(() if self.gate is None else self.gate.unbind())]

    def read(self) -> list[float]:
        """Bring :meth:`figures` to the host; nothing, and no wait, if there has been no step since the last look."""
        return [] if self.skipped is None else read(self.figures(), self.skipped.device)


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
