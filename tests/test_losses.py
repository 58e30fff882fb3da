"""Losses that closures return, and what reports make of them."""

import math

import numpy as np
import pytest
import torch
from problems import RULES, Problem, assert_same

from lightning_soaa import SOAA, RatioRadius


def test_loss_closure_that_reuses_the_buffer_of_the_loss_does_not_change_the_base_loss():
    x, buffer = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64)), torch.zeros((), dtype=torch.float64)
    optimizer = SOAA([x])

    def loss_closure():
        return buffer.copy_((x.detach() ** 2).sum())

    def closure():
        x.grad = 2 * x.detach()
        return loss_closure()

    optimizer.step(closure, loss_closure=loss_closure)
    report = optimizer.last_step
    assert report.base_loss == 13
    assert report.actual_reduction == 13 - float((x.detach() ** 2).sum()) > 0


def test_bound_base_loss_is_a_copy_too():
    problem, other = Problem("ratio"), Problem("ratio")
    buffer = problem.closure().detach()
    problem.optimizer.bind_loss_closure(problem.loss_closure, base_loss=buffer)
    buffer.fill_(1e9)
    problem.optimizer.step()
    other.optimizer.step(other.closure, loss_closure=other.loss_closure)
    assert problem.optimizer.last_step == other.optimizer.last_step


@pytest.mark.parametrize("rule", RULES)
def test_reported_loss_is_the_users_and_reductions_are_those_of_the_minimised_loss(rule):
    down, up = Problem(rule), Problem(rule, maximize=True)
    up.spoil = -1.0
    for _ in range(3):
        down.step()
        up.step()
        falling, rising = down.optimizer.last_step, up.optimizer.last_step
        assert falling.base_loss == -rising.base_loss > 0
        for name in ("predicted_reduction", "actual_reduction", "acceptance_ratio", "step_norm"):
            a, b = getattr(falling, name), getattr(rising, name)
            assert a == b or (math.isnan(a) and math.isnan(b)), name


NUMBERS = {
    "np.float64": lambda value: np.float64(value),
    "np.float32": lambda value: np.float32(value),
    "np.float16": lambda value: np.float16(value),
    "np.int64": lambda value: np.int64(round(value)),
    "array without dimensions": lambda value: np.array(value),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("rule", RULES)
def test_loss_may_be_a_number_of_numpys(rule, kind):
    plain, other = Problem(rule), Problem(rule)
    for _ in range(3):
        as_torch = lambda loss: torch.as_tensor(NUMBERS[kind](loss.item()))  # noqa: E731
        as_numpy = lambda loss: NUMBERS[kind](loss.item())  # noqa: E731
        plain.optimizer.step(
            lambda as_torch=as_torch: as_torch(plain.closure()),
            loss_closure=lambda as_torch=as_torch: as_torch(plain.loss()),
        )
        other.optimizer.step(
            lambda as_numpy=as_numpy: as_numpy(other.closure()),
            loss_closure=lambda as_numpy=as_numpy: as_numpy(other.loss()),
        )
    assert_same(plain.facts(), other.facts())
    assert plain.optimizer.last_step.base_loss == other.optimizer.last_step.base_loss


@pytest.mark.parametrize("trial", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("maximize", [True, False])
def test_trial_that_is_not_finite_counts_as_an_infinite_rise_until_the_next_check(trial, maximize):
    problem = Problem(RatioRadius(max_trials=2), maximize=maximize).run(2)
    problem.optimizer.step(problem.closure, loss_closure=lambda: trial)
    report = problem.optimizer.last_step
    assert report.acceptance_ratio == report.actual_reduction == -math.inf
    assert not report.accepted
    other = Problem(RatioRadius(max_trials=2), maximize=maximize)
    other.params, other.batch = problem.params, problem.batch
    other.optimizer = SOAA(other.params, radius=RatioRadius(max_trials=2), maximize=maximize)
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    other.optimizer.param_groups[0]["unchecked_steps"] = 10  # the next step is a check
    other.step()
    assert other.optimizer.last_step.checked
    assert math.isfinite(other.optimizer.last_step.actual_reduction)
    assert math.isfinite(other.optimizer.state_dict()["param_groups"][0]["actual_reduction"])


@pytest.mark.parametrize("spent", ["state_dict", "last_step"])
def test_skipped_steps_are_counted_once_where_a_loss_closure_saves_or_reads_in_a_check(spent):
    problem = Problem(RatioRadius()).run(1)
    head = problem.optimizer.param_groups[0]
    head.update(rule_phase=0, unchecked_steps=0)
    problem.spoil = math.nan
    problem.run(2)
    problem.spoil = 1.0
    head["unchecked_steps"] = 10
    seen = []

    def loss_closure():
        if spent == "state_dict":
            seen.append(problem.optimizer.state_dict()["param_groups"][0]["skipped_steps"])
        else:
            seen.append(problem.optimizer.last_step.skipped_steps)
        return problem.loss()

    problem.optimizer.step(problem.closure, loss_closure=loss_closure)
    assert set(seen) == {2}
    assert head["skipped_steps"] == problem.optimizer.last_step.skipped_steps == 2
    assert problem.optimizer.last_step.checked


@pytest.mark.parametrize("how", ["closure", "bound base loss", "loss closure"])
def test_first_check_repeats_the_loss_where_nothing_has_moved_and_no_later_one_does(how):
    problem, seen = Problem(RatioRadius(interval=2)), []
    start = problem.params[0].detach().clone()

    def loss_closure():
        seen.append(torch.equal(start, problem.params[0]))
        return problem.loss()

    if how == "closure":
        problem.optimizer.step(problem.closure, loss_closure=loss_closure)
    else:
        loss = problem.closure()
        problem.optimizer.bind_loss_closure(loss_closure, base_loss=loss if how == "bound base loss" else None)
        problem.optimizer.step()
    assert seen == [True] * (2 if how == "loss closure" else 1) + [False]
    report = problem.optimizer.last_step
    assert report.trials == report.total_trials == len(seen)
    assert report.repeat_gap == 0
    problem.run(10)
    assert problem.optimizer.last_step.repeat_gap == 0
    assert problem.calls["loss"] == problem.optimizer.last_step.total_trials - len(seen) <= 10


def test_reports_have_no_repeat_gap_before_the_first_check():
    problem = Problem("fixed").run(2)
    assert math.isnan(problem.optimizer.last_step.repeat_gap)
    assert problem.optimizer.param_groups[0]["repeat_gap"] is None


@pytest.mark.parametrize("maximize", [True, False])
def test_gap_of_a_loss_closure_that_computes_another_loss_is_reported_saved_and_forgiven(maximize):
    """It is off by a constant, so that every step seems to raise the loss by 0.25."""
    sign = -1 if maximize else 1
    problem = Problem(RatioRadius(), maximize=maximize)
    problem.spoil = sign
    for _ in range(5):
        problem.optimizer.step(problem.closure, loss_closure=lambda: problem.loss() + sign * 0.25)
        report = problem.optimizer.last_step
        assert report.repeat_gap == pytest.approx(0.25, rel=1e-12)
        assert report.actual_reduction == pytest.approx(-0.25, abs=0.01)
        assert report.accepted
    other = Problem(RatioRadius(), maximize=maximize)
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    other.step()
    assert other.optimizer.last_step.repeat_gap == report.repeat_gap
    assert other.calls["loss"] == 1


# A first radius above the floor, at which every finite loss is taken, and below 1/100 of the prior.
def test_loss_that_rises_by_more_than_the_gap_is_not_forgiven():
    problem = Problem(RatioRadius(max_trials=1))
    for gap in (*[0.25] * 9, 0.6):
        assert problem.optimizer.radius > problem.optimizer.param_groups[0].get("radius_low", -1.0)
        problem.optimizer.step(problem.closure, loss_closure=lambda gap=gap: problem.loss() + gap)
        assert problem.optimizer.last_step.accepted == (gap == 0.25)
        assert problem.optimizer.last_step.repeat_gap == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_repetition_that_is_not_finite_is_an_infinite_gap_and_forgives_nothing(value):
    problem = Problem(RatioRadius(max_trials=1))
    losses = iter([value])
    problem.optimizer.step(problem.closure, loss_closure=lambda: next(losses, 1.0))
    problem.run(8)
    problem.optimizer.step(problem.closure, loss_closure=lambda: 1e3)
    assert problem.optimizer.last_step.repeat_gap == math.inf
    assert not problem.optimizer.last_step.accepted


def test_repetition_that_could_not_be_compared_is_made_up_for_at_the_next_check():
    problem = Problem(RatioRadius())
    problem.spoil = math.nan
    problem.step()
    assert math.isnan(problem.optimizer.last_step.repeat_gap)
    assert problem.optimizer.last_step.trials == 1
    problem.spoil = 1.0
    problem.step()
    assert problem.optimizer.last_step.repeat_gap == 0
    assert problem.optimizer.last_step.trials == 2
    problem.step()
    assert problem.optimizer.last_step.trials == 1


def test_exception_in_the_repetition_leaves_everything_as_before_the_step():
    problem = Problem(RatioRadius(), weight_decay=0.1)
    before = problem.facts()
    with pytest.raises(ZeroDivisionError):
        problem.optimizer.step(problem.closure, loss_closure=lambda: 1 / 0)
    assert_same(before, problem.facts())
    assert problem.optimizer.last_step is None
