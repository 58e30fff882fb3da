"""Tensors that are stepped together, and sums over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_soaa._dist import Shards

# Entries worked on at a time: on a CPU three float32 temporaries of them fit its last cache (they take 3 MB); elsewhere
# they take 400 MB.
CACHED, BOUNDED = 2**18, 2**25
# Tensors of no more entries are worked on together, where copies of them cost less than an operation on each.
SMALL = 2**14


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which scalars are kept on `device`: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


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
        params: the parameters, as real tensors of any shape.
        grads: their gradients in the state's dtype, of the same shapes.
        state: lists of tensors by key, each as long as `params`.
        last_bound: d of the last step.
        shards: the process groups over which the coordinates are spread; the tensors here are this rank's part.
        coordinates: their number, over all shards; of the parts of a bucket the first has that of all.
        rotated: the gradients in the coordinates of the Fisher, where these are its own; zero where left out.
        packed: the state itself, where `grads` and `state` are one flat copy of many small tensors each.
    """

    group: int
    step: int
    beta1: float
    beta2: float
    eps: float
    foreach: bool
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Tensor]] = field(default_factory=dict)
    last_bound: float = 0.0
    shards: Shards = ()
    coordinates: int = 0
    rotated: list[Tensor] = field(default_factory=list)
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

    def spread(self, flat: list[Tensor]) -> list[Tensor]:
        """Return tensors like the gradients here as tensors like the parameters, which share their memory."""
        return list(unflatten(flat[0], self.params)) if self.packed else flat

    def store(self) -> None:
        """Bring what has been done to packed state to the state itself."""
        for name, tensors in self.packed.items():
            torch._foreach_copy_(tensors, unflatten(self.state[name][0], tensors))


def on_host(device: torch.device) -> bool:
    """Return whether the host reads tensors of `device` without waiting for it."""
    return device.type == "cpu"


def block_size(device: torch.device) -> int:
    """Return how many entries are worked on at a time."""
    return CACHED if on_host(device) else BOUNDED


def divide(bucket: Bucket) -> list[Bucket]:
    """Return a bucket in parts of at most :func:`block_size` entries, as far as its tensors can be divided.

    What is formed between two passes over a block stays small, on a CPU in its cache. There small tensors are packed
    into flat ones, too: for them an operation costs more than its work.
    """
    host = on_host(bucket.device)
    most, small = block_size(bucket.device), SMALL if host else -1
    room, parts, blocks = {True: 0, False: 0}, dict[bool, Bucket](), list[Bucket]()
    for row in zip(bucket.params, bucket.grads, *bucket.state.values(), strict=True):
        for param, grad, *kept in pieces(row, most):
            size = param.numel()
            packs = size <= small
            if size > room[packs] or packs not in parts:
                parts[packs] = replace(bucket, params=[], grads=[], state={name: [] for name in bucket.state})
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
        if len(block.params) > 1 and block.params[0].numel() <= small:
            block.packed = block.state
            block.grads = [flatten(block.grads)]
            block.state = {name: [flatten(tensors)] for name, tensors in block.packed.items()}
    return blocks


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


def square_sum(tensors: Sequence[Tensor], *, foreach: bool) -> Tensor:
    """Return the sum of squares of all entries, 0-d in the wide dtype; norms are formed in float32 at least."""
    dtype = torch.float32 if tensors[0].dtype.itemsize < 4 else None
    if foreach and len(tensors) > 1:
        parts = torch._foreach_norm(list(tensors), 2, dtype)
    else:
        parts = tuple(torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors)
    norms = stacked(parts).to(wide_dtype(tensors[0].device))
    return (norms * norms).sum()


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return 0-d tensors as one, of which only the sum is wanted."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts))


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return ``sum_i <left_i, right_i>`` as a 0-d tensor in the wide dtype."""
    parts = [(a * b).sum() for a, b in zip(left, right, strict=True)]
    return stacked(parts).to(wide_dtype(left[0].device)).sum()


def gated(ok: Tensor | None, value: float, otherwise: float) -> Tensor | float:
    """Return `value` where `ok` and `otherwise` elsewhere, 0-d in the wide dtype, without reading `ok` on the host.

    None is what the host knows to be true: `value`.
    """
    if ok is None:
        return value
    wide = torch.full((), value, dtype=wide_dtype(ok.device), device=ok.device)
    return torch.where(ok, wide, otherwise)
