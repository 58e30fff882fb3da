"""Tasks whose losses jump or do not follow their gradients: codes, detached targets, straight-through estimators."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import data
from benchmarks.data import Batch
from benchmarks.tasks.base import Task, cross_entropy, mlp

CODES, CODE, PLACES = 32, 8, 4  # codes in the book, their length, and how many make up an image


def straight_through(value: Tensor, replaced: Tensor) -> Tensor:
    """Return `replaced` forward, with the gradient of `value`."""
    return value + (replaced - value).detach()


class Quantised(nn.Module):
    """An autoencoder whose code is four vectors out of a book of 32 (arXiv 1711.00937)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 128, PLACES * CODE), mlp(PLACES * CODE, 128, 64)
        self.book = nn.Parameter(0.1 * torch.randn(CODES, CODE))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images anew, the code and the nearest vectors of the book."""
        code = self.encoder(images).unflatten(1, (PLACES, CODE))
        nearest = self.book[torch.cdist(code, self.book[None]).argmin(-1)]
        return self.decoder(straight_through(code, nearest).flatten(1)), code, nearest


def _commitment(model: nn.Module, batch: Batch) -> Tensor:
    """Return the squared error plus what draws the book to the code, and a quarter of what draws the code to it."""
    images, (again, code, nearest) = batch[0], model(batch[0])
    book, commitment = functional.mse_loss(nearest, code.detach()), functional.mse_loss(code, nearest.detach())
    return functional.mse_loss(again, images) + book + 0.25 * commitment


def _reconstruction(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model(batch[0])[0], batch[0])


def _temporal_difference(model: nn.Module, batch: Batch) -> Tensor:
    """Return the squared error of values against the label plus half of another row's value, which is detached."""
    images, labels = batch
    values = model(images).squeeze(-1)
    return functional.mse_loss(values, labels.float() + 0.5 * values.detach().roll(1))


class Experts(nn.Module):
    """Eight small networks, of which a gate chooses one for each image."""

    def __init__(self, count: int = 8):
        super().__init__()
        self.gate, self.experts = nn.Linear(784, count), nn.ModuleList(mlp(784, 32, 10) for _ in range(count))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, multiplied by how sure the gate is."""
        sure, chosen = self.gate(images).softmax(1).max(1)
        logits = images.new_zeros(len(images), 10)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                logits = logits.index_add(0, rows, expert(images[rows]) * sure[rows, None])
        return logits


class Rounded(nn.Linear):
    """A linear layer whose weights are rounded forward, to two values or to seven."""

    def __init__(self, fan_in: int, fan_out: int, *, values: int):
        super().__init__(fan_in, fan_out)
        self.values = values

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs @ rounded weight.T + bias."""
        weight = self.weight.detach()
        unit = weight.abs().mean() if self.values == 2 else weight.abs().max() / (self.values // 2)
        rounded = weight.sign() * unit if self.values == 2 else (weight / unit).round() * unit
        return functional.linear(inputs, straight_through(self.weight, rounded), self.bias)


def _rounded(seed: int, values: int) -> nn.Module:
    hidden = [
        module for size in (784, 128) for module in (Rounded(size, 128, values=values), nn.BatchNorm1d(128), nn.ReLU())
    ]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


class Discrete(nn.Module):
    """An autoencoder whose code is ten choices among eight (arXiv 1611.01144); in eval mode the likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 128, 80), mlp(80, 128, 64)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the pixels."""
        logits = self.encoder(images).unflatten(1, (10, 8))
        if self.training:
            chosen = functional.gumbel_softmax(logits, hard=True)
        else:
            chosen = functional.one_hot(logits.argmax(-1), 8).float()
        return self.decoder(chosen.flatten(1))


def _pixels(model: nn.Module, batch: Batch) -> Tensor:
    return functional.binary_cross_entropy_with_logits(model(batch[0]), batch[0])


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is turned round (arXiv 1409.7495)."""

    @staticmethod
    def forward(ctx: object, inputs: Tensor) -> Tensor:
        """Return the inputs."""
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """Return the gradient times -0.3."""
        return -0.3 * gradient


class Adversarial(nn.Module):
    """Features that tell the digit and are not to tell how bright the image is."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.digit, self.brightness = mlp(64, 64, 64), nn.Linear(64, 10), mlp(64, 32, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of digit and brightness."""
        features = self.features(images).relu()
        return self.digit(features), self.brightness(Reversal.apply(features))


def _both(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    digit, brightness = model(images)
    bright = (images.mean(1) > 0.3).long()
    return functional.cross_entropy(digit, labels) + functional.cross_entropy(brightness, bright)


def _digit(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0])[0], batch[1])


def _made(seed: int, kind: type[nn.Module]) -> nn.Module:
    return kind()


SURROGATE = (
    Task(
        *("vq_vae", 600, 64, data.digits, partial(_made, kind=Quantised), _commitment),
        metric=_reconstruction,
        about="digits, codes out of a book, straight-through",
    ),
    Task(
        *("values", 500, 64, data.digits, lambda seed: mlp(64, 64, 64, 1), _temporal_difference),
        about="temporal differences: detached targets",
    ),
    Task(
        *("experts", 500, 64, data.mnist, partial(_made, kind=Experts), cross_entropy),
        about="one expert of eight for each image",
    ),
    Task(
        *("binary_weights", 500, 64, data.mnist, partial(_rounded, values=2), cross_entropy),
        about="weights rounded to two values",
    ),
    Task(
        *("rounded_weights", 500, 64, data.mnist, partial(_rounded, values=7), cross_entropy),
        about="weights rounded to seven values",
    ),
    Task(
        *("gumbel", 600, 64, data.digits, partial(_made, kind=Discrete), _pixels),
        about="discrete codes, Gumbel-softmax",
    ),
    Task(
        *("adversarial", 500, 64, data.digits, partial(_made, kind=Adversarial), _both),
        metric=_digit,
        about="a reversed gradient",
    ),
)
