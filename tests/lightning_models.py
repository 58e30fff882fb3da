"""Small models, rules and a recording logger for tests of the mixin, and what two runs are compared by."""

import random
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_soaa import SOAA, FixedRadius
from lightning_soaa.module import SOAAMixin
from lightning_soaa.monitor import TrustRegionMonitor
from lightning_soaa.radius import AbstractRadius, Decision

BATCHES, BATCH = 8, 6

# The fixed keys of the monitor, with one optimizer and one parameter group.
TRUST_REGION = {
    "trust_region/radius",
    "trust_region/acceptance_ratio",
    "trust_region/acceptance_rate",
    "trust_region/predicted_reduction",
    "trust_region/actual_reduction",
    "trust_region/step_norm",
    "trust_region/trials",
    "trust_region/rejects",
    "trust_region/skipped_steps",
    "trust_region/outlier_steps",
}
FISHER = {"fisher/mean", "fisher/min", "fisher/max", "fisher/trace", "fisher/active_fraction"}

# What Lightning itself warns of in these runs.
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*does not have many workers",
        ".*treespec, LeafSpec",
        ".*returned `None`",
        ".*smaller than the logging interval",
        "You defined a `validation_step` but have no `val_dataloader`",
        "Checkpoint directory",
        "When using `Trainer.accumulate_grad_batches",
    )
]


@dataclass(frozen=True)
class EveryStep(AbstractRadius):
    """FixedRadius with a check on every step, whose trial loss decides nothing."""

    needs_trial: ClassVar[bool] = True
    accept: bool = True

    def init(self, lr):
        return {"radius": 1.0}

    def update(self, numbers, evidence):
        return Decision(dict(numbers), accepted=self.accept)


@dataclass(frozen=True)
class Remember(AbstractRadius):
    """Checks on every step, remembers (base, trial) of each and accepts."""

    needs_trial: ClassVar[bool] = True
    seen: list = field(default_factory=list, compare=False)

    def init(self, lr):
        return {"radius": 1.0}

    def update(self, numbers, evidence):
        self.seen.append((evidence.base, evidence.trial))
        return Decision(dict(numbers), accepted=True)


class Tape(list):
    """A list that the guards of a trial leave alone, so that it counts trials too."""


ACCEPT, REJECT = EveryStep(), EveryStep(accept=False)


def loader(seed=0, batches=BATCHES, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batches * BATCH, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=BATCH, **kwargs)


class Net(LightningModule):
    """Dropout, batch normalisation, a metric, noise from python and numpy, logging, schedulers by `schedule`."""

    def __init__(self, rule=FixedRadius(), lr=0.05, schedule=None, **soaa):  # noqa: B008  (frozen)
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
        self.accuracy = MulticlassAccuracy(2)
        self.rule, self.lr, self.soaa, self.schedule = rule, lr, soaa, schedule
        self.calls, self.lrs, self.losses, self.outputs, self.steps = [], [], [], [], []

    def loss(self, batch):
        inputs, labels = batch
        logits = self.net(inputs + 0.01 * random.random() + 0.01 * np.random.rand())
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, labels)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.losses.append(loss.detach())
        self.steps.append(self.global_step)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(inputs), labels))

    def configure_optimizers(self):
        optimizer = SOAA(self.parameters(), lr=self.lr, radius=self.rule, **self.soaa)
        return optimizer if self.schedule is None else self.schedule(optimizer)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.lrs.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        self.outputs.append(outputs)
        self.steps.append(self.global_step)

    # Hooks, in the order and as often as they are called.
    def on_before_zero_grad(self, optimizer):
        self.calls.append(f"on_before_zero_grad {type(optimizer).__name__}")

    def on_before_backward(self, loss):
        self.calls.append(f"on_before_backward {loss.item()}")

    def on_after_backward(self):
        self.calls.append("on_after_backward")

    def on_before_optimizer_step(self, optimizer):
        self.calls.append(f"on_before_optimizer_step {type(optimizer).__name__}")
        self.log("gradient", self.net[0].weight.grad.norm() if self.net[0].weight.grad is not None else 0.0)

    def on_train_epoch_end(self):
        self.calls.append("on_train_epoch_end")


class Mixed(SOAAMixin, Net):
    pass


class Automatic(Mixed):
    """The same, in automatic mode."""

    automatic_optimization = True


class OwnLoop(Mixed):
    """The same, in a loop of its own."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        return {"loss": self.soaa_step(self.optimizers(), lambda: super(OwnLoop, self).training_step(batch, batch_idx))}


class Adversaries(LightningModule):
    """A generator and a discriminator with batch normalisation and dropout, stepped by hand in the usual way.

    `rules` are those of the discriminator's and the generator's SOAA; `toggle` freezes the other's parameters.
    """

    automatic_optimization = False

    def __init__(self, rules=(FixedRadius(), FixedRadius()), toggle=False, clip=None, lr=0.02):  # noqa: B008  (frozen)
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 1)
        self.rules, self.toggle, self.clip, self.lr, self.seen = rules, toggle, clip, lr, []

    def score(self, inputs, label):
        logits = self.head(self.discriminator(inputs))
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    def fake(self, batch):
        return self.generator(torch.randn(len(batch[0]), 3))

    def discriminator_loss(self, batch):
        loss = self.score(batch[0], 1.0) + self.score(self.fake(batch).detach(), 0.0)
        self.log("discriminator", loss)
        return loss

    def generator_loss(self, batch):
        loss = self.score(self.fake(batch), 1.0)
        self.log("generator", loss)
        return loss

    def step(self, optimizer, loss_fn):
        optimizer.zero_grad()
        loss = loss_fn()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), (self.discriminator_loss, self.generator_loss), strict=True):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            self.seen.append(self.step(optimizer, lambda: loss(batch)).detach())  # noqa: B023
            if self.toggle:
                self.untoggle_optimizer(optimizer)
        self.seen.append(self.global_step)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def on_before_optimizer_step(self, optimizer):
        if self.clip is not None:
            self.clip_gradients(optimizer, self.clip, "norm")
        self.log(f"gradient of {len(optimizer.param_groups[0]['params'])}", next(
            p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None
        ).norm())  # fmt: skip

    def configure_optimizers(self):
        parts = ([*self.discriminator.parameters(), *self.head.parameters()], list(self.generator.parameters()))
        found = [SOAA(part, lr=self.lr, radius=rule) for part, rule in zip(parts, self.rules, strict=True)]
        return found, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in found]


class ProtectedAdversaries(SOAAMixin, Adversaries):
    def step(self, optimizer, loss_fn):
        return self.soaa_step(optimizer, loss_fn)


class Mute(TrustRegionMonitor):
    """Stands in for the monitor, whose rows would double the time of a run, in tests that are not about it."""

    def on_train_batch_end(self, *args):
        pass

    def on_train_epoch_end(self, *args):
        pass


class Rows(Logger):
    """A logger that keeps its rows, without what TrustRegionMonitor adds."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        kept = {key: value for key, value in metrics.items() if not key.startswith(("trust_region", "fisher"))}
        self.rows.append((step, kept))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@dataclass
class Run:
    module: LightningModule
    trainer: Trainer
    rows: list = field(repr=False)
    random: tuple = field(repr=False)

    def facts(self):
        """Everything that two runs are compared by."""
        optimizer = self.trainer.optimizers[0].state_dict()
        return {
            "parameters and buffers": self.module.state_dict(),
            "moments": optimizer["state"],
            "metric": self.module.accuracy.metric_state,
            "metrics": {k: v for k, v in self.trainer.callback_metrics.items() if "/" not in k},
            "rows": self.rows,
            "learning rates": self.module.lrs,
            "losses": self.module.losses,
            "outputs": self.module.outputs,
            "hooks": self.module.calls,
            "global_step": (self.trainer.global_step, self.module.steps),
            "schedulers": [config.scheduler.state_dict() for config in self.trainer.lr_scheduler_configs],
            "random": self.random,
        }


def seed():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def make_trainer(callbacks=(), **kwargs):
    """Return a quiet Trainer and its logger; kwargs go to the Trainer."""
    rows = Rows()
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": rows,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "callbacks": [LearningRateMonitor(), Mute(), *callbacks],
    }
    return Trainer(**{**defaults, **kwargs}), rows


def fit(module, callbacks=(), validate=False, data=None, ckpt_path=None, **kwargs):
    """Train `module` from a fixed seed of all random streams and return the run."""
    trainer, rows = make_trainer(callbacks, **kwargs)
    trainer.fit(module, loader() if data is None else data, loader(1, 2) if validate else None, ckpt_path=ckpt_path)
    return Run(module, trainer, rows.rows, (torch.get_rng_state(), random.getstate(), np.random.get_state()))


def train(make, *args, callbacks=lambda: (), data=loader, **kwargs):
    """Seed, make a module and train it; `callbacks` and `data` make fresh ones for each run."""
    seed()
    return fit(make(), *args, callbacks=callbacks(), data=data(), **kwargs)


def assert_same(one, other, path=""):
    """Fail unless two structures hold the same bits."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other) or bool((one.isnan() & other.isnan()).all()), path
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}/{index}")
    elif isinstance(one, nn.Module | torch.optim.Optimizer) or callable(one):
        pass
    else:
        assert one == other or (one != one and other != other), path


def assert_steps_alike(one, other, *, rtol=1e-12, report_rtol=1e-9):
    """Fail unless two histories of (point, state, radius, report) decide alike and differ by rounding only."""
    close = partial(torch.testing.assert_close, rtol=rtol, atol=1e-13)
    for (point, moments, radius, report), (x, m, d, r) in zip(one, other, strict=True):
        close(x, point)
        close(m, moments)
        assert d == pytest.approx(radius, rel=rtol)
        for name, value in (report or {}).items():
            exact = value is None or isinstance(value, bool | int)
            assert r[name] == (value if exact else pytest.approx(value, rel=report_rtol, abs=1e-13, nan_ok=True)), name


def manual_step(module, batch, trial):
    """Step a module's only optimizer by hand, with `trial` as loss closure; return the loss."""
    optimizer = module.optimizers()

    def closure():
        optimizer.zero_grad()
        loss = module.loss(batch)
        module.manual_backward(loss)
        return loss

    return optimizer.step(closure, loss_closure=trial)
