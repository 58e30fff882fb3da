"""One step of SOAA: what is called, what moves, what is undone, what is reported."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from problems import RULES, Problem, assert_same

from lightning_soaa import SOAA, FixedRadius, PublishedRadius
from lightning_soaa.radius import AbstractRadius, Decision


@dataclass(frozen=True)
class Judge(AbstractRadius):
    """Checks on every step; accepts or rejects all, after as many trials as it is told."""

    needs_trial: ClassVar[bool] = True
    verdict: bool = True
    tries: int = 1

    def init(self, lr):
        return {"radius": 1.0}

    def update(self, numbers, evidence):
        return Decision({"radius": numbers["radius"] / 2}, self.verdict, retry=evidence.attempt < self.tries)


@pytest.mark.parametrize("rule", RULES)
def test_loss_falls(rule):
    problem = Problem(rule, lr=1e-2)
    first = problem.loss().item()
    problem.run(60)
    problem.batch = 0
    assert problem.loss().item() < 0.8 * first


@pytest.mark.parametrize("rule", RULES)
def test_step_returns_what_the_closure_returned(rule):
    problem = Problem(rule)
    loss = problem.step()
    assert loss.requires_grad
    assert loss.item() == Problem(rule).loss().item()


@pytest.mark.parametrize(
    "kind", [lambda loss: loss.item(), lambda loss: loss.detach(), lambda loss: loss.reshape(1), lambda loss: loss]
)
@pytest.mark.parametrize("rule", RULES)
def test_loss_may_be_a_float_or_any_tensor_of_one_element(rule, kind):
    plain, other = Problem(rule), Problem(rule)
    for _ in range(5):
        plain.optimizer.step(lambda: plain.closure().detach(), loss_closure=plain.loss_closure)
        other.optimizer.step(lambda: kind(other.closure()), loss_closure=lambda: kind(other.loss_closure().detach()))
    assert_same(plain.facts(), other.facts())


def test_int_loss_is_accepted():
    x = torch.nn.Parameter(torch.ones(1))
    optimizer = SOAA([x], radius=PublishedRadius(3))

    def closure():
        x.grad = torch.ones(1)
        return 1

    assert optimizer.step(closure) == 1
    assert optimizer.last_step.base_loss == 1


def test_closure_without_a_loss_is_enough_where_none_is_needed():
    problem, silent = Problem("fixed").run(4), Problem("fixed")
    for _ in range(4):
        assert silent.optimizer.step(lambda: silent.closure() and None) is None
        silent.batch += 1
    assert_same(problem.facts(), silent.facts())


@pytest.mark.parametrize("how", ["closure returns None", "no closure", "bound base loss", "bound"])
def test_missing_base_loss_is_one_more_trial_or_handed_over(how):
    problem, other = Problem("ratio"), Problem("ratio")
    problem.step()
    optimizer = other.optimizer
    if how == "closure returns None":
        optimizer.step(lambda: other.closure() and None, loss_closure=other.loss_closure)
    else:
        loss = other.closure()
        if how == "no closure":
            optimizer.step(loss_closure=other.loss_closure)
        else:
            optimizer.bind_loss_closure(other.loss_closure, base_loss=loss if how == "bound base loss" else None)
            optimizer.step()
    # One of them repeats the loss before anything moves: this is the first check.
    assert other.calls["loss"] == optimizer.last_step.trials == (2 if how == "bound base loss" else 3)
    assert_same(problem.facts(), other.facts(), but=["total_trials"])


def test_bound_loss_closure_lives_for_one_step():
    problem = Problem("ratio")
    problem.optimizer.bind_loss_closure(problem.loss_closure)
    problem.optimizer.step(problem.closure)
    with pytest.raises(ValueError, match="`loss_closure` must be given under RatioRadius, got None"):
        problem.optimizer.step(problem.closure)
    problem.optimizer.bind_loss_closure(problem.loss_closure)
    with pytest.raises(ZeroDivisionError):
        problem.optimizer.step(lambda: 1 / 0)
    with pytest.raises(ValueError, match="`loss_closure` must be given"):
        problem.optimizer.step(problem.closure)


@pytest.mark.parametrize("retries", [1, 3])
def test_rejected_step_restores_parameters_bitwise_and_keeps_the_gradient(retries):
    problem = Problem(Judge(verdict=False, tries=retries), weight_decay=0.1)
    before = problem.facts()
    problem.step()
    after, report = problem.facts(), problem.optimizer.last_step
    assert all(torch.equal(before[f"param {i}"], after[f"param {i}"]) for i in range(4))
    assert all(after[f"state {i} m"].abs().sum() > 0 for i in range(4))
    assert (report.checked, report.accepted, report.skipped, report.trials) == (True, False, False, 1 + retries)
    assert report.step_norm == 0
    assert report.radius == 0.5**retries


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("foreach", [True, False])
def test_check_that_accepts_changes_no_bit_of_the_step(weight_decay, foreach):
    @dataclass(frozen=True)
    class Accept(AbstractRadius):
        needs_trial: ClassVar[bool] = True

        def init(self, lr):
            return {"radius": 0.5}

        def update(self, numbers, evidence):
            return Decision(dict(numbers), accepted=True)

    checked = Problem(Accept(), weight_decay=weight_decay, foreach=foreach).run(8)
    plain = Problem(FixedRadius(0.5), weight_decay=weight_decay, foreach=foreach).run(8)
    assert checked.calls["loss"] == 1 + 8  # one more in the first check
    for a, b in zip(checked.params, plain.params, strict=True):
        assert torch.equal(a, b)


SPOILT = {
    "nan gradient": lambda p: p.params[2].grad.view(-1)[0:1].fill_(math.nan),
    "inf gradient": lambda p: p.params[3].grad.fill_(math.inf),
    "overflow": lambda p: p.params[0].grad.fill_(1e200),
}


@pytest.mark.parametrize("kind", [*SPOILT, "nan loss", "inf loss"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("when", [0, 1, 60, 61, 62, 63, 64])
def test_nonfinite_step_moves_nothing_and_training_goes_on(rule, kind, when):
    problem = Problem(rule).run(when)
    before = problem.facts()

    def closure():
        loss = problem.closure()
        if kind in SPOILT:
            SPOILT[kind](problem)
            return loss
        return loss.detach() * (math.nan if kind == "nan loss" else math.inf)

    problem.optimizer.step(closure, loss_closure=problem.loss_closure)
    after, report = problem.facts(), problem.optimizer.last_step
    for key, value in before.items():
        if key.startswith("param") or key.endswith((" m", " v")):
            assert torch.equal(value, after[key]), key
    assert after["group 0 radius"] == before["group 0 radius"]
    assert (report.skipped, report.accepted, report.step_norm, report.skipped_steps) == (True, False, 0, 1)
    problem.run(3)
    assert problem.optimizer.last_step.skipped_steps == 1
    assert not problem.optimizer.last_step.skipped
    assert all(bool(p.isfinite().all()) for p in problem.params)


def test_counts_of_the_report_add_up():
    problem, reports = Problem("ratio"), []
    for _ in range(80):
        problem.step()
        reports.append(problem.optimizer.last_step)
    assert [r.step for r in reports] == list(range(1, 81))
    assert reports[-1].checks == sum(r.checked for r in reports) < 80
    assert reports[-1].accepted_checks == sum(r.checked and r.accepted for r in reports)
    assert reports[-1].total_trials == sum(r.trials for r in reports)
    last = [r for r in reports if r.checked][-1]
    assert reports[-1].acceptance_ratio == last.actual_reduction / last.predicted_reduction


def test_report_before_the_first_check_has_no_ratio():
    problem = Problem("fixed").run(1)
    report = problem.optimizer.last_step
    assert math.isnan(report.acceptance_ratio)
    assert math.isnan(report.predicted_reduction)
    assert Problem("fixed").optimizer.last_step is None


def test_reading_reports_does_not_change_the_run():
    read, unread = Problem("ratio"), Problem("ratio")
    for _ in range(40):
        read.step()
        assert read.optimizer.last_step is not None
        unread.step()
    unread.optimizer.state_dict()  # brings to the host what no report has asked for
    assert_same(read.facts(), unread.facts())


@pytest.mark.parametrize("rule", RULES)
def test_step_with_zero_gradients_moves_nothing_and_leaves_the_radius(rule):
    problem, radii = Problem(rule), []
    before = problem.facts()

    def closure():
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        return torch.tensor([1])

    for _ in range(3):
        problem.optimizer.step(closure, loss_closure=lambda: torch.tensor([1]))
        radii.append(problem.optimizer.radius)
    after = problem.facts()
    assert all(torch.equal(before[f"param {i}"], after[f"param {i}"]) for i in range(4))
    assert len(set(radii)) == 1 or rule == "published"
    assert math.isfinite(problem.optimizer.radius)


@pytest.mark.parametrize("rule", RULES)
def test_step_without_gradients_is_no_step(rule):
    problem = Problem(rule)
    before = problem.facts()
    problem.optimizer.step(lambda: torch.tensor(1.0), loss_closure=lambda: torch.tensor(1.0))
    assert_same(before, problem.facts())


@pytest.mark.parametrize("grads", ["missing", "zero"])
@pytest.mark.parametrize("rule", RULES)
def test_step_with_nothing_at_all_creates_state_and_moves_nothing(rule, grads):
    problem = Problem(rule, lr=0.0)
    if grads == "zero":
        for p in problem.params:
            p.grad = torch.zeros_like(p)
    before = problem.facts()
    problem.optimizer.step(closure=None)
    assert all({"m", "v", "step"} <= problem.optimizer.state[p].keys() for p in problem.params)
    after = problem.facts()
    assert all(torch.equal(before[f"param {i}"], after[f"param {i}"]) for i in range(4))
    assert problem.optimizer.radius == before["group 0 radius"]


def test_optimizer_keeps_no_gradient_alive():
    import gc
    import weakref

    problem = Problem("ratio").run(3)
    refs = [weakref.ref(p.grad) for p in problem.params]
    problem.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_state_is_eight_bytes_a_parameter_in_float32():
    problem = Problem("ratio", dtype=torch.float32).run(20)
    state = problem.optimizer.state
    tensors = [v for s in state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 8 * sum(p.numel() for p in problem.params)
