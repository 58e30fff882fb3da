"""Tensors that are stepped together, and sums over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_soaa._dist import Shards

# Entries worked on at a time: on a CPU three float32 temporaries of them fit its cache; elsewhere they take 400 MB.
CACHED, BOUNDED = 2**16, 2**25


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
        coordinates: their number, over all shards.
        rotated: the gradients in the coordinates of the Fisher, where these are its own; zero where left out.
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

    def blocks(self) -> list["Bucket"]:
        """Return the bucket in parts of at most :func:`block_size` entries, as far as tensors can be divided.

        What is formed between two passes over a block stays small, on a CPU in its cache.
        """
        most = block_size(self.device)
        if self.numel <= most:
            return [self]
        names, room = list(self.state), 0
        blocks: list[Bucket] = []
        for tensors in zip(self.params, self.grads, *self.state.values(), strict=True):
            whole = not all(tensor.is_contiguous() for tensor in tensors)
            for param, grad, *kept in zip(*((t,) if whole else pieces(t) for t in tensors), strict=True):
                if not blocks or param.numel() > room:
                    blocks.append(replace(self, params=[], grads=[], state={name: [] for name in names}))
                    room = most
                room -= param.numel()
                blocks[-1].params.append(param)
                blocks[-1].grads.append(grad)
                for name, tensor in zip(names, kept, strict=True):
                    blocks[-1].state[name].append(tensor)
        return blocks


def on_host(device: torch.device) -> bool:
    """Return whether the host reads tensors of `device` without waiting for it."""
    return device.type == "cpu"


def block_size(device: torch.device) -> int:
    """Return how many entries are worked on at a time."""
    return CACHED if on_host(device) else BOUNDED


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor in flat parts of one block at most, itself if it is short or not contiguous."""
    most = block_size(tensor.device)
    if tensor.numel() <= most or not tensor.is_contiguous():
        return (tensor,)
    return torch.split(tensor.view(-1), most)


def norms(tensors: Sequence[Tensor], order: int, *, foreach: bool) -> Tensor:
    """Return the `order`-norm of each piece of the tensors, as one vector in the wide dtype.

    Formed in float32 at least.
    """
    dtype = torch.float32 if tensors[0].dtype.itemsize < 4 else None
    listed = [piece for tensor in tensors for piece in pieces(tensor)]
    if foreach:
        parts = torch._foreach_norm(listed, order, dtype)
    else:
        parts = tuple(torch.linalg.vector_norm(piece, order, dtype=dtype) for piece in listed)
    return torch.stack(parts).to(wide_dtype(tensors[0].device))


def square_sum(tensors: Sequence[Tensor], *, foreach: bool) -> Tensor:
    """Return the sum of squares of all entries, 0-d in the wide dtype."""
    return norms(tensors, 2, foreach=foreach).square().sum()


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return ``sum_i <left_i, right_i>`` as a 0-d tensor in the wide dtype."""
    parts = [(a * b).sum() for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).to(wide_dtype(left[0].device)).sum()


def gated(ok: Tensor | None, value: float, otherwise: float) -> Tensor | float:
    """Return `value` where `ok` and `otherwise` elsewhere, 0-d in the wide dtype, without reading `ok` on the host.

    None is what the host knows to be true: `value`.
    """
    if ok is None:
        return value
    wide = torch.full((), value, dtype=wide_dtype(ok.device), device=ok.device)
    return torch.where(ok, wide, otherwise)
