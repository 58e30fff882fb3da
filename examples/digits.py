"""Train an MLP on scikit-learn's handwritten digits without choosing a learning rate.

python examples/digits.py              # about half a minute; then: tensorboard --logdir logs
python examples/digits.py --lr 10      # the same run: lr plays no part
"""

import argparse
import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_soaa import SOAA, SOAAMixin


class Digits(SOAAMixin, L.LightningModule):
    """An ordinary LightningModule: nothing in it knows about the optimizer but `configure_soaa`, which is optional."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(128, 10),
        )  # fmt: skip
        self.train_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def configure_soaa(self, params) -> SOAA:
        return SOAA(params, lr=self.hparams.lr)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.net(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.test_accuracy(self.net(images), labels)
        self.log("test/accuracy", self.test_accuracy)


def loaders(batch_size: int, seed: int) -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=digits.target, random_state=seed)
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(images[test], labels[test]), 360),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-3, help="plays no part; to see that for yourself")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", default="logs", help="folder of the TensorBoard logs")
    parser.add_argument("--fast", action="store_true", help="three epochs, to see that it runs")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    torch.set_num_threads(1)  # faster for a network this small
    # The data is in memory; the other is Lightning's own.
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
    train, test = loaders(batch_size=64, seed=args.seed)
    trainer = L.Trainer(
        max_epochs=3 if args.fast else args.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(args.logs, name="digits"),
        log_every_n_steps=5,
    )
    model = Digits(lr=args.lr)
    trainer.fit(model, train)
    (result,) = trainer.test(model, test, verbose=False)
    print(f"test accuracy: {result['test/accuracy']:.4f}")


if __name__ == "__main__":
    main()
