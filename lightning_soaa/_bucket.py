"""Tensors that are stepped together, in the blocks that they are worked on in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._dist import Shards
from lightning_soaa._memory import flatten, one_view, pieces, unflatten
from lightning_soaa._sums import on_host, wide_dtype

# Entries worked on at a time: on a CPU what a step forms of them, two float32 tensors and four on a check, fits a cache
# (they take 1 and 2 MB); elsewhere a check, which forms five, takes 700 MB.
CACHED, BOUNDED = 2**17, 2**25
# Tensors of no more entries are worked on together, where copies of them cost less than an operation on each.
SMALL = 2**14


@dataclass(frozen=True)
class Pace:
    """How a bucket is moved along its directions.

    Args:
        lr: what multiplies the direction.
        decay: share of the parameters that weight decay takes.
        cautious: coordinates on which the direction does not descend along the gradients stay.
        keeps: False to leave the moments as they are.
        promises: the slope along the step is asked for as well.
        compiled: by what torch.compile makes, which neither leaves moments nor promises.
    """

    lr: float
    decay: float
    cautious: bool
    keeps: bool = True
    promises: bool = False
    compiled: bool = False


@dataclass
class Bucket:
    """Tensors of one parameter group, device, dtype and age, with the scalars that belong to them.

    Args:
        group: index of the parameter group.
        step: gradients absorbed by these parameters, the current one included (t of the formulas).
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: the constant of steps 3 and 5.
        foreach: whether the ``_foreach`` form is used.
        fused: whether a fused kernel may be used.
        whole: its tensors have not been divided, for a step that does so itself or is compiled.
        params: the parameters, as real tensors of any shape.
        owners: which of the step's parameters each of them is, or is a part of.
        portions: of each of the step's parameters; empty where all are 1.
        grads: their gradients in the state's dtype, of the same shapes.
        state: lists of tensors by key, each as long as `params`.
        last_bound: d of the last step.
        shards: the process groups over which the coordinates are spread; the tensors here are this rank's part.
        coordinates: their number, over all shards; of the parts of a bucket the first has that of all.
        frames: what the Fisher's own coordinates rest on, if it has any; a step that may be undone leaves it as it is.
        rotated: the gradients in these coordinates; one list for all copies of the bucket.
        flat: `grads` and `state` are one flat tensor for many small ones each.
        packed: of these, the state itself, where it is no view of it.
    """

    group: int
    step: int
    beta1: float
    beta2: float
    eps: float
    foreach: bool
    fused: bool = False
    whole: bool = False
    params: list[Tensor] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    portions: Sequence[float] = ()
    grads: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Tensor]] = field(default_factory=dict)
    last_bound: float = 0.0
    shards: Shards = ()
    coordinates: int = 0
    frames: list[Any] = field(default_factory=list)
    rotated: list[Tensor] = field(default_factory=list)
    flat: bool = False
    packed: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def correction1(self) -> float:
        """Return ``1 - b1^t`` (step 2)."""
        return 1 - self.beta1**self.step

    @property
    def correction2(self) -> float:
        """Return ``1 - b2^t`` (step 2)."""
        return 1 - self.beta2**self.step

    @property
    def numel(self) -> int:
        """Return the number of coordinates held here."""
        return sum(tensor.numel() for tensor in self.params)

    @property
    def device(self) -> torch.device:
        """Return the device of all tensors in the bucket."""
        return self.params[0].device

    @property
    def many(self) -> bool:
        """Return whether to use multi-tensor operations, which agree bit for bit with a for-loop."""
        return self.foreach and len(self.grads) > 1

    def but(self, **changes: Any) -> "Bucket":
        """Return the bucket with other values of some fields; dataclasses.replace takes ten times as long."""
        other = object.__new__(Bucket)
        vars(other).update(vars(self), **changes)
        return other

    def tentative(self) -> "Bucket":
        """Return the bucket with a copy of its state, for a step that may be undone."""
        return self.but(state={name: [kept.clone() for kept in tensors] for name, tensors in self.state.items()})

    def parts(self) -> "Iterator[Bucket]":
        """Yield the bucket in parts of at most :func:`block_size` entries, as far as its tensors can be divided."""
        if not self.whole:
            yield self
        elif on_host(self.device):
            for owners, params, grad, *kept in self.rows(tuple(self.state)):
                state = {name: [tensor] for name, tensor in zip(self.state, kept, strict=True)}
                yield self.but(owners=owners, params=params, grads=[grad], state=state, whole=False)
        else:
            yield from divide(self)

    def rows(self, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield owners and parameters (lists), gradients and named state in parts of :func:`block_size` at most.

        Of small tensors that are worked on as one, all at once; else one tensor, flat, or a part of it. One that is not
        contiguous is yielded as it is.
        """
        kept = [self.state[name] for name in names]
        if self.flat:
            yield self.owners, self.params, self.grads[0], *(tensors[0] for tensors in kept)
            return
        most = block_size(self.device)
        for owner, *row in zip(self.owners, self.params, self.grads, *kept, strict=True):
            for param, *others in pieces(row, most):
                yield [owner], [param], *others

    def shorten(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Multiply tensors of the given parameters by their portions (modified in place)."""
        if not self.portions:
            return
        portions = [self.portions[owner] for owner in owners]
        if self.foreach and len(tensors) > 1:
            torch._foreach_mul_(list(tensors), portions)
            return
        for tensor, portion in zip(tensors, portions, strict=True):
            if portion != 1:
                tensor.mul_(portion)

    def slopes(self, like_grads: Sequence[Tensor]) -> Tensor:
        """Return the product of tensors like the gradients with these, for each parameter, in the wide dtype.

        Shape (n,), n the number of `params`.
        """
        products = [a * b for a, b in zip(self.grads, like_grads, strict=True)]
        parts = [part.sum() for part in self.spread(products)]
        return torch.stack(parts).to(wide_dtype(self.device))

    def spread(self, like_grads: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like the gradients here as tensors like the parameters, which share their memory."""
        return unflatten(like_grads[0], self.params) if self.flat else list(like_grads)

    def store(self) -> None:
        """Bring what has been done to copies of small tensors of the state to the state itself."""
        for name, tensors in self.packed.items():
            torch._foreach_copy_(tensors, unflatten(self.state[name][0], tensors))


def block_size(device: torch.device) -> int:
    """Return how many entries are worked on at a time."""
    return CACHED if on_host(device) else BOUNDED


def divide(bucket: Bucket, *, whole: bool = False) -> list[Bucket]:
    """Return a bucket in parts of at most :func:`block_size` entries, as far as its tensors can be divided.

    What is formed between two passes over a block stays small, on a CPU in its cache. There small tensors are worked
    on as one, too, since for them an operation costs more than its work: in a copy, unless they lie side by side. With
    `whole`, larger tensors are not divided.
    """
    host = on_host(bucket.device)
    most, small = block_size(bucket.device), SMALL if host or whole else -1
    owned, columns = bucket.owners, [bucket.params, bucket.grads, *bucket.state.values()]
    if not whole:
        rows = [list(pieces(row, most)) for row in zip(*columns, strict=True)]
        owned = [owner for owner, parts in zip(owned, rows, strict=True) for _ in parts]
        columns = [list(column) for column in zip(*(piece for parts in rows for piece in parts), strict=True)]
    blocks: list[Bucket] = []
    for places, packs in batched([tensor.numel() for tensor in columns[0]], most, small, whole=whole):
        params, grads, *kept = ([column[place] for place in places] for column in columns)
        owners = [owned[place] for place in places]
        block = bucket.but(owners=owners, params=params, grads=grads, state=dict(zip(bucket.state, kept, strict=True)))
        block.coordinates, block.whole = 0 if blocks else bucket.coordinates, whole and not packs
        blocks.append(block)
        if host and packs and len(params) > 1:
            views = {name: one_view(tensors) for name, tensors in block.state.items()}
            block.flat, block.grads = True, [flatten(grads)]
            block.packed = {name: tensors for name, tensors in block.state.items() if views[name] is None}
            block.state = {
                name: [flatten(tensors) if (view := views[name]) is None else view]
                for name, tensors in block.state.items()
            }
    return blocks


def batched(sizes: Sequence[int], most: int, small: int, *, whole: bool) -> list[tuple[list[int], bool]]:
    """Return which tensors are worked on together, as places and whether they are small, in the order they come in.

    Args:
        sizes: of the tensors.
        most: what sizes may add up to, unless there is a single one.
        small: up to which size a tensor is small; those are apart from others.
        whole: of others there may be any number.
    """
    batches = list[tuple[list[int], bool]]()
    current, room = dict[bool, list[int]](), {True: 0.0, False: 0.0}
    for place, size in enumerate(sizes):
        packs = size <= small
        if packs not in current or size > room[packs]:
            current[packs], room[packs] = [], most if packs or not whole else inf
            batches.append((current[packs], packs))
        current[packs].append(place)
        room[packs] -= size
    return batches


def side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with their small contiguous ones on the host moved into one memory for each dtype, in order."""
    kinds: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if type(tensor) is Tensor and on_host(tensor.device) and tensor.numel() <= SMALL and tensor.is_contiguous():
            kinds.setdefault(tensor.dtype, []).append(index)
    moved = list(tensors)
    for places in kinds.values():
        small = [tensors[index] for index in places]
        for index, view in zip(places, unflatten(flatten(small), small), strict=True):
            moved[index] = view
    return moved
