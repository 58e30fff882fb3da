"""Long runs on a small noisy problem: nothing drifts, nothing piles up."""

import gc
from math import isfinite

import numpy as np
import psutil
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning_models import QUIET, Tape
from torch import nn

from lightning_soaa import SOAA, RatioRadius, TrustRegionWarning
from lightning_soaa.module import SOAAMixin

pytestmark = QUIET

STEPS, LOOK = 10_000, 1000
EVERY = 499  # a batch in so many is broken: not finite and far off by turns


class Noisy:
    """A regression on labels of which half is noise, in float32."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(self.draw(6, 3))
        self.target = self.draw(6, 3)
        self.optimizer = SOAA([self.weight], radius=RatioRadius())

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def loss(self):
        return (torch.tanh(self.x @ self.weight) - self.y).square().mean()

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self, factor):
        self.x = self.draw(8, 6)
        self.y = (torch.tanh(self.x @ self.target) + 0.5 * self.draw(8, 3)) * factor
        self.optimizer.step(self.closure, loss_closure=self.loss)

    def look(self):
        """Check what holds at any time; return the step, and what is alive: tensors, objects, memory."""
        head, state = self.optimizer.param_groups[0], self.optimizer.state.values()
        report = self.optimizer.last_step
        assert 0 < head["radius_low"] <= self.optimizer.radius <= head["radius_high"]
        assert all(isfinite(value) for value in head.values() if isinstance(value, float))
        kept = [self.weight, *(t for each in state for t in each.values() if isinstance(t, torch.Tensor))]
        assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in kept)
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
        return report, (tensors, len(objects), psutil.Process().memory_info().rss)


def test_10_000_steps_leave_radius_memory_and_counters_where_they_belong():
    noisy, looks = Noisy(), []
    for step in range(1, STEPS + 1):
        broken, odd = step % EVERY == 0, step // EVERY % 2
        noisy.step((float("nan") if odd else 1e3) if broken else 1.0)
        if step % LOOK == 0:
            looks.append(noisy.look())
    reports = [report for report, _ in looks]
    assert [report.step for report in reports] == list(range(LOOK, STEPS + 1, LOOK))
    for name in ("checks", "accepted_checks", "skipped_steps", "outlier_steps", "total_trials"):
        counts = [getattr(report, name) for report in reports]
        assert counts == sorted(counts), name
    assert reports[-1].skipped_steps == 10
    assert 10 <= reports[-1].outlier_steps < 30  # of the other steps, one in a thousand at most
    assert STEPS / 40 < reports[-1].checks < STEPS / 4
    (tensors, objects, memory), (last_tensors, last_objects, last_memory) = looks[2][1], looks[-1][1]
    assert last_tensors == tensors
    assert last_objects - objects < 500  # far less than one a step
    assert last_memory - memory < 4 << 20


# Through the Trainer

FIT_STEPS = 20_000
FAULTS = ("nan", "inf", "empty", "huge gradients", "huge inputs", "no batch", "no loss")
FAULT_EVERY = 97
RAISES = {5_003: "forward", 9_001: "trial", 14_009: "forward"}  # step: where


class FaultError(Exception):
    """Thrown into a run."""


class Faulty(SOAAMixin, LightningModule):
    """A regression with faults: batches, losses and gradients that are broken, and exceptions."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.given = self.broken = 0
        self.raised = Tape()  # which a trial that raises does not take back

    def training_step(self, batch, batch_idx):
        inputs, labels, fault = batch
        where = "trial" if self.in_trial else "forward"
        for step, place in RAISES.items():
            if self.global_step >= step and where == place and step not in self.raised:
                self.raised.append(step)
                raise FaultError
        if fault == "no loss":
            return None
        loss = (torch.tanh(self.net(inputs)) - labels).square().mean()
        if not self.in_trial:
            self.given += 1
            self.broken += not loss.isfinite()
        return loss * (1e6 if fault == "huge gradients" else 1.0)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["counts"] = [self.given, self.broken]

    def on_load_checkpoint(self, checkpoint):
        self.given, self.broken = checkpoint["counts"]


class Stream:
    """A loader without a length; every so many batches one has a fault."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.target = torch.randn(6, 3, generator=self.generator)
        self.count = 0

    def loss(self, module):
        """Return what `module` makes of inputs without noise and faults."""
        inputs = torch.randn(1_000, 6, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return float((torch.tanh(module.net(inputs)) - torch.tanh(inputs @ self.target)).square().mean())

    def __iter__(self):
        for _ in range(1_000):
            self.count += 1
            faults, due = self.count // FAULT_EVERY, self.count % FAULT_EVERY == 0
            fault = FAULTS[faults % len(FAULTS)] if due else None
            inputs = torch.randn(0 if fault == "empty" else 8, 6, generator=self.generator)
            noise = torch.randn(len(inputs), 3, generator=self.generator)
            labels = torch.tanh(inputs @ self.target) + 0.5 * noise
            inputs = inputs * {"nan": float("nan"), "huge inputs": 1e6}.get(fault, 1.0)
            labels = labels * (float("inf") if fault == "inf" else 1.0)
            yield None if fault == "no batch" else (inputs, labels, fault)


class Looks(Callback):
    """Looks at state and reports every so many steps, and saves a checkpoint."""

    def __init__(self, folder):
        self.path, self.found = folder / "last.ckpt", []

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step % LOOK or (self.found and trainer.global_step <= self.found[-1][0]):
            return
        optimizer = trainer.optimizers[0]
        report, head = optimizer.last_step, optimizer.param_groups[0]
        assert report.step == module.given
        assert report.skipped_steps == head["skipped_steps"] == module.broken
        assert (report.checks, report.outlier_steps) == (head["checks"], head["outlier_steps"])
        assert 0 < head["radius_low"] <= optimizer.radius <= head["radius_high"]
        kept = [*module.parameters(), *(t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))]
        assert all(bool(tensor.isfinite().all()) for tensor in kept)
        trainer.save_checkpoint(self.path)
        gc.collect()
        self.found.append((trainer.global_step, len(gc.get_objects()), psutil.Process().memory_info().rss))


@pytest.mark.timeout(900)  # it takes 75 s of a core
@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings(f"ignore::lightning_soaa.{TrustRegionWarning.__name__}")
def test_20_000_steps_through_the_trainer_with_faults_neither_drift_nor_pile_up(tmp_path):
    torch.manual_seed(0)
    module, stream, looks = Faulty(), Stream(), Looks(tmp_path)
    for failures in range(len(RAISES) + 1):
        trainer = Trainer(
            accelerator="cpu", max_steps=FIT_STEPS, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[looks], log_every_n_steps=10,
        )  # fmt: skip
        try:
            trainer.fit(module, stream, ckpt_path=looks.path if failures else None)
        except FaultError:
            assert len(module.raised) == failures + 1
    steps, objects, memory = np.array(looks.found).T
    assert steps[-1] == FIT_STEPS
    assert module.broken > 50
    settled = steps > FIT_STEPS / 4
    assert np.polyfit(steps[settled], objects[settled], 1)[0] < 0.05  # one in 20 steps
    assert np.polyfit(steps[settled], memory[settled], 1)[0] < 200  # bytes a step
    assert stream.loss(module) < 0.5 * stream.loss(Faulty())
