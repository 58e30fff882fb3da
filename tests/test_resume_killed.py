"""A run that is killed in mid-epoch goes on from its last checkpoint as if nothing had happened, bit for bit."""

import random
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import BATCHES, QUIET, Mixed, assert_same, fit, loader, seed
from processes import start, stop

from lightning_soaa import RatioRadius
from lightning_soaa.monitor import TrustRegionMonitor

pytestmark = [*QUIET, pytest.mark.processes]

SAVED_EVERY, KILLED_AT, EPOCHS = 3, (1, 4), 3  # steps; epoch and batch
FLAGS = [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}]


class Position:
    """The batches of `loader`, from a position that Lightning saves and restores."""

    def __init__(self):
        self.batches, self.next = list(loader()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.next %= len(self.batches)
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next % len(self.batches)}

    def load_state_dict(self, state):
        self.next = state["next"]


class Interrupted(Mixed):
    """Draws from streams that each batch seeds, as no checkpoint holds them; stops in a trial if `stop_at` says so."""

    stop_at = None

    def on_fit_start(self):
        self.trace = []

    def on_train_batch_start(self, batch, batch_idx):
        number = self.current_epoch * BATCHES + batch_idx
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.in_trial and self.stop_at is not None and (self.current_epoch, batch_idx) == KILLED_AT:
            Path(self.stop_at).touch()
            time.sleep(600)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        optimizer = self.trainer.optimizers[0]
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        report = dict(vars(optimizer.last_step)) if stepped else None
        self.trace.append((self.trainer.global_step, optimizer.radius, deepcopy(self.state_dict()), report))


def train(folder, flags, stop_at=None, ckpt_path=None):
    seed()
    module = Interrupted(RatioRadius(interval=1))
    module.stop_at = stop_at
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED_EVERY, save_top_k=-1, monitor=None)
    callbacks = [saver, TrustRegionMonitor(console=False)]
    return fit(
        module, callbacks, data=Position(), max_epochs=EPOCHS, ckpt_path=ckpt_path, enable_checkpointing=True, **flags
    )


def last(folder):
    """Return the checkpoint with the most steps."""
    return max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))


@pytest.fixture(scope="module", params=range(len(FLAGS)), ids=["plain", "accumulate and clip"])
def killed(request, tmp_path_factory):
    """The checkpoints of a run that was killed in a trial, and its flags."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(__file__, request.param, folder, log=folder / "log")
    try:
        end = time.monotonic() + 60
        while not (folder / "in a trial").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
    finally:
        stop(process)  # SIGKILL
    assert process.returncode == -9
    return folder, FLAGS[request.param]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_killed_run_resumed_equals_the_uninterrupted_one(killed, tmp_path):
    folder, flags = killed
    path = last(folder)
    whole = train(tmp_path / "whole", flags)
    rest = train(tmp_path / "rest", flags, ckpt_path=path)
    begun = torch.load(path, weights_only=True)["global_step"]
    per_step = flags.get("accumulate_grad_batches", 1)
    assert begun % (BATCHES // per_step) != 0  # in mid-epoch
    assert_same(whole.module.trace[begun * per_step :], rest.module.trace)
    assert_same(whole.trainer.optimizers[0].state_dict(), rest.trainer.optimizers[0].state_dict())
    assert len(rest.module.trace) == EPOCHS * BATCHES - begun * per_step
    reports = [report for _, _, _, report in rest.module.trace]
    assert any(report["checked"] for report in reports if report)


def test_killed_runs_checkpoint_is_that_of_the_uninterrupted_run(killed, tmp_path):
    folder, flags = killed
    train(tmp_path, flags)
    for path in folder.glob("*.ckpt"):
        mine, other = (torch.load(where / path.name, weights_only=True) for where in (folder, tmp_path))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert_same(mine[key], other[key], key)


def test_checkpoint_holds_plain_values_and_loads_as_a_module(killed):
    folder, _ = killed
    path = last(folder)
    kept = torch.load(path, weights_only=True)
    head = kept["optimizer_states"][0]["param_groups"][0]
    assert head["steps"] == kept["global_step"] == head["checks"] > 0
    module = Interrupted.load_from_checkpoint(path, weights_only=True)
    assert_same(kept["state_dict"], module.state_dict())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train(Path(sys.argv[2]), FLAGS[int(sys.argv[1])], stop_at=f"{sys.argv[2]}/in a trial")
