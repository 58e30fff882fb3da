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

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket, dots, gated, norms, square_sum, wide_dtype

MOMENT = "m"
SQUARE = "v"


def update_moments(
    grads: list[Tensor], m: list[Tensor], v: list[Tensor], ok: Tensor, *, beta1: float, beta2: float
) -> None:
    """Step 1 where `ok`, nothing otherwise; the readable form.

    Args:
        grads: gradients; not read where `ok` is false, so they may hold nan.
        m: first moments (modified in place).
        v: second moments (modified in place).
        ok: 0-d bool on the tensors' device, so that the host need not know it.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
    """
    decay1, decay2 = gated(ok, beta1, 1.0), gated(ok, beta2, 1.0)
    for grad, first, second in zip(grads, m, v, strict=True):
        clean = torch.where(ok, grad, 0.0)
        first.mul_(decay1).add_(clean, alpha=1 - beta1)
        second.mul_(decay2).addcmul_(clean, clean, value=1 - beta2)


def update_moments_foreach(
    grads: list[Tensor], m: list[Tensor], v: list[Tensor], ok: Tensor, *, beta1: float, beta2: float
) -> None:
    """:func:`update_moments` by multi-tensor operations (`m` and `v` modified in place)."""
    clean = [torch.where(ok, grad, 0.0) for grad in grads]
    torch._foreach_mul_(m, gated(ok, beta1, 1.0))
    torch._foreach_add_(m, clean, alpha=1 - beta1)
    torch._foreach_mul_(v, gated(ok, beta2, 1.0))
    torch._foreach_addcmul_(v, clean, clean, value=1 - beta2)


def box_direction(
    m: list[Tensor],
    v: list[Tensor],
    scale: Tensor | None,
    ok: Tensor,
    *,
    radius: float,
    correction1: float,
    correction2: float,
    eps: float,
    gain: Tensor | None = None,
) -> list[Tensor]:
    """Steps 2, 4 and 5: the minimiser of the diagonal model in the box of `radius`; the readable form.

    ``u_i = d mh_i / (max(d F_i, sqrt(vh_i)) + eps)``, which up to `eps` is the elementwise smaller of the
    natural-gradient step ``mh/F`` and the box bound ``d mh/sqrt(vh)``.

    Args:
        m: first moments, uncorrected.
        v: second moments, uncorrected.
        scale: c of step 3, 0-d; None leaves F out, so that only the box limits.
        ok: 0-d bool; where it is false the direction is zero.
        radius: d.
        correction1: ``1 - b1^t``.
        correction2: ``1 - b2^t``.
        eps: added to the denominator.
        gain: what gradients are multiplied by, 0-d, which changes the unit of eps; None for 1.

    Returns:
        The direction u for each tensor, newly allocated; the step is ``-lr u``.
    """
    factor = gated(ok, radius / correction1, 0.0)
    factor = factor if gain is None else factor * gain
    directions = []
    for first, second in zip(m, v, strict=True):
        corrected = second / correction2 if gain is None else second * (gain.square() / correction2)
        denominator = corrected.sqrt()
        if scale is not None:
            denominator = torch.maximum(corrected.mul_(scale * radius), denominator)
        denominator.add_(eps)
        directions.append((first / denominator).mul_(factor))
    return directions


def box_direction_foreach(
    m: list[Tensor],
    v: list[Tensor],
    scale: Tensor | None,
    ok: Tensor,
    *,
    radius: float,
    correction1: float,
    correction2: float,
    eps: float,
    gain: Tensor | None = None,
) -> list[Tensor]:
    """:func:`box_direction` by multi-tensor operations."""
    factor = gated(ok, radius / correction1, 0.0)
    if gain is None:
        corrected = torch._foreach_div(v, correction2)
    else:
        corrected, factor = torch._foreach_mul(v, gain.square() / correction2), factor * gain
    denominators = torch._foreach_sqrt(corrected)
    if scale is not None:
        torch._foreach_mul_(corrected, scale * radius)
        torch._foreach_maximum_(denominators, corrected)
    torch._foreach_add_(denominators, eps)
    directions = torch._foreach_div(m, denominators)
    torch._foreach_mul_(directions, factor)
    return list(directions)


def drop_disagreement(directions: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Set to zero the coordinates on which a direction does not descend (arXiv 2411.16085; modified in place)."""
    for direction, grad in zip(directions, grads, strict=True):
        direction.mul_(direction * grad > 0)


class AbstractFisher(ABC):
    """What the optimizer asks of a Fisher estimate: coordinates, and a diagonal in them. It sees no loss."""

    @abstractmethod
    def init(self, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the fresh state of one real parameter, in `dtype`; the same keys for every parameter."""

    @abstractmethod
    def update(self, bucket: Bucket, ok: Tensor) -> None:
        """Absorb the bucket's gradients where `ok` (step 1; the state is modified in place)."""

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
        ok: Tensor,
        radius: float,
        gain: Tensor | None = None,
        *,
        cautious: bool = False,
    ) -> list[Tensor]:
        """Return u of step 5 for each parameter of the bucket, zero where not `ok`.

        Args:
            bucket: its moments are read.
            scale: c of step 3, 0-d; None leaves F out.
            ok: 0-d bool.
            radius: d.
            gain: what gradients are multiplied by before eps is added, 0-d; None for 1.
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

    def init(self, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the fresh state of one real parameter, in `dtype`."""
        return {
            key: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format) for key in (MOMENT, SQUARE)
        }

    def update(self, bucket: Bucket, ok: Tensor) -> None:
        """Absorb the bucket's gradients where `ok` (step 1; the state is modified in place)."""
        form = update_moments_foreach if bucket.foreach else update_moments
        form(bucket.grads, bucket.state[MOMENT], bucket.state[SQUARE], ok, beta1=bucket.beta1, beta2=bucket.beta2)

    def sums(self, bucket: Bucket) -> Tensor:
        """Return ``[sum(mh^2), sum(vh), eps n]`` over the bucket's n coordinates (the sums of step 3), shape (3,)."""
        moment = square_sum(bucket.state[MOMENT], foreach=bucket.foreach) / bucket.correction1**2
        square = self.square(bucket)
        return torch.stack((moment, square, torch.full_like(square, bucket.eps * bucket.numel)))

    def square(self, bucket: Bucket) -> Tensor:
        """Return ``sum(vh)`` over the bucket, 0-d."""
        return norms(bucket.state[SQUARE], 1, foreach=bucket.foreach).sum() / bucket.correction2

    def direction(
        self,
        bucket: Bucket,
        scale: Tensor | None,
        ok: Tensor,
        radius: float,
        gain: Tensor | None = None,
        *,
        cautious: bool = False,
    ) -> list[Tensor]:
        """Return u of step 5 for each parameter of the bucket, zero where not `ok`."""
        form = box_direction_foreach if bucket.foreach else box_direction
        directions = form(
            bucket.state[MOMENT],
            bucket.state[SQUARE],
            scale,
            ok,
            radius=radius,
            correction1=bucket.correction1,
            correction2=bucket.correction2,
            eps=bucket.eps,
            gain=gain,
        )
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
