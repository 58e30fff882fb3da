"""What a fit costs beside a plain loop: ``python -m benchmarks.fit_cost [--steps 400] [--rounds 7]``.

The same network, batches and optimizers in a plain torch loop and under Lightning's Trainer, one run after the other in
turn; figures are medians over rounds of the ratio of processor times within a round, with quartiles.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.step_cost import ratio
from benchmarks.tasks import get_task
from lightning_soaa import SOAA, SOAAMixin

TASK = "mnist_cnn"


def loader() -> DataLoader:
    """Return the batches of one epoch, in an order that is the same each time."""
    images, labels = get_task(TASK).data().train
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    return DataLoader(TensorDataset(images, labels), 64, sampler=order)


class Plain(LightningModule):
    """The task as a user would write it, with AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.task = get_task(TASK)
        self.net = self.task.model(0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.task.loss(self.net, batch)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), foreach=True)


class Mixed(SOAAMixin, Plain):
    """The same with the mixin, which replaces the optimizer."""


class Automatic(Mixed):
    """The same in automatic mode."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True


def plain_loop(soaa: bool, steps: int) -> None:
    """Train without Lightning."""
    task = get_task(TASK)
    net = task.model(0)
    adamw = torch.optim.AdamW(net.parameters(), foreach=True)
    # Under the Trainer the mixin keeps AdamW's weight decay.
    optimizer = SOAA(net.parameters(), weight_decay=adamw.defaults["weight_decay"]) if soaa else adamw
    done = 0
    while done < steps:
        for batch in loader():

            def closure(batch: list[Tensor] = batch) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = task.loss(net, batch)
                loss.backward()
                return loss

            if isinstance(optimizer, SOAA):
                optimizer.step(closure, loss_closure=lambda batch=batch: task.loss(net, batch))
            else:
                optimizer.step(closure)
            done += 1
            if done == steps:
                break


def fit(kind: type[Plain], steps: int) -> None:
    """Train under Lightning, with the mixin's own monitor if it has one."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        Trainer(accelerator="cpu", max_steps=steps, logger=CSVLogger(folder), **quiet).fit(kind(), loader())


KINDS: dict[str, Callable[[int], None]] = {
    "AdamW, plain loop": lambda steps: plain_loop(False, steps),
    "AdamW, Trainer": lambda steps: fit(Plain, steps),
    "SOAA, plain loop": lambda steps: plain_loop(True, steps),
    "SOAA, Trainer, mixin and monitor": lambda steps: fit(Mixed, steps),
    "the same, automatic mode": lambda steps: fit(Automatic, steps),
}


def main() -> None:
    """Print one row a kind of run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_cost", description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(arguments.rounds + 1):
        for kind, run in KINDS.items():
            start = time.process_time()
            run(arguments.steps)
            if turn:  # the first warms up
                seconds[kind].append(time.process_time() - start)
    table = Table("run", "ms a step", "x AdamW, Trainer", "x SOAA, plain loop")
    for kind, values in seconds.items():
        bases = (seconds["AdamW, Trainer"], seconds["SOAA, plain loop"])
        table.add_row(kind, f"{1e3 * median(values) / arguments.steps:.2f}", *(ratio(values, base) for base in bases))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
