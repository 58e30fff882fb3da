"""Moments, the diagonal Fisher and the step inside the box. Tensors only: no loss is known here.

Every function takes flat lists of real tensors that share one device, one dtype and one age, and comes twice: a
for-loop that reads like the formulas, and a ``_foreach`` form of the same operations in the same order, so that both
agree bit for bit on the CPU. Equation numbers are the steps of the published rule (arXiv 2410.02293):

.. code-block:: text

    1  m <- b1 m + (1-b1) g            v <- b2 v + (1-b2) g*g
    2  mh = m/(1-b1^t)                 vh = v/(1-b2^t)
    3  F = c vh,  c = 1 + sum(mh^2)/sum(vh+eps)          both sums over all parameters
    4  r = max(d F, sqrt(vh))
    5  u = d mh / (r + eps)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket, dots, gated, on_host, square_sum, stacked, wide_dtype

MOMENT = "m"
SQUARE = "v"

Unit: TypeAlias = Tensor | float | None

SMALLEST = torch.finfo(torch.float32).smallest_normal

# Zero where the second tensor is at or below a bound, the first tensor elsewhere. It has no branch; torch.where has one
# an entry, which on a CPU takes ten times as long where signs are random.
keep_above = torch.ops.aten.threshold_backward.grad_input


def update_moments(
    grads: list[Tensor], m: list[Tensor], v: list[Tensor], ok: Tensor | None, *, beta1: float, beta2: float
) -> None:
    """Step 1 where `ok`, nothing otherwise; the readable form.

    Args:
        grads: gradients; not read where `ok` is false, so they may hold nan.
        m: first moments (modified in place).
        v: second moments (modified in place).
        ok: 0-d bool on the tensors' device, so that the host need not know it; None where the host knows it is true.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
    """
    decay = gated(ok, beta2, 1.0)
    for grad, first, second in zip(grads, m, v, strict=True):
        toward, clean = (grad, grad) if ok is None else (torch.where(ok, grad, first), torch.where(ok, grad, 0.0))
        first.lerp_(toward, 1 - beta1)
        second.mul_(decay).addcmul_(clean, clean, value=1 - beta2)


def update_moments_foreach(
    grads: list[Tensor], m: list[Tensor], v: list[Tensor], ok: Tensor | None, *, beta1: float, beta2: float
) -> None:
    """:func:`update_moments` by multi-tensor operations (`m` and `v` modified in place)."""
    toward = grads if ok is None else [torch.where(ok, grad, first) for grad, first in zip(grads, m, strict=True)]
    clean = grads if ok is None else [torch.where(ok, grad, 0.0) for grad in grads]
    torch._foreach_lerp_(m, toward, 1 - beta1)
    torch._foreach_mul_(v, gated(ok, beta2, 1.0))
    torch._foreach_addcmul_(v, clean, clean, value=1 - beta2)


def representable(shift: float | Tensor) -> float | Tensor:
    """Return what is added to denominators, no less than a float32 can hold: beside 0, it must not vanish."""
    return shift.clamp_min(SMALLEST) if isinstance(shift, Tensor) else max(shift, SMALLEST)


def box_direction(
    m: list[Tensor],
    v: list[Tensor],
    scale: Tensor | None,
    ok: Tensor | None,
    *,
    radius: float,
    correction1: float,
    correction2: float,
    eps: float | Tensor,
) -> list[Tensor]:
    """Steps 2, 4 and 5: the minimiser of the diagonal model in the box of `radius`; the readable form.

    ``u_i = d mh_i / (max(d F_i, sqrt(vh_i)) + eps)``, which up to `eps` is the elementwise smaller of the
    natural-gradient step ``mh/F`` and the box bound ``d mh/sqrt(vh)``. Where only the box limits, ``sqrt(1-b2^t)`` is
    taken out of the root, which saves a pass over the tensors.

    Args:
        m: first moments, uncorrected.
        v: second moments, uncorrected.
        scale: c of step 3, 0-d; None leaves F out, so that only the box limits.
        ok: 0-d bool; where it is false the direction is zero. None for true.
        radius: d.
        correction1: ``1 - b1^t``.
        correction2: ``1 - b2^t``.
        eps: added to the denominator, a number or 0-d.

    Returns:
        The direction u for each tensor, newly allocated; the step is ``-lr u``.
    """
    root = 1.0 if scale is not None else correction2**0.5
    factor, shift, directions = gated(ok, radius * root / correction1, 0.0), representable(eps * root), []
    for first, second in zip(m, v, strict=True):
        if scale is None:
            denominator = second.sqrt()
        else:
            corrected = second / correction2
            denominator = torch.maximum(corrected.sqrt(), corrected.mul_(scale * radius))
        denominator.add_(shift)
        directions.append((first / denominator).mul_(factor))
    return directions


def box_direction_foreach(
    m: list[Tensor],
    v: list[Tensor],
    scale: Tensor | None,
    ok: Tensor | None,
    *,
    radius: float,
    correction1: float,
    correction2: float,
    eps: float | Tensor,
) -> list[Tensor]:
    """:func:`box_direction` by multi-tensor operations."""
    root = 1.0 if scale is not None else correction2**0.5
    if scale is None:
        denominators = torch._foreach_sqrt(v)
    else:
        corrected = torch._foreach_div(v, correction2)
        denominators = torch._foreach_sqrt(corrected)
        torch._foreach_mul_(corrected, scale * radius)
        torch._foreach_maximum_(denominators, corrected)
    # A 0-d tensor without `alpha` is taken for a number, which the host would wait for.
    torch._foreach_add_(denominators, representable(eps * root), **({"alpha": 1} if isinstance(eps, Tensor) else {}))
    directions = torch._foreach_div(m, denominators)
    torch._foreach_mul_(directions, gated(ok, radius * root / correction1, 0.0))
    return list(directions)


def drop_disagreement(directions: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Set to zero the coordinates on which a direction does not descend (arXiv 2411.16085; modified in place).

    Those whose gradient is nan stay.
    """
    for direction, grad in zip(directions, grads, strict=True):
        keep_above(direction, direction * grad, 0.0, grad_input=direction)


def box(bucket: Bucket, scale: Tensor | None, ok: Tensor | None, radius: float, unit: Unit) -> list[Tensor]:
    """Return :func:`box_direction` of the bucket's moments, in its form."""
    form = box_direction_foreach if bucket.many else box_direction
    return form(
        bucket.state[MOMENT],
        bucket.state[SQUARE],
        scale,
        ok,
        radius=radius,
        correction1=bucket.correction1,
        correction2=bucket.correction2,
        eps=bucket.eps if unit is None else unit * bucket.eps,
    )


class AbstractFisher(ABC):
    """What the optimizer asks of a Fisher estimate: coordinates, and a diagonal in them. It sees no loss."""

    # Whether it may be asked of parts of tensors, and of several in one.
    elementwise: ClassVar[bool] = False

    @abstractmethod
    def init(self, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the fresh state of one real parameter, in `dtype`; the same keys for every parameter."""

    @abstractmethod
    def update(self, bucket: Bucket, ok: Tensor | None) -> None:
        """Absorb the bucket's gradients where `ok`, None for true (step 1; the state is modified in place)."""

    @abstractmethod
    def square(self, bucket: Bucket) -> Tensor:
        """Return ``sum(vh)`` over the bucket, 0-d."""

    @abstractmethod
    def sums(self, bucket: Bucket) -> Tensor:
        """Return ``[sum(mh^2), sum(vh), eps n]`` over the bucket's n coordinates (the sums of step 3), shape (3,)."""

    @abstractmethod
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
        """Return u of step 5 for each parameter of the bucket, zero where not `ok`.

        Args:
            bucket: its moments are read.
            scale: c of step 3, 0-d; None leaves F out.
            ok: 0-d bool; None for true.
            radius: d.
            unit: what eps is a multiple of, a number or 0-d; None for 1.
            cautious: coordinates on which u does not descend along the bucket's gradients are zero.
        """

    @abstractmethod
    def model_reduction(self, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
        """Return ``sum(mh u) - 1/2 sum(vh u^2)`` over the bucket (step 10 without its lr), 0-d."""

    @abstractmethod
    def statistics(self, bucket: Bucket, scale: Tensor, radius: float) -> Tensor:
        """Return ``[min, max, sum, number of coordinates that F limits]`` of F over a non-empty bucket, shape (4,).

        F limits a coordinate where ``d F > sqrt(vh)`` (step 4): there the model binds, not the radius.
        """


@dataclass(frozen=True)
class DiagonalFisher(AbstractFisher):
    """The Fisher of the published rule: Adam's second moment, scaled by the size of the mean gradient (step 3).

    O(n) in memory and time. Keeps two tensors a parameter, ``m`` and ``v``. The gradient of a rejected step stays in
    them: it was a valid gradient of its batch. Does not see interactions between coordinates.
    """

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the fresh state of one real parameter, in `dtype`."""
        return {
            key: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format) for key in (MOMENT, SQUARE)
        }

    def update(self, bucket: Bucket, ok: Tensor | None) -> None:
        """Absorb the bucket's gradients where `ok` (step 1; the state is modified in place)."""
        form = update_moments_foreach if bucket.many else update_moments
        form(bucket.grads, bucket.state[MOMENT], bucket.state[SQUARE], ok, beta1=bucket.beta1, beta2=bucket.beta2)

    def sums(self, bucket: Bucket) -> Tensor:
        """Return ``[sum(mh^2), sum(vh), eps n]`` over the bucket's n coordinates (the sums of step 3), shape (3,)."""
        moment = square_sum(bucket.state[MOMENT], foreach=bucket.foreach) / bucket.correction1**2
        square = self.square(bucket)
        return torch.stack((moment, square, torch.full_like(square, bucket.eps * bucket.numel)))

    def square(self, bucket: Bucket) -> Tensor:
        """Return ``sum(vh)`` over the bucket, 0-d."""
        seconds = bucket.state[SQUARE]
        if on_host(bucket.device) or not bucket.many:
            parts = [second.sum() for second in seconds]
        else:  # one operation for all, which on a CPU would take ten times as long
            parts = list(torch._foreach_norm(seconds, 1))
        return stacked(parts).to(wide_dtype(bucket.device)).sum() / bucket.correction2

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
        """Return u of step 5 for each parameter of the bucket, zero where not `ok`."""
        directions = box(bucket, scale, ok, radius, unit)
        if cautious:
            drop_disagreement(directions, bucket.grads)
        return directions

    def model_reduction(self, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
        """Return ``sum(mh u) - 1/2 sum(vh u^2)`` over the bucket (step 10 without its lr), 0-d."""
        linear = dots(bucket.state[MOMENT], directions) / bucket.correction1
        quadratic = dots(bucket.state[SQUARE], [u * u for u in directions]) / bucket.correction2
        return linear - quadratic / 2

    def statistics(self, bucket: Bucket, scale: Tensor, radius: float) -> Tensor:
        """Return least, largest and sum of F, and on how many coordinates it limits the step, shape (4,)."""
        wide, rows = wide_dtype(bucket.device), []
        for second in bucket.state[SQUARE]:
            if second.numel():
                corrected = second / bucket.correction2
                fisher = corrected * scale
                active = (fisher * radius > corrected.sqrt()).sum()
                rows.append(torch.stack([x.to(wide) for x in (fisher.min(), fisher.max(), fisher.sum(), active)]))
        table = torch.stack(rows)
        return torch.stack((table[:, 0].min(), table[:, 1].max(), table[:, 2].sum(), table[:, 3].sum()))
