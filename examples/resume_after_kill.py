"""Kill a run in mid-epoch and go on from its last checkpoint: the end is that of a run that was never killed.

python examples/resume_after_kill.py   # about half a minute; on Linux and macOS

Radius, moments, counters and the position of the search are in the optimizer's state, so that Lightning's checkpoint
holds all of it and `Trainer.fit(..., ckpt_path=...)` is all there is to resuming.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_soaa import SOAAMixin


class Digits(SOAAMixin, L.LightningModule):
    def __init__(self, killed_at: int = 0) -> None:
        super().__init__()
        self.killed_at = killed_at
        self.net = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)  # no exception, no clean-up, nothing is written


def loader() -> DataLoader:
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    # Its order depends on seed and epoch alone, and Lightning tells it the epoch; `shuffle=True` draws from a stream
    # that no checkpoint holds.
    sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=0)
    return DataLoader(data, batch_size=64, sampler=sampler, drop_last=True)


def train(folder: str, epochs: int, killed_at: int = 0, ckpt_path: str | None = None) -> Digits:
    L.seed_everything(0, verbose=False)
    model = Digits(killed_at)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=ModelCheckpoint(folder, save_last=True),  # after each epoch
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    print(f"{trainer.global_step} steps, radius {trainer.optimizers[0].radius:.8g}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--fast", action="store_true", help="three epochs, to see that it runs")
    parser.add_argument("--killed-in", help=argparse.SUPPRESS)  # folder of the run that is killed
    args = parser.parse_args()
    epochs = 3 if args.fast else args.epochs

    torch.set_num_threads(1)  # faster for a network this small
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|exists and is not empty)")
    if args.killed_in:
        train(args.killed_in, epochs, killed_at=28 * (epochs - 1) + 10)  # in the last epoch
    with tempfile.TemporaryDirectory() as folder:
        killed = subprocess.run([sys.executable, *sys.argv, "--killed-in", folder], check=False)
        assert killed.returncode == -signal.SIGKILL
        print(f"killed, which left: {', '.join(sorted(os.listdir(folder)))}")
        resumed = train(folder, epochs, ckpt_path=f"{folder}/last.ckpt")
    with tempfile.TemporaryDirectory() as folder:
        whole = train(folder, epochs)
    same = all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    print(f"same parameters as without the kill, bit for bit: {same}")


if __name__ == "__main__":
    main()
