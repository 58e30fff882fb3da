"""Regression, tables, a differential equation and other tasks with an unusual scale."""

from functools import cache, partial
from itertools import pairwise
from math import pi

import torch
from torch import Tensor, nn

from benchmarks import data
from benchmarks.data import Batch
from benchmarks.tasks.base import Task, cross_entropy, mlp, squared_error


class PoissonNet(nn.Module):
    """A tanh network that carries its own first and second derivatives along both inputs.

    No autograd is needed for them, so the loss can be evaluated under ``no_grad``.
    """

    def __init__(self, width: int = 32, depth: int = 3):
        super().__init__()
        sizes = [2] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(width, 1)
        for layer in [*self.hidden, self.head]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        """Return u at `points`."""
        for layer in self.hidden:
            points = torch.tanh(layer(points))
        return self.head(points).squeeze(-1)

    def laplacian(self, points: Tensor) -> Tensor:
        """Return u_xx + u_yy at `points`, by the chain rule layer by layer."""
        value = points
        first = torch.eye(2)[:, None, :].expand(2, len(points), 2)
        second = torch.zeros(2, len(points), 2)
        for layer in self.hidden:
            value = torch.tanh(layer(value))
            first, second = first @ layer.weight.T, second @ layer.weight.T
            slope = 1 - value.square()
            second = slope * second - 2 * value * slope * first.square()
            first = slope * first
        return (second @ self.head.weight.T).sum(0).squeeze(-1)


def _solution(points: Tensor) -> Tensor:
    x, y = points.unbind(1)
    return torch.sin(pi * x) * torch.sin(pi * y) + 0.3 * torch.sin(3 * pi * x) * torch.sin(2 * pi * y)


def _source(points: Tensor) -> Tensor:
    """Return the Laplacian of the solution."""
    x, y = points.unbind(1)
    slow = torch.sin(pi * x) * torch.sin(pi * y)
    return -(pi**2) * (2 * slow + 13 * 0.3 * torch.sin(3 * pi * x) * torch.sin(2 * pi * y))


def _poisson(model: nn.Module, batch: Batch) -> Tensor:
    inside, edge = batch
    residual = model.laplacian(inside) - _source(inside)
    return residual.square().mean() + 100 * model(edge).square().mean()


def _relative_error(model: nn.Module, batch: Batch) -> Tensor:
    exact = _solution(batch[0])
    return (model(batch[0]) - exact).norm() / exact.norm()


class Siren(nn.Module):
    """A network of sines from coordinates to a grey value."""

    def __init__(self, width: int = 128, depth: int = 4, frequency: float = 60.0):
        super().__init__()
        self.frequency = frequency
        sizes = [2] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(width, 1)
        nn.init.uniform_(self.hidden[0].weight, -0.5, 0.5)
        for layer in [*list(self.hidden)[1:], self.head]:
            bound = (6 / layer.in_features) ** 0.5 / frequency
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, points: Tensor) -> Tensor:
        """Return the grey values at `points`."""
        for layer in self.hidden:
            points = torch.sin(self.frequency * layer(points))
        return self.head(points)


class ZeroLinear(nn.Module):
    """Softmax regression from zero on features smaller than usual."""

    def __init__(self, size: float = 0.3):
        super().__init__()
        self.size, self.linear = size, nn.Linear(64, 10)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.linear(self.size * images)


@cache
def _raw_pixels() -> data.Data:
    """Return MNIST with pixels in [-128, 127], as a byte image with the middle taken off."""
    images = [rows[0] * 255 - 128 for rows in (data.mnist().train, data.mnist().valid)]
    return data.Data((images[0], data.mnist().train[1]), (images[1], data.mnist().valid[1]))


TASKS = [
    Task(
        "autompg_mlp",
        400,
        32,
        data.autompg,
        lambda seed: mlp(7, 64, 64, 1),
        squared_error,
        scale=1e4,
        about="regression of car mileage, MLP, loss times 1e4",
    ),
    Task(
        "poisson_pinn",
        1000,
        128,
        partial(data.square, 4096),
        lambda seed: PoissonNet(),
        _poisson,
        metric=_relative_error,
        about="2-d Poisson equation, tanh MLP; relative L2 error",
    ),
    Task(
        "scaled_table",
        400,
        32,
        partial(data.breast_cancer, 2.0),
        lambda seed: mlp(30, 64, 64, 2),
        cross_entropy,
        scale=1e-4,
        about="breast cancer, feature scales over 4 decades, loss times 1e-4",
    ),
    Task(
        "siren_photo",
        400,
        256,
        partial(data.photograph, 96),
        lambda seed: Siren(),
        squared_error,
        about="sine network fits a photograph; held-out pixels",
    ),
    Task(
        "raw_pixels",
        500,
        32,
        _raw_pixels,
        lambda seed: mlp(784, 256, 256, 10, activation=nn.Tanh),
        cross_entropy,
        about="tanh MLP on pixels in [-128, 127], MNIST",
    ),
    Task(
        "tiny_features",
        400,
        64,
        data.digits,
        lambda seed: ZeroLinear(),
        cross_entropy,
        about="softmax regression from zero, features times 0.3, digits",
    ),
]

VARIANTS: list[Task] = []
