"""Where the host waits for the device: nowhere between checks, once a trial, once a step under the published rule."""

import pytest
import torch
from problems import Problem
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_soaa._proposal
import lightning_soaa._trust_region
import lightning_soaa.optimizer


class CountReads(TorchDispatchMode):
    """Counts scalars read by the host, one at a time or as a list."""

    def __init__(self):
        super().__init__()
        self.scalars = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}:
            self.scalars += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def packed(monkeypatch):
    """Counts packed reads by the one function that makes them."""
    calls, inner = [], lightning_soaa._proposal.read

    def read(values, device):
        calls.append(len(values))
        return inner(values, device)

    for module in (lightning_soaa._proposal, lightning_soaa._trust_region, lightning_soaa.optimizer):
        monkeypatch.setattr(module, "read", read)
    return calls


def step_counting(problem, packed):
    """Return (scalars read, packed reads) of one step."""
    packed.clear()
    loss = problem.closure().detach()
    with CountReads() as counter:
        problem.optimizer.step(lambda: loss, loss_closure=problem.loss_closure)
    problem.batch += 1
    return counter.scalars, len(packed)


def test_fixed_radius_never_reads(packed):
    problem = Problem("fixed", weight_decay=0.1)
    assert [step_counting(problem, packed) for _ in range(10)] == [(0, 0)] * 10


def test_published_radius_reads_once_a_step(packed):
    problem = Problem("published")
    assert [step_counting(problem, packed)[1] for _ in range(10)] == [1] * 10


def test_ratio_radius_reads_once_a_trial_and_not_at_all_between_checks(packed):
    problem, checked, plain = Problem("ratio", weight_decay=0.1), 0, 0
    for _ in range(90):
        before = dict(problem.optimizer.param_groups[0])
        scalars, reads = step_counting(problem, packed)
        after = problem.optimizer.param_groups[0]
        trials = after["total_trials"] - before["total_trials"]
        assert reads == trials
        if trials:
            checked += 1
        else:
            plain += 1
            assert scalars == 0
    assert checked > 20
    assert plain > 20


def test_only_reading_the_report_costs_more(packed):
    problem = Problem("fixed")
    step_counting(problem, packed)
    packed.clear()
    assert problem.optimizer.last_step.step == 1
    assert len(packed) == 1
    assert problem.optimizer.last_step.step == 1
    assert len(packed) == 1
