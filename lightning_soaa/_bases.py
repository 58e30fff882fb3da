"""Bases of rows and columns: the pure functions of :mod:`lightning_soaa.kronecker`. No Fisher is known here.

Every function takes stacks: n matrices of one shape (a, b) as one tensor (n, a, b), their factors and bases as
(n, a, a) and (n, b, b). A side that is not rotated has neither; its factors and bases are tensors without entries.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

# What torch.linalg raises where a decomposition fails.
LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# Share of the identity beside a factor of trace 1: directions without any gradient keep the basis that they have.
RIDGE = 1e-6
# Offsets between which the schedule chooses: to look at all would take long where refreshes are rare.
OFFSETS = 1000


def rotated_sides(shape: Sequence[int], max_dim: int) -> tuple[int, int]:
    """Return the lengths of a parameter's two sides, 0 for one that is not rotated.

    Vectors and scalars, sides longer than `max_dim`, sides of length 1 and parameters without entries are not.
    """
    if len(shape) < 2 or not prod(shape):
        return 0, 0
    rows, columns = shape[0], prod(shape[1:])
    return (rows if 1 < rows <= max_dim else 0), (columns if 1 < columns <= max_dim else 0)


def rotate(matrices: Tensor, left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``P' X Q`` for each matrix X, in `out` if given; where a basis has no entries its side stays as it is."""
    if right.numel():
        return torch.bmm(torch.bmm(left.mT, matrices) if left.numel() else matrices, right, out=out)
    if left.numel():
        return torch.bmm(left.mT, matrices, out=out)
    return matrices if out is None else out.copy_(matrices)


def rotate_back(matrices: Tensor, left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``P X Q'``, which undoes :func:`rotate`."""
    return rotate(matrices, left.mT, right.mT, out=out)


def unit_factor(factor: Tensor) -> Tensor:
    """Return factors with trace 1, so that no product of them is too small for their dtype."""
    trace = factor.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(factor.dtype).tiny)
    return factor / trace[:, None, None]


def first_bases(factor: Tensor, basis: Tensor) -> Tensor:
    """Return the eigenvectors of each factor, the one of the largest eigenvalue first.

    Where there are none, since the decomposition fails or is not finite, the basis as it is.
    """
    try:
        unit = unit_factor(factor)
        unit.diagonal(dim1=1, dim2=2).add_(RIDGE)
        vectors = torch.linalg.eigh(unit)[1].flip(2)
    except LinAlgError:
        return basis
    return torch.where(finite(vectors), vectors, basis)


def refreshed(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return bases after a step of orthogonal iteration, the order in which they take the old columns, and what has.

    The columns with the largest share of the factor come first. Where the decomposition fails, or is not finite, it is
    the basis as it was.

    Args:
        factor: shape (n, a, a), symmetric; not modified.
        basis: shape (n, a, a), orthonormal columns; not modified.

    Returns:
        Shapes (n, a, a), (n, a) and, bool, (n, 1, 1).
    """
    turned = torch.baddbmm(basis, unit_factor(factor), basis, beta=RIDGE)
    order = (basis * turned).sum(1).argsort(dim=1, descending=True, stable=True)
    try:
        new = orthonormal(turned.gather(2, order[:, None, :].expand_as(turned)))
    except LinAlgError:
        new = torch.full_like(basis, torch.nan)
    good = finite(new)
    same = torch.arange(order.shape[1], device=order.device)
    return torch.where(good, new, basis), torch.where(good[:, :, 0], order, same), good


def orthonormal(matrices: Tensor) -> Tensor:
    """Return Q of each QR decomposition, without R, and without entries that are too small to tell from 0.

    Of these some would be subnormal, and a CPU takes several times as long for a product with them.
    """
    basis: Tensor = torch.linalg.householder_product(*torch.geqrf(matrices))
    return torch.nn.functional.hardshrink(basis, torch.finfo(basis.dtype).eps ** 2)


def finite(matrices: Tensor) -> Tensor:
    """Return whether all entries of each matrix, none of them large, are finite, shape (n, 1, 1)."""
    return matrices.sum((1, 2), keepdim=True).isfinite()


def turn_moments(
    moment: Tensor, square: Tensor, change: Tensor, order: Tensor, turns: Tensor, *, side: int
) -> tuple[Tensor, Tensor]:
    """Return both moments in bases that have turned on one side, as they are elsewhere.

    The first moment is turned exactly; the second, whose diagonal alone is known, takes the order of the columns.

    Args:
        moment: m, shape (n, a, b); not modified.
        square: v, shape (n, a, b); not modified.
        change: ``P_new' P``, shape (n, a, a), or (n, b, b) for columns.
        order: of the new columns among the old, shape (n, a) or (n, b).
        turns: which have turned, bool, shape (n, 1, 1).
        side: 0 for rows, 1 for columns.
    """
    new = torch.bmm(change, moment) if side == 0 else torch.bmm(moment, change.mT)
    taken = square.gather(side + 1, (order[:, :, None] if side == 0 else order[:, None, :]).expand_as(square))
    return torch.where(turns, new, moment), torch.where(turns, taken, square)


@cache
def offsets(sides: tuple[tuple[int, int], ...], every: int) -> tuple[int, ...]:
    """Return for each stack when in `every` steps its turns begin, so that no step bears much more than another.

    Args:
        sides: number of bases in the stack, and their length.
        every: steps from one refresh of a basis to the next.
    """
    load: Counter[int] = Counter()
    chosen = [0] * len(sides)
    for index in sorted(range(len(sides)), key=lambda index: -sides[index][1]):
        count, length = sides[index]
        turns = Counter(-(-(row + 1) * every // count) - 1 for row in range(count if length else 0))
        # The sum of squares of what steps bear rises by twice this, and by the same for all offsets.
        best = min(range(min(every, OFFSETS)), key=lambda o: sum(load[(at - o) % every] * n for at, n in turns.items()))
        chosen[index] = best
        load.update({(at - best) % every: n * length**3 for at, n in turns.items()})
    return tuple(chosen)


def due(step: int, offset: int, count: int, every: int) -> slice:
    """Return which of `count` bases in a stack have their turn; each has one in `every` steps."""
    at = (step + offset) % every
    return slice(count * at // every, count * (at + 1) // every)
