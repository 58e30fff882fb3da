"""Where rotated parameters and their bases lie in memory: stacks of one shape, in flat tensors with many of them.

All that :mod:`lightning_soaa.kronecker` does element by element is done once for a flat tensor, what it does with
matrices once for a stack.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._bases import rotate, rotate_back
from lightning_soaa._bucket import Bucket, block_size
from lightning_soaa._estimate import MOMENT, SQUARE
from lightning_soaa._memory import flatten, one_view, stacked_view, unflatten

LEFT, RIGHT, LEFT_BASIS, RIGHT_BASIS = "left", "right", "left_basis", "right_basis"
SIDES = ((LEFT, LEFT_BASIS), (RIGHT, RIGHT_BASIS))
AGE = "basis_age"  # steps since each of the two bases was refreshed; no entries where neither side is rotated
FRAME = (LEFT, RIGHT, LEFT_BASIS, RIGHT_BASIS, AGE)


@dataclass
class Frame:
    """Factors and bases of n parameters of one shape, in stacks.

    Args:
        place: where the parameters are in the flat tensors of their block.
        shape: (n, a, b), first dimension by all others.
        state: of each key of the frame, a stack.
        packed: of these, the tensors of the state, where a stack is no view of them.
        phases: when the bases of each side have their turn.
    """

    place: slice
    shape: tuple[int, int, int]
    state: dict[str, Tensor]
    packed: dict[str, list[Tensor]]
    phases: tuple[int, int] = (0, 0)

    @property
    def bases(self) -> tuple[Tensor, Tensor]:
        """Return the bases of rows and columns."""
        return self.state[LEFT_BASIS], self.state[RIGHT_BASIS]

    def of(self, flat: Tensor) -> Tensor:
        """Return the parameters' part of a flat tensor, as matrices."""
        return flat[self.place].view(self.shape)

    def store(self) -> None:
        """Bring what has been done to copies to the state."""
        for key, tensors in self.packed.items():
            torch._foreach_copy_(tensors, list(self.state[key].unbind()))


def in_bases(bucket: Bucket, flat: Tensor, *, back: bool = False) -> Tensor:
    """Return a flat tensor with each matrix in it turned by its bases, or with `back` out of them."""
    new = torch.empty_like(flat)
    for frame in bucket.frames:
        (rotate_back if back else rotate)(frame.of(flat), *frame.bases, out=frame.of(new))
    return new


def stack(states: Sequence[dict[str, Any]]) -> None:
    """Stack the frames of rotated parameters of one shape, and lay all moments one behind the other (modified)."""
    kinds: dict[Any, dict[torch.Size, list[dict[str, Any]]]] = {}
    for each in states:
        moment = each[MOMENT]
        kinds.setdefault((moment.device, moment.dtype), {}).setdefault(moment.shape, []).append(each)
    for shapes in kinds.values():
        for alike in shapes.values():
            for key in FRAME:
                give(alike, key, torch.stack([one[key] for one in alike]).unbind())
        ordered = [each for alike in shapes.values() for each in alike]
        for key in (MOMENT, SQUARE):
            tensors = [each[key] for each in ordered]
            give(ordered, key, unflatten(flatten(tensors), tensors))


def sorted_by_shape(bucket: Bucket) -> tuple[dict[torch.Size, list[int]], list[int]]:
    """Return which parameters of a bucket are rotated, by shape, and which are not."""
    kinds, rest = dict[torch.Size, list[int]](), list[int]()
    for index, (param, age) in enumerate(zip(bucket.params, bucket.state[AGE], strict=True)):
        (kinds.setdefault(param.shape, []) if age.numel() else rest).append(index)
    return kinds, rest


def parts(kinds: Mapping[torch.Size, Sequence[int]], bucket: Bucket) -> list[list[Sequence[int]]]:
    """Return stacks of one shape each, in parts of as many entries as are worked on at a time, as far as that goes."""
    most, room = block_size(bucket.device), 0
    found = list[list[Sequence[int]]]()
    for shape, rows in kinds.items():
        step = max(1, most // shape.numel())
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            if not found or len(some) * shape.numel() > room:
                found.append([])
                room = most
            found[-1].append(some)
            room -= len(some) * shape.numel()
    return found


def some_of(bucket: Bucket, rows: Sequence[int], keys: Sequence[str]) -> tuple[list[Tensor], list[Tensor], Any]:
    """Return parameters, gradients and some of the state of some of the parameters of a bucket."""
    lists = [bucket.params, bucket.grads, *(bucket.state[key] for key in keys)]
    if len(rows) < len(bucket.params):
        lists = [[kept[row] for row in rows] for kept in lists]
    return lists[0], lists[1], dict(zip(keys, lists[2:], strict=True))


def give(states: Sequence[dict[str, Any]], key: str, tensors: Sequence[Tensor]) -> None:
    """Give each state its tensor."""
    for each, tensor in zip(states, tensors, strict=True):
        each[key] = tensor


def framed(bucket: Bucket, stacks: Sequence[Sequence[int]]) -> Bucket:
    """Return stacks of parameters as one flat tensor with a frame each: views, or copies to be stored."""
    places = [row for rows in stacks for row in rows]
    params, grads, kept = some_of(bucket, places, (MOMENT, SQUARE))
    views = {key: one_view(tensors) for key, tensors in kept.items()}
    state = {key: [flatten(kept[key]) if view is None else view] for key, view in views.items()}
    block = bucket.but(params=params, grads=[flatten(grads)], state=state, frames=[], rotated=[], flat=True)
    block.owners = [bucket.owners[row] for row in places]
    block.packed = {key: kept[key] for key, view in views.items() if view is None}
    start = 0
    for rows in stacks:
        shape = bucket.params[rows[0]].shape
        place = slice(start, start := start + len(rows) * shape.numel())
        parts = {key: [bucket.state[key][row] for row in rows] for key in FRAME}
        found = {key: stacked_view(tensors) for key, tensors in parts.items()}
        frame = {key: torch.stack(parts[key]) if view is None else view for key, view in found.items()}
        packed = {key: parts[key] for key, view in found.items() if view is None}
        matrices = (len(rows), shape[0], shape.numel() // shape[0])
        block.frames.append(Frame(place, matrices, frame, packed))
    return block
