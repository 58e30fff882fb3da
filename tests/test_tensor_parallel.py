"""Tensor parallelism: decisions and steps of one process, from parameters spread over two, or over two by two."""

import os
import sys
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_models import ACCEPT, QUIET, assert_same, assert_steps_alike, fit, seed
from processes import SHARDS_ON_CPU, of_ranks
from test_fsdp import Layers, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAA, FixedRadius, RatioRadius
from lightning_soaa.module import SOAAMixin

pytestmark = [*QUIET, pytest.mark.processes]

BATCHES, SIZE = 8, 6
RANKS = int(os.environ.get("WORLD_SIZE", "2"))  # Lightning takes the variable away after a fit
RANK = int(os.environ.get("RANK", "0"))
COPIES = RANKS // 2  # of the model, each over two processes
RULE = RatioRadius(interval=1, max_trials=1)


def data(copy=None):
    """Return the batches of one copy of the model, or those of all copies together."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCHES, COPIES, SIZE, 4, generator=generator, dtype=torch.float64)
    inputs = (inputs if copy is None else inputs[:, copy]).reshape(-1, 4)
    size = SIZE * (COPIES if copy is None else 1)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).double()), batch_size=size)


def network():
    seed()
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 1)).double()


def spread(net, mesh):
    """Spread the first two layers over `mesh`; the third stays whole."""
    from torch.distributed.tensor import DTensor

    if not isinstance(net[0].weight, DTensor):
        parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


class Whole(Layers):
    """Raises the loss of one batch's trial, whose step is rejected."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.net = network()

    def training_step(self, batch, batch_idx):
        loss = nn.functional.binary_cross_entropy_with_logits(self.net(batch[0]).squeeze(1), batch[1])
        return loss + (1.0 if getattr(self, "in_trial", False) and batch_idx == 5 else 0.0) + self.bias.square().sum()


class Spread(Whole):
    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        spread(self.net, self.device_mesh["tensor_parallel"])
        if self.device_mesh["data_parallel"].size() > 1 and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class MixedWhole(SOAAMixin, Whole):
    pass


class MixedSpread(SOAAMixin, Spread):
    pass


class AutomaticSpread(MixedSpread):
    automatic_optimization = True


def run(kind, rule, **flags):
    """Train in the processes that others have started, or where `kind` is whole, in each of them by itself."""
    if issubclass(kind, Spread):
        strategy = ModelParallelStrategy(COPIES, 2, process_group_backend="gloo")
        flags = {"strategy": strategy, "devices": RANKS, **flags}
    batches = data(RANK // 2 if issubclass(kind, Spread) else None)
    flags["use_distributed_sampler"] = False
    seed()
    return fit(kind(rule, weight_decay=0.01), data=batches, **{"max_epochs": 2, **flags})


def by_hand(net):
    """Train in a plain loop; return what came of each step."""
    optimizer = SOAA(net.parameters(), radius=RULE)
    history = []
    for epoch in range(2):
        for index, (inputs, labels) in enumerate(data()):
            refused = 1.0 if index == 5 else 0.0

            def loss(more=0.0, inputs=inputs, labels=labels):
                return nn.functional.binary_cross_entropy_with_logits(net(inputs).squeeze(1), labels) + more

            def closure(loss=loss):
                optimizer.zero_grad()
                value = loss()
                value.backward()
                return value

            optimizer.step(closure, loss_closure=partial(loss, refused if epoch else 0.0))
            point = {name: whole(param) for name, param in net.named_parameters()}
            moments = [{k: whole(v) for k, v in optimizer.state[param].items()} for param in net.parameters()]
            history.append((point, moments, optimizer.radius, dict(vars(optimizer.last_step))))
    return history


FLAGS = {"plain": {}, "accumulating": {"accumulate_grad_batches": 2}}


def job_of_copies():
    return {"plain": [run(kind, RULE).module.history for kind in (MixedWhole, MixedSpread)]}


def job(folder):
    found = {}
    for name, flags in FLAGS.items():
        found[name] = [run(kind, RULE, **flags).module.history for kind in (MixedWhole, MixedSpread)]
        cases = [(Spread, FixedRadius()), (MixedSpread, ACCEPT), (AutomaticSpread, ACCEPT)]
        found["stock", name] = [[step[:3] for step in run(kind, rule, **flags).module.history] for kind, rule in cases]
    half = run(MixedSpread, RULE, max_epochs=1)
    half.trainer.save_checkpoint(f"{folder}/half.ckpt")
    rest = run(MixedSpread, RULE, ckpt_path=f"{folder}/half.ckpt")
    found["resumed"] = half.module.history + rest.module.history
    return found


def job_by_hand():
    alone, net = by_hand(network()), network()
    spread(net, init_device_mesh("cpu", (2,)))
    return [alone, by_hand(net)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks came to."""
    return of_ranks(__file__, tmp_path_factory.mktemp("tp"))


def test_plain_loop_on_two_processes_decides_as_on_one_and_steps_alike_to_rounding(tmp_path):
    for alone, together in of_ranks(__file__, tmp_path, "by hand"):
        assert_close(alone, together)


# Products over tensors that are split are summed in another order.
assert_close = partial(assert_steps_alike, rtol=1e-11, report_rtol=1e-8)


def assert_same_and_close(ranks, case):
    alone, together = ranks[0][case]
    assert_close(alone, together)
    assert {report["accepted"] for *_, report in together if report and report["checked"]} == {True, False}
    for rank in ranks[1:]:
        assert_same(together, rank[case][1])


@pytest.mark.parametrize("case", FLAGS)
def test_two_processes_decide_as_one_and_step_alike_to_rounding(ranks, case):
    assert_same_and_close(ranks, case)


@pytest.mark.parametrize("flags", FLAGS)
def test_run_equals_automatic_bit_for_bit(ranks, flags):
    for rank in ranks:
        stock, *others = rank["stock", flags]
        for other in others:
            assert_same(stock, other)


def test_one_and_one_epochs_are_two(ranks):
    for rank in ranks:
        assert_same(rank["plain"][1], rank["resumed"])


@SHARDS_ON_CPU
def test_two_copies_over_two_processes_each_decide_as_one_process_and_step_alike_to_rounding(tmp_path):
    """fully_shard over one dimension of the mesh, tensor parallelism over the other."""
    ranks = of_ranks(__file__, tmp_path, "copies", ranks=4)
    assert_same_and_close(ranks, "plain")


JOBS = {"by hand": lambda folder: job_by_hand(), "copies": lambda folder: job_of_copies()}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, folder, *name = sys.argv[1:]
    torch.save(JOBS[name[0]](folder) if name else job(folder), f"{folder}/{rank}.pt")
