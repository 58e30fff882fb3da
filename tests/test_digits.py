"""The main job, end to end: the example's own module and data through a Trainer."""

import csv
import importlib.util
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_models import FISHER, TRUST_REGION
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_soaa import SOAA, TrustRegionMonitor

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.py"
KEYS = TRUST_REGION | FISHER

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(digits, *, lr=1e-3, epochs=10, logger=False, kind=None, seed=0):
    """Return (module, trainer, test accuracy)."""
    L.seed_everything(seed, verbose=False)
    train_loader, test_loader = digits.loaders(batch_size=64, seed=seed)
    module = (kind or digits.Digits)(lr=lr)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, train_loader)
    (result,) = trainer.test(module, test_loader, verbose=False)
    return module, trainer, result["test/accuracy"]


@pytest.mark.parametrize("lr", [1e-6, 1e-3, 10.0])
def test_digits_are_learned_whatever_lr_is(digits, lr):
    *_, accuracy = train(digits, lr=lr)
    assert accuracy >= 0.95


def test_tensorboard_file_holds_all_fixed_keys_from_the_first_row(digits, tmp_path):
    _, trainer, _ = train(digits, epochs=2, logger=TensorBoardLogger(tmp_path))
    assert trainer.global_step == 44  # 1437 images in whole batches of 64, twice: one global step for each
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    for key in KEYS | {"train/loss"}:
        assert [event.step for event in events.Scalars(key)] == list(range(4, 44, 5)), key
    assert all(event.value > 0 for event in events.Scalars("trust_region/radius"))


def test_csv_header_is_complete_from_the_first_row(digits, tmp_path):
    _, trainer, _ = train(digits, epochs=1, logger=CSVLogger(tmp_path))
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= KEYS
    assert all(rows[0][key] != "" for key in KEYS)


def test_a_nan_batch_is_skipped_shown_and_forgotten(digits, tmp_path):
    reports = []

    class Poisoned(digits.Digits):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 100 else loss

        def on_train_batch_start(self, batch, batch_idx):
            self.before = [tensor.clone() for tensor in self.parameters()]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx + 22 * self.current_epoch == 100:
                still = zip(self.before, self.parameters(), strict=True)
                reports.append(
                    (self.optimizers().optimizer.last_step, all(map(torch.equal, *zip(*still, strict=True))))
                )

    _, trainer, accuracy = train(digits, logger=CSVLogger(tmp_path), kind=Poisoned)
    *_, clean = train(digits)
    ((report, unmoved),) = reports
    assert report.skipped
    assert not report.accepted
    assert report.step_norm == 0
    assert unmoved
    assert trainer.global_step == 220
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["trust_region/skipped_steps"]]
    assert {float(row["trust_region/skipped_steps"]) for row in rows if int(row["step"]) < 100} == {0.0}
    assert {float(row["trust_region/skipped_steps"]) for row in rows if int(row["step"]) > 105} == {1.0}
    assert accuracy == pytest.approx(clean, abs=0.02)  # 7 of 360 images


def test_mixin_adds_one_monitor_and_its_optimizer(digits):
    module, trainer, _ = train(digits, epochs=1)
    assert sum(isinstance(callback, TrustRegionMonitor) for callback in trainer.callbacks) == 1
    assert isinstance(module.optimizers().optimizer, SOAA)
    assert math.isfinite(module.optimizers().optimizer.radius)
