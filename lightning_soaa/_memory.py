"""Where tensors lie in memory: several as one flat tensor, as views where they lie side by side."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# In torch 2.6 views of a flat tensor as tensors without entries are of the shape (0,).
_EMPTY = [torch.empty(0, 2)]
LOSES_SHAPES = torch._utils._unflatten_dense_tensors(torch.empty(0), _EMPTY)[0].dim() == 1  # type: ignore[no-untyped-call]


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
    first, width = tensors[0], tensors[0].element_size()
    start = end = first.data_ptr()
    for tensor in tensors:  # the usual case, at once
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            merged = runs(tensors) or [first]
            return merged[0].view(-1) if len(merged) == 1 and merged[0].is_contiguous() else None
        end += tensor.numel() * width
    memory = first.untyped_storage()
    inside = end <= memory.data_ptr() + memory.nbytes()
    return first.as_strided(((end - start) // width,), (1,)) if inside else None


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


def pieces(tensors: Sequence[Tensor], most: int) -> Iterable[Sequence[Tensor]]:
    """Return tensors of one shape, flat and in parts of `most` entries if all are contiguous, else as they are."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    flat = [tensor.view(-1) for tensor in tensors]
    return [flat] if flat[0].numel() <= most else zip(*(torch.split(tensor, most) for tensor in flat), strict=True)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of all tensors in one flat copy."""
    flat: Tensor = torch._utils._flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of what :func:`flatten` made of tensors of the shapes of `like`."""
    views: list[Tensor] = list(torch._utils._unflatten_dense_tensors(flat, like))  # type: ignore[no-untyped-call]
    if LOSES_SHAPES:
        return [view.view(one.shape) for view, one in zip(views, like, strict=True)]
    return views
