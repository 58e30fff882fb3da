"""The mixin under DistributedDataParallel, two gloo processes: stock automatic optimization's bits, one decision."""

import sys
import time
import warnings
from copy import deepcopy

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_models import (
    ACCEPT,
    QUIET,
    Automatic,
    Mixed,
    Net,
    Remember,
    assert_same,
    fit,
    loader,
    make_trainer,
    seed,
)  # fmt: skip
from processes import group_lives, of_ranks, start, stop
from torch import nn

from lightning_soaa import FixedRadius, RatioRadius

pytestmark = [*QUIET, pytest.mark.processes]

BATCHES = 8  # four a rank


class Watched:
    """Keeps, of each batch, the buffers that its forward found and those that it left."""

    def on_fit_start(self):
        seed()  # python seeds its stream anew where a process forks
        torch.manual_seed(100 + self.global_rank)
        self.before, self.after = [], []

    def training_step(self, batch, batch_idx):
        found = buffers(self)
        loss = super().training_step(batch, batch_idx)
        if not getattr(self, "in_trial", False):
            self.before.append(found)
            self.after.append(buffers(self))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.after.append(buffers(self))


def buffers(module):
    return [buffer.clone() for buffer in module.net.buffers()]


class Branching:
    """Has parameters that only every second batch uses."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.branch = nn.Linear(4, 1)

    def loss(self, batch):
        loss = super().loss(batch)
        if len(self.losses) % 2:
            loss = loss + self.branch(batch[0]).square().mean()
        return loss


class Hooked:
    """Halves what ranks exchange by a communication hook."""

    def on_fit_start(self):
        super().on_fit_start()
        self.trainer.strategy.model.register_comm_hook(None, compress)


NAN_BATCH, HIGH_BATCH = 2, 1


def compress(state, bucket):
    half = bucket.buffer().to(torch.bfloat16) / torch.distributed.get_world_size()
    future = torch.distributed.all_reduce(half, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


# name: (what the module has besides, arguments of DDPStrategy, flags of the Trainer)
CASES = {
    "plain": ((), {}, {}),
    "validation in mid-epoch": ((), {}, {"validate": True, "val_check_interval": 2}),
    "accumulate and clip": ((), {}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05, "max_epochs": 2}),
    "static_graph": ((), {"static_graph": True}, {}),
    "find_unused_parameters": ((Branching,), {"find_unused_parameters": True}, {}),
    "find_unused_parameters, accumulate": (
        (Branching,), {"find_unused_parameters": True}, {"accumulate_grad_batches": 2},
    ),
    "gradient_as_bucket_view": ((), {"gradient_as_bucket_view": True}, {"accumulate_grad_batches": 2}),
    "communication hook": ((Hooked,), {}, {}),
    "buffers of each rank": ((), {"broadcast_buffers": False}, {}),
    "bf16-mixed": ((), {}, {"precision": "bf16-mixed"}),
}  # fmt: skip
MODULES = {
    "stock": (Net, FixedRadius()),
    "mixin": (Mixed, FixedRadius()),
    "mixin, a check on every step": (Mixed, ACCEPT),
    "automatic mode, a check on every step": (Automatic, ACCEPT),
}


class Watching(Watched, Mixed):
    pass


def run(module, strategy=None, data=None, **flags):
    """Train `module` in two processes, which others have started."""
    strategy = DDPStrategy(process_group_backend="gloo", **(strategy or {}))
    data = data or loader(batches=BATCHES)
    return fit(module, data=data, strategy=strategy, devices=2, **{"max_epochs": 1, **flags})


def make(kind, *args, **kwargs):
    """Return a module with the same initial parameters each time."""
    seed()
    return kind(*args, **kwargs)


def compare():
    """Return the facts of all cases and modules."""
    found = {}
    for name, (parts, strategy, flags) in CASES.items():
        for kind, (base, rule) in MODULES.items():
            run_ = run(make(type("Case", (*parts, Watched, base), {}), rule), strategy, **flags)
            facts = run_.facts() | {"buffers": (run_.module.before, run_.module.after)}
            found[name, kind] = facts
    return found


class Deciding(Watching):
    """Weighs the loss by rank; on rank 1 it is nan on one batch of an epoch, and high on another in its trial alone."""

    def on_fit_start(self):
        super().on_fit_start()
        self.batch, self.history = 0, []

    def loss(self, batch):
        loss = super().loss(batch) * (1.0 + 3 * self.global_rank)
        if self.global_rank == 1:
            loss = loss * (float("nan") if self.batch == NAN_BATCH else 1.0)
            loss = loss + (1.0 if self.in_trial and self.batch == HIGH_BATCH else 0.0)
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        self.batch = batch_idx

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        optimizer = self.trainer.optimizers[0]
        point = nn.utils.parameters_to_vector(self.parameters()).detach().clone()
        self.history.append((point, optimizer.radius, dict(vars(optimizer.last_step))))


def decide():
    run_ = run(make(Deciding, RatioRadius(interval=1, max_trials=1)), max_epochs=3)
    found = {name: getattr(run_.module, name) for name in ("history", "losses", "before", "after")}
    return found | {"state": run_.trainer.optimizers[0].state_dict()}


class Resuming(Deciding):
    """Keeps what a checkpoint brought back."""

    def on_train_start(self):
        super().on_train_start()
        self.loaded = deepcopy(self.trainer.optimizers[0].state_dict())


def resume(go_on, path):
    """Go on from a checkpoint for one epoch more, by `run` or `fit`; return what was loaded and what came of it."""
    module = make(Resuming, RatioRadius())
    run_ = go_on(module, ckpt_path=path, max_epochs=2)
    return {"loaded": run_.module.loaded, "history": run_.module.history, "step": run_.trainer.global_step}


class Scaled(Watched):
    """Its loss depends on a buffer that each rank moves by itself, and that of the first rank is given to all."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.ones(1))

    def loss(self, batch):
        loss = super().loss(batch) * self.scale.item()
        self.scale += 1.0 + self.global_rank
        return loss


def replay(kind, **flags):
    """Return base and trial loss of each step of a run in which nothing moves."""
    rule = Remember()
    run(make(type("Case", (Scaled, kind), {}), rule, lr=0.0), **flags)
    return rule.seen


def job(rank, folder):
    torch.set_num_threads(1)
    alone = f"{folder}/alone.ckpt"
    if rank == 0:  # before there are two: the other waits for this one
        fit(make(Resuming, RatioRadius()), data=loader(batches=BATCHES), max_epochs=1).trainer.save_checkpoint(alone)
    found = {"cases": compare(), "decisions": decide()}
    found["replays"] = {
        name: [replay(kind), replay(kind, accumulate_grad_batches=2)]
        for name, kind in (("default", Mixed), ("automatic", Automatic))
    }
    found["resumed"] = resume(run, alone)
    together = run(make(Resuming, RatioRadius()))
    together.trainer.save_checkpoint(f"{folder}/together.ckpt")
    found["state"] = together.trainer.optimizers[0].state_dict()
    torch.save(found, f"{folder}/{rank}.pt")


# Lightning's own launchers


class Faulty(Watching):
    fault = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.fault and self.global_rank == 1 and batch_idx == 2:
            if self.fault == "raises":
                raise ArithmeticError("in process 1")
            return None
        return loss


LAUNCHED = {"raises": "ddp", "returns None": "ddp_fork"}


def launched(fault, folder):
    """Train twice by Lightning's own launcher, once without the fault, and save what the module is left with."""
    torch.set_num_threads(1)
    for each in (None, fault):
        module = make(Faulty, FixedRadius())
        module.fault = each
        trainer, _ = make_trainer(strategy=LAUNCHED[fault], devices=2, max_epochs=1)
        trainer.fit(module, loader(batches=BATCHES))
        if trainer.is_global_zero:
            torch.save(module.state_dict(), f"{folder}/{fault}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder):
    """What both ranks came to."""
    return of_ranks(__file__, folder)


@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind != "stock"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_automatic_bit_for_bit(ranks, case, kind):
    for rank in ranks:
        assert_same(rank["cases"][case, "stock"], rank["cases"][case, kind])


def test_ranks_saw_batches_and_streams_of_their_own(ranks):
    first, second = (rank["cases"]["plain", "stock"] for rank in ranks)
    assert not torch.equal(first["losses"][0], second["losses"][0])
    assert not torch.equal(first["random"][0], second["random"][0])
    assert_same(first["moments"], second["moments"])


def test_every_decision_is_the_same_on_both_ranks(ranks):
    first, second = (rank["decisions"]["history"] for rank in ranks)
    assert len(first) == 3 * BATCHES // 2
    for (x, radius, report), (y, other_radius, other) in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert radius == other_radius
        assert_same(report, other)
    assert_same(*(rank["decisions"]["state"] for rank in ranks))


def test_decisions_of_all_kinds_were_taken(ranks):
    reports = [report for _, _, report in ranks[0]["decisions"]["history"]]
    assert any(report["checked"] and report["accepted"] for report in reports)
    for batch, kind in ((NAN_BATCH, "skipped"), (HIGH_BATCH, "rejected")):
        found = [
            i for i, report in enumerate(reports) if not report["accepted"] and report["skipped"] == (kind == "skipped")
        ]
        assert found == [epoch * BATCHES // 2 + batch for epoch in range(3)], kind


def test_step_that_one_rank_alone_would_take_is_put_back_on_both(ranks):
    for rank in ranks:
        history = rank["decisions"]["history"]
        for step in range(HIGH_BATCH, len(history), BATCHES // 2):
            assert torch.equal(history[step][0], history[step - 1][0])
            assert history[step][1] < history[step - 1][1]


def test_loss_that_is_nan_on_one_rank_moves_nothing_on_either(ranks):
    for rank in ranks:
        history = rank["decisions"]["history"]
        for epoch in range(3):
            step = epoch * BATCHES // 2 + NAN_BATCH
            assert torch.equal(history[step][0], history[step - 1][0])
            assert history[step][1] == history[step - 1][1]
    assert [bool(torch.stack(rank["decisions"]["losses"]).isnan().any()) for rank in ranks] == [False, True]


def test_loss_of_a_report_is_the_mean_over_ranks(ranks):
    losses = [rank["decisions"]["losses"] for rank in ranks]
    for step, (_, _, report) in enumerate(ranks[0]["decisions"]["history"]):
        mean = (losses[0][step].double() + losses[1][step].double()) / 2
        assert report["base_loss"] == mean or report["skipped"]


def test_trial_replays_the_streams_of_its_own_rank(ranks):
    assert ranks[0]["decisions"]["history"][-1][2]["repeat_gap"] == 0


@pytest.mark.parametrize("mode", ["default", "automatic"])
def test_trial_starts_from_the_buffers_of_the_first_rank_that_the_forward_was_given(ranks, mode):
    for rank in ranks:
        for seen in rank["replays"][mode]:
            assert len(seen) >= 2
            assert all(base == trial for base, trial in seen)


def test_trials_leave_no_trace_in_buffers_and_forwards_find_those_of_the_first_rank(ranks):
    first, second = (rank["decisions"] for rank in ranks)
    assert_same(first["before"], second["before"])
    for found in (first, second):
        assert_same(found["after"][::2], found["after"][1::2])  # after the forward, after the step
    assert not torch.equal(first["after"][0][0], second["after"][0][0])


def steps_of(found):
    return [report["step"] for _, _, report in found["history"]]


def test_checkpoint_of_one_process_resumes_on_two(ranks, folder):
    saved = torch.load(folder / "alone.ckpt", weights_only=True)["optimizer_states"][0]
    for rank in ranks:
        assert_same(saved, rank["resumed"]["loaded"])
        assert [report["step"] for _, _, report in rank["resumed"]["history"]] == list(
            range(BATCHES + 1, BATCHES * 3 // 2 + 1)
        )
        assert rank["resumed"]["step"] == BATCHES * 3 // 2
    assert_same(*(rank["resumed"]["history"] for rank in ranks))


def test_checkpoint_of_two_processes_resumes_on_one(ranks, folder):
    saved = torch.load(folder / "together.ckpt", weights_only=True)["optimizer_states"][0]
    resumed = resume(
        lambda module, **flags: fit(module, data=loader(batches=BATCHES), **flags), folder / "together.ckpt"
    )
    assert_same(saved, resumed["loaded"])
    for rank in ranks:
        assert_same(saved, rank["state"])
    assert [report["step"] for _, _, report in resumed["history"]] == list(
        range(BATCHES // 2 + 1, BATCHES * 3 // 2 + 1)
    )


@pytest.fixture(scope="module")
def launches(folder):
    """The output and exit status of runs by Lightning's own launchers, and whether they left a process behind."""
    logs = {fault: folder / f"{fault}.log" for fault in LAUNCHED}
    processes = {fault: start(__file__, fault, folder, log=log) for fault, log in logs.items()}
    found, end = {}, time.monotonic() + 90
    try:
        for fault, process in processes.items():
            code = process.wait(max(1.0, end - time.monotonic()))
            patience = time.monotonic() + 10
            while group_lives(process) and time.monotonic() < patience:
                time.sleep(0.05)
            found[fault] = (code, logs[fault].read_text(), group_lives(process))
    finally:
        for process in processes.values():
            stop(process)
    return found


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("raises", "ArithmeticError: in process 1"),
        (
            "returns None",
            "RuntimeError: SOAAMixin: `training_step` must return a loss where there are several processes, got None "
            "in process 1; the others wait for its gradients: return a loss of 0 that depends on all parameters",
        ),
    ],
)
def test_process_that_fails_ends_all(launches, fault, text):
    code, output, left = launches[fault]
    assert code != 0
    assert text in output
    assert not left


@pytest.mark.parametrize("fault", LAUNCHED)
def test_processes_of_lightnings_own_launchers_equal_those_started_by_others(launches, ranks, folder, fault):
    expected = ranks[0]["cases"]["plain", "mixin"]["parameters and buffers"]
    assert_same(dict(expected), dict(torch.load(folder / f"{fault}.pt")))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] in LAUNCHED:
        launched(*sys.argv[1:])
    else:
        job(int(sys.argv[1]), sys.argv[2])
