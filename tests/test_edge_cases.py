"""What a step does when something is missing, broken or raised, and what its report says of it."""

import copy
import math
import warnings
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import RULES, Problem, assert_same, drive
from torch import nn

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius, StepReport
from lightning_soaa.radius import AbstractRadius, Decision

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
NEEDS_MORE = (
    "SOAA: `(loss_closure|closure)` must (be given|return the loss) under (RatioRadius|PublishedRadius), got None"
)


@dataclass(frozen=True)
class Script(AbstractRadius):
    """Checks on every step and decides as written: one letter a trial, a accept, r reject, t reject and try again.

    The repetition of the loss in the first check of all is a trial that no letter is used up for.
    """

    needs_trial: ClassVar[bool] = True

    verdicts: str = "a"
    radius: float = 0.5
    shrink: float = 0.5

    def init(self, lr):
        return {"radius": self.radius, "turn": 0}

    def update(self, numbers, evidence):
        verdict = self.verdicts[numbers["turn"] % len(self.verdicts)]
        radius = numbers["radius"] * (1.0 if verdict == "a" else self.shrink)
        new = {"radius": radius, "turn": numbers["turn"] + 1}
        return Decision(new, accepted=verdict == "a", retry=verdict == "t")


def bits(tensor):
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)


def point(problem):
    return torch.cat([bits(p) for p in problem.params])


def moments(problem):
    return {i: {k: bits(problem.optimizer.state[p][k]) for k in ("m", "v")} for i, p in enumerate(problem.params)}


def same_moments(left, right):
    return all(torch.equal(left[i][k], right[i][k]) for i in left for k in left[i])


def flat(problem):
    return torch.cat([p.detach().flatten() for p in problem.params]).numpy().copy()


def in_phase(problem, *, check):
    """Go on until the next step of RatioRadius is a check after burn-in, or is none."""
    head = problem.optimizer.param_groups[0]
    rule = problem.optimizer.radius_rule
    while head["rule_phase"] > 0 or (head["unchecked_steps"] + 1 >= rule.interval) != check:
        problem.step()
    return problem


# The ten checks that optimizers driven by the loss fall over


def zero_gradients(rule):
    x = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0)))
    optimizer, before = SOAA([x], radius=rule), bits(x)
    for _ in range(3):
        x.grad = torch.zeros(3)
        optimizer.step(lambda: torch.tensor([1]), loss_closure=lambda: torch.tensor([1]))
    assert torch.equal(bits(x), before)
    assert math.isfinite(optimizer.radius)
    assert optimizer.radius > 0


def no_gradients(rule):
    x = nn.Parameter(torch.ones(3))
    optimizer, before = SOAA([x], radius=rule), bits(x)
    radius = optimizer.radius
    optimizer.step(lambda: torch.tensor(1.0), loss_closure=lambda: torch.tensor(1.0))
    assert torch.equal(bits(x), before)
    assert optimizer.radius == radius


def closure_returns(value, rule):
    problem = Problem(rule)
    before = point(problem)

    def closure():
        problem.closure()
        return value

    assert problem.optimizer.step(closure, loss_closure=problem.loss_closure) is value
    assert not torch.equal(point(problem), before) or isinstance(value, int)
    assert np.isfinite(flat(problem)).all()


def bare_step(rule):
    problem = Problem(rule)
    problem.closure()
    before = problem.facts()
    if rule.needs_loss or rule.needs_trial:
        with pytest.raises(ValueError, match=NEEDS_MORE):
            problem.optimizer.step()
        assert_same(before, problem.facts())
    else:
        assert problem.optimizer.step() is None
        assert not torch.equal(problem.params[0], before["param 0"])


def group_of_no_lr(rule):
    problem = Problem(rule)
    still, moving = problem.params[0], problem.params[1:]
    problem.optimizer = SOAA([{"params": [still]}, {"params": moving, "lr": 1e-2}], lr=1e-28, radius=rule)
    before = bits(still), bits(moving[0])
    problem.run(10)
    assert torch.equal(bits(still), before[0])
    assert not torch.equal(bits(moving[0]), before[1])


def bfloat16(rule):
    problem = Problem(rule, dtype=torch.bfloat16, lr=0.01)
    first = problem.loss().item()
    problem.run(40)
    problem.batch = 0
    assert problem.loss().item() < first
    assert {p.dtype for p in problem.params} == {torch.bfloat16}


def zero_dimensions(rule):
    x = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = SOAA([x], lr=0.1, radius=rule)
    for _ in range(40):
        x.grad = 2 * x.detach()
        optimizer.step(lambda: x.square(), loss_closure=lambda: x.square())
    assert abs(x.item()) < 1.5
    assert x.shape == optimizer.state[x]["m"].shape == ()


def nan_loss(rule):
    problem = Problem(rule).run(2)
    before = point(problem)
    problem.spoil = math.nan
    problem.step()
    assert torch.equal(point(problem), before)
    problem.spoil = 1.0
    problem.run(3)
    assert np.isfinite(flat(problem)).all()
    assert not torch.equal(point(problem), before)


def resume(rule):
    whole, half, rest = Problem(rule).run(60), Problem(rule).run(30), Problem(rule)
    rest.params, state = copy.deepcopy(half.params), copy.deepcopy(half.optimizer.state_dict())
    rest.optimizer, rest.batch = SOAA(rest.params, radius=rule), half.batch
    rest.optimizer.load_state_dict(state)
    assert_same(whole.facts(), rest.run(30).facts())


TEN = {
    "zero gradients are a no-op": zero_gradients,
    "no gradients are a no-op": no_gradients,
    "closure may return None": lambda rule: rule.needs_loss or closure_returns(None, rule),
    "closure may return an int": lambda rule: closure_returns(1, rule),
    "bare step works or names the remedy": bare_step,
    "group of lr 1e-28 does not move": group_of_no_lr,
    "bfloat16 trains": bfloat16,
    "parameter without dimensions trains": zero_dimensions,
    "nan loss moves nothing": nan_loss,
    "resume does not drift": resume,
}


@pytest.mark.parametrize("claim", TEN)
@each_rule
def test_ten_edges(rule, claim):
    TEN[claim](rule)


# Not finite


POISON = {
    "nan gradient": lambda problem: problem.params[2].grad.view(-1)[3:4].fill_(math.nan),
    "inf gradient": lambda problem: problem.params[0].grad.view(-1)[0:1].fill_(-math.inf),
    "gradient whose square overflows": lambda problem: problem.params[1].grad.view(-1)[1:2].fill_(1e160),
}


def poisoned(problem, kind):
    """A closure that spoils its gradients or its loss."""

    def closure():
        loss = problem.closure()
        if kind in POISON:
            POISON[kind](problem)
            return loss
        return loss.detach() * {"nan loss": math.nan, "inf loss": math.inf, "-inf loss": -math.inf}[kind]

    return closure


KINDS = [*POISON, "nan loss", "inf loss", "-inf loss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rule", [PublishedRadius(50), RatioRadius()], ids=["published", "ratio"])
def test_bad_step_that_is_read_leaves_no_trace_in_the_run(rule, first, kind):
    problem, plain = (Problem(rule, weight_decay=0.1).run(0 if first else 7) for _ in range(2))
    before = {k: v for k, v in problem.facts().items() if not k.startswith("group")}
    problem.optimizer.step(poisoned(problem, kind), loss_closure=problem.loss_closure)
    report = problem.optimizer.last_step
    assert (report.skipped, report.accepted, report.checked, report.step_norm) == (True, False, False, 0.0)
    assert (report.skipped_steps, report.step) == (1, 1 if first else 8)
    after = {k: v for k, v in problem.facts().items() if not k.startswith("group")}
    if first and isinstance(rule, PublishedRadius):  # no check, so there is nothing to put back
        assert not any(after[key].any() for key in after if key.endswith((" m", " v")))
        after = {k: v for k, v in after.items() if not k.startswith("state")}
    assert_same(before, after)
    counts = ["steps", "skipped_steps", "total_trials", "unchecked_steps"]
    assert_same(problem.run(20).facts(), plain.run(20).facts(), but=counts)
    assert problem.optimizer.last_step.skipped_steps == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rule", [FixedRadius(), RatioRadius()], ids=["fixed", "ratio"])
def test_bad_step_between_checks_only_ages_the_parameters(rule, foreach, kind):
    problem = Problem(rule, weight_decay=0.1, foreach=foreach).run(4)
    if isinstance(rule, RatioRadius):
        in_phase(problem, check=False)
    before, kept, radius = point(problem), moments(problem), problem.optimizer.radius
    ages = [problem.optimizer.state[p]["step"] for p in problem.params]
    calls = problem.calls["loss"]
    problem.optimizer.step(poisoned(problem, kind), loss_closure=problem.loss_closure)
    assert problem.calls["loss"] == calls
    assert torch.equal(point(problem), before)
    assert same_moments(moments(problem), kept)
    assert [problem.optimizer.state[p]["step"] for p in problem.params] == [age + 1 for age in ages]
    assert problem.optimizer.radius == radius
    report = problem.optimizer.last_step
    assert (report.skipped, report.accepted, report.checked, report.trials) == (True, False, False, 0)
    assert (report.step_norm, report.skipped_steps) == (0.0, 1)
    problem.run(3)
    assert not torch.equal(point(problem), before)
    assert problem.optimizer.last_step.skipped_steps == 1


def test_unread_skips_are_counted_by_whoever_reads_next():
    def spoil_two():
        problem = in_phase(Problem(RatioRadius()), check=False)
        for _ in range(2):
            problem.optimizer.step(poisoned(problem, "nan loss"), loss_closure=problem.loss_closure)
        return problem

    head = lambda problem: problem.optimizer.param_groups[0]["skipped_steps"]  # noqa: E731
    problem = spoil_two()
    assert problem.optimizer.last_step.skipped_steps == head(problem) == 2
    problem = spoil_two()
    assert problem.optimizer.state_dict()["param_groups"][0]["skipped_steps"] == 2
    problem = spoil_two()
    assert copy.deepcopy(problem.optimizer).param_groups[0]["skipped_steps"] == 2
    problem = in_phase(spoil_two(), check=True)
    problem.step()
    assert head(problem) == 2
    assert problem.optimizer.last_step.skipped_steps == 2
    problem = in_phase(spoil_two(), check=True)
    problem.optimizer.step(poisoned(problem, "nan gradient"), loss_closure=problem.loss_closure)
    assert head(problem) == problem.optimizer.last_step.skipped_steps == 3


def test_check_that_was_skipped_is_made_up_for_on_the_next_step():
    problem = in_phase(Problem(RatioRadius()), check=True)
    checks = problem.optimizer.last_step.checks
    problem.optimizer.step(poisoned(problem, "nan loss"), loss_closure=problem.loss_closure)
    assert (problem.optimizer.last_step.checks, problem.optimizer.last_step.checked) == (checks, False)
    problem.step()
    assert (problem.optimizer.last_step.checks, problem.optimizer.last_step.checked) == (checks + 1, True)


@each_rule
def test_endless_bad_steps_change_neither_point_nor_radius(rule):
    problem = Problem(rule).run(3)
    before, kept, radius = point(problem), moments(problem), problem.optimizer.radius
    problem.spoil = math.inf
    problem.run(30)
    assert torch.equal(point(problem), before)
    assert same_moments(moments(problem), kept)
    assert problem.optimizer.radius == radius
    assert problem.optimizer.last_step.skipped_steps == 30


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("after_burn_in", [True, False])
def test_nonfinite_trial_loss_rejects_bitwise_and_shrinks_the_radius(after_burn_in, value):
    problem = Problem(RatioRadius(max_trials=3), weight_decay=0.1).run(20)
    if after_burn_in:
        in_phase(problem, check=True)
    before, radius, calls = point(problem), problem.optimizer.radius, []
    problem.optimizer.step(problem.closure, loss_closure=lambda: calls.append(1) or value)
    report = problem.optimizer.last_step
    assert torch.equal(point(problem), before)
    assert (report.checked, report.accepted, report.skipped, report.trials) == (True, False, False, 3)
    assert len(calls) == 3
    assert problem.optimizer.radius == report.radius == radius / 8
    assert report.actual_reduction == report.acceptance_ratio == -math.inf
    assert report.predicted_reduction > 0
    problem.run(5)
    assert np.isfinite(flat(problem)).all()


def test_nonfinite_first_trial_is_tried_again_at_once_with_a_smaller_radius():
    problem, answers = Problem(RatioRadius()).run(3), iter([math.nan])
    radius, norm = problem.optimizer.radius, problem.optimizer.last_step.step_norm
    problem.optimizer.step(problem.closure, loss_closure=lambda: next(answers, None) or problem.loss())
    report = problem.optimizer.last_step
    assert (report.accepted, report.trials) == (True, 2)
    assert report.radius < radius
    assert 0 < report.step_norm < norm


# Exceptions


class Boom(BaseException):
    """Not an Exception, as a KeyboardInterrupt is not."""


@pytest.mark.parametrize("error", [RuntimeError, Boom])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("trial", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exception_in_any_closure_leaves_no_bit_changed_and_the_step_can_be_repeated(dtype, trial, steps, error):
    rule = Script("a" * steps + "tta")
    problem, plain = (Problem(rule, dtype=dtype, weight_decay=0.1, grouped=True).run(steps) for _ in range(2))
    before, report = problem.facts(), problem.optimizer.last_step
    kept = point(problem)
    seen, calls = [], trial + (trial > 0 and steps == 0)  # the first check repeats the loss before its first trial

    def closure():
        loss = problem.closure()
        if trial == 0:
            raise error("boom")
        return loss

    def loss_closure():
        seen.append(1)
        if len(seen) == calls:
            raise error("boom")
        return problem.loss()

    with pytest.raises(error, match="boom"):
        problem.optimizer.step(closure, loss_closure=loss_closure)
    assert len(seen) == calls
    assert_same(before, problem.facts())
    assert torch.equal(point(problem), kept)
    assert len(problem.optimizer.state) == (4 if steps else 0)
    assert problem.optimizer.last_step is report
    problem.step()
    plain.step()
    assert problem.optimizer.last_step == plain.optimizer.last_step
    assert problem.optimizer.last_step.trials == (3 if steps else 4)
    assert_same(problem.facts(), plain.facts())


@pytest.mark.parametrize("steps", [0, 4])
@each_rule
def test_exception_in_the_closure_leaves_no_bit_changed(rule, steps):
    problem = Problem(rule, weight_decay=0.1).run(steps)
    before, report = problem.facts(), problem.optimizer.last_step

    def closure():
        problem.closure()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        problem.optimizer.step(closure, loss_closure=problem.loss_closure)
    assert_same(before, problem.facts())
    assert len(problem.optimizer.state) == (4 if steps else 0)
    assert problem.optimizer.last_step is report


def test_exception_where_the_base_loss_is_one_more_trial_leaves_no_bit_changed():
    problem = Problem(RatioRadius()).run(2)
    problem.closure()
    before = problem.facts()
    with pytest.raises(ZeroDivisionError):
        problem.optimizer.step(loss_closure=lambda: 1 / 0)
    assert_same(before, problem.facts())


def test_exception_in_the_rule_leaves_no_bit_changed():
    @dataclass(frozen=True)
    class Raising(Script):
        def update(self, numbers, evidence):
            raise OverflowError

    problem = Problem(Raising(), weight_decay=0.1)
    before = problem.facts()
    with pytest.raises(OverflowError):
        problem.step()
    assert_same(before, problem.facts())
    assert len(problem.optimizer.state) == 0


# Rejection


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_rejected_step_puts_back_every_bit(dtype, weight_decay, foreach):
    real = dtype.to_real() if dtype.is_complex else dtype
    tiny = torch.finfo(real).smallest_normal
    values = torch.tensor([-0.0, 0.0, 1.0, tiny, tiny / 2, -tiny / 4, 1 / 3, torch.finfo(real).max], dtype=real)
    x = nn.Parameter(torch.view_as_complex(values.reshape(4, 2)) if dtype.is_complex else values)
    optimizer = SOAA([x], radius=Script("ttr"), weight_decay=weight_decay, foreach=foreach)
    before, seen = bits(x), []
    x.grad = torch.ones_like(x)

    def loss_closure():
        seen.append(torch.equal(bits(x), before))
        return 1.0

    optimizer.step(lambda: 1.0, loss_closure=loss_closure)
    assert seen == [True, False, False, False]
    assert torch.equal(bits(x), before)
    assert optimizer.state[x]["m"].abs().sum() > 0
    assert optimizer.state[x]["step"] == 1
    report = optimizer.last_step
    assert (report.checked, report.accepted, report.skipped, report.trials) == (True, False, False, 4)
    assert (report.step_norm, report.radius) == (0.0, 0.5 / 8)


def test_trials_of_one_step_start_from_the_same_point_and_shrink_with_the_radius():
    problem = Problem(Script("ttta", radius=0.1, shrink=0.25))
    start, points = flat(problem), []
    problem.optimizer.step(problem.closure, loss_closure=lambda: points.append(flat(problem)) or problem.loss())
    repeated, *lengths = [np.linalg.norm(p - start) for p in points]
    assert repeated == 0
    for i, length in enumerate(lengths):
        assert length == pytest.approx(lengths[0] * 0.25**i, rel=1e-7)
    np.testing.assert_array_equal(flat(problem), points[-1])
    assert problem.optimizer.last_step.trials == len(points) == 5


def test_trial_point_leaves_weight_decay_out_and_the_kept_point_has_it():
    problem, trial = Problem(Script("a"), weight_decay=0.25, lr=1.0), []
    start = flat(problem)
    problem.optimizer.step(problem.closure, loss_closure=lambda: trial.append(flat(problem)) or problem.loss())
    np.testing.assert_array_equal(trial[0], start)
    np.testing.assert_allclose(flat(problem), trial[1] - 0.25 * start, rtol=1e-12, atol=1e-14)


# Closures


@each_rule
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_closure_runs_once_with_gradients_and_loss_closure_without_whatever_surrounds_the_step(rule, context):
    problem, modes = Problem(rule), []

    def closure():
        modes.append(("closure", torch.is_grad_enabled()))
        return problem.closure()

    def loss_closure():
        modes.append(("loss", torch.is_grad_enabled()))
        loss = problem.loss()
        assert not loss.requires_grad
        return loss

    for _ in range(3):
        with context():
            problem.optimizer.step(closure, loss_closure=loss_closure)
            assert torch.is_grad_enabled() == (context is torch.enable_grad)
        problem.batch += 1
    wanted = [("closure", True), ("loss", False)] if rule.needs_trial else [("closure", True)]
    repeated = [("closure", True), ("loss", False), ("loss", False)] if rule.needs_trial else wanted
    assert modes == repeated + wanted * 2


@pytest.mark.parametrize(
    "rule", [RatioRadius(), RatioRadius(relative=50.0, target=0.01), RatioRadius(interval=2, max_trials=1)]
)
def test_loss_closure_is_called_as_often_as_trials_are_reported(rule):
    problem, trials = Problem(rule), []
    for _ in range(80):
        before = problem.calls["loss"]
        problem.step()
        trials.append(problem.optimizer.last_step.trials)
        assert problem.calls["loss"] - before == trials[-1]
    assert problem.optimizer.last_step.total_trials == sum(trials) == problem.calls["loss"]
    assert problem.calls["closure"] == 80
    trials[0] -= 1  # the one in which nothing moves
    assert (max(trials) > 1) == (rule.relative > 1)
    assert min(trials) == 0


def test_bound_loss_closure_is_used_once_and_an_argument_takes_its_place():
    problem = Problem(RatioRadius())
    problem.optimizer.bind_loss_closure(problem.loss_closure)
    problem.optimizer.step(problem.closure)
    assert problem.calls == {"closure": 1, "loss": 2}
    with pytest.raises(ValueError, match="`loss_closure` must be given under RatioRadius, got None"):
        problem.optimizer.step(problem.closure)
    assert problem.calls == {"closure": 1, "loss": 2}
    problem.optimizer.bind_loss_closure(lambda: 1 / 0)
    problem.optimizer.step(problem.closure, loss_closure=problem.loss_closure)
    with pytest.raises(ValueError, match="`loss_closure` must be given"):
        problem.optimizer.step(problem.closure)


def test_bound_loss_closure_is_gone_after_loading_and_not_in_a_copy():
    problem = Problem(RatioRadius()).run(1)
    state = problem.optimizer.state_dict()
    problem.optimizer.bind_loss_closure(problem.loss_closure)
    clone = copy.deepcopy(problem.optimizer)
    problem.optimizer.load_state_dict(state)
    for optimizer in (problem.optimizer, clone):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="`loss_closure` must be given"):
            optimizer.step()


def test_loss_that_the_closure_returns_wins_over_the_bound_one():
    problem = Problem(RatioRadius())
    problem.optimizer.bind_loss_closure(problem.loss_closure, base_loss=1e6)
    loss = problem.optimizer.step(problem.closure)
    assert problem.optimizer.last_step.base_loss == loss.item()


# Reports


@each_rule
def test_report_and_radius_before_during_and_after(rule):
    problem = Problem(rule)
    assert problem.optimizer.last_step is None
    assert (
        problem.optimizer.radius
        == {"fixed": 0.5, "published": 1.0, "ratio": 0.0}[next(name for name, value in RULES.items() if value is rule)]
    )
    problem.step()
    first = problem.optimizer.last_step
    assert first is problem.optimizer.last_step
    assert isinstance(first, StepReport)
    assert first.radius == problem.optimizer.radius
    kept = copy.deepcopy(first)
    during = []
    inner = problem.closure
    problem.closure = lambda: during.append(problem.optimizer.last_step) or inner()
    problem.step()
    assert during[0] is first
    assert first == kept
    assert problem.optimizer.last_step.step == 2
    with pytest.raises(FrozenInstanceError):
        first.step = 5
    for field in fields(StepReport):
        assert type(getattr(first, field.name)) is field.type, field.name


def test_report_read_late_or_twice_is_the_one_of_its_step():
    early, late = (in_phase(Problem(RatioRadius()), check=True) for _ in range(2))
    for _ in range(7):
        early.step()
        late.step()
        reports = [early.optimizer.last_step]
        early.closure()
        late.closure()
        late.optimizer.zero_grad()
        with pytest.raises(ZeroDivisionError):
            late.optimizer.step(lambda: 1 / 0, loss_closure=late.loss_closure)
        reports += [late.optimizer.last_step, early.optimizer.last_step]
        assert reports[0] == reports[1] == reports[2]


verdict = st.sampled_from(["a", "r", "ta", "tr", "tta", "skip"])


@settings(max_examples=25, deadline=None)
@given(st.lists(verdict, min_size=1, max_size=12))
def test_counts_are_those_of_a_plain_tally(steps):
    script = "".join(step for step in steps if step != "skip") or "a"
    problem = Problem(Script(script, shrink=0.9))
    checks = accepted = skipped = trials = 0
    first = True
    for number, step in enumerate(steps, start=1):
        problem.spoil = math.nan if step == "skip" else 1.0
        problem.step()
        checks += step != "skip"
        accepted += step.endswith("a")
        skipped += step == "skip"
        mine = (1 if step == "skip" else len(step)) + first  # the loss is repeated until a check has seen it
        first = first and step == "skip"
        trials += mine
        report = problem.optimizer.last_step
        assert (report.step, report.checks, report.accepted_checks) == (number, checks, accepted)
        assert (report.skipped_steps, report.total_trials) == (skipped, trials)
        assert (report.checked, report.accepted) == (step != "skip", step.endswith("a"))
        assert (report.skipped, report.trials) == (step == "skip", mine)
        assert math.isnan(report.acceptance_ratio) == (checks == 0)


def test_reductions_are_those_of_the_last_check_measured_from_outside():
    problem = Problem(RatioRadius(), lr=1.0)
    report = None
    for _ in range(70):
        start, previous = flat(problem), report
        base = problem.loss().item()
        gradient = []

        def closure(gradient=gradient):
            loss = problem.closure()
            gradient.extend(p.grad.flatten() for p in problem.params)
            return loss

        problem.optimizer.step(closure, loss_closure=problem.loss_closure)
        report = problem.optimizer.last_step
        assert report.base_loss == base
        if report.checked and report.accepted:
            moved = flat(problem) - start
            promised = -float(torch.cat(gradient).numpy() @ moved)
            assert report.predicted_reduction == pytest.approx(promised, rel=1e-7, abs=1e-15)
            assert report.actual_reduction == pytest.approx(base - problem.loss().item(), rel=1e-12, abs=1e-15)
            assert report.acceptance_ratio == report.actual_reduction / report.predicted_reduction
        elif not report.checked:
            assert report.predicted_reduction == previous.predicted_reduction
            assert report.actual_reduction == previous.actual_reduction
        problem.batch += 1
    assert 0 < report.checks < 70


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rule", [FixedRadius(4.0), PublishedRadius(50), RatioRadius(), Script("ta")])
def test_step_norm_is_the_norm_of_the_displacement(rule, foreach, grouped):
    problem = Problem(rule, lr=0.02, foreach=foreach, grouped=grouped)
    if grouped:
        for group, lr in zip(problem.optimizer.param_groups, (0.02, 0.01, 0.005, 0.0), strict=True):
            group["lr"] = lr
    for _ in range(6):
        start = flat(problem)
        problem.step()
        assert problem.optimizer.last_step.step_norm == pytest.approx(np.linalg.norm(flat(problem) - start), rel=1e-9)
    assert problem.optimizer.last_step.step_norm > 0


@pytest.mark.parametrize("rule", [FixedRadius(0.05), FixedRadius(10.0), PublishedRadius(50), RatioRadius()])
def test_fisher_statistics_and_active_fraction_are_those_of_numpy(rule):
    problem = Problem(rule)
    problem.params[3].requires_grad_(False)
    groups = [
        {"params": problem.params[:2], "betas": (0.8, 0.9), "eps": 1e-3, "lr": 0.5},
        {"params": problem.params[2:], "betas": (0.5, 0.99), "lr": 1.0},
    ]
    problem.optimizer = SOAA(groups, lr=1.0, radius=rule)
    problem.spoil = 1e6 if isinstance(rule, RatioRadius) else 1.0
    problem.run(3)
    problem.params[3].requires_grad_(True)  # an age of its own
    problem.run(3)
    bound = problem.optimizer.radius
    problem.step()
    report = problem.optimizer.last_step
    top = bottom = 0.0
    rows = []
    for group in problem.optimizer.param_groups:
        b1, b2 = group["betas"]
        for p in group["params"]:
            kept = problem.optimizer.state[p]
            t = 4 if p is problem.params[3] else 7
            assert kept["step"] == t
            mh, vh = kept["m"].numpy() / (1 - b1**t), kept["v"].numpy() / (1 - b2**t)
            top += np.sum(mh**2)
            bottom += np.sum(vh + group["eps"])
            radius = 0.0 if isinstance(rule, RatioRadius) else bound  # there the Fisher limits nothing
            rows.append((vh, radius))
    c = 1 + top / bottom
    fisher = np.concatenate([np.ravel(c * vh) for vh, _ in rows])
    active = np.concatenate([np.ravel(d * c * vh > np.sqrt(vh)) for vh, d in rows])
    for name, value in {"mean": fisher.mean(), "min": fisher.min(), "max": fisher.max(), "trace": fisher.sum()}.items():
        assert getattr(report, f"fisher_{name}") == pytest.approx(value, rel=1e-12), name
    assert report.active_fraction == pytest.approx(active.mean(), abs=1e-15)
    if isinstance(rule, FixedRadius):
        assert (report.active_fraction > 0) == (rule.radius > 1)


@each_rule
def test_statistics_are_nan_when_nothing_has_coordinates(rule):
    x = nn.Parameter(torch.empty(0, 3))
    x.grad = torch.empty(0, 3)
    optimizer = SOAA([x], radius=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: 1.0, loss_closure=lambda: 1.0)
    report = optimizer.last_step
    for name in ("fisher_mean", "fisher_min", "fisher_max", "fisher_trace", "active_fraction"):
        assert math.isnan(getattr(report, name)), name
    assert (report.step, report.skipped) == (1, False)
    assert math.isfinite(optimizer.radius)


@pytest.mark.parametrize("foreach", [True, False])
def test_the_smallest_eps_leaves_no_nan_beside_zero_gradients_in_float32(foreach):
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = SOAA([x], eps=1.2e-38, foreach=foreach)
    drive(optimizer, lambda: (x[:2] * 1e-9).sum(), 12)
    assert x.isfinite().all()
    assert x[2] == 1
