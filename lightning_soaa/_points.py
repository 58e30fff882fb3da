"""Points of a log: (step, value) pairs, as two arrays where there are many, and what is asked of them."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

Points = Sequence[tuple[int, float]]  # (step of the trainer, value), in the order of steps
Array = np.ndarray[Any, Any]


class Column(Sequence[tuple[int, float]]):
    """Points as two arrays, 16 bytes each: a log of a million rows has as many in each column.

    Args:
        steps: whole numbers, strictly rising, shape (n,).
        values: float64, shape (n,).
    """

    def __init__(self, steps: Array, values: Array) -> None:
        self.steps, self.values = steps, values

    @classmethod
    def of(cls, steps: Sequence[float] | Array, values: Sequence[float] | Array) -> "Column":
        """Return points in the order of steps; of two values for a step, the later one."""
        when, what = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
        if not (when[1:] > when[:-1]).all():
            latest = dict(zip(when.tolist(), what.tolist(), strict=True))
            when = np.array(sorted(latest), dtype=np.int64)
            what = np.array([latest[step] for step in when.tolist()])
        return cls(when, what)

    def __len__(self) -> int:
        """Return how many points there are."""
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Go through the points, in python's own numbers."""
        return zip(self.steps.tolist(), self.values.tolist(), strict=True)

    @overload
    def __getitem__(self, index: int) -> tuple[int, float]: ...
    @overload
    def __getitem__(self, index: slice) -> "Column": ...
    def __getitem__(self, index: int | slice) -> "tuple[int, float] | Column":
        """Return one point or some of them."""
        if isinstance(index, slice):
            return Column(self.steps[index], self.values[index])
        return int(self.steps[index]), float(self.values[index])

    def __repr__(self) -> str:
        """Return the points as a list would show them."""
        return repr(list(self))


def arrays(points: Points) -> tuple[Array, Array]:
    """Return steps and values, of shape (n,) each."""
    if isinstance(points, Column):
        return points.steps, points.values
    return np.array([step for step, _ in points], dtype=np.int64), np.array([value for _, value in points], dtype=float)


def at(points: Points, steps: Array) -> Array:
    """Return the values at `steps`, nan where there is none."""
    known, values = arrays(points)
    if not len(known):
        return np.full(len(steps), np.nan)
    place = np.minimum(np.searchsorted(known, steps), len(known) - 1)
    return np.where(known[place] == steps, values[place], np.nan)


def extremes(points: Points) -> tuple[float, float]:
    """Return the smallest and the largest finite value, nan if there is none."""
    _, values = arrays(points)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (np.nan, np.nan)


def last_known(points: Points) -> float:
    """Return the last value that is not nan, nan if there is none."""
    _, values = arrays(points)
    known = np.flatnonzero(~np.isnan(values))
    return float(values[known[-1]]) if len(known) else np.nan


def increases(points: Points) -> Array:
    """Return the steps at which a count is higher than the row before; the first row is compared with 0."""
    steps, values = arrays(points)
    return steps[np.diff(values, prepend=0.0) > 0]


def thinned(points: Points, most: int) -> tuple[Array, Array]:
    """Return steps and values, at most about `most`: the smallest and the largest value of each stretch of rows.

    What is not finite is nan, and a stretch without a finite value is nan, so that a line has its gaps.
    """
    steps, values = arrays(points)
    values = np.where(np.isfinite(values), values, np.nan)
    width = -(-2 * len(steps) // most)
    if width <= 2:
        return steps, values
    count = len(steps) // width * width  # what is left over is shown whole
    stretches = values[:count].reshape(-1, width)
    first = np.arange(0, count, width)
    low = first + np.where(np.isnan(stretches), np.inf, stretches).argmin(1)
    high = first + np.where(np.isnan(stretches), -np.inf, stretches).argmax(1)
    kept = np.unique(np.concatenate([low, high, np.arange(count, len(steps))]))
    return steps[kept], values[kept]


def spread(steps: Array, most: int) -> Array:
    """Return the first of the `steps` in each of `most` stretches of equal length: as many marks as can be told apart.

    Args:
        steps: rising, shape (n,).
        most: how many are left at most.
    """
    if len(steps) <= most:
        return steps
    stretch = (steps - steps[0]) * most // (steps[-1] - steps[0] + 1)
    return steps[np.unique(stretch, return_index=True)[1]]
