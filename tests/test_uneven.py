"""Processes with different numbers of batches: refused by name on all of them, before any waits for another."""

import itertools
import sys
import warnings

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_models import ACCEPT, BATCH, QUIET, Automatic, Mixed, OwnLoop, fit, loader, seed
from processes import of_ranks
from torch.distributed.algorithms.join import Join
from torch.utils.data import DataLoader, IterableDataset

from lightning_soaa import RatioRadius

pytestmark = [*QUIET, pytest.mark.processes]

MODES = {"default": Mixed, "automatic": Automatic, "own loop": OwnLoop}
LEFT = {"uneven": [5, 3], "uneven, accumulating": [6, 3]}
# Seen when a loader ends: batches in process 0 and 1 (of each epoch), flags, how many the error says of process 1.
STREAMS = {
    "stream": (5, 3, {}, 3),
    "stream, accumulating": (5, 3, {"accumulate_grad_batches": 2}, 3),
    "stream, one batch longer": (4, 3, {}, 3),
    "stream that is empty": (4, 0, {}, 0),
    "stream that is empty in the second epoch": ([4, 4], [4, 0], {}, 0),
    "stream that is shorter in the second epoch": ([4, 4], [4, 2], {}, 2),
    "stream with a limit above its end": (5, 3, {"limit_train_batches": 4}, 3),
    "stream that is wrong about its length": (5, 3, {"claimed": 5}, 3),
}


class Joining:
    """Enters Join where a user of Lightning can."""

    def on_train_epoch_start(self):
        self.join = Join([self.trainer.strategy.model])
        self.join.__enter__()


class Stream(IterableDataset):
    """So many batches in each epoch; claims another number, if told to."""

    def __init__(self, counts, claimed=None):
        self.counts, self.epoch = counts if isinstance(counts, list) else [counts] * 9, 0
        if claimed is not None:
            self.__class__ = type("Claiming", (Stream,), {"__len__": lambda self: claimed * BATCH})

    def __iter__(self):
        self.epoch += 1
        return itertools.islice(itertools.cycle(loader().dataset), self.counts[self.epoch - 1] * BATCH)


def stream(counts, claimed=None):
    return DataLoader(Stream(counts, claimed), batch_size=BATCH)


def run(module, data, **flags):
    seed()
    strategy = DDPStrategy(process_group_backend="gloo")
    return fit(module, data=data, strategy=strategy, devices=2, **{"max_epochs": 2, **flags})


def refusal(*args, **flags):
    try:
        run(*args, **flags)
    except ValueError as error:
        return str(error)
    return "not refused"


def job(rank):
    found = {}
    for mode, kind in MODES.items():
        for name, counts in LEFT.items():
            flags = {"accumulate_grad_batches": 3} if "accumulating" in name and mode != "own loop" else {}
            data = loader(batches=counts[rank])
            found[mode, name] = refusal(kind(ACCEPT), data, use_distributed_sampler=False, **flags)
        for name, (most, least, flags, _) in STREAMS.items():
            flags = {key: value for key, value in flags.items() if mode != "own loop" or "accumulate" not in key}
            data = stream((most, least)[rank], flags.pop("claimed", None))
            found[mode, name] = refusal(kind(ACCEPT), data, **flags)
        even = run(kind(ACCEPT), stream([4, 3]), num_sanity_val_steps=0)
        limited = run(kind(ACCEPT), stream((5, 3)[rank]), limit_train_batches=3)
        found[mode, "streams"] = (even.trainer.global_step, limited.trainer.global_step)
        found[mode, "joining"] = refusal(type("Joined", (Joining, kind), {})(ACCEPT), loader())
        limited = run(kind(ACCEPT), loader(batches=(5, 3)[rank]), use_distributed_sampler=False, limit_train_batches=3)
        found[mode, "limited"] = limited.trainer.global_step
    padded = run(Mixed(RatioRadius()), loader(batches=7))  # seven batches, of which each process takes four
    found["padded"] = (padded.trainer.global_step, padded.trainer.optimizers[0].state_dict())
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks came to."""
    folder = tmp_path_factory.mktemp("uneven")
    return of_ranks(__file__, folder)


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("mode", MODES)
def test_uneven_numbers_of_batches_are_refused_by_name_on_all_processes(ranks, mode, name):
    most, least = LEFT[name]
    for rank in ranks:
        assert rank[mode, name] == (
            f"SOAAMixin: `train_dataloader` must be one that gives each process as many batches, got {most} in process "
            f"0 and {least} in process 1; those that go on would wait for the one that has ended: leave "
            f"use_distributed_sampler=True, which evens them out, or set Trainer(limit_train_batches={least})"
        )


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("mode", MODES)
def test_streams_that_end_apart_are_refused_by_name_before_any_process_waits(ranks, mode, name):
    *_, left = STREAMS[name]
    limit = f"set Trainer(limit_train_batches={left}), or " if left else ""
    for rank in ranks:
        assert rank[mode, name] == (
            f"SOAAMixin: `train_dataloader` must be one that gives each process as many batches, got {left} in process "
            f"1 and more in process 0; those that go on would wait for the one that has ended: {limit}have the loaders "
            "end together"
        )


@pytest.mark.parametrize("mode", MODES)
def test_streams_that_end_together_are_trained_on_and_the_limit_that_the_error_names_is_a_remedy(ranks, mode):
    assert [rank[mode, "streams"] for rank in ranks] == [(7, 6)] * 2


@pytest.mark.parametrize("mode", MODES)
def test_join_is_refused_by_name(ranks, mode):
    for rank in ranks:
        assert rank[mode, "joining"] == (
            "SOAAMixin: `torch.distributed.algorithms.Join` must be left out, got a model inside of one; a process "
            "that has run out of batches has no loss to decide by: give each process as many batches, as "
            "Trainer(use_distributed_sampler=True) does"
        )


@pytest.mark.parametrize("mode", MODES)
def test_the_limit_that_the_error_names_is_a_remedy(ranks, mode):
    assert [rank[mode, "limited"] for rank in ranks] == [6, 6]


def test_lightnings_sampler_evens_an_odd_number_of_batches_out(ranks):
    steps, state = ranks[0]["padded"]
    assert steps == 2 * 4
    assert ranks[1]["padded"][0] == steps
    assert state["param_groups"][0]["radius"] == ranks[1]["padded"][1]["param_groups"][0]["radius"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.save(job(int(sys.argv[1])), f"{sys.argv[2]}/{sys.argv[1]}.pt")
