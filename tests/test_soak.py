"""A long run on a small noisy problem: nothing drifts, nothing piles up."""

import gc
from math import isfinite

import psutil
import torch
from torch import nn

from lightning_soaa import SOAA, RatioRadius

STEPS, LOOK = 10_000, 1000
EVERY = 499  # a batch in so many is broken: not finite and far off by turns


class Noisy:
    """A regression on labels of which half is noise, in float32."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(self.draw(6, 3))
        self.target = self.draw(6, 3)
        self.optimizer = SOAA([self.weight], radius=RatioRadius())

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def loss(self):
        return (torch.tanh(self.x @ self.weight) - self.y).square().mean()

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self, factor):
        self.x = self.draw(8, 6)
        self.y = (torch.tanh(self.x @ self.target) + 0.5 * self.draw(8, 3)) * factor
        self.optimizer.step(self.closure, loss_closure=self.loss)

    def look(self):
        """Check what holds at any time; return the step, and what is alive: tensors, objects, memory."""
        head, state = self.optimizer.param_groups[0], self.optimizer.state.values()
        report = self.optimizer.last_step
        assert 0 < head["radius_low"] <= self.optimizer.radius <= head["radius_high"]
        assert all(isfinite(value) for value in head.values() if isinstance(value, float))
        kept = [self.weight, *(t for each in state for t in each.values() if isinstance(t, torch.Tensor))]
        assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in kept)
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
        return report, (tensors, len(objects), psutil.Process().memory_info().rss)


def test_10_000_steps_leave_radius_memory_and_counters_where_they_belong():
    noisy, looks = Noisy(), []
    for step in range(1, STEPS + 1):
        broken, odd = step % EVERY == 0, step // EVERY % 2
        noisy.step((float("nan") if odd else 1e3) if broken else 1.0)
        if step % LOOK == 0:
            looks.append(noisy.look())
    reports = [report for report, _ in looks]
    assert [report.step for report in reports] == list(range(LOOK, STEPS + 1, LOOK))
    for name in ("checks", "accepted_checks", "skipped_steps", "outlier_steps", "total_trials"):
        counts = [getattr(report, name) for report in reports]
        assert counts == sorted(counts), name
    assert reports[-1].skipped_steps == 10
    assert 10 <= reports[-1].outlier_steps < 30  # of the other steps, one in a thousand at most
    assert STEPS / 40 < reports[-1].checks < STEPS / 4
    (tensors, objects, memory), (last_tensors, last_objects, last_memory) = looks[2][1], looks[-1][1]
    assert last_tensors == tensors
    assert last_objects - objects < 500  # far less than one a step
    assert last_memory - memory < 4 << 20
