"""Two gloo processes under every rule: no decision is taken from what only one of them knows."""

import sys

import pytest
import torch
import torch.distributed as dist
from problems import Problem, assert_same
from processes import of_ranks

from lightning_soaa import DiagonalFisher, FixedRadius, KroneckerFisher, PublishedRadius, RatioRadius

RULES = {
    "fixed": (FixedRadius(0.05), DiagonalFisher()),
    "published": (PublishedRadius(60), DiagonalFisher()),
    "ratio": (RatioRadius(interval=2), DiagonalFisher()),
    "kronecker": (RatioRadius(interval=2), KroneckerFisher(refresh_every=3)),
}
STEPS, NAN_STEPS, REJECTED = 60, {1, 12}, 6


def train(rule, fisher, rank):
    """Step on gradients averaged over ranks and on the loss of this rank alone; return all that came of it.

    One trial is bad on one rank alone.
    """
    problem, history, bad = Problem(rule, lr=0.05, weight_decay=0.01, fisher=fisher), [], [1e3] * rank

    def loss():
        problem.spoil = float("nan") if rank == 1 and problem.batch in NAN_STEPS else 1.0 + 3 * rank
        return problem.loss()

    def closure():
        problem.optimizer.zero_grad()
        value = loss()
        value.backward()
        for p in problem.params:
            p.grad.nan_to_num_(0.0)
            dist.all_reduce(p.grad)
            p.grad /= 2
        return value

    for _ in range(STEPS):
        trial_loss = lambda: loss() + (bad.pop() if problem.batch == REJECTED and bad else 0.0)  # noqa: E731
        problem.optimizer.step(closure, loss_closure=trial_loss)
        problem.batch += 1
        report = problem.optimizer.last_step
        point = torch.cat([p.detach().flatten() for p in problem.params])
        history.append((point, vars(report)))
    state = {i: problem.optimizer.state[p] for i, p in enumerate(problem.params)}
    return history, state


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save({name: train(*rules, rank) for name, rules in RULES.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks came to."""
    folder = tmp_path_factory.mktemp("ranks")
    return of_ranks(__file__, folder)


@pytest.mark.parametrize("rule", RULES)
def test_both_ranks_hold_the_same_bits_after_every_step(ranks, rule):
    (first, first_state), (second, second_state) = (rank[rule] for rank in ranks)
    for (x, report), (y, other) in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert all(other[key] == value or value != value for key, value in report.items()), (report, other)
    for index, entry in first_state.items():
        assert_same(entry, second_state[index])


@pytest.mark.parametrize("rule", RULES)
def test_loss_that_is_nan_on_one_rank_skips_the_step_on_both(ranks, rule):
    for rank in ranks:
        history = rank[rule][0]
        assert {step for step, (_, report) in enumerate(history) if report["skipped"]} == NAN_STEPS
        for step in NAN_STEPS:
            assert torch.equal(history[step][0], history[step - 1][0])
            assert history[step][1]["radius"] == history[step - 1][1]["radius"]


@pytest.mark.parametrize("rule", ["ratio", "kronecker"])
def test_decisions_of_both_kinds_were_taken(ranks, rule):
    reports = [report for _, report in ranks[0][rule][0]]
    assert [report["trials"] for report in reports].index(2, 2) == REJECTED
    assert any(report["checked"] and report["accepted"] for report in reports)
    assert any(not report["checked"] and not report["skipped"] for report in reports)


@pytest.mark.parametrize("rule", RULES)
def test_reported_loss_is_the_mean_of_both_ranks(ranks, rule):
    loss = Problem(RULES[rule][0]).loss().item()
    for rank in ranks:
        assert rank[rule][0][0][1]["base_loss"] == pytest.approx((1 + 4) / 2 * loss, rel=1e-14)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
