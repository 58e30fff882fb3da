"""LightningModules of other people's packages: SOAA by one line against the optimizer that they come with.

``python -m benchmarks.public_modules [--modules a,b] [--seeds 3]``: the modules are as their packages have them, with
their own optimizer, learning rate and schedule, and the same with ``class Ours(SOAAMixin, Theirs): pass``.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAAMixin


@dataclass(frozen=True)
class Public:
    """One module.

    Args:
        package: which it comes from.
        make: takes a function that puts what is wanted before a class, and returns the module.
        data: returns the loader.
        epochs: of a run.
    """

    package: str
    make: Callable[[Callable[[type], type]], Any]
    data: Callable[[], Iterable[Any]]
    epochs: int = 20

    @property
    def installed(self) -> bool:
        return find_spec(self.package.partition(".")[0]) is not None


def words(length: int = 8, vocabulary: int = 11) -> DataLoader[Any]:
    """Return sequences that count up or down by one to three."""
    generator = torch.Generator().manual_seed(0)
    starts, strides = (
        torch.randint(low, high, (160, 1), generator=generator) for low, high in ((0, vocabulary), (1, 4))
    )
    inputs = (starts + strides * torch.arange(length)) % vocabulary
    return DataLoader(TensorDataset(inputs, (inputs + strides) % vocabulary), batch_size=16)


def lstm(before: Callable[[type], type]) -> Any:
    from lightning.pytorch.demos.lstm import LightningLSTM

    module = before(LightningLSTM)(vocab_size=11)
    module.model = type(module.model)(vocab_size=11, ninp=16, nhid=16, nlayers=2)
    return module


def transformer(before: Callable[[type], type]) -> Any:
    from lightning.pytorch.demos.transformer import LightningTransformer

    module = before(LightningTransformer)(vocab_size=11)
    module.model = type(module.model)(vocab_size=11, ninp=16, nhead=2, nhid=16, nlayers=2)
    return module


CONTEXT, HORIZON = 24, 6


def waves() -> Tensor:
    """Return 64 noisy waves of other periods and heights, one a row."""
    generator = torch.Generator().manual_seed(0)
    periods = 6 + 18 * torch.rand(64, 1, generator=generator)
    heights = 0.5 + 4 * torch.rand(64, 1, generator=generator)
    noise = 0.1 * torch.randn(64, CONTEXT + HORIZON, generator=generator)
    return heights * (2 + torch.sin(torch.arange(CONTEXT + HORIZON) * 6.283 / periods) + noise)


def windows() -> DataLoader[Any]:
    """Return batches as GluonTS makes them."""
    batches = [
        {
            "past_target": part[:, :CONTEXT],
            "past_observed_values": torch.ones(len(part), CONTEXT),
            "future_target": part[:, CONTEXT:],
            "future_observed_values": torch.ones(len(part), HORIZON),
        }
        for part in waves().split(16)
    ]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def feed_forward(before: Callable[[type], type]) -> Any:
    from gluonts.torch.model.simple_feedforward.lightning_module import SimpleFeedForwardLightningModule

    sizes = {"prediction_length": HORIZON, "context_length": CONTEXT}
    return before(SimpleFeedForwardLightningModule)(sizes)


def d_linear(before: Callable[[type], type]) -> Any:
    from gluonts.torch.model.d_linear.lightning_module import DLinearLightningModule

    sizes = {"prediction_length": HORIZON, "context_length": CONTEXT, "hidden_dimension": 20}
    return before(DLinearLightningModule)(sizes)


def series(**inputs: list[str]) -> Any:
    """Return a data set of pytorch-forecasting, with the series itself and `inputs`."""
    import pandas
    from pytorch_forecasting import TimeSeriesDataSet

    values = waves()[:16]
    frame = pandas.DataFrame(
        {
            "time": list(range(values.shape[1])) * len(values),
            "series": [str(row) for row in range(len(values)) for _ in range(values.shape[1])],
            "y": values.flatten().tolist(),
        }
    )
    return TimeSeriesDataSet(
        frame, time_idx="time", target="y", group_ids=["series"], max_encoder_length=12,
        max_prediction_length=4, time_varying_unknown_reals=["y"], **inputs,
    )  # fmt: skip


def with_time() -> Any:
    return series(time_varying_known_reals=["time"])


def loader_of(dataset: Any) -> Any:
    return dataset.to_dataloader(train=True, batch_size=32, num_workers=0)


def n_beats(before: Callable[[type], type]) -> Any:
    from pytorch_forecasting import NBeats

    return before(NBeats).from_dataset(series(), widths=[32, 32])


def decoder_mlp(before: Callable[[type], type]) -> Any:
    from pytorch_forecasting import DecoderMLP

    return before(DecoderMLP).from_dataset(with_time(), hidden_size=32)


MODULES = {
    "LightningLSTM": Public("lightning", lstm, words),
    "LightningTransformer": Public("lightning", transformer, words),
    "SimpleFeedForward": Public("gluonts", feed_forward, windows, 50),
    "DLinear": Public("gluonts", d_linear, windows, 50),
    "NBeats": Public("pytorch_forecasting", n_beats, lambda: loader_of(series()), 10),
    "DecoderMLP": Public("pytorch_forecasting", decoder_mlp, lambda: loader_of(with_time()), 10),
}


class Noting:
    """Keeps the loss of each batch; its package's data would come from the net."""

    def prepare_data(self) -> None:
        pass

    def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
        vars(self).setdefault("noted", []).append(float(outputs["loss"]))


def ours(theirs: type) -> type:
    return type("Ours", (Noting, SOAAMixin, theirs), {})


def unchanged(theirs: type) -> type:
    return type(theirs.__name__, (Noting, theirs), {})


def final_loss(name: str, seed: int, before: Callable[[type], type], epochs: int | None = None) -> float:
    """Train one module; return the mean loss of its last epoch."""
    from lightning.pytorch import Trainer

    public = MODULES[name]
    torch.manual_seed(seed)
    module = public.make(before)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs or public.epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, public.data())
    noted = module.noted
    return mean(noted[-len(noted) // trainer.max_epochs :])


def main() -> None:
    """Print one row a module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.public_modules", description=__doc__)
    parser.add_argument("--modules", default=",".join(name for name, public in MODULES.items() if public.installed))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table = Table("module", "package", "their optimizer", "SOAA", "each seed, theirs / SOAA", "SOAA below")
    for name in arguments.modules.split(","):
        pairs = [tuple(final_loss(name, seed, kind) for kind in (unchanged, ours)) for seed in range(arguments.seeds)]
        their, own = (mean(column) for column in zip(*pairs, strict=True))
        spread = ", ".join(f"{one:.3f} / {other:.3f}" for one, other in pairs)
        below = f"{sum(other <= one for one, other in pairs)} of {len(pairs)}"
        table.add_row(name, MODULES[name].package, f"{their:.3f}", f"{own:.3f}", spread, below)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
