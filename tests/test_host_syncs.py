"""Where the host waits for the device: nowhere between checks, once a trial, once a step under the published rule.

On the CPU, where it does not wait, it reads more often; the outcome is the same.
"""

import math

import pytest
import torch
from problems import RULES, Problem
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_soaa._describe
import lightning_soaa._proposal
import lightning_soaa._sums
import lightning_soaa._trust_region
import lightning_soaa._unread
import lightning_soaa._walk
import lightning_soaa.optimizer
from lightning_soaa import SOAA, FixedRadius, KroneckerFisher, RatioRadius

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select
}  # fmt: skip


class CountReads(TorchDispatchMode):
    """Counts operations whose outcome the host must wait for."""

    def __init__(self):
        super().__init__()
        self.scalars = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READS:
            self.scalars += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def packed(monkeypatch):
    """Counts packed reads by the one function that makes them."""
    calls, inner = [], lightning_soaa._sums.read

    def read(values, device):
        calls.append(len(values))
        return inner(values, device)

    for module in (
        *(lightning_soaa._describe, lightning_soaa._trust_region, lightning_soaa._unread, lightning_soaa.optimizer),
    ):
        monkeypatch.setattr(module, "read", read)
    return calls


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        bool,
        float,
        lambda x: x.nonzero(),
        lambda x: x.equal(x),
        lambda x: x[x > 0],
        lambda x: [0][x],
    ],
)
def test_counter_sees_what_a_host_may_wait_for(read):
    with CountReads() as counter:
        read(torch.zeros((), dtype=torch.int64))
    assert counter.scalars > 0


def step_counting(problem, packed):
    """Return (scalars read, packed reads) of one step."""
    packed.clear()
    loss = problem.closure().detach()
    with CountReads() as counter:
        problem.optimizer.step(lambda: loss, loss_closure=problem.loss_closure)
    problem.batch += 1
    return counter.scalars, len(packed)


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fisher": KroneckerFisher(refresh_every=3)}])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_does_the_same_whether_or_not_the_host_reads(request, rule, options):
    """But for the order of sums, and logarithms from two libraries."""

    def run():
        problem = Problem(rule, weight_decay=0.1, **options)
        for step in range(90):
            problem.spoil = {40: 1e4, 55: math.nan, 70: 1e4}.get(step, 1.0)
            problem.step()
        return problem.facts()

    read = run()
    request.getfixturevalue("accelerator")
    unread = run()
    assert read.keys() == unread.keys()
    for key, value in read.items():
        if isinstance(value, int | str | bool | None):
            assert value == unread[key], key
        else:
            torch.testing.assert_close(value, unread[key], rtol=1e-8, atol=1e-12, equal_nan=True)


def test_fixed_radius_never_reads(accelerator, packed):
    problem = Problem("fixed", weight_decay=0.1)
    assert [step_counting(problem, packed) for _ in range(10)] == [(0, 0)] * 10


def test_published_radius_reads_once_a_step(accelerator, packed):
    problem = Problem("published")
    assert [step_counting(problem, packed) for _ in range(10)] == [(0, 1)] * 10


def test_ratio_radius_reads_once_a_trial_and_not_at_all_between_checks(accelerator, packed):
    problem, checked, plain = Problem("ratio", weight_decay=0.1), 0, 0
    for _ in range(90):
        before = dict(problem.optimizer.param_groups[0])
        scalars, reads = step_counting(problem, packed)
        after = problem.optimizer.param_groups[0]
        trials = after["total_trials"] - before["total_trials"]
        assert reads == trials
        assert scalars == 0
        checked += trials > 0
        plain += trials == 0
    assert checked > 20
    assert plain > 20


def test_check_of_several_trials_reads_once_for_each(accelerator, packed):
    problem = Problem("ratio").run(20)
    problem.loss_closure = lambda: problem.loss() + 1e3
    assert step_counting(problem, packed) == (0, 4)
    assert packed == [packed[0]] * 4
    assert problem.optimizer.last_step.trials == 4


@pytest.mark.parametrize("rule", ["fixed", "ratio"])
@pytest.mark.parametrize("how", ["state_dict", "copy"])
def test_what_settles_the_counts_of_steps_that_were_not_read_reads_them_once(accelerator, packed, how, rule):
    problem = Problem(rule, weight_decay=0.1).run(3)
    problem.optimizer.param_groups[0].update({"rule_phase": 0} if rule == "ratio" else {})
    problem.run(2)
    packed.clear()
    with CountReads() as counter:
        for _ in range(2):
            problem.optimizer.state_dict() if how == "state_dict" else problem.optimizer.__getstate__()
    assert (counter.scalars, len(packed)) == (0, 1)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    ("rule", "numbers"), [(FixedRadius(), {}), (RatioRadius(interval=9), {"rule_phase": 0})], ids=["fixed", "ratio"]
)
def test_step_that_is_no_check_runs_on_tensors_without_data(rule, numbers, foreach):
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in ((4, 3), (), (0,))]
    optimizer = SOAA(params, radius=rule, weight_decay=0.1, foreach=foreach)
    optimizer.param_groups[0].update(numbers)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step(lambda: torch.empty((), device="meta"), loss_closure=lambda: 1 / 0)
    assert optimizer.param_groups[0]["steps"] == 3


@pytest.mark.parametrize("rule", RULES)
def test_operations_of_a_step_do_not_depend_on_the_number_of_values(rule):
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for size in (3, 3000):
        x = torch.nn.Parameter(torch.ones(size))
        optimizer = SOAA([x], radius=RULES[rule])
        x.grad = torch.ones_like(x)
        with Count() as count:
            optimizer.step(lambda: 1.0, loss_closure=lambda: 0.5)
        counts.append(count.calls)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("rule", "reads"), [("fixed", 2), ("published", 1), ("ratio", 1)])
def test_only_reading_the_report_costs_more(accelerator, packed, rule, reads):
    """Once for the statistics, and once before that for whether a step that was not read yet was skipped."""
    problem = Problem(rule)
    step_counting(problem, packed)
    packed.clear()
    for _ in range(2):
        with CountReads() as counter:
            assert problem.optimizer.last_step.step == 1
        assert (len(packed), counter.scalars) == (reads, 0)


def test_sums_over_shards_are_two_a_step_five_on_a_check_and_one_more_after_one(monkeypatch):
    """Each `total` or `by_owner` is one sum over processes where parameters are sharded."""
    calls = []
    for name, inner in (("total", lightning_soaa._sums.total), ("by_owner", lightning_soaa._proposal.by_owner)):
        for module in (lightning_soaa._proposal, lightning_soaa._walk):
            monkeypatch.setattr(module, name, lambda *args, inner=inner: (calls.append(1), inner(*args))[1])
    problem, seen = Problem("ratio").run(3), set()
    for _ in range(60):
        head = problem.optimizer.param_groups[0]
        before, asked = head["total_trials"], head["checked_slope"] > 0
        calls.clear()
        problem.step()
        trials = head["total_trials"] - before
        if trials <= 1:
            seen.add((bool(trials), asked, len(calls)))
    assert seen == {(False, False, 2), (False, True, 3), (True, False, 5), (True, True, 6)}
