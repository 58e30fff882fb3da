"""The outlier gate: what is left out, what is let in, and what a step that is left out leaves behind."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, assert_same
from reference import Gate
from test_host_syncs import CountReads

from lightning_soaa import FixedRadius, PublishedRadius, RatioRadius
from lightning_soaa.gate import FRESH_GATE, SIZE, WARM_UP, pass_gate, pass_gate_on_host


def decisions(norms, losses=None, *, known=None):
    """Return which of a sequence of gradients are left out and what the gate knows after it, the same in both forms."""
    known = torch.tensor(FRESH_GATE, dtype=torch.float64) if known is None else known
    out = []
    for norm, loss in zip(norms, losses if losses is not None else [None] * len(norms), strict=True):
        square = torch.tensor(float(norm), dtype=torch.float64).square()
        loss = None if loss is None else torch.tensor(float(loss), dtype=torch.float64)
        ok = square.isfinite() if loss is None else square.isfinite() & loss.isfinite()
        before = known.clone()
        outlier, after = pass_gate(known, square, loss, ok)
        assert torch.equal(known, before)
        assert after.shape == (SIZE,)
        numbers = (tuple(known.tolist()), float(square), None if loss is None else float(loss), bool(ok))
        outlier_on_host, after_on_host = pass_gate_on_host(*numbers)
        assert outlier_on_host == bool(outlier)
        np.testing.assert_allclose(after_on_host, after.numpy(), rtol=1e-12, atol=1e-12)
        known = after
        out.append(bool(outlier))
    return out, known


def steady(count, *, spread=0.3, seed=0):
    """Norms and losses of an ordinary run."""
    rng = np.random.default_rng(seed)
    return list(np.exp(spread * rng.normal(size=count))), list(2.0 + 0.2 * rng.normal(size=count))


log_norms = st.floats(-6, 6) | st.sampled_from([0.0, 0.1, -0.1])
sequences = st.lists(st.tuples(log_norms, st.floats(-5, 5)), min_size=1, max_size=80)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sequences)
def test_gate_agrees_with_its_twin_in_plain_numbers(steps):
    norms, losses = [10.0**a for a, _ in steps], [b for _, b in steps]
    twin = Gate()
    expected = [twin.leaves_out([[np.array(norm)]], loss) for norm, loss in zip(norms, losses, strict=True)]
    out, known = decisions(norms, losses)
    assert out == expected
    facts = [*twin.seen, twin.credit, twin.means[0], twin.variances[0], twin.means[1], twin.variances[1]]
    facts.append(twin.peak)
    np.testing.assert_allclose(known.numpy(), facts, rtol=1e-9, atol=1e-9)


@given(sequences.filter(lambda steps: len(steps) >= WARM_UP))
def test_nothing_is_left_out_among_the_first_five(steps):
    out, _ = decisions([10.0**a for a, _ in steps][:WARM_UP], [b for _, b in steps][:WARM_UP])
    assert not any(out)


@pytest.mark.parametrize("count", [WARM_UP, 30, 1000])
@pytest.mark.parametrize("with_losses", [True, False])
def test_a_hundredfold_gradient_among_steady_ones_is_left_out(count, with_losses):
    norms, losses = steady(count + 20)
    norms[count] *= 100
    out, _ = decisions(norms, losses if with_losses else None)
    assert [i for i, left_out in enumerate(out) if left_out] == [count]


def test_gradient_of_twice_the_norm_is_left_out_if_its_loss_is_far_out_too():
    norms, losses = steady(200, spread=0.05)
    for norm, loss, expected in ((2.5, 2.0, False), (1.0, 15.0, False), (2.5, 15.0, True)):
        out, _ = decisions([*norms, norm], [*losses, loss])
        assert not any(out[:-1])
        assert out[-1] is expected


@pytest.mark.parametrize("offset", [0.0, -4.0])
def test_gradient_of_ordinary_norm_is_left_out_if_its_loss_is_ten_times_the_usual_size_and_far_out(offset):
    norms, losses = steady(200, spread=0.05)
    for norm, loss, expected in ((1.0, 15.0, False), (1.0, 25.0, True), (0.5, 25.0, True)):
        out, _ = decisions([*norms, norm], [*(offset + loss for loss in losses), loss])
        assert not any(out[:-1])
        assert out[-1] is expected


@pytest.mark.parametrize("spread", [0.8, 1.2])
def test_where_norms_scatter_widely_one_far_above_the_highest_is_left_out(spread):
    """Six deviations would be a factor 360 and 4 000 above the mean."""
    for seed in range(5):
        norms, losses = steady(101, spread=spread, seed=seed)
        norms[100] = 10 * max(norms[:100])
        assert decisions(norms, losses)[0][100]


@pytest.mark.parametrize("spread", [0.8, 1.2])
def test_of_a_steady_run_whose_norms_scatter_widely_under_one_in_a_hundred_is_left_out(spread):
    for seed in range(5):
        assert sum(decisions(*steady(1000, spread=spread, seed=seed))[0]) < 10


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3])
def test_no_gradient_of_a_steady_run_is_left_out(spread):
    for seed in range(5):
        assert not any(decisions(*steady(1000, spread=spread, seed=seed))[0])


def test_of_a_steady_run_whose_norms_scatter_by_half_one_in_five_thousand_is_left_out():
    assert sum(sum(decisions(*steady(1000, spread=0.5, seed=seed))[0]) for seed in range(5)) == 1


def test_gradients_that_fall_by_decades_are_let_in_and_so_is_a_steady_rise():
    fall = [10.0 ** (-i / 30) for i in range(300)]
    assert not any(decisions(fall)[0])
    assert not any(decisions(fall[::-1])[0])
    assert not any(decisions([1.0] * 100 + [1e-6] * 100)[0])


@settings(max_examples=50, deadline=None)
@given(st.floats(0.6, 6), st.integers(WARM_UP, 200), st.integers(0, 100))
def test_a_lasting_change_is_let_in_after_three_steps(decades, count, seed):
    norms, losses = steady(count, seed=seed)
    after, _ = steady(60, seed=seed + 1)
    out, _ = decisions(norms + [10**decades * norm for norm in after], losses + losses[:1] * 60)
    assert not any(out[:count])
    assert sum(out[count:]) <= 3
    assert not any(out[count + 4 :])


@settings(max_examples=200, deadline=None)
@given(sequences, st.integers(1, 10))
def test_never_are_more_than_one_in_eleven_and_three_left_out(steps, repeats):
    norms = [10.0**a for a, _ in steps] * repeats
    out, _ = decisions(norms, [b for _, b in steps] * repeats)
    for seen in range(1, len(out) + 1):
        assert sum(out[:seen]) <= 3 + seen / 11


def test_endless_outliers_use_up_the_whole_right_to_leave_out_and_no_more():
    """Each is three times as far out as the limit that the last one widened."""
    known, left_out = decisions(*steady(50))[1], 0
    for _ in range(330):
        limit = 6 * known[3].sqrt() + math.log(3)
        out, known = decisions([math.exp(float(known[2] + 3 * limit))], known=known)
        left_out += out[0]
        _, known = decisions([math.exp(float(known[2]))] * 9, known=known)
    assert 3 <= left_out <= 3 + 3300 / 11


@pytest.mark.parametrize(
    ("norm", "loss"), [(0.0, 2.0), (math.nan, 2.0), (math.inf, 2.0), (1.0, math.nan), (1e200, 2.0)]
)
@pytest.mark.parametrize("count", [0, 5, 50])
def test_gradients_that_are_zero_or_not_finite_are_not_its_business(norm, loss, count):
    _, known = decisions(*steady(count)) if count else ([], torch.tensor(FRESH_GATE, dtype=torch.float64))
    out, after = decisions([norm] * 3, [loss] * 3, known=known)
    assert not any(out)
    assert torch.equal(after, known)


@settings(max_examples=100, deadline=None)
@given(sequences, st.sampled_from([1e-4, 1e4]), st.sampled_from([1e-4, 1e4]))
def test_units_of_gradients_and_loss_change_no_decision(steps, unit, loss_unit):
    rng = np.random.default_rng(0)  # so that nothing lies exactly on a limit
    norms = [10.0 ** (a + 1e-3 * rng.normal()) for a, _ in steps]
    losses = [b + 1e-3 * rng.normal() for _, b in steps]
    out, _ = decisions(norms, losses)
    assert decisions([unit * norm for norm in norms], [loss_unit * loss for loss in losses])[0] == out


def test_what_keeps_coming_far_out_widens_the_limit_until_it_is_let_in():
    norms, _ = steady(400, spread=0.1)
    norms = [norm * (20 if i % 13 == 12 else 1) for i, norm in enumerate(norms)]
    out, known = decisions(norms)
    spikes = [out[i] for i in range(12, 400, 13)]
    assert spikes[0]
    assert not any(spikes[-5:])
    assert sum(out) == sum(spikes)
    assert 6 * math.sqrt(known[3]) + math.log(3) > math.log(20)


def test_one_outlier_moves_no_mean_and_widens_no_more_than_its_limit():
    _, known = decisions(*steady(100))
    for far in (1e2, 1e12):
        out, after = decisions([far], [2.0], known=known)
        assert out == [True]
        assert torch.equal(after[3], known[3])
        limit = min(6 * known[4].sqrt() + math.log(3), known[7] + math.log(4))
        assert after[4] == pytest.approx(float(0.99 * (known[4] + 0.01 * limit**2)), rel=1e-12)
        assert after[7] == pytest.approx(float(known[7] + 0.1 * (limit - known[7])), rel=1e-12)


def test_ten_equal_losses_at_the_start_do_not_narrow_the_limit_of_the_loss_for_good():
    """As at a radius far too small, on one batch or in 16 bits."""
    norms, losses = steady(1000, spread=0.5)
    assert not any(decisions(norms, [2.0] * WARM_UP + losses[WARM_UP:])[0][100:])


@pytest.mark.parametrize("interval", [5, 20])
def test_losses_that_are_not_known_do_not_narrow_the_limit_of_the_loss(interval):
    """Without a closure the loss is known on checks only."""
    norms, losses = steady(1000)
    known = decisions(norms, losses)[1]
    sparse = [loss if i < 40 or i % interval == 0 else None for i, loss in enumerate(losses)]
    assert decisions(norms, sparse)[1][6] > 0.5 * known[6]


# ----------------------------------------------------------------------------------------------------------------------
# In SOAA

SPIKE = 1e6


def spiked(problem, factor=SPIKE):
    """A closure whose gradients are `factor` times too large."""

    def closure():
        loss = problem.closure()
        for p in problem.params:
            p.grad *= factor
        return loss

    return closure


def before_a(kind, **options):
    """Return a problem whose next step is a check of burn-in, a check after it, or no check."""
    problem = Problem(RatioRadius(), weight_decay=0.1, **options).run(15)
    head = problem.optimizer.param_groups[0]
    if kind != "burn-in":
        while head["rule_phase"]:
            problem.step()
        due = lambda: problem.optimizer.radius_rule.check_due(  # noqa: E731
            {"phase": 0, "steady": head["rule_steady"], "doubts": 0}, head["unchecked_steps"]
        )
        while due() != (kind == "check"):
            problem.step()
    return problem


KINDS = ["burn-in", "check", "no check"]


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_leaves_parameters_and_moments_bit_for_bit_and_is_counted_as_such(kind, foreach):
    problem, plain = (before_a(kind, foreach=foreach) for _ in range(2))
    problem.optimizer.state_dict()  # all that is unread is heard
    before, radius = problem.facts(), problem.optimizer.radius
    problem.optimizer.step(spiked(problem), loss_closure=problem.loss_closure)
    report, after = problem.optimizer.last_step, problem.facts()
    ages = [] if kind != "no check" else [" step"]  # between checks the host does not know of it
    moved = {key: value for key, value in before.items() if not key.startswith("group")}
    assert_same(moved, {key: after[key] for key in moved}, but=ages)
    assert (report.outlier_steps, report.skipped_steps) == (1, 0)
    assert (report.skipped, report.accepted, report.checked, report.step_norm) == (True, False, False, 0.0)
    assert (report.radius, problem.optimizer.radius) == (radius, radius)
    assert report.trials == (kind != "no check")
    if kind != "no check":  # the run goes on as if nothing had happened, except for what the gate knows
        counts = ["steps", "total_trials", "unchecked_steps", "gate", "outlier_steps"]
        assert_same(problem.run(3).facts(), plain.run(3).facts(), but=counts)
    assert problem.run(3).optimizer.last_step.outlier_steps == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_the_usual_size_is_no_outlier(kind):
    problem = before_a(kind)
    problem.optimizer.step(spiked(problem, 2.0), loss_closure=problem.loss_closure)
    assert problem.optimizer.last_step.outlier_steps == 0
    assert not problem.optimizer.last_step.skipped


def test_an_outlier_between_checks_costs_no_host_read(accelerator, monkeypatch):
    problem, reads = before_a("no check"), []
    for name in ("tolist", "item", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: reads.append(1))
    loss = spiked(problem)().detach()
    with CountReads() as counter:
        problem.optimizer.step(lambda: loss, loss_closure=problem.loss_closure)
    assert (counter.scalars, reads) == (0, [])
    monkeypatch.undo()
    assert problem.optimizer.last_step.outlier_steps == 1


def test_outliers_that_were_not_read_are_counted_by_whoever_reads_next():
    def two():
        problem = before_a("no check")
        for _ in range(2):
            problem.optimizer.step(spiked(problem), loss_closure=problem.loss_closure)
        return problem

    head = lambda problem: problem.optimizer.param_groups[0]["outlier_steps"]  # noqa: E731
    problem = two()
    assert problem.optimizer.last_step.outlier_steps == head(problem) == 2
    assert two().optimizer.state_dict()["param_groups"][0]["outlier_steps"] == 2
    assert copy.deepcopy(two().optimizer).param_groups[0]["outlier_steps"] == 2
    problem = two()
    while not problem.optimizer.last_step.checked:
        problem.step()
    assert (head(problem), problem.optimizer.last_step.outlier_steps) == (2, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_gate_knows_survives_a_state_dict_bit_for_bit(kind):
    problem = before_a(kind)
    problem.optimizer.step(spiked(problem), loss_closure=problem.loss_closure)
    other = Problem(RatioRadius(), weight_decay=0.1)
    with torch.no_grad():
        for p, q in zip(other.params, problem.params, strict=True):
            p.copy_(q)
    other.batch = problem.batch
    state = problem.optimizer.state_dict()
    gate = state["param_groups"][0]["gate"]
    assert len(gate) == SIZE
    assert all(type(number) is float for number in gate)
    other.optimizer.load_state_dict(copy.deepcopy(state))
    assert_same(problem.facts(), other.facts())
    for both in (problem, other):
        both.run(4)
        both.optimizer.step(spiked(both), loss_closure=both.loss_closure)
        both.run(20)
        both.optimizer.state_dict()
    assert_same(problem.facts(), other.facts())
    assert problem.optimizer.last_step.outlier_steps == 2


def test_saving_at_any_time_changes_no_later_step():
    saved, plain = Problem(RatioRadius()), Problem(RatioRadius())
    for step in range(80):
        for problem in (saved, plain):
            closure = spiked(problem) if step in {30, 57, 58} else problem.closure
            problem.optimizer.step(closure, loss_closure=problem.loss_closure)
            problem.batch += 1
        saved.optimizer.state_dict()
    plain.optimizer.state_dict()
    assert_same(saved.facts(), plain.facts())
    assert saved.optimizer.last_step.outlier_steps == 3


@pytest.mark.parametrize("rule", [FixedRadius(), PublishedRadius(100)], ids=["fixed", "published"])
def test_there_is_no_gate_under_rules_of_the_paper(rule):
    problem = Problem(rule).run(30)
    before = torch.cat([p.detach().flatten() for p in problem.params])
    problem.optimizer.step(spiked(problem), loss_closure=problem.loss_closure)
    report = problem.optimizer.last_step
    assert (report.outlier_steps, report.skipped, report.accepted) == (0, False, True)
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in problem.params]))
    assert problem.optimizer.state_dict()["param_groups"][0]["gate"] == ()


@pytest.mark.parametrize("kind", ["check", "no check"])
def test_a_poisoned_batch_costs_next_to_nothing(kind):
    problem, clean = before_a(kind), before_a(kind)
    problem.optimizer.step(spiked(problem), loss_closure=problem.loss_closure)
    problem.batch += 1
    clean.step()
    for both in (problem, clean):
        both.run(30)
        both.batch = 0
    assert problem.loss().item() == pytest.approx(clean.loss().item(), rel=0.05)


def test_losses_whose_squares_overflow_are_let_in():
    out, known = decisions([1.0] * 8, [0.0, 1e160, -1e160, 1e200, 0.0, 1.0, 2.0, 3.0])
    assert not any(out)
    assert known[6].isinf()
