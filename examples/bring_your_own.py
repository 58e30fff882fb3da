"""Train somebody else's LightningModule without a learning rate: three lines, and their file is left alone.

python examples/bring_your_own.py      # about half a minute

The module is Lightning's own demo of an LSTM, which asks for SGD at lr=20, and carries its hidden state from one batch
to the next: a trial starts from the state that the batch started from.
"""

import argparse
import pydoc_data.topics
import warnings

import lightning as L
import torch
from lightning.pytorch.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAAMixin  # 1


class Mine(SOAAMixin, LightningLSTM):  # 2
    def prepare_data(self): ...  # 3: theirs downloads a text, and this file brings its own


def text() -> tuple[TensorDataset, int]:
    """Return windows of the texts of Python's `help()`, in their order, and how many kinds of characters there are."""
    topics = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    code = {character: number for number, character in enumerate(sorted(set(topics)))}
    windows = torch.tensor([code[character] for character in topics]).unfold(0, 36, 35)
    return TensorDataset(windows[:, :-1], windows[:, 1:].contiguous()), len(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="20 steps, to see that it runs")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    torch.set_num_threads(1)  # faster for a network this small
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
    data, vocabulary = text()
    model = Mine(vocabulary)
    model.model = SimpleLSTM(vocabulary, ninp=64, nhid=128, nlayers=2)  # theirs has 9 M parameters; this is for a CPU
    trainer = L.Trainer(
        max_steps=20 if args.fast else args.steps,
        accelerator="cpu",
        logger=TensorBoardLogger("logs", name="bring_your_own"),
        log_every_n_steps=10,
    )
    trainer.fit(model, DataLoader(data, batch_sampler=SequenceSampler(data, batch_size=20)))
    print(f"training loss: {trainer.callback_metrics['train_loss']:.4f} nats a character")


if __name__ == "__main__":
    main()
