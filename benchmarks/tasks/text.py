"""Tasks on sequences and words."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import data
from benchmarks.data import Batch
from benchmarks.tasks.base import Task, cross_entropy, next_token

CHARACTERS = 97
WORDS = 3000


class Attention(nn.Module):
    """Pre-norm causal self-attention and MLP, both residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's output, of the shape of its input (batch, time, width)."""
        split = self.qkv(self.norm1(inputs)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        inputs = inputs + self.out(mixed.transpose(1, 2).flatten(2))
        return inputs + self.mlp(self.norm2(inputs))


class Transformer(nn.Module):
    """A causal transformer over characters."""

    def __init__(self, length: int, depth: int = 2, width: int = 64, heads: int = 4):
        super().__init__()
        self.token, self.place = nn.Embedding(CHARACTERS, width), nn.Embedding(length, width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.blocks = nn.Sequential(*[Attention(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, time, characters)."""
        states = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(states)))


class RowLSTM(nn.Module):
    """Reads an image row by row."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.lstm, self.head = nn.LSTM(28, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits after the last row."""
        states, _ = self.lstm(images.unflatten(1, (28, 28)))
        return self.head(states[:, -1])


class CharGRU(nn.Module):
    """A one-layer recurrent character model."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.token, self.rnn = nn.Embedding(CHARACTERS, 32), nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, time, characters)."""
        return self.head(self.rnn(self.token(tokens))[0])


class WordBag(nn.Module):
    """Guesses the middle word of five from the mean embedding of the other four."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.token, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)

    def forward(self, context: Tensor) -> Tensor:
        """Return logits over the words."""
        return self.head(self.token(context).mean(1))


def _middle_word(model: nn.Module, batch: Batch) -> Tensor:
    (windows,) = batch
    return functional.cross_entropy(model(windows[:, torch.tensor([0, 1, 3, 4])]), windows[:, 2])


def _transformer(seed: int, length: int = 64, depth: int = 2, width: int = 64) -> nn.Module:
    return Transformer(length, depth, width)


TASKS = [
    Task(
        "char_transformer",
        400,
        16,
        partial(data.characters, 64),
        _transformer,
        next_token,
        about="2 layers of width 64, characters of Python's help texts",
    ),
    Task("row_lstm", 400, 64, data.mnist, lambda seed: RowLSTM(), cross_entropy, about="LSTM over 28 rows of MNIST"),
    Task(
        "char_gru",
        300,
        32,
        partial(data.characters, 40),
        lambda seed: CharGRU(),
        next_token,
        about="GRU of width 96, characters of Python's help texts",
    ),
    Task(
        "word_bag",
        400,
        128,
        partial(data.words, 5, WORDS),
        lambda seed: WordBag(),
        _middle_word,
        about="middle word of five, 3 000 embeddings: sparse rows",
    ),
]

VARIANTS = [
    replace(TASKS[0], name=f"char_transformer_{depth}x{width}", model=partial(_transformer, depth=depth, width=width))
    for depth, width in ((1, 64), (4, 64), (2, 32), (2, 128))
]
