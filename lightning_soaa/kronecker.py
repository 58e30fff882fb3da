"""KroneckerFisher: a diagonal Fisher in coordinates that the gradients' own correlations choose.

A gradient G is seen as a matrix of shape (a, b): first dimension by all others. Two factors are kept, and of each an
orthonormal basis of eigenvectors; the second moment is that of the gradient in those bases:

.. code-block:: text

    L <- bf L + (1-bf) G G'              R <- bf R + (1-bf) G' G           L = P diag P',  R = Q diag Q'
    m <- b1 m + (1-b1) P' G Q            v <- b2 v + (1-b2) (P' G Q)^2     step 1
    u = P box(m, v) Q'                                                     steps 2 to 5 in the bases, and back

The bases are those of arXiv 2409.11321; Fisher, box and trust region are SOAA's. When a basis turns, the first moment
is turned with it, and the second takes the order of the new columns.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from math import prod
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket
from lightning_soaa._checks import check_between, check_count
from lightning_soaa._dist import is_sharded
from lightning_soaa._moments import drop_disagreement
from lightning_soaa._sums import dots, gated
from lightning_soaa.fisher import (
    MOMENT,
    SQUARE,
    AbstractFisher,
    DiagonalFisher,
    Unit,
    box,
)

LEFT, RIGHT, LEFT_BASIS, RIGHT_BASIS = "left", "right", "left_basis", "right_basis"
SIDES = ((LEFT, LEFT_BASIS), (RIGHT, RIGHT_BASIS))
# Added to a factor of trace 1: directions without any gradient keep the basis that they have.
RIDGE = 1e-6

DIAGONAL = DiagonalFisher()

P = ParamSpec("P")
T = TypeVar("T")


def rotated_sides(shape: Sequence[int], max_dim: int) -> tuple[int, int]:
    """Return the lengths of a parameter's two sides, 0 for one that is not rotated.

    Vectors and scalars, sides longer than `max_dim` and sides of length 1 are not.
    """
    if len(shape) < 2:
        return 0, 0
    rows, columns = shape[0], prod(shape[1:])
    return (rows if 1 < rows <= max_dim else 0), (columns if 1 < columns <= max_dim else 0)


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor of two dimensions or more as a matrix, first dimension by all others."""
    return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:]))


def rotate(tensor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``P' X Q`` in the shape of X; where a basis has no entries its side stays as it is."""
    if not (left.numel() or right.numel()):
        return tensor
    matrix = as_matrix(tensor)
    matrix = left.T @ matrix if left.numel() else matrix
    matrix = matrix @ right if right.numel() else matrix
    return matrix.reshape(tensor.shape)


def rotate_back(tensor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``P X Q'``, which undoes :func:`rotate`."""
    return rotate(tensor, left.T, right.T)


def unit_factor(factor: Tensor) -> Tensor:
    """Return `factor` with trace 1 and a ridge, so that no product of it is too small for its dtype."""
    unit = factor / factor.trace().clamp_min(torch.finfo(factor.dtype).tiny)
    unit.diagonal().add_(RIDGE)
    return unit


def first_basis(factor: Tensor) -> Tensor:
    """Return the eigenvectors of a factor, the one of the largest eigenvalue first; shape (a, a)."""
    vectors: Tensor = torch.linalg.eigh(unit_factor(factor))[1]
    return vectors.flip(1)


def refreshed(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the basis after a step of orthogonal iteration, and the order in which it takes the old columns.

    The columns with the largest share of the factor come first. A result that is not finite is the basis as it was.

    Args:
        factor: shape (a, a), symmetric; not modified.
        basis: shape (a, a), orthonormal columns; not modified.
    """
    turned = unit_factor(factor) @ basis
    order = (basis * turned).sum(0).argsort(descending=True, stable=True)
    new = torch.linalg.qr(turned[:, order])[0]
    good = new.isfinite().all()
    return torch.where(good, new, basis), torch.where(good, order, torch.arange(len(order), device=order.device))


def refresh(state: dict[str, Tensor], side: int, ok: Tensor | None) -> None:
    """Turn one basis of a parameter, and both moments with it, where `ok` and where the result is finite.

    Args:
        state: the parameter's, modified in place.
        side: 0 for rows, 1 for columns.
        ok: 0-d bool; None for true.
    """
    factor, basis = SIDES[side]
    turned, order = refreshed(state[factor], state[basis])
    turns = (turned != state[basis]).any()
    turns = turns if ok is None else turns & ok
    change = turned.T @ state[basis]
    moment, square = (as_matrix(state[key]) for key in (MOMENT, SQUARE))
    moment = change @ moment if side == 0 else moment @ change.T
    for key, new in ((basis, turned), (MOMENT, moment), (SQUARE, square.index_select(side, order))):
        state[key].copy_(torch.where(turns, new.reshape(state[key].shape), state[key]))


def without_autocast(method: Callable[Concatenate[Any, Bucket, P], T]) -> Callable[Concatenate[Any, Bucket, P], T]:
    """Return a method of a bucket that multiplies matrices in their own dtype, whatever the caller's autocast says."""

    @wraps(method)
    def precise(self: Any, bucket: Bucket, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.autocast(bucket.device.type, enabled=False):
            return method(self, bucket, *args, **kwargs)

    return cast("Callable[Concatenate[Any, Bucket, P], T]", precise)


@dataclass(frozen=True)
class KroneckerFisher(AbstractFisher):
    """A diagonal Fisher in the Kronecker eigenbasis of the gradients (arXiv 2409.11321).

    It sees interactions between the rows and between the columns of a parameter, which a diagonal misses. Convolutions
    count as matrices of output channels by all else; vectors, scalars and sides longer than `max_dim` are not rotated.

    At the first gradient of a rotated parameter its bases are made, from that gradient alone; it is absorbed, but the
    parameter does not move. (If that gradient is left out, bases turn from the parameter's own coordinates.) Later a
    basis takes one step of orthogonal iteration every `refresh_every` steps, one parameter after the other, so that no
    step bears the cost of all. A coordinate moves no further than the radius, also while its second moment is still
    that of the basis before.

    Args:
        max_dim: longest side that is rotated, >= 1 (default: 256).
        refresh_every: steps from one refresh of a basis to the next, >= 1 (default: 10).
        decay: bf, the decay of the factors, in (0, 1) (default: 0.95).

    Keeps ``m`` and ``v`` as DiagonalFisher does and, for each rotated side of length a, two matrices of shape (a, a):
    see :meth:`state_bytes`. Does not support sharded parameters.
    """

    max_dim: int = 256
    refresh_every: int = 10
    decay: float = 0.95

    def __post_init__(self) -> None:
        for name in ("max_dim", "refresh_every"):
            check_count("KroneckerFisher", name, getattr(self, name))
        check_between("KroneckerFisher", "decay", self.decay, 0, 1, "in (0, 1)")

    def init(self, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the fresh state of one real parameter, in `dtype`.

        Raises:
            ValueError: the parameter is sharded.
        """
        if is_sharded(param):
            raise ValueError(
                "SOAA: `fisher` must be DiagonalFisher() where parameters are sharded, got KroneckerFisher; leave it "
                "out, or train with DDP"
            )
        state = DIAGONAL.init(param, dtype)
        for (factor, basis), size in zip(SIDES, rotated_sides(param.shape, self.max_dim), strict=True):
            state[factor] = torch.zeros(size, size, dtype=dtype, device=param.device)
            state[basis] = torch.eye(size, dtype=dtype, device=param.device)
        return state

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        """Return how many bytes the state of `params` will take, without making it."""
        total = 0
        for param in params:
            real = torch.view_as_real(param) if param.is_complex() else param
            width = max(4, real.element_size())
            total += width * (2 * real.numel() + sum(2 * a * a for a in rotated_sides(real.shape, self.max_dim)))
        return total

    @without_autocast
    def update(self, bucket: Bucket, ok: Tensor | None) -> None:
        """Absorb gradients where `ok`, and refresh the bases whose turn it is (the state is modified in place)."""
        self._rotate(bucket, ok)
        DIAGONAL.update(replace(bucket, grads=bucket.rotated), ok)

    @without_autocast
    def advance(self, bucket: Bucket, ok: Tensor | None, radius: float, unit: Unit, *, cautious: bool) -> list[Tensor]:
        """Do :meth:`update` and return :meth:`direction` without a scale."""
        self._rotate(bucket, ok)
        inside = replace(bucket, grads=bucket.rotated)
        return self._back(bucket, DIAGONAL.advance(inside, ok, radius, unit, cautious=cautious), radius)

    def _rotate(self, bucket: Bucket, ok: Tensor | None) -> None:
        """Refresh the bases whose turn it is and set the bucket's gradients in them, zero where not `ok`."""
        bucket.rotated = []
        for index, grad in enumerate(bucket.grads):
            state = {key: tensors[index] for key, tensors in bucket.state.items()}
            clean = grad if ok is None else torch.where(ok, grad, 0.0)
            self._turn(state, clean, ok, first=bucket.step == 1, due=(bucket.step + index) % self.refresh_every == 0)
            bucket.rotated.append(rotate(clean, state[LEFT_BASIS], state[RIGHT_BASIS]))

    def _turn(self, state: dict[str, Tensor], clean: Tensor, ok: Tensor | None, *, first: bool, due: bool) -> None:
        """Let the factors absorb a gradient, zero where not `ok`, and turn the bases (`state` modified in place)."""
        matrix = as_matrix(clean) if clean.ndim > 1 else clean
        for side, (factor, basis) in enumerate(SIDES):
            if not state[factor].numel():
                continue
            rows = matrix if side == 0 else matrix.T
            state[factor].mul_(gated(ok, 0.0 if first else self.decay, 1.0))
            state[factor].addmm_(rows, rows.T, alpha=1.0 if first else 1 - self.decay)
            if first:
                new = first_basis(state[factor])
                state[basis].copy_(new if ok is None else torch.where(ok, new, state[basis]))
            elif due:
                refresh(state, side, ok)

    def square(self, bucket: Bucket) -> Tensor:
        """Return ``sum(vh)`` over the bucket, 0-d."""
        return DIAGONAL.square(bucket)

    def sums(self, bucket: Bucket) -> Tensor:
        """Return ``[sum(mh^2), sum(vh), eps n]``, shape (3,); the first is the same in all bases."""
        return DIAGONAL.sums(bucket)

    @without_autocast
    def direction(
        self,
        bucket: Bucket,
        scale: Tensor | None,
        ok: Tensor | None,
        radius: float,
        unit: Unit = None,
        *,
        cautious: bool = False,
    ) -> list[Tensor]:
        """Return u of step 5 for each parameter of the bucket, zero where not `ok`; found in the bases, turned back."""
        directions = box(bucket, scale, ok, radius, unit)
        if cautious:
            drop_disagreement(directions, bucket.rotated)
        return self._back(bucket, directions, radius)

    def _back(self, bucket: Bucket, directions: list[Tensor], radius: float) -> list[Tensor]:
        """Return directions in the parameters' own coordinates, bounded in the bases; none before the second step."""
        for index, pair in enumerate(self._bases(bucket)):
            if any(basis.numel() for basis in pair):
                bounded = directions[index].clamp_(-radius, radius) if bucket.step > 1 else directions[index].zero_()
                directions[index] = rotate_back(bounded, *pair)
        return directions

    def model_reduction(self, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
        """Return ``sum(mh u) - 1/2 sum(vh u^2)`` over the bucket in the bases, 0-d."""
        rotated = [rotate(u, *pair) for u, pair in zip(directions, self._bases(bucket), strict=True)]
        linear = dots(bucket.state[MOMENT], rotated) / bucket.correction1
        return linear - dots(bucket.state[SQUARE], [u * u for u in rotated]) / bucket.correction2 / 2

    def statistics(self, bucket: Bucket, scale: Tensor, radius: float) -> Tensor:
        """Return least, largest and sum of F, and on how many coordinates it limits the step, shape (4,)."""
        return DIAGONAL.statistics(bucket, scale, radius)

    @staticmethod
    def _bases(bucket: Bucket) -> list[tuple[Tensor, Tensor]]:
        """Return the two bases of each parameter of the bucket."""
        return list(zip(bucket.state[LEFT_BASIS], bucket.state[RIGHT_BASIS], strict=True))
