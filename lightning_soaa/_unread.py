"""What has happened on the device since the host last looked: small tensors that are read along with something else.

On the CPU these are numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._proposal import Proposal
from lightning_soaa._state import FRESH_SLOPE, GATE, LEFT_OVER, OUTLIER_STEPS, PROMISED, SKIPPED_STEPS
from lightning_soaa._sums import on_host, read, wide_dtype
from lightning_soaa.gate import FRESH_GATE, SIZE, Gate


@dataclass(frozen=True)
class Unread:
    """Counts and figures of steps that the host has not heard of. Numbers or 0-d; None where there is nothing.

    Args:
        skipped: steps whose loss or gradient was not finite.
        outliers: steps that the gate left out.
        left_over: slopes that the gradient that followed the last check found along it, for each of `params`, shape
            (n,); nan if that step was left out.
        params: the parameters that had a gradient then.
        gate: what the outlier gate knows, shape (8,).
    """

    skipped: Tensor | int | None = None
    outliers: Tensor | int | None = None
    left_over: Tensor | Sequence[float] | None = None
    params: Sequence[Tensor] = ()
    gate: Gate | None = None

    def gate_of(self, head: dict[str, Any], home: torch.device) -> Gate:
        """Return what the gate knows; `head`, the first group, has it where nothing is unread."""
        known = self.gate if self.gate is not None else tuple(head[GATE]) or FRESH_GATE
        if on_host(home):
            return tuple(known.tolist()) if isinstance(known, Tensor) else known
        return torch.as_tensor(known, dtype=wide_dtype(home), device=home)

    def after(self, proposal: Proposal, params: Sequence[Tensor]) -> "Unread":
        """Return what is unread after a step of `params` that the host did not look at."""
        ok, outlier = (x.to(torch.int64) if isinstance(x, Tensor) else int(x) for x in (proposal.ok, proposal.outlier))
        skipped = 1 - ok - outlier
        skipped = skipped if self.skipped is None else self.skipped + skipped
        outlier = outlier if self.outliers is None else self.outliers + outlier
        beside = self.beside(proposal, params)
        return Unread(skipped, outlier, beside.left_over, beside.params, beside.gate)

    def beside(self, proposal: Proposal, params: Sequence[Tensor]) -> "Unread":
        """Return what is unread beside the outcome of a step of `params` that the host looks at."""
        known = (self.left_over, self.params) if proposal.left_over is None else (proposal.left_over, params)
        return Unread(self.skipped, self.outliers, *known, proposal.gate)

    def figures(self) -> list[Tensor | float | None]:
        """Return what is to be read, for :meth:`settle`."""
        return [self.skipped, self.outliers, *(() if self.gate is None else self.gate), *self._slopes()]

    def _slopes(self) -> list[Tensor | float | None]:
        return [self.left_over] if isinstance(self.left_over, Tensor) else list(self.left_over or ())

    def read(self) -> list[float]:
        """Bring :meth:`figures` to the host; nothing, and no wait, if there has been no step since the last look."""
        if self.skipped is None:
            return []
        return read(self.figures(), self.skipped.device if isinstance(self.skipped, Tensor) else torch.device("cpu"))

    def found(self, figures: Sequence[float]) -> list[tuple[Tensor, float]]:
        """Return parameters with the slope that the gradient after the last check found, from what has been read."""
        slopes = figures[len(figures) - len(self.params) :] if self.left_over is not None else ()
        return [] if any(isnan(slope) for slope in slopes) else list(zip(self.params, slopes, strict=bool(slopes)))

    def settle(self, head: dict[str, Any], state: Mapping[Tensor, dict[str, Any]], figures: Sequence[float]) -> None:
        """Enter what :meth:`figures` listed, once it has been read, into first group and state (modified in place)."""
        if not figures:
            return
        head[SKIPPED_STEPS] += int(figures[0])
        head[OUTLIER_STEPS] += int(figures[1])
        if self.gate is not None:
            head[GATE] = tuple(figures[2 : 2 + SIZE])
        if found := self.found(figures):
            head[FRESH_SLOPE] = fresh_slope(found, state)
            for param, slope in found:
                state[param][LEFT_OVER] = slope


def fresh_slope(
    found: Sequence[tuple[Tensor, float]], state: Mapping[Tensor, dict[str, Any]], known: float | None = None
) -> float | None:
    """Return slopes that were found over those that the last check started from; what is `known` if none were."""
    pairs = [(slope, state[param][PROMISED]) for param, slope in found if state[param][PROMISED] > 0]
    return sum(slope for slope, _ in pairs) / sum(promised for _, promised in pairs) if pairs else known
