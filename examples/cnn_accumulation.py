"""Train a CNN with BatchNorm on batches of 16 whose gradients accumulate to batches of 64, without a learning rate.

python examples/cnn_accumulation.py    # about half a minute

A check compares the loss of all four micro-batches before and after the step. What a trial does to the statistics of
BatchNorm and to the dropout masks is undone.
"""

import argparse
import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_soaa import SOAAMixin


def convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class CNN(SOAAMixin, L.LightningModule):
    """No optimizer and no learning rate: SOAA gets all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            convolution(1, 16), convolution(16, 32), nn.MaxPool2d(2),
            convolution(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10),
        )  # fmt: skip
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("test/accuracy", self.accuracy)


def loaders(batch_size: int, seed: int) -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[360:], order[:360]
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(images[test], labels[test]), 360),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="two epochs, to see that it runs")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    torch.set_num_threads(1)  # faster for a network this small
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
    train, test = loaders(batch_size=16, seed=args.seed)
    trainer = L.Trainer(
        max_epochs=2 if args.fast else args.epochs,
        accumulate_grad_batches=4,
        accelerator="cpu",
        logger=TensorBoardLogger("logs", name="cnn_accumulation"),
        log_every_n_steps=5,
    )
    model = CNN()
    trainer.fit(model, train)
    (result,) = trainer.test(model, test, verbose=False)
    print(f"test accuracy: {result['test/accuracy']:.4f}")


if __name__ == "__main__":
    main()
