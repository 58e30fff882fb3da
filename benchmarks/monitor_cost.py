"""What TrustRegionMonitor costs a training step: ``python -m benchmarks.monitor_cost [--steps 2000]``.

Fits of one network under Lightning, in threads of one process that take turns batch by batch, so that all of them meet
the same machine: without a monitor, twice, with the default one, and with all of its options; each with a progress bar,
a CSVLogger, a TensorBoardLogger and the Trainer's own interval of rows. What the two without differ by cannot be told
here.
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from statistics import median, quantiles
from threading import Semaphore, Thread
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.tasks import get_task
from lightning_soaa import SOAAMixin, TrustRegionMonitor

TASK = "mnist_cnn"
BLOCK = 50  # steps whose time is compared: as many as there are to a row
PATIENCE = 300.0  # seconds that a fit waits for its turn


class NoMonitor(TrustRegionMonitor):
    """Stands where the mixin would put a monitor, and has none of its hooks."""


for _hook in [name for name in vars(TrustRegionMonitor) if name.startswith("on_") or name in {"setup", "teardown"}]:
    setattr(NoMonitor, _hook, getattr(Callback, _hook))

KINDS: dict[str, Callable[[], TrustRegionMonitor]] = {
    "none": NoMonitor,
    "default": TrustRegionMonitor,
    "all options": lambda: TrustRegionMonitor(layers=3, histograms=True, check_time=True),
    "none, again": NoMonitor,
}


class Net(SOAAMixin, LightningModule):
    """The task as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same checks in all fits
        self.task = get_task(TASK)
        self.net = self.task.model(0)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.task.loss(self.net, batch)
        self.log("train/loss", loss)
        return loss


class Turn(Callback):
    """Times what a fit does from one batch to the next, and lets the next fit have its turn in between.

    Args:
        mine: is released when it is this fit's turn.
        after: is released when it is the next one's.
    """

    def __init__(self, mine: Semaphore, after: Semaphore) -> None:
        self.mine, self.after = mine, after
        self.seconds: list[float] = []
        self.start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """End the turn of the batch before and wait for the next."""
        if self.start:
            self.seconds.append(time.thread_time() - self.start)
            self.after.release()
        if not self.mine.acquire(timeout=PATIENCE):
            raise TimeoutError("another fit has not ended its turn")
        self.start = time.thread_time()

    def on_train_end(self, *_: Any) -> None:
        """End the last turn."""
        self.after.release()

    on_exception = on_train_end


def train(net: Net, kind: str, turn: Turn, steps: int, logs: str) -> None:
    """Train `net` with one kind of monitor, at `turn`."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=[CSVLogger(logs, name=kind), TensorBoardLogger(logs, name=kind)],
        callbacks=[turn, KINDS[kind]()],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    images, labels = get_task(TASK).data().train
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    trainer.fit(net, DataLoader(TensorDataset(images, labels), 64, sampler=order))


def measure(steps: int) -> dict[str, list[float]]:
    """Return the milliseconds a step of each kind, a number for each block but the first."""
    gates = [Semaphore(0) for _ in KINDS]
    turns = {kind: Turn(gates[i], gates[(i + 1) % len(gates)]) for i, kind in enumerate(KINDS)}
    with (
        tempfile.TemporaryDirectory() as logs,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        threads = [
            Thread(target=train, args=(Net(), kind, turn, steps, logs), daemon=True) for kind, turn in turns.items()
        ]
        for thread in threads:
            thread.start()
        gates[0].release()
        for thread in threads:
            thread.join()
    starts = range(BLOCK, steps - BLOCK, BLOCK)
    return {kind: [1000 * sum(turn.seconds[i : i + BLOCK]) / BLOCK for i in starts] for kind, turn in turns.items()}


def main() -> None:
    """Print one row a kind of monitor."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor_cost", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="of each fit")
    parser.add_argument("--fast", action="store_true", help="few steps, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times = measure(5 * BLOCK if arguments.fast else arguments.steps)
    table = Table("monitor", "ms a step, median", "over the mean of both without, median, %", "middle half, %")
    bare = [sum(pair) / 2 for pair in zip(times["none"], times["none, again"], strict=True)]
    for kind, own in times.items():
        over = [100 * (mine / without - 1) for mine, without in zip(own, bare, strict=True)]
        low, _, high = quantiles(over, n=4)
        table.add_row(kind, f"{median(own):.2f}", f"{median(over):+.2f}", f"{low:+.2f} to {high:+.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
