"""Tasks written after the rules and constants had been chosen: other losses, other architectures, deep plain nets."""

from collections import Counter
from functools import cache, partial
from itertools import pairwise
from math import log, pi

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from benchmarks import data
from benchmarks.data import Batch, Data
from benchmarks.tasks.base import Task, cross_entropy, mlp, next_token, squared_error
from benchmarks.tasks.text import CHARACTERS

PAIRED_WORDS = 400


class Variational(nn.Module):
    """An autoencoder with a code of eight normal variables; in eval mode their means."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 128, 16), mlp(8, 128, 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the pixels, means and logarithms of the variances of the code."""
        mean, spread = self.encoder(images).chunk(2, 1)
        code = mean + (0.5 * spread).exp() * torch.randn_like(mean) if self.training else mean
        return self.decoder(code), mean, spread


def _evidence_bound(model: nn.Module, batch: Batch) -> Tensor:
    """Return cross-entropy summed over the pixels plus divergence from the prior, mean over images."""
    images = batch[0]
    logits, mean, spread = model(images)
    pixels = functional.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1)
    return (pixels + 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1)).mean()


class Patches(nn.Module):
    """A small vision transformer: sixteen patches of 7 x 7, two layers with norms before."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.embed, self.place = nn.Linear(49, width), nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        patches = images.view(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)
        return self.head(self.norm(self.layers(self.embed(patches) + self.place)).mean(1))


class Factors(nn.Module):
    """Guesses a number for a pair of words from the product of their embeddings and a bias of each."""

    def __init__(self, words: int = PAIRED_WORDS, width: int = 16):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(words, size) for size in (width, width, 1, 1))
        self.mean = nn.Parameter(torch.zeros(()))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return a number for each pair, shape (n,)."""
        (left, right), tables = pairs.unbind(1), self.tables
        return (tables[0](left) * tables[1](right)).sum(1) + (tables[2](left) + tables[3](right))[:, 0] + self.mean


@cache
def _pairs() -> Data:
    """Return pairs of words within four of each other in Python's help texts, and the logarithm of how often."""
    windows = data.words(5, PAIRED_WORDS)
    counts = Counter[tuple[int, int]]()
    for tensor in (*windows.train, *windows.valid):
        for place in range(1, 5):
            counts.update((int(a), int(b)) for a, b in tensor[:, [0, place]].tolist())
    values = torch.tensor([log(count) for count in counts.values()])
    return data.split(torch.tensor(list(counts)), values, valid=4000)


def _noise(model: nn.Module, like: Tensor, seed: int) -> Tensor:
    """Return normal noise; in eval mode always the same."""
    generator = None if model.training else torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator)


def _contrast(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of finding each image's other noisy copy in the batch, temperature 0.1."""
    images = batch[0]
    one, other = (functional.normalize(model(images + 0.2 * _noise(model, images, seed))) for seed in (0, 1))
    return functional.cross_entropy(one @ other.T / 0.1, torch.arange(len(images)))


class Denoiser(nn.Module):
    """Guesses the noise in an image from the image and how noisy it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64 + 16, 192, 192, 64)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        """Return the guessed noise; `time` in [0, 1], shape (n,)."""
        waves = time[:, None] * torch.logspace(0, 2, 8)
        return self.net(torch.cat([images, waves.sin(), waves.cos()], 1))


def _denoising(model: nn.Module, batch: Batch) -> Tensor:
    """Return the squared error of the guessed noise at times spread evenly."""
    images = 2 * batch[0] - 1
    noise = _noise(model, images, 0)
    time = torch.rand(len(images)) if model.training else torch.linspace(0, 1, len(images))
    share = (pi / 2 * time)[:, None]
    return functional.mse_loss(model(share.cos() * images + share.sin() * noise, time), noise)


class Dilated(nn.Module):
    """Four residual causal convolutions over characters, each reaching twice as far back."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.token = nn.Embedding(CHARACTERS, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**place) for place in range(4))
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, time, characters)."""
        states = self.token(tokens).transpose(1, 2)
        for place, layer in enumerate(self.layers):
            states = states + functional.gelu(layer(functional.pad(states, (2 * 2**place, 0))))
        return self.head(states.transpose(1, 2))


class RowRNN(nn.Module):
    """Reads an image row by row, with two plain recurrent layers."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.rnn, self.head = nn.RNN(28, width, 2, batch_first=True), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits after the last row."""
        return self.head(self.rnn(images.unflatten(1, (28, 28)))[0][:, -1])


def _plain(seed: int, activation: type[nn.Module], depth: int, width: int) -> nn.Module:
    return mlp(64, *[width] * depth, 10, activation=activation)


def _weight_normed(seed: int) -> nn.Module:
    layers = [module for a, b in pairwise((784, 128, 128)) for module in (weight_norm(nn.Linear(a, b)), nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def _deep_cnn(seed: int, depth: int = 7, channels: int = 16) -> nn.Module:
    stem = [nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, channels, 5, stride=4, padding=2), nn.ReLU()]
    body = [module for _ in range(depth) for module in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*stem, *body, nn.Flatten(), nn.Linear(49 * channels, 10))


def _made(seed: int, kind: type[nn.Module]) -> nn.Module:
    return kind()


def _digits(name: str, activation: type[nn.Module], depth: int, width: int, steps: int, about: str) -> Task:
    model = partial(_plain, activation=activation, depth=depth, width=width)
    return Task(name, steps, 64, data.digits, model, cross_entropy, about=about)


UNSEEN = (
    Task("vae", 600, 64, data.digits, partial(_made, kind=Variational), _evidence_bound, about="digits, code of 8"),
    Task("patches", 400, 64, data.mnist, partial(_made, kind=Patches), cross_entropy, about="vision transformer"),
    Task("word_pairs", 800, 256, _pairs, partial(_made, kind=Factors), squared_error, about="matrix factorisation"),
    Task("contrast", 400, 128, data.digits, lambda seed: mlp(64, 128, 128, 32), _contrast, about="InfoNCE on digits"),
    Task("denoiser", 600, 128, data.digits, partial(_made, kind=Denoiser), _denoising, about="diffusion on digits"),
    Task(
        "dilated", 300, 32, partial(data.characters, 64), partial(_made, kind=Dilated), next_token, about="causal CNN"
    ),
    Task("linear", 400, 32, data.digits, lambda seed: nn.Linear(64, 10), cross_entropy, about="logistic regression"),
    Task("weight_norm", 400, 64, data.mnist, _weight_normed, cross_entropy, about="MLP with weight norm"),
    Task("row_rnn", 300, 64, data.mnist, partial(_made, kind=RowRNN), cross_entropy, about="two plain tanh RNNs"),
    Task("deep_cnn", 300, 64, data.mnist, _deep_cnn, cross_entropy, about="8 convolutions, no norms"),
    _digits("deep_tanh", nn.Tanh, 10, 32, 600, "10 plain layers of 32"),
    _digits("deep_relu", nn.ReLU, 12, 48, 500, "12 plain layers of 48"),
    _digits("deep_gelu", nn.GELU, 16, 32, 500, "16 plain layers of 32"),
    _digits("sigmoid", nn.Sigmoid, 4, 64, 800, "4 plain layers of 64"),
)
