"""Tasks on images: perceptrons, convolutions, an autoencoder, a residual net, noisy labels, fine-tuning."""

from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import data
from benchmarks.data import Batch
from benchmarks.tasks.base import Task, cross_entropy, mlp


def _digits_mlp(seed: int, depth: int = 2, width: int = 128) -> nn.Module:
    return mlp(64, *[width] * depth, 10, dropout=0.2)


def _cnn(seed: int, width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, width, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(49 * 2 * width, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _autoencoder(seed: int) -> nn.Module:
    return mlp(784, 256, 128, 64, 30, 64, 128, 256, 784)


def _reconstruction(model: nn.Module, batch: Batch) -> Tensor:
    """Return a tenth of the squared error summed over the pixels, mean over images."""
    images = batch[0]
    return 0.1 * (model(images).sigmoid() - images).square().sum(1).mean()


class Residual(nn.Module):
    """Two batch-normed convolutions beside an identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return relu(inputs + body(inputs))."""
        return functional.relu(inputs + self.body(inputs))


def _resnet(seed: int, blocks: int = 3, channels: int = 16) -> nn.Module:
    stem = [nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, channels, 5, stride=4, padding=2, bias=False)]
    tail = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10)]
    body = [Residual(channels) for _ in range(blocks)]
    return nn.Sequential(*stem, nn.BatchNorm2d(channels), nn.ReLU(), *body, *tail)


@cache
def _pretrained(seed: int, steps: int = 200) -> dict[str, Tensor]:
    """Return the weights of a small net after AdamW at 1e-3 on the first five classes, linear decay to 0."""
    model = _cnn(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stream = data.batches(data.mnist_half(0, 5).train, 64, seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        cross_entropy(model, next(stream)).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _unseen() -> data.Data:
    return data.mnist_half(5, 10)


def _finetune(seed: int) -> nn.Module:
    model = _cnn(seed)
    model.load_state_dict(_pretrained(seed))
    return model


def _noisy(seed: int) -> nn.Module:
    return mlp(784, 128, 128, 10)


class ScaledLinear(nn.Module):
    """A linear layer whose weights start with deviation 1 and are divided by the root of the fan-in when used."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(fan_out, fan_in)), nn.Parameter(torch.zeros(fan_out))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs @ weight.T / sqrt(fan_in) + bias."""
        return functional.linear(inputs, self.weight * self.weight.shape[1] ** -0.5, self.bias)


def _tangent(seed: int, width: int = 512) -> nn.Module:
    first, second, head = ScaledLinear(784, width), ScaledLinear(width, width), ScaledLinear(width, 10)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head)


TASKS = [
    Task("digits_mlp", 600, 64, data.digits, _digits_mlp, cross_entropy, about="MLP with dropout, digits"),
    Task("mnist_cnn", 400, 64, data.mnist, _cnn, cross_entropy, about="2 convolutions, 5 000 MNIST images"),
    Task("mnist_autoencoder", 500, 64, data.mnist, _autoencoder, _reconstruction, about="MLP autoencoder, code of 30"),
    Task("mnist_resnet", 300, 64, data.mnist, _resnet, cross_entropy, about="3 batch-normed residual blocks, MNIST"),
    Task("noisy_labels", 400, 64, data.mnist_noisy, _noisy, cross_entropy, about="MLP, 40 % of labels wrong, MNIST"),
    Task("finetune", 300, 32, _unseen, _finetune, cross_entropy, about="CNN trained on classes 0-4, then on 5-9"),
    Task("tangent_mlp", 400, 32, data.mnist, _tangent, cross_entropy, about="width 512, weights of deviation 1, MNIST"),
]

VARIANTS = [
    replace(TASKS[0], name=f"digits_mlp_{depth}x{width}", model=partial(_digits_mlp, depth=depth, width=width))
    for depth, width in ((1, 128), (4, 128), (8, 128), (2, 32), (2, 512))
] + [replace(TASKS[3], name=f"mnist_resnet_{blocks}", model=partial(_resnet, blocks=blocks)) for blocks in (1, 6)]
