"""Modules that step several SOAA by `soaa_step`, two gloo processes: one decision each, the loop by hand's bits."""

import sys
import warnings
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_models import ACCEPT, QUIET, Adversaries, ProtectedAdversaries, assert_same, fit, loader, seed
from processes import of_ranks

from lightning_soaa import FixedRadius, RatioRadius

pytestmark = [*QUIET, pytest.mark.processes]

BATCHES = 8  # four a rank
NAN_BATCH, HIGH_BATCH = 2, 1


class Apart:
    """Has other batches, streams and losses on each rank, and keeps what each step left."""

    def on_fit_start(self):
        seed()
        torch.manual_seed(100 + self.global_rank)
        self.history = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        point = {name: value.detach().clone() for name, value in self.named_parameters()}
        optimizers = [optimizer.optimizer for optimizer in self.optimizers()]
        reports = [dict(vars(optimizer.last_step)) for optimizer in optimizers]
        self.history.append((point, [optimizer.radius for optimizer in optimizers], reports))


class ByHand(Apart, Adversaries):
    pass


class Protected(Apart, ProtectedAdversaries):
    pass


class Deciding(Protected):
    """Weighs losses by rank; on rank 1 one batch is nan to the discriminator, another a bad trial to the other."""

    def training_step(self, batch, batch_idx):
        self.batch = batch_idx
        super().training_step(batch, batch_idx)

    def discriminator_loss(self, batch):
        loss = super().discriminator_loss(batch) * (1 + self.global_rank)
        return loss * (float("nan") if self.global_rank == 1 and self.batch == NAN_BATCH else 1.0)

    def generator_loss(self, batch):
        loss = super().generator_loss(batch) * (1 + self.global_rank)
        return loss + (1.0 if self.global_rank == 1 and self.in_trial and self.batch == HIGH_BATCH else 0.0)


def run(kind, rules, **flags):
    seed()
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    return fit(kind(rules, **flags), data=loader(batches=BATCHES), strategy=strategy, devices=2)


STOCK, ALWAYS = (FixedRadius(), FixedRadius()), (ACCEPT, ACCEPT)
KINDS = {"by hand": (ByHand, STOCK), "soaa_step": (Protected, STOCK), "soaa_step, checked": (Protected, ALWAYS)}
OPTIONS = {"plain": {}, "toggled": {"toggle": True}, "clipped": {"clip": 0.1}}


def job():
    found = {}
    for option, flags in OPTIONS.items():
        for name, (kind, rules) in KINDS.items():
            done = run(kind, rules, **flags)
            points = [point for point, *_ in done.module.history]
            found[option, name] = {"run": points, "buffers": done.module.state_dict(), "losses": done.module.seen}
    deciding = run(Deciding, (RatioRadius(interval=1, max_trials=1), RatioRadius(interval=1, max_trials=1)))
    states = [optimizer.state_dict() for optimizer in deciding.trainer.optimizers]
    steps = deciding.trainer.global_step
    losses = [loss for loss in deciding.module.seen if isinstance(loss, torch.Tensor)]
    return found | {"history": deciding.module.history, "states": states, "steps": steps, "losses": losses}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks came to."""
    folder = tmp_path_factory.mktemp("manual_ddp")
    return of_ranks(__file__, folder)


@pytest.mark.parametrize("kind", ["soaa_step", "soaa_step, checked"])
@pytest.mark.parametrize("option", OPTIONS)
def test_two_processes_equal_the_loop_written_by_hand(ranks, option, kind):
    for rank in ranks:
        assert_same(rank[option, "by hand"], rank[option, kind])


def test_ranks_saw_losses_of_their_own(ranks):
    first, second = (rank["losses"] for rank in ranks)
    assert len(first) == 2 * BATCHES
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_parameters_radius_and_reports_of_each_optimizer_are_the_same_on_both_ranks(ranks):
    assert len(ranks[0]["history"]) == BATCHES
    assert_same(ranks[0]["history"], ranks[1]["history"])
    assert_same(ranks[0]["states"], ranks[1]["states"])
    assert ranks[0]["steps"] == ranks[1]["steps"] == 2 * BATCHES


def test_loss_of_a_report_is_the_mean_over_ranks(ranks):
    for step, (*_, reports) in enumerate(ranks[0]["history"]):
        for which, report in enumerate(reports):
            one, other = (rank["losses"][2 * step + which].double() for rank in ranks)
            assert report["base_loss"] == (one + other) / 2 or report["skipped"]


def moved(history, part):
    """Return, of each step but the first, whether any parameter of `part` moved."""
    pick = lambda point: {name: value for name, value in point.items() if name.startswith(part)}  # noqa: E731
    return [any(not torch.equal(a, pick(y)[n]) for n, a in pick(x).items()) for (x, *_), (y, *_) in pairwise(history)]


def test_what_is_wrong_on_one_rank_holds_back_that_optimizer_alone_on_both(ranks):
    for rank in ranks:
        history = rank["history"]
        for epoch in range(2):
            high, bad = (history[epoch * BATCHES // 2 + batch][2] for batch in (HIGH_BATCH, NAN_BATCH))
            assert (high[0]["accepted"], high[1]["accepted"], high[1]["skipped"]) == (True, False, False)
            assert (bad[0]["skipped"], bad[1]["skipped"]) == (True, False)
        still = [epoch * BATCHES // 2 + NAN_BATCH - 1 for epoch in range(2)]
        assert [i for i, did in enumerate(moved(history, "discriminator")) if not did] == still
        assert [i for i, did in enumerate(moved(history, "generator")) if not did] == [
            epoch * BATCHES // 2 + HIGH_BATCH - 1 for epoch in range(2)
        ]


def test_trial_replays_the_streams_of_its_own_rank(ranks):
    assert [report["repeat_gap"] for report in ranks[0]["history"][-1][2]] == [0.0, 0.0]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.save(job(), f"{sys.argv[2]}/{sys.argv[1]}.pt")
