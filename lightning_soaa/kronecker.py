"""KroneckerFisher: a diagonal Fisher in coordinates that the gradients' own correlations choose.

A gradient G is seen as a matrix of shape (a, b): first dimension by all others. Two factors are kept, and of each an
orthonormal basis of eigenvectors; the moments are those of the gradient in those bases:

.. code-block:: text

    m <- b1 m + (1-b1) P' G Q            v <- b2 v + (1-b2) (P' G Q)^2     step 1
    u = P box(m, v) Q'                                                     steps 2 to 5 in the bases, and back
    L <- bf L + (1-bf) G G'              R <- bf R + (1-bf) G' G           L = P diag P',  R = Q diag Q'

The bases are those of arXiv 2409.11321; Fisher, box and trust region are SOAA's. When a basis turns, which it does once
a step is over, the first moment is turned with it, and the second takes the order of the new columns.

Parameters of one shape are worked on as one stack, see :mod:`lightning_soaa._frames`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from lightning_soaa._bases import (
    due,
    first_bases,
    offsets,
    refreshed,
    rotate,
    rotated_sides,
    turn_moments,
)
from lightning_soaa._bucket import Bucket, Pace, divide
from lightning_soaa._checks import check_between, check_count, refuse_sharded
from lightning_soaa._dist import is_sharded
from lightning_soaa._estimate import MOMENT, SQUARE, AbstractFisher, Slopes, Unit
from lightning_soaa._frames import AGE, SIDES, Frame, framed, in_bases, parts, some_of, sorted_by_shape, stack
from lightning_soaa._moments import drop_disagreement, drop_unmarked
from lightning_soaa._sums import dots, gated
from lightning_soaa.fisher import DiagonalFisher, box

DIAGONAL = DiagonalFisher()

P = ParamSpec("P")
T = TypeVar("T")


def without_autocast(method: Callable[Concatenate[Any, Bucket, P], T]) -> Callable[Concatenate[Any, Bucket, P], T]:
    """Return a method of a bucket that multiplies matrices in their own dtype, whatever the caller's autocast says."""

    @wraps(method)
    def precise(self: Any, bucket: Bucket, *args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_autocast_enabled(bucket.device.type):
            return method(self, bucket, *args, **kwargs)
        with torch.autocast(bucket.device.type, enabled=False):
            return method(self, bucket, *args, **kwargs)

    return cast("Callable[Concatenate[Any, Bucket, P], T]", precise)


@dataclass(frozen=True)
class KroneckerFisher(AbstractFisher):
    """A diagonal Fisher in the Kronecker eigenbasis of the gradients (arXiv 2409.11321).

    It sees interactions between the rows and between the columns of a parameter, which a diagonal misses. Convolutions
    count as matrices of output channels by all else; vectors, scalars and sides longer than `max_dim` are not rotated.

    The first gradient of a rotated parameter makes its bases, from that gradient alone; it is absorbed, but the
    parameter does not move. (If that gradient is left out, bases turn from the parameter's own coordinates.) Later a
    basis takes one step of orthogonal iteration every `refresh_every` steps, some of them on each step, so that none
    bears the cost of all. A coordinate moves no further than the radius, also while its second moment is still that of
    the basis before. A basis whose decomposition fails stays as it is until its next turn.

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

    @property
    def rotates(self) -> bool:
        """Return that it has coordinates of its own."""
        return True

    def init(self, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the fresh state of one real parameter, in `dtype`.

        Raises:
            ValueError: the parameter is sharded.
        """
        if is_sharded(param):
            refuse_sharded(self)
        state, sides = DIAGONAL.init(param, dtype), rotated_sides(param.shape, self.max_dim)
        for (factor, basis), size in zip(SIDES, sides, strict=True):
            state[factor] = torch.zeros(size, size, dtype=dtype, device=param.device)
            state[basis] = torch.eye(size, dtype=dtype, device=param.device)
        state[AGE] = torch.zeros(2 if any(sides) else 0, dtype=dtype, device=param.device)
        return state

    def rotated(self, param: Tensor) -> bool:
        """Return whether a parameter has a side that is rotated."""
        return any(rotated_sides((torch.view_as_real(param) if param.is_complex() else param).shape, self.max_dim))

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        """Return how many bytes the state of `params` will take, without making it."""
        total = 0
        for param in params:
            real = torch.view_as_real(param) if param.is_complex() else param
            sides = rotated_sides(real.shape, self.max_dim)
            entries = 2 * real.numel() + sum(2 * a * a for a in sides) + (2 if any(sides) else 0)
            total += max(4, real.element_size()) * entries
        return total

    def lay_out(self, states: Sequence[dict[str, Any]]) -> None:
        """Stack the frames of rotated parameters of one shape, their moments behind each other, and lay out all others.

        (`states` modified.)
        """
        stack([each for each in states if each[AGE].numel()])
        others = [each for each in states if not each[AGE].numel()]
        rest = [{key: each[key] for key in (MOMENT, SQUARE)} for each in others]
        DIAGONAL.lay_out(rest)
        for each, moved in zip(others, rest, strict=True):
            each.update(moved)

    def blocks(self, bucket: Bucket, *, whole: bool = False) -> list[Bucket]:
        """Return the rotated parameters, sorted by shape, in flat parts, and others as DiagonalFisher is given them."""
        rotated, rest = sorted_by_shape(bucket)
        blocks = [framed(bucket, stacks) for stacks in parts(rotated, bucket)]
        frames = [frame for block in blocks for frame in block.frames]
        sides = tuple((frame.shape[0], frame.state[key].shape[1]) for frame in frames for key, _ in SIDES)
        phases = iter(offsets(sides, self.refresh_every))
        for frame in frames:
            frame.phases = (next(phases), next(phases))
        if rest:
            params, grads, state = some_of(bucket, rest, (MOMENT, SQUARE))
            owners = [bucket.owners[row] for row in rest]
            blocks += divide(bucket.but(owners=owners, params=params, grads=grads, state=state))
        for index, block in enumerate(blocks):
            block.coordinates = 0 if index else bucket.coordinates
        return blocks

    @without_autocast
    def update(self, bucket: Bucket, ok: Tensor | None) -> None:
        """Absorb gradients where `ok` (the moments are modified in place)."""
        DIAGONAL.update(self._inside(bucket), ok)

    @without_autocast
    def advance(self, bucket: Bucket, ok: Tensor | None, radius: float, unit: Unit, *, cautious: bool) -> list[Tensor]:
        """Do :meth:`update` and return :meth:`direction` without a scale."""
        return self._back(bucket, DIAGONAL.advance(self._inside(bucket), ok, radius, unit, cautious=cautious), radius)

    def _inside(self, bucket: Bucket) -> Bucket:
        """Return the bucket with its gradients in the bases."""
        if not bucket.frames:
            return bucket
        if not bucket.rotated:
            bucket.rotated.append(in_bases(bucket, bucket.grads[0]))
        return bucket.but(grads=bucket.rotated)

    def strides(self, bucket: Bucket, unit: Unit, pace: Pace) -> bool:
        """Return whether :meth:`stride` takes such a step, as DiagonalFisher's does; a subclass may do other things."""
        return type(self) is KroneckerFisher and not bucket.frames and DIAGONAL.strides(bucket, unit, pace)

    def stride(
        self, bucket: Bucket, ok: Tensor | None, radius: float, unit: Unit, pace: Pace
    ) -> tuple[Tensor, list[Slopes]]:
        """Do as DiagonalFisher does with what is not rotated."""
        return DIAGONAL.stride(bucket, ok, radius, unit, pace)

    @without_autocast
    def turn(self, bucket: Bucket, ok: Tensor | None) -> None:
        """Let the factors absorb the gradients where `ok`, and refresh the bases whose turn it is."""
        for frame in bucket.frames:
            grads = frame.of(bucket.grads[0])
            grads = grads if ok is None else torch.where(ok, grads, 0.0)
            self._absorb(frame, grads, ok, first=bucket.step == 1)
            if bucket.step == 1:
                self._begin(bucket, frame, grads, ok)
            else:
                for side in (0, 1):
                    self._refresh(bucket, frame, ok, side)
            frame.store()
        if bucket.frames:
            bucket.store()

    def _absorb(self, frame: Frame, grads: Tensor, ok: Tensor | None, *, first: bool) -> None:
        """Let the factors absorb gradients, zero where not `ok`, and age the bases."""
        factors = [frame.state[key] for key, _ in SIDES]
        sides = [side for side, factor in enumerate(factors) if factor.numel()]
        ages = frame.state[AGE]
        (ages if len(sides) > 1 else ages[:, sides[0]]).add_(gated(ok, 1.0, 0.0))
        for side in sides:
            rows = grads if side == 0 else grads.mT
            keep, add = (0.0, 1.0) if first else (self.decay, 1 - self.decay)
            if ok is not None:
                factors[side].mul_(gated(ok, keep, 1.0))
                keep = 1.0
            factors[side].baddbmm_(rows, rows.mT, beta=keep, alpha=add)

    def _begin(self, bucket: Bucket, frame: Frame, grads: Tensor, ok: Tensor | None) -> None:
        """Make the bases of a stack whose factors hold their first gradient, and set the moments anew in them."""
        for factor, basis in SIDES:
            if frame.state[factor].numel():
                old = frame.state[basis]
                new = first_bases(frame.state[factor], old)
                old.copy_(new if ok is None else torch.where(ok, new, old))
        frame.state[AGE].zero_()
        rotated = rotate(grads, *frame.bases)  # in the bases that are kept
        frame.of(bucket.state[MOMENT][0]).copy_(rotated).mul_(1 - bucket.beta1)
        frame.of(bucket.state[SQUARE][0]).copy_(rotated).square_().mul_(1 - bucket.beta2)

    def _refresh(self, bucket: Bucket, frame: Frame, ok: Tensor | None, side: int) -> None:
        """Turn those bases of one side of a stack that have their turn, and the moments with them."""
        factor, basis = (frame.state[key] for key in SIDES[side])
        rows = due(bucket.step, frame.phases[side], len(basis), self.refresh_every)
        if rows.start == rows.stop or not basis.numel():
            return
        old = basis[rows]
        new, order, turns = refreshed(factor[rows], old)
        turns = turns if ok is None else turns & ok
        moment, square = (frame.of(bucket.state[key][0])[rows] for key in (MOMENT, SQUARE))
        turned = turn_moments(moment, square, torch.bmm(new.mT, old), order, turns, side=side)
        age = frame.state[AGE][rows, side]
        for kept, value in ((moment, turned[0]), (square, turned[1]), (old, torch.where(turns, new, old))):
            kept.copy_(value)
        age.copy_(torch.where(turns.flatten(), 0.0, age))

    def rotation(self, bucket: Bucket) -> tuple[int, list[Tensor]]:
        """Return how many coordinates of the bucket are rotated, and steps since each of their bases was refreshed."""
        ages = [age for age in bucket.state[AGE] if age.numel()]
        rows = zip(bucket.params, bucket.state[AGE], strict=True)
        return sum(param.numel() for param, age in rows if age.numel()), ages

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
        marked: bool = False,
    ) -> list[Tensor]:
        """Return u of step 5 for each parameter of the bucket, zero where not `ok`; found in the bases, turned back."""
        directions = box(bucket, scale, ok, radius, unit)
        if cautious:
            drop_disagreement(directions, self._inside(bucket).grads)
        if marked:
            drop_unmarked(directions, bucket.state[SQUARE])
        return self._back(bucket, directions, radius)

    @without_autocast
    def mark(self, bucket: Bucket) -> None:
        """Keep which coordinates, in the bases, moved in a check, in the lowest bit of the second moment."""
        DIAGONAL.mark(self._inside(bucket))

    def _back(self, bucket: Bucket, directions: list[Tensor], radius: float) -> list[Tensor]:
        """Return directions in the parameters' own coordinates, bounded in the bases; none before the second step."""
        if not bucket.frames:
            return directions
        if bucket.step == 1:
            return [direction.zero_() for direction in directions]
        return [in_bases(bucket, u.clamp_(-radius, radius), back=True) for u in directions]

    @without_autocast
    def model_reduction(self, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
        """Return ``sum(mh u) - 1/2 sum(vh u^2)`` over the bucket in the bases, 0-d."""
        if bucket.frames:
            directions = [in_bases(bucket, u) for u in directions]
        linear = dots(bucket.state[MOMENT], directions) / bucket.correction1
        return linear - dots(bucket.state[SQUARE], [u * u for u in directions]) / bucket.correction2 / 2

    def statistics(self, bucket: Bucket, scale: Tensor, radius: float) -> Tensor:
        """Return least, largest and sum of F, and on how many coordinates it limits the step, shape (4,)."""
        return DIAGONAL.statistics(bucket, scale, radius)
