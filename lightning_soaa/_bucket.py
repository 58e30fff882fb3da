"""Tensors that are stepped together, and the memory that they are worked on in."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._dist import Shards
from lightning_soaa._sums import on_host

# Entries worked on at a time: on a CPU three float32 temporaries of them fit its last cache (they take 3 MB); elsewhere
# a check, which forms five, takes 700 MB.
CACHED, BOUNDED = 2**18, 2**25
# Tensors of no more entries are worked on together, where copies of them cost less than an operation on each.
SMALL = 2**14


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
        whole: its tensors have not been divided, for the compiled step.
        params: the parameters, as real tensors of any shape.
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

    def tentative(self) -> "Bucket":
        """Return the bucket with a copy of its state, for a step that may be undone."""
        return replace(self, state={name: [kept.clone() for kept in tensors] for name, tensors in self.state.items()})

    def spread(self, like_grads: list[Tensor]) -> list[Tensor]:
        """Return tensors like the gradients here as tensors like the parameters, which share their memory."""
        return unflatten(like_grads[0], self.params) if self.flat else like_grads

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
    room, parts, blocks = {True: 0, False: 0}, dict[bool, Bucket](), list[Bucket]()
    for row in zip(bucket.params, bucket.grads, *bucket.state.values(), strict=True):
        for param, grad, *kept in [row] if whole else pieces(row, most):
            size = param.numel()
            packs = size <= small
            if size > room[packs] or packs not in parts:
                empty: dict[str, list[Tensor]] = {name: [] for name in bucket.state}
                parts[packs] = replace(bucket, params=[], grads=[], state=empty, whole=whole and not packs)
                parts[packs].coordinates = 0 if blocks else bucket.coordinates
                blocks.append(parts[packs])
                room[packs] = most
            part = parts[packs]
            room[packs] -= size
            part.params.append(param)
            part.grads.append(grad)
            for tensors, tensor in zip(part.state.values(), kept, strict=True):
                tensors.append(tensor)
    for block in blocks:
        if host and len(block.params) > 1 and block.params[0].numel() <= small:
            views = {name: one_view(tensors) for name, tensors in block.state.items()}
            block.flat, block.grads = True, [flatten(block.grads)]
            block.packed = {name: tensors for name, tensors in block.state.items() if views[name] is None}
            block.state = {
                name: [flatten(tensors) if (view := views[name]) is None else view]
                for name, tensors in block.state.items()
            }
    return blocks


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


def runs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the host with those that lie side by side in one memory, in order, merged into flat views.

    Empty ones are left out. Tensors that are not contiguous stay as they are.
    """
    found: list[tuple[Tensor, int]] = []
    end = limit = -1  # of the last run, and of its memory
    for tensor in tensors:
        size = tensor.nbytes
        if not size:
            continue
        if tensor.is_contiguous() and tensor.data_ptr() == end and end + size <= limit:
            first, count = found.pop()
            found.append((first, count + tensor.numel()))
            end += size
            continue
        found.append((tensor, tensor.numel()))
        memory, whole = tensor.untyped_storage(), tensor.is_contiguous()
        end, limit = (tensor.data_ptr() + size, memory.data_ptr() + memory.nbytes()) if whole else (-1, -1)
    return [first.as_strided((n,), (1,)) if n > first.numel() else first for first, n in found]


def one_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors that lie side by side in one memory, in order, as one flat tensor; None for others."""
    merged = runs(tensors) or [tensors[0]]
    return merged[0].view(-1) if len(merged) == 1 and merged[0].is_contiguous() else None


def stacked_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors of one shape that lie side by side in one memory, in order, as one tensor; None for others."""
    first, count = tensors[0], len(tensors)
    start, size = first.data_ptr(), first.nbytes
    if not first.is_contiguous():
        return None
    if any(tensor.data_ptr() != start + index * size for index, tensor in enumerate(tensors)):
        return None
    memory = first.untyped_storage()
    if start + count * size > memory.data_ptr() + memory.nbytes():
        return None
    return first.as_strided((count, *first.shape), (first.numel(), *first.stride()))


def pieces(tensors: Sequence[Tensor], most: int) -> list[Sequence[Tensor]]:
    """Return tensors of one shape, in flat parts of `most` entries if all are contiguous, else as they are."""
    if tensors[0].numel() <= most or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return list(zip(*(torch.split(tensor.view(-1), most) for tensor in tensors), strict=True))


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of all tensors in one flat copy."""
    flat: Tensor = torch._utils._flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of what :func:`flatten` made of tensors of the shapes of `like`."""
    views: list[Tensor] = list(torch._utils._unflatten_dense_tensors(flat, like))  # type: ignore[no-untyped-call]
    return views
