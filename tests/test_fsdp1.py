"""The mixin under FSDP1 (FSDPStrategy), two gloo processes: DDP's decisions and steps from parts of flat parameters."""

import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning_models import ACCEPT, BATCH, QUIET, assert_same, assert_steps_alike, fit, seed
from processes import of_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAA, FixedRadius, KroneckerFisher, PublishedRadius, RatioRadius
from lightning_soaa._flat import parts_of
from lightning_soaa.module import SOAAMixin

pytestmark = [*QUIET, pytest.mark.processes]

BATCHES = 8  # four a rank


class OnCpu(FSDPStrategy):
    """Where it is given FSDPStrategy itself Lightning asks for a GPU. torch does not, if it is told of the CPU.

    Lightning's "32-true" rounds the module to float32; float64 keeps rounding far from what is tested.
    """

    def _setup_model(self, model):
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(
            model.to(model.dtype_of_parameters),
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )
        self.kwargs.pop("auto_wrap_policy", None)
        return super()._setup_model(model)


OnCpu.__name__, OnCpu.__module__ = FSDPStrategy.__name__, FSDPStrategy.__module__


def data():
    """Inputs that are the same in float32, which Lightning makes of them, and in float64."""
    inputs = torch.randn(BATCHES * BATCH, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).float()), batch_size=BATCH)


class Layers(LightningModule):
    """Parts of unequal sizes; of the outermost unit, which holds the bias alone, one rank has nothing at all."""

    dtype_of_parameters = torch.float64
    bad = None  # index of the batch whose loss is nan on one rank

    def __init__(self, rule, lr=0.05, **options):
        super().__init__()
        self.rule, self.options, self.history = rule, {"lr": lr, **options}, []
        self.net = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Dropout(0.2), nn.Linear(7, 1))
        self.bias = nn.Parameter(torch.ones(1))
        self.to(self.dtype_of_parameters)
        self.shapes = {name: param.shape for name, param in self.named_parameters()}

    def configure_optimizers(self):
        return SOAA(self.parameters(), radius=self.rule, **self.options)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.global_rank + self.current_epoch * BATCHES + batch_idx)

    def training_step(self, batch, batch_idx):
        inputs, labels = (tensor.to(self.dtype_of_parameters) for tensor in batch)
        loss = nn.functional.binary_cross_entropy_with_logits(self.net(inputs).squeeze(1), labels)
        if getattr(self, "in_trial", False) and batch_idx == 1 and self.global_rank == 1:
            loss = loss + 1.0  # the other rank alone would accept
        if self.global_rank == 1 and batch_idx == self.bad:
            loss = loss * float("nan")
        return loss * (1 + 3 * self.global_rank) + self.bias.square().sum()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        optimizer = self.trainer.optimizers[0]
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        report = dict(vars(optimizer.last_step)) if stepped else None
        named = {name.replace("_fsdp_wrapped_module.", ""): param for name, param in self.named_parameters()}
        point = {name: whole(param, self.shapes[name]) for name, param in named.items()}
        moments = {
            name: {key: whole(value, self.shapes[name]) for key, value in sorted(optimizer.state[param].items())}
            for name, param in named.items()
        }
        self.history.append((point, moments, optimizer.radius, report))


def whole(value, shape):
    """Return a copy of all of a tensor of which each rank may hold a flat part; all ranks must ask."""
    if not isinstance(value, torch.Tensor):
        return value
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value.detach().clone())
    flat = torch.cat([part.flatten() for part in parts])
    copies = flat.reshape(-1, *shape)  # one, unless there are replicas
    return copies[dist.get_rank() * len(copies) // dist.get_world_size()].clone()


class MixedNet(SOAAMixin, Layers):
    pass


class AutomaticNet(MixedNet):
    automatic_optimization = True


class Stock(Layers):
    """Without the mixin, which would tell the optimizer of the parts."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer._note_parts(parts_of(self.trainer.strategy.model))
        return optimizer


class Single:
    """As Lightning's precision has it."""

    dtype_of_parameters = torch.float32


class SingleStock(Single, Stock):
    pass


class SingleNet(Single, MixedNet):
    pass


class SingleAutomatic(Single, AutomaticNet):
    pass


class NanOnOneRank(MixedNet):
    bad = 2


def fsdp1(**options):
    from torch.distributed.fsdp import MixedPrecision

    options = {"mixed_precision": MixedPrecision(), "auto_wrap_policy": {nn.Sequential}, **options}
    return OnCpu(process_group_backend="gloo", **options)


def ddp():
    return DDPStrategy(process_group_backend="gloo")


def run(kind, strategy, *args, **flags):
    """Train in processes that others have started."""
    seed()
    options = {key: flags.pop(key) for key in ("lr", "weight_decay", "fisher") if key in flags}
    module = kind(*args, **options)
    return fit(module, data=data(), strategy=strategy, devices=dist_size(), **{"max_epochs": 2, **flags})


def dist_size():
    return 2


CLIP = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
# name: (radius rule, arguments of SOAA and of the Trainer)
RULES = {
    "ratio": (RatioRadius(interval=1, max_trials=1), {"weight_decay": 0.01}),
    "ratio, growing": (RatioRadius(interval=1), {}),
    "ratio, accumulate and clip": (RatioRadius(interval=1), {"accumulate_grad_batches": 2, **CLIP}),
    "published": (PublishedRadius(8), {}),
    "fixed": (FixedRadius(), {"weight_decay": 0.1}),
}
STOCK = {"plain": {}, "accumulate and clip": {"accumulate_grad_batches": 2, **CLIP}}
FORMATS = ("full", "sharded")


def job(folder):
    found = {}
    for name, (rule, flags) in RULES.items():
        found[name] = [
            run(MixedNet, strategy, rule, **flags).module.history for strategy in (ddp(), fsdp1())
        ]
    for name, flags in STOCK.items():
        cases = [(Stock, FixedRadius())]
        cases += [(kind, rule) for kind in (MixedNet, AutomaticNet) for rule in (FixedRadius(), ACCEPT)]
        found["stock", name] = [
            [step[:3] for step in run(kind, fsdp1(), rule, **flags).module.history] for kind, rule in cases
        ]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.save(job(sys.argv[2]), f"{sys.argv[2]}/{sys.argv[1]}.pt")
