"""The mixin under FSDP2 (ModelParallelStrategy), two gloo processes: DDP's decisions and steps from sharded tensors."""

import sys
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning_models import ACCEPT, BATCH, QUIET, assert_same, assert_steps_alike, fit, seed
from processes import SHARDS_ON_CPU, of_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAA, FixedRadius, KroneckerFisher, PublishedRadius, RatioRadius
from lightning_soaa.module import SOAAMixin

pytestmark = [*QUIET, pytest.mark.processes, SHARDS_ON_CPU]

BATCHES = 8  # four a rank


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCHES * BATCH, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).double()), batch_size=BATCH)


class Layers(LightningModule):
    """float64, so that rounding is far from what is tested; shards of unequal sizes, and one rank without any."""

    def __init__(self, rule, lr=0.05, **options):
        super().__init__()
        self.rule, self.options, self.history = rule, {"lr": lr, **options}, []
        self.net = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Dropout(0.2), nn.Linear(7, 1)).double()
        self.bias = nn.Parameter(torch.ones(1, dtype=torch.float64))  # not sharded

    def configure_optimizers(self):
        return SOAA(self.parameters(), radius=self.rule, **self.options)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.global_rank + self.current_epoch * BATCHES + batch_idx)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = nn.functional.binary_cross_entropy_with_logits(self.net(inputs).squeeze(1), labels)
        if getattr(self, "in_trial", False) and batch_idx == 1 and self.global_rank == 1:
            loss = loss + 1.0  # the other rank alone would accept
        return loss * (1 + 3 * self.global_rank) + self.bias.square().sum()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        optimizer = self.trainer.optimizers[0]
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        report = dict(vars(optimizer.last_step)) if stepped else None
        point = {name: whole(param) for name, param in self.named_parameters()}
        moments = [{key: whole(value) for key, value in optimizer.state[param].items()} for param in self.parameters()]
        self.history.append((point, moments, optimizer.radius, report))


class Sharded:
    """The outermost part that is sharded has parameters of its own: those it would keep after a forward."""

    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[3], self.net):
                fully_shard(part, mesh=mesh)


def whole(value):
    """Return a copy of all of a tensor; all ranks must ask."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


class ShardedNet(Sharded, Layers):
    pass


class MixedNet(SOAAMixin, Layers):
    pass


class MixedShardedNet(SOAAMixin, ShardedNet):
    pass


class AutomaticShardedNet(MixedShardedNet):
    automatic_optimization = True


def fsdp(save_distributed_checkpoint=True):
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=save_distributed_checkpoint,
    )


def ddp():
    return DDPStrategy(process_group_backend="gloo")


def run(kind, strategy, *args, **flags):
    """Train in two processes, which others have started."""
    seed()
    options = {key: flags.pop(key) for key in ("lr", "weight_decay", "fisher") if key in flags}
    module = kind(*args, **options)
    return fit(module, data=data(), strategy=strategy, devices=2, **{"max_epochs": 2, **flags})


# name: (radius rule, arguments of SOAA and of the Trainer)
RULES = {
    "ratio": (RatioRadius(interval=1, max_trials=1), {"weight_decay": 0.01}),
    "ratio, growing": (RatioRadius(interval=1), {}),
    "ratio, accumulate and clip": (RatioRadius(interval=1), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "published": (PublishedRadius(8), {}),
    "fixed": (FixedRadius(), {"weight_decay": 0.1}),
}
STOCK = {"plain": {}, "accumulate and clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}}
FORMATS = {"distributed checkpoint": True, "one file": False}


def resume(folder, distributed):
    """Train two epochs at once, and one and one; return both histories."""
    rule = RatioRadius(interval=1)
    at_once = run(MixedShardedNet, fsdp(distributed), rule)
    half = run(MixedShardedNet, fsdp(distributed), rule, max_epochs=1)
    path = f"{folder}/half-{distributed}.ckpt"
    half.trainer.save_checkpoint(path)
    rest = run(MixedShardedNet, fsdp(distributed), rule, ckpt_path=path)
    return at_once.module.history, half.module.history, rest.module.history


def job(folder):
    found = {}
    for name, (rule, flags) in RULES.items():
        found[name] = [
            run(kind, strategy, rule, **flags).module.history
            for kind, strategy in ((MixedNet, ddp()), (MixedShardedNet, fsdp()))
        ]
    for name, flags in STOCK.items():
        cases = [(ShardedNet, FixedRadius())]
        cases += [(kind, rule) for kind in (MixedShardedNet, AutomaticShardedNet) for rule in (FixedRadius(), ACCEPT)]
        found["stock", name] = [
            [step[:3] for step in run(kind, fsdp(), rule, **flags).module.history] for kind, rule in cases
        ]
    for name, distributed in FORMATS.items():
        found["resumed", name] = resume(folder, distributed)
    try:
        run(MixedShardedNet, fsdp(), FixedRadius(), fisher=KroneckerFisher())
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks came to."""
    folder = tmp_path_factory.mktemp("fsdp")
    return of_ranks(__file__, folder)


@pytest.mark.parametrize("rule", RULES)
def test_sharded_run_is_the_same_on_both_ranks_after_every_step(ranks, rule):
    assert_same(ranks[0][rule][1], ranks[1][rule][1])


@pytest.mark.parametrize("rule", RULES)
def test_sharded_run_decides_as_ddp_and_steps_alike_to_rounding(ranks, rule):
    assert_steps_alike(*ranks[0][rule])


def test_decisions_of_both_kinds_were_taken(ranks):
    reports = [report for *_, report in ranks[0]["ratio"][1]]
    assert {report["accepted"] for report in reports if report["checked"]} == {True, False}
    assert ranks[0]["ratio"][1][-1][0]["bias"] < 1


@pytest.mark.parametrize("flags", STOCK)
def test_sharded_run_equals_automatic_bit_for_bit(ranks, flags):
    for rank in ranks:
        stock, *others = rank["stock", flags]
        for other in others:
            assert_same(stock, other)
    assert not torch.equal(stock[0][0]["net.0.weight"], stock[-1][0]["net.0.weight"])


@pytest.mark.parametrize("form", FORMATS)
def test_one_and_one_epochs_are_two(ranks, form):
    for rank in ranks:
        at_once, half, rest = rank["resumed", form]
        assert len(half) == len(rest) == BATCHES // 2
        assert_same(at_once, half + rest)


def test_kronecker_fisher_is_refused_by_name(ranks):
    for rank in ranks:
        assert rank["refused"] == (
            "SOAA: `fisher` must be DiagonalFisher() where parameters are sharded, got KroneckerFisher; leave it out, "
            "or train with DDP"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.save(job(sys.argv[2]), f"{sys.argv[2]}/{sys.argv[1]}.pt")
