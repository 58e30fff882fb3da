"""Tensors that are stepped together, and sums over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_soaa._dist import Shards


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


def norms(tensors: Sequence[Tensor], order: int, *, foreach: bool) -> Tensor:
    """Return the `order`-norm of each tensor, as one vector in the wide dtype; formed in float32 at least."""
    dtype = torch.float32 if tensors[0].dtype.itemsize < 4 else None
    if foreach:
        parts = torch._foreach_norm(list(tensors), order, dtype)
    else:
        parts = tuple(torch.linalg.vector_norm(tensor, order, dtype=dtype) for tensor in tensors)
    return torch.stack(parts).to(wide_dtype(tensors[0].device))


def square_sum(tensors: Sequence[Tensor], *, foreach: bool) -> Tensor:
    """Return the sum of squares of all entries, 0-d in the wide dtype."""
    return norms(tensors, 2, foreach=foreach).square().sum()


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return ``sum_i <left_i, right_i>`` as a 0-d tensor in the wide dtype."""
    parts = [(a * b).sum() for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).to(wide_dtype(left[0].device)).sum()


def gated(ok: Tensor, value: float, otherwise: float) -> Tensor:
    """Return `value` where `ok` and `otherwise` elsewhere, 0-d in the wide dtype, without reading `ok` on the host."""
    wide = torch.full((), value, dtype=wide_dtype(ok.device), device=ok.device)
    return torch.where(ok, wide, otherwise)
