"""FSDP2 on a mesh of two dimensions (HSDP), four gloo processes: replicas of shards take DDP's decisions and steps."""

import sys
import warnings

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_models import ACCEPT, QUIET, assert_same, assert_steps_alike, fit, seed
from processes import SHARDS_ON_CPU, of_ranks
from test_fsdp import Layers, MixedNet, ddp
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import FixedRadius, RatioRadius
from lightning_soaa.module import SOAAMixin

pytestmark = [*QUIET, pytest.mark.processes, SHARDS_ON_CPU]

RANKS = 4
BATCHES = 4  # a rank


class Hybrid:
    """Shards each part over two processes, and holds it twice."""

    def configure_model(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            for part in (self.net[3], self.net):
                fully_shard(part, mesh=mesh)


class HybridNet(Hybrid, Layers):
    pass


class MixedHybridNet(SOAAMixin, HybridNet):
    pass


class AutomaticHybridNet(MixedHybridNet):
    automatic_optimization = True


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(RANKS * BATCHES * 3, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).double()), batch_size=3)


def hybrid():
    return ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1, process_group_backend="gloo")


def run(kind, strategy, rule, **flags):
    """Train in four processes, which others have started."""
    seed()
    module = kind(rule, weight_decay=0.01)
    return fit(module, data=data(), strategy=strategy, devices=RANKS, **{"max_epochs": 2, **flags})


RULE = RatioRadius(interval=1, max_trials=1)


def job(folder):
    found = {
        "ddp": run(MixedNet, ddp(), RULE).module.history,
        "hsdp": run(MixedHybridNet, hybrid(), RULE).module.history,
    }
    cases = [(HybridNet, FixedRadius()), (AutomaticHybridNet, ACCEPT)]
    found["stock"] = [
        [step[:3] for step in run(kind, hybrid(), rule, max_epochs=1).module.history] for kind, rule in cases
    ]
    half = run(MixedHybridNet, hybrid(), RULE, max_epochs=1)
    half.trainer.save_checkpoint(f"{folder}/half.ckpt")
    rest = run(MixedHybridNet, hybrid(), RULE, ckpt_path=f"{folder}/half.ckpt")
    found["resumed"] = half.module.history + rest.module.history
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What all four ranks came to."""
    folder = tmp_path_factory.mktemp("hsdp")
    return of_ranks(__file__, folder, ranks=RANKS)


def test_run_is_the_same_on_all_ranks_after_every_step(ranks):
    for rank in ranks[1:]:
        assert_same(ranks[0]["hsdp"], rank["hsdp"])


def test_run_decides_as_ddp_and_steps_alike_to_rounding(ranks):
    replicated, hybrid_ = ranks[0]["ddp"], ranks[0]["hsdp"]
    assert len(hybrid_) == 2 * BATCHES
    assert_steps_alike(replicated, hybrid_)


def test_decisions_of_both_kinds_were_taken(ranks):
    reports = [report for *_, report in ranks[0]["hsdp"]]
    assert {report["accepted"] for report in reports if report["checked"]} == {True, False}


def test_run_equals_automatic_bit_for_bit(ranks):
    for rank in ranks:
        stock, *others = rank["stock"]
        for other in others:
            assert_same(stock, other)


def test_one_and_one_epochs_are_two(ranks):
    for rank in ranks:
        assert_same(rank["hsdp"], rank["resumed"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.save(job(sys.argv[2]), f"{sys.argv[2]}/{sys.argv[1]}.pt")
