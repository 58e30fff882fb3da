"""What a task is, and the losses that several tasks share."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.data import Batch, Data

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data and its loss.

    Args:
        name: unique name, also the row of every table.
        steps: optimizer steps of a whole run.
        batch_size: rows of a training batch.
        data: returns the data, the same for every seed.
        model: returns the initial model of a seed, built under that seed.
        loss: the training loss of a batch, up to `scale`. Deterministic but for torch's random stream.
        scale: factor on the training loss. Validation losses are reported without it.
        metric: validation loss where it is not `loss`.
        about: one line for the tables.
    """

    name: str
    steps: int
    batch_size: int
    data: Callable[[], Data]
    model: Callable[[int], nn.Module]
    loss: Loss
    scale: float = 1.0
    metric: Loss | None = None
    about: str = ""

    def build(self, seed: int) -> nn.Module:
        """Return the initial model of `seed`; torch's random stream is left where it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model(seed)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scaled loss of `batch`."""
        return self.loss(model, batch) * self.scale

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        """Return the unscaled loss over all validation rows, in eval mode."""
        mode = model.training
        model.eval()
        loss = (self.metric or self.loss)(model, self.data().valid).item()
        model.train(mode)
        return loss


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of (inputs, labels)."""
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error of (inputs, scalar targets)."""
    inputs, targets = batch
    return functional.mse_loss(model(inputs).squeeze(-1), targets)


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of every next token of (windows,)."""
    (windows,) = batch
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU, dropout: float = 0.0) -> nn.Sequential:
    """Return a multi-layer perceptron with the given layer sizes and torch's default initial weights."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), activation()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
