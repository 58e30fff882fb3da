"""Train a network whose parameters are sharded over two processes (FSDP2) on the CPU, without a learning rate.

python examples/fsdp2.py               # about half a minute

`fully_shard` and Lightning's ModelParallelStrategy, as without SOAA. Each process keeps half of the parameters, of the
moments and of the Fisher; norms, slopes and decisions are those of the whole. With GPUs: accelerator="gpu".
"""

import argparse
import warnings

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAAMixin


class Digits(SOAAMixin, L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10))

    def configure_model(self):
        if not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[0], self.net):
                fully_shard(part, mesh=mesh)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_end(self):
        kept = sum(param.to_local().numel() for param in self.parameters())
        whole = sum(param.numel() for param in self.parameters())
        print(f"process {self.global_rank} keeps {kept} of {whole} parameters")


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
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),  # starts this file once more
        logger=False,
        enable_checkpointing=False,
    )
    model = Digits()
    trainer.fit(model, DataLoader(train, 32, shuffle=True, drop_last=True))  # 2 x 32: each process has its own batches
    images, labels = test.tensors
    with torch.no_grad():
        logits = model.eval().net(images)  # in both processes, which gather the parameters from each other
    if trainer.is_global_zero:
        print(f"test accuracy: {(logits.argmax(1) == labels).float().mean():.4f}")


if __name__ == "__main__":
    main()
