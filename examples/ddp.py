"""Train a network in two processes (DDP) on the CPU, without a learning rate: one radius, one decision at each check.

python examples/ddp.py                 # about half a minute

Nothing in the module knows of it. Losses of a check are means over processes, so that all of them take the step or
all undo it. With GPUs: accelerator="gpu".
"""

import argparse
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAAMixin


class Digits(SOAAMixin, L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10)
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_end(self):
        print(f"process {self.global_rank}: radius {self.optimizers().optimizer.radius:.8g}")


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="three epochs, to see that it runs")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    torch.set_num_threads(1)  # of each process
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
    train, test = digits(args.seed)
    trainer = L.Trainer(
        max_epochs=3 if args.fast else args.epochs,
        accelerator="cpu",
        devices=2,
        strategy="ddp",  # starts this file once more
        logger=False,
        enable_checkpointing=False,
    )
    model = Digits()
    trainer.fit(model, DataLoader(train, 32, shuffle=True, drop_last=True))  # 2 x 32: each process has its own batches
    if trainer.is_global_zero:
        images, labels = test.tensors
        accuracy = (model.eval().net(images).argmax(1) == labels).float().mean()
        print(f"test accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    main()
