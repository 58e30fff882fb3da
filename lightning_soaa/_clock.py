"""How much of a run's time checks take, without waiting for the device."""

from collections import deque
from dataclasses import dataclass, field
from math import nan
from time import perf_counter
from typing import Any

import torch

# Batches without a check that the others are compared with, at least.
FEWEST = 5
# What a batch may be: a step with trials, a step without, or one that only accumulates.
CHECKED, UNCHECKED, OTHER = "checked", "unchecked", "other"


def mark(device: torch.device) -> Any:
    """Return the present moment: of the device where it keeps time by events, else of the host, in seconds."""
    if device.type in {"cuda", "xpu"}:
        event = torch.get_device_module(device).Event(enable_timing=True)
        event.record()
        return event
    return perf_counter()


def passed(start: Any, end: Any) -> float | None:
    """Return the seconds between two events; None if the device is not there yet."""
    return start.elapsed_time(end) / 1000 if end.query() else None


@dataclass
class BatchClock:
    """Times batches; the first of them is left out, since whatever is slow only once is slow in it.

    A check costs what a batch with one takes longer than a batch without. On an accelerator that counts the time
    between events of its stream, not the host's, which may be anywhere ahead.

    Args:
        device: the module's.

    On ``mps``, which is timed on the host, checks wait for the steps before them and look longer than they are.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((CHECKED, UNCHECKED, OTHER), 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((CHECKED, UNCHECKED, OTHER), 0))
    _started: Any = None
    _first: bool = True
    _open: deque[tuple[str, Any, Any]] = field(default_factory=deque)

    def start(self) -> None:
        """Begin a batch."""
        self._started = mark(self.device)

    def stop(self, kind: str) -> None:
        """End the batch, which turned out to be of `kind`; ignored if none has begun."""
        started, self._started = self._started, None
        if started is None:
            return
        if self._first:
            self._first = False
            return
        if isinstance(started, float):  # the host's time: nothing to wait for
            self.seconds[kind] += perf_counter() - started
            self.counts[kind] += 1
            return
        self._open.append((kind, started, mark(self.device)))
        self._close()

    def _close(self) -> None:
        """Enter the batches that the device has finished."""
        while self._open:
            kind, start, end = self._open[0]
            seconds = passed(start, end)
            if seconds is None:
                return
            self._open.popleft()
            self.seconds[kind] += seconds
            self.counts[kind] += 1

    def check_share(self) -> float:
        """Return the share of the batches' time that checks took, in [0, 1]; nan while there is nothing to compare."""
        self._close()
        if self.counts[UNCHECKED] < FEWEST:
            return nan
        plain = self.seconds[UNCHECKED] / self.counts[UNCHECKED]
        extra = self.seconds[CHECKED] - self.counts[CHECKED] * plain
        total = sum(self.seconds.values())
        return max(0.0, extra) / total if total > 0 else nan
