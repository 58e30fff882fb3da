"""Small tensors: sums over large ones and over shards, and what brings them to the host."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_soaa._dist import Shards, over_shards


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which scalars are kept on `device`: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_host(device: torch.device) -> bool:
    """Return whether the host reads tensors of `device` without waiting for it."""
    return device.type == "cpu"


def square_sum(tensors: Sequence[Tensor], *, foreach: bool) -> Tensor:
    """Return the sum of squares of all entries, 0-d in the wide dtype; norms are formed in float32 at least."""
    dtype = torch.float32 if tensors[0].dtype.itemsize < 4 else None
    if foreach and len(tensors) > 1:
        parts = torch._foreach_norm(list(tensors), 2, dtype)
    else:
        parts = tuple(torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors)
    return summed_squares(parts)


def summed_squares(norms: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Return the sum of squares of 0-d tensors, each times `scale`, 0-d in the wide dtype."""
    wide = stacked(norms).to(wide_dtype(norms[0].device))
    if scale != 1:
        wide = wide * scale
    return (wide * wide).sum() if wide.ndim else wide * wide


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return 0-d tensors as one, of which only the sum is wanted."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts))


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return ``sum_i <left_i, right_i>`` as a 0-d tensor in the wide dtype."""
    parts = [(a * b).sum() for a, b in zip(left, right, strict=True)]
    return stacked(parts).to(wide_dtype(left[0].device)).sum()


def total(parts: Iterable[Tensor], shards: Sequence[Shards]) -> Tensor:
    """Return the sum of small tensors of one shape, over all shards of each, on the device of the first."""
    listed = list(parts)
    if len(listed) == 1 and not shards[0]:
        return listed[0]
    listed, sums = [part.to(listed[0].device) for part in listed], []
    for kind in dict.fromkeys(shards):
        here = [part for part, other in zip(listed, shards, strict=True) if other == kind]
        sums.append(over_shards(torch.stack(here).sum(0), kind))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def gated(ok: Tensor | None, value: float, otherwise: float) -> Tensor | float:
    """Return `value` where `ok` and `otherwise` elsewhere, 0-d in the wide dtype, without reading `ok` on the host.

    None is what the host knows to be true: `value`.
    """
    if ok is None:
        return value
    wide = torch.full((), value, dtype=wide_dtype(ok.device), device=ok.device)
    return torch.where(ok, wide, otherwise)


def allowed(ok: Tensor | bool, device: torch.device) -> Tensor | None:
    """Return `ok` as a tensor on `device`, or None where the host knows that it is true."""
    return None if ok is True else torch.as_tensor(ok, device=device)


def sent(numbers: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on `device`, in the wide dtype unless another is given; the host does not wait."""
    return torch.tensor(numbers, dtype=wide_dtype(device) if dtype is None else dtype).to(device, non_blocking=True)


def near(value: Tensor | float | None, device: torch.device) -> Tensor | float | None:
    """Return a number as it is, a tensor on `device`."""
    return value.to(device) if isinstance(value, Tensor) else value


def read(values: Sequence[Tensor | float | None], device: torch.device) -> list[float]:
    """Bring numbers and small tensors to the host, None as 0, one after the other; from an accelerator packed into one.

    The only place where a step waits for its device.
    """
    if on_host(device):
        found: list[float] = []
        for value in values:
            if isinstance(value, Tensor) and value.ndim:
                found += value.tolist()
            else:
                found.append(0.0 if value is None else float(value))
        return found
    tensors = [torch.as_tensor(0.0 if value is None else value).to(device, wide_dtype(device)) for value in values]
    return [float(value) for value in torch.cat([tensor.reshape(-1) for tensor in tensors]).tolist()]
