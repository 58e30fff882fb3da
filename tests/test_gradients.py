"""Gradients that a step finds: none that count, none that are finite, ones that are only views."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from problems import RULES, Problem, assert_same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius
from lightning_soaa.radius import AbstractRadius, Decision

STATISTICS = ("fisher_mean", "fisher_min", "fisher_max", "fisher_trace")


def statistics(problem):
    return [getattr(problem.optimizer.last_step, name) for name in STATISTICS]


@pytest.mark.parametrize("rule", [FixedRadius(), PublishedRadius(50), RatioRadius()], ids=RULES)
def test_fisher_statistics_of_a_skipped_step_are_those_of_the_moments_that_it_left(rule):
    problem = Problem(rule).run(4)
    before = statistics(problem)
    problem.spoil = math.nan
    problem.step()
    assert problem.optimizer.last_step.skipped
    assert statistics(problem) == before


@pytest.mark.parametrize("rule", RULES)
def test_fisher_statistics_are_nan_as_long_as_nothing_was_absorbed(rule):
    problem = Problem(rule)
    problem.spoil = math.nan
    problem.step()
    assert problem.optimizer.last_step.skipped
    assert all(math.isnan(value) for value in [*statistics(problem), problem.optimizer.last_step.active_fraction])


def test_fisher_statistics_of_a_skipped_step_leave_out_parameters_that_have_absorbed_nothing():
    problem, plain = Problem("published"), Problem("published")
    for one in (problem, plain):
        one.params[3].requires_grad_(False)
        one.run(3)
    problem.params[3].requires_grad_(True)
    problem.spoil = math.nan
    problem.step()
    assert statistics(problem) == statistics(plain)


@pytest.mark.parametrize("rule", RULES)
def test_checkpoint_of_a_fresh_optimizer_counts_no_step_and_ages_nothing(rule):
    class Holder(nn.Module):
        def __init__(self, params):
            super().__init__()
            self.params = nn.ParameterList(params)

    problem, plain = Problem(rule, weight_decay=0.1), Problem(rule, weight_decay=0.1)
    before = problem.facts()
    get_optimizer_state_dict(Holder(problem.params), problem.optimizer)  # steps on zero gradients at lr 0
    assert [problem.optimizer.state[p]["step"] for p in problem.params] == [0, 0, 0, 0]
    after = problem.facts()
    assert_same(before, {key: value for key, value in after.items() if not key.startswith("state")})
    assert problem.optimizer.last_step is None
    assert_same(problem.run(5).facts(), plain.run(5).facts())


def test_zero_gradients_count_as_soon_as_there_is_state():
    problem = Problem("fixed").run(1)
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    problem.optimizer.step()
    assert problem.optimizer.last_step.step == 2


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_conjugated_and_negated_gradients_are_what_they_stand_for(rule, foreach):
    start = torch.randn(6, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(6, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    conjugated, negated = grad.conj(), (grad * 1j).conj().imag
    assert conjugated.is_conj()
    assert negated.is_neg()
    runs = []
    for lazy in (True, False):
        z, x = nn.Parameter(start.clone()), nn.Parameter(start.real.clone())
        z.grad = conjugated if lazy else conjugated.resolve_conj()
        x.grad = negated if lazy else negated.resolve_neg()
        optimizer = SOAA([z, x], lr=0.1, radius=RULES[rule], foreach=foreach)
        optimizer.step(lambda: 1.0, loss_closure=lambda: 0.99)
        runs.append((torch.view_as_real(z.detach()), x.detach()))
    for left, right in zip(*runs, strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(runs[0][1], start.real)


def test_smallest_eps_gives_no_nan_where_gradients_are_zero():
    x = nn.Parameter(torch.ones(4))
    optimizer = SOAA([x], eps=torch.finfo(torch.float32).smallest_normal, radius=FixedRadius())
    for value in (1.0, 0.0):
        x.grad = torch.tensor([value, 0.0, 0.0, 0.0])
        optimizer.step()
    assert x[0] < 1
    assert torch.equal(x[1:], torch.ones(3))


@dataclass(frozen=True)
class Broken(AbstractRadius):
    """Goes well for two steps, then answers as it is told."""

    needs_loss: ClassVar[bool] = True
    radius: float = math.nan

    def init(self, lr):
        return {"radius": 1.0, "turn": 0}

    def update(self, numbers, evidence):
        if numbers["turn"] < 2:
            return Decision({"radius": 1.0, "turn": numbers["turn"] + 1}, accepted=True)
        if self.radius == 0:
            raise OverflowError
        return Decision({"radius": self.radius, "turn": 0}, accepted=True)


@dataclass(frozen=True)
class BrokenChecks(Broken):
    needs_loss: ClassVar[bool] = False
    needs_trial: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("radius", "error", "rule_says"),
    [
        (math.nan, ValueError, "must be finite, got nan"),
        (math.inf, ValueError, "must be finite, got inf"),
        (-1.0, ValueError, "must be >= 0, got -1.0"),
        ("x", TypeError, "must be a real number, got 'x'"),
        (0.0, OverflowError, None),
    ],
)
@pytest.mark.parametrize("kind", [Broken, BrokenChecks])
def test_rule_that_raises_or_gives_no_radius_moves_nothing(kind, radius, error, rule_says):
    problem = Problem(kind(radius=radius), weight_decay=0.1).run(2)
    before = problem.facts()
    with pytest.raises(error) as caught:
        problem.step()
    if rule_says:
        assert str(caught.value) == f"{kind.__name__}: `update(...).numbers['radius']` {rule_says}"
    after = problem.facts()
    if kind is BrokenChecks:
        assert_same(before, after)
        return
    # Without a check there is no copy to put back: the moments keep the gradient, and their age says so.
    assert_same(*({k: v for k, v in facts.items() if not k.startswith("state")} for facts in (before, after)))
    assert [problem.optimizer.state[p]["step"] for p in problem.params] == [3, 3, 3, 3]
    assert not torch.equal(before["state 0 m"], after["state 0 m"])
