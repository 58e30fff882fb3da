"""Make the pictures of the documentation: three short runs on scikit-learn's digits, drawn as the report draws them.

python docs/pictures.py            # about a minute; writes docs/pictures/*.png
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAAMixin
from lightning_soaa._plots import PANELS, png
from lightning_soaa._runs import Run, advice_for, read_run

FOLDER = Path(__file__).parent / "pictures"
SHOWN = (
    "Radius",
    "Acceptance ratio and rate",
    "Predicted and actual reduction",
    "Loss",
    "Rejects, skipped steps and outliers",
)
NAMES = {"healthy": "a healthy run", "small-batch": "batches of two", "poisoned": "five poisoned batches"}
STEPS = 300
# Batches that are poisoned: inputs times 100 with wrong labels, or a loss that is nan.
LARGE, NAN = (100, 140, 220), (180, 181)


class Net(SOAAMixin, L.LightningModule):
    """A small network without dropout, so that all that is seen comes from the batches."""

    def __init__(self, poisoned: bool) -> None:
        super().__init__()
        self.poisoned = poisoned
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        if self.poisoned and batch_idx in LARGE:
            images, labels = 100 * images, 9 - labels
        loss = nn.functional.cross_entropy(self.net(images), labels)
        if self.poisoned and batch_idx in NAN:
            loss = loss * float("nan")
        self.log("train/loss", loss)
        return loss


def train(name: str, logs: str) -> Run:
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    if name == "small-batch":  # a third of the labels are wrong: two samples say next to nothing about the loss
        wrong = torch.rand(len(labels)) < 1 / 3
        labels = torch.where(wrong, torch.randint(0, 10, labels.shape), labels)
    size = 2 if name == "small-batch" else 64
    sampler = torch.randint(0, len(labels), (STEPS * size,)).tolist()
    data = DataLoader(TensorDataset(images, labels), size, sampler=sampler)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(logs, name=name, version=0),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(poisoned=name == "poisoned"), data)
    return read_run(Path(logs) / name / "version_0", NAMES[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write the pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of workers that a data set in memory does not need, and the advice of bad runs
    options.folder.mkdir(parents=True, exist_ok=True)
    panels = [panel for panel in PANELS if panel.title in SHOWN]
    with tempfile.TemporaryDirectory() as logs:
        for name in NAMES:
            run = train(name, logs)
            png(panels, [run], options.folder / f"{name}.png", dpi=90)
            advice = ", ".join(advice.kind for advice in advice_for(run)) or "none"
            print(f"{options.folder / name}.png: advice {advice}")


if __name__ == "__main__":
    main()
