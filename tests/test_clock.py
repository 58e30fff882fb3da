"""The time of checks: what batches with one take longer than others, counted without waiting."""

from math import isnan

import pytest
import torch

from lightning_soaa import _clock
from lightning_soaa._clock import CHECKED, OTHER, UNCHECKED, BatchClock


def timed(monkeypatch, *batches):
    """Return a clock that has seen batches of (kind, seconds), with a host clock of our own."""
    now = [0.0]
    monkeypatch.setattr(_clock, "perf_counter", lambda: now[0])
    clock = BatchClock(torch.device("cpu"))
    for kind, seconds in batches:
        clock.start()
        now[0] += seconds
        clock.stop(kind)
        now[0] += 100.0  # between batches
    return clock


def test_share_is_what_checks_take_longer_over_all_batches(monkeypatch):
    slow_first = (CHECKED, 50.0)
    clock = timed(monkeypatch, slow_first, *10 * [(UNCHECKED, 2.0)], *4 * [(CHECKED, 3.0)], *2 * [(OTHER, 4.0)])
    assert clock.check_share() == pytest.approx(4 * 1.0 / (20 + 12 + 8), abs=1e-12)


def test_share_is_not_known_without_batches_to_compare_with(monkeypatch):
    assert isnan(timed(monkeypatch).check_share())
    assert isnan(timed(monkeypatch, *20 * [(CHECKED, 1.0)]).check_share())
    assert isnan(timed(monkeypatch, *5 * [(UNCHECKED, 1.0)]).check_share())  # the first is left out
    assert timed(monkeypatch, *6 * [(UNCHECKED, 1.0)]).check_share() == 0


def test_checks_that_look_faster_than_other_steps_take_no_time(monkeypatch):
    assert timed(monkeypatch, *6 * [(UNCHECKED, 2.0)], (CHECKED, 1.0)).check_share() == 0


def test_an_end_without_a_start_is_ignored(monkeypatch):
    clock = timed(monkeypatch)
    clock.stop(CHECKED)
    assert not any(clock.counts.values())


class Event:
    """An event of a device that is `behind` by some queries."""

    now = 0.0

    def __init__(self, enable_timing):
        self.at, self.behind = None, 2

    def record(self):
        self.at = Event.now

    def query(self):
        self.behind -= 1
        return self.behind < 0

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def test_events_of_a_device_are_entered_in_order_once_it_is_there_and_never_waited_for(monkeypatch):
    class Module:
        pass

    Module.Event = Event
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    clock = BatchClock(torch.device("cuda"))
    for _ in range(3):
        clock.start()
        Event.now += 0.5
        clock.stop(UNCHECKED)
    assert clock.counts[UNCHECKED] == 0  # two batches that the device has not finished
    for _ in range(8):
        clock.check_share()
    assert clock.counts[UNCHECKED] == 2
    assert clock.seconds[UNCHECKED] == 1.0
