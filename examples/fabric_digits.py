"""Train an MLP on scikit-learn's handwritten digits in a loop of one's own, with Lightning Fabric.

python examples/fabric_digits.py       # a few seconds

Fabric's optimizer takes no keywords: the loss closure is bound to the SOAA inside of it, for one step.
"""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAA


def loaders(batch_size: int, seed: int) -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=digits.target, random_state=seed)
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(images[test], labels[test]), 360),
    )


def train_epoch(fabric, model, optimizer, train) -> float:
    """Return the mean loss of an epoch."""
    soaa, total = optimizer.optimizer, 0.0
    for images, labels in train:
        # Called again at the trial point. There is nothing random in this model and nothing that counts batches;
        # with dropout or batch normalisation it would have to draw the same masks and leave the statistics alone.
        def loss_closure(images=images, labels=labels):
            return nn.functional.cross_entropy(model(images), labels)

        def closure(loss_closure=loss_closure):
            optimizer.zero_grad()
            loss = loss_closure()
            fabric.backward(loss)
            return loss

        soaa.bind_loss_closure(loss_closure)
        total += optimizer.step(closure).item()
    return total / len(train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-3, help="plays no part; to see that for yourself")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, bf16-true or 64-true")
    parser.add_argument("--fast", action="store_true", help="three epochs, to see that it runs")
    args = parser.parse_args()

    torch.set_num_threads(1)  # faster for a network this small
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=args.precision)
    fabric.seed_everything(args.seed)
    train, test = fabric.setup_dataloaders(*loaders(batch_size=64, seed=args.seed))
    model = nn.Sequential(
        nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(),
        nn.Linear(256, 128), nn.LayerNorm(128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip
    model, optimizer = fabric.setup(model, SOAA(model.parameters(), lr=args.lr))

    for epoch in range(3 if args.fast else args.epochs):
        loss = train_epoch(fabric, model, optimizer, train)
        report = optimizer.optimizer.last_step
        fabric.print(f"epoch {epoch:2d}: loss {loss:.4f}, radius {report.radius:.4g}, checks {report.checks}")

    with torch.no_grad():
        correct = [(model(images).argmax(1) == labels).float().mean() for images, labels in test]
    fabric.print(f"test accuracy: {torch.stack(correct).mean():.4f}")


if __name__ == "__main__":
    main()
