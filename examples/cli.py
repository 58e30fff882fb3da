"""Train from the command line and a file of options (LightningCLI), without a learning rate.

python examples/cli.py fit                                           # options are those of examples/cli.yaml
python examples/cli.py fit --optimizer.fisher=KroneckerFisher        # any of them can be given here
python examples/cli.py --fast                                        # two epochs, to see that it runs

All options and their defaults: python examples/cli.py fit --print_config
"""

import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_soaa  # noqa: F401  (SOAA and its rules go by their names)
from lightning_soaa import SOAAMixin


class Digits(SOAAMixin, L.LightningModule):
    """A network on scikit-learn's handwritten digits.

    Args:
        width: of the hidden layer.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("val/accuracy", self.accuracy, prog_bar=True)


class Data(L.LightningDataModule):
    """The digits.

    Args:
        batch_size: of the batches to train on.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 16
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.train, self.valid = (TensorDataset(images[part], labels[part]) for part in (order[360:], order[:360]))

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.valid, 360)


def main() -> None:
    if "--fast" in sys.argv:
        sys.argv[1:] = ["fit", "--trainer.max_epochs=2"]
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of Lightning's calls, which is not for users to mend
    torch.set_num_threads(1)  # faster for a network this small
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|will be overridden)")
    options = {"fit": {"default_config_files": [str(Path(__file__).with_suffix(".yaml"))]}}
    cli = LightningCLI(Digits, Data, parser_kwargs=options)
    print(f"validation accuracy: {cli.trainer.callback_metrics['val/accuracy']:.4f}")


if __name__ == "__main__":
    main()
