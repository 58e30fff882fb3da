"""The diagonal Fisher. Tensors only: no loss is known here.

The functions are in :mod:`lightning_soaa._moments`, with the formulas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_soaa._bucket import Bucket, Pace, block_size
from lightning_soaa._estimate import MOMENT, SQUARE, AbstractFisher, Slopes, Unit
from lightning_soaa._memory import unflatten
from lightning_soaa._moments import (
    advance_fused,
    box_direction,
    box_direction_foreach,
    drop_disagreement,
    drop_unmarked,
    mark_moved,
    move,
    update_moments,
    update_moments_foreach,
)
from lightning_soaa._stride import compiled_stride, stride_numbers
from lightning_soaa._sums import dots, on_host, square_sum, stacked, summed_squares, wide_dtype


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


@dataclass(frozen=True)
class DiagonalFisher(AbstractFisher):
    """The Fisher of the published rule: Adam's second moment, scaled by the size of the mean gradient (step 3).

    O(n) in memory and time. Keeps two tensors a parameter, ``m`` and ``v``. The gradient of a rejected step stays in
    them: it was a valid gradient of its batch. Does not see interactions between coordinates.
    """

    elementwise: ClassVar[bool] = True

    @property
    def compiles(self) -> bool:
        """Return whether it has a compiled step; a subclass may do other things on the way."""
        return type(self) is DiagonalFisher

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
        marked: bool = False,
    ) -> list[Tensor]:
        """Return u of step 5 for each parameter of the bucket, zero where not `ok`."""
        directions = box(bucket, scale, ok, radius, unit)
        if cautious:
            drop_disagreement(directions, bucket.grads)
        if marked:
            drop_unmarked(directions, bucket.state[SQUARE])
        return directions

    def mark(self, bucket: Bucket) -> None:
        """Keep which coordinates moved in a check, in the lowest bit of the second moment (modified in place)."""
        mark_moved(bucket.state[MOMENT], bucket.state[SQUARE], bucket.grads)

    def advance(self, bucket: Bucket, ok: Tensor | None, radius: float, unit: Unit, *, cautious: bool) -> list[Tensor]:
        """Do :meth:`update` and return :meth:`direction` without a scale, by the fused kernel where there is one."""
        m, v = bucket.state[MOMENT], bucket.state[SQUARE]
        fused = bucket.fused and all(x.is_contiguous() for x in (*bucket.grads, *m, *v))
        # A subclass may do other things on the way. The kernel takes eps as a number.
        if not fused or type(self) is not DiagonalFisher or isinstance(unit, Tensor):
            return super().advance(bucket, ok, radius, unit, cautious=cautious)
        directions = advance_fused(
            bucket.grads,
            m,
            v,
            ok,
            radius=radius,
            step=bucket.step,
            beta1=bucket.beta1,
            beta2=bucket.beta2,
            eps=bucket.eps if unit is None else unit * bucket.eps,
        )
        if cautious:
            drop_disagreement(directions, bucket.grads)
        return directions

    def strides(self, bucket: Bucket, unit: Unit, pace: Pace) -> bool:
        """Return whether :meth:`stride` takes such a step; a subclass may do other things on the way."""
        if type(self) is not DiagonalFisher or not isinstance(unit, float):
            return False
        if not (pace.compiled or (bucket.fused and on_host(bucket.device))):
            return False
        tensors = (*(() if bucket.flat else bucket.params), *bucket.grads, *bucket.state[MOMENT], *bucket.state[SQUARE])
        return all(tensor.is_contiguous() for tensor in tensors)

    def stride(
        self, bucket: Bucket, ok: Tensor | None, radius: float, unit: Unit, pace: Pace
    ) -> tuple[Tensor, list[Slopes]]:
        """Do :meth:`advance` and move the parameters, by the fused kernel in parts that fit a cache, or compiled."""
        numbers = {"radius": radius, "beta1": bucket.beta1, "beta2": bucket.beta2}
        numbers["eps"] = cast("float", unit) * bucket.eps
        if pace.compiled:
            return self._stride_compiled(bucket, ok, pace, numbers), []
        wide, m = wide_dtype(bucket.device), bucket.state[MOMENT]
        if ok is not None:  # the host knows: it is false
            nothing = [(bucket.owners, torch.zeros(len(bucket.owners), dtype=wide))] if pace.promises else []
            return torch.zeros((), dtype=wide), nothing
        keep = torch.tensor(1 - pace.decay, dtype=wide) if pace.decay else None
        longest = min(block_size(bucket.device), max(first.numel() for first in m))
        room = torch.empty((2 if pace.keeps else 4, longest), dtype=m[0].dtype).unbind()
        age, norms, slopes = torch.full((), float(bucket.step), dtype=torch.float32), [], list[Slopes]()
        for owners, params, grad, first, second in bucket.rows((MOMENT, SQUARE)):
            u, product, *copies = room if grad.numel() == longest else [tensor[: grad.numel()] for tensor in room]
            if not pace.keeps:
                first, second = copies[0].copy_(first), copies[1].copy_(second)
            advance_fused([grad], [first], [second], None, step=bucket.step, **numbers, room=[u], age=age)
            if pace.cautious:
                drop_disagreement([u], [grad], room=product)
            spread = unflatten(u, params) if bucket.flat else [u]
            bucket.shorten(spread, owners)
            norms.append(torch.linalg.vector_norm(u))
            if pace.promises:
                products = torch.mul(u, grad, out=product)
                parts = [part.sum() for part in (unflatten(products, params) if bucket.flat else [products])]
                slopes.append((owners, torch.stack(parts).to(wide) * pace.lr))
            move(params, spread, lr=pace.lr, keep=keep, foreach=True)
        return summed_squares(norms, pace.lr), slopes

    @staticmethod
    def _stride_compiled(bucket: Bucket, ok: Tensor | None, pace: Pace, numbers: dict[str, float]) -> Tensor:
        """Return the squared norm of the step of :meth:`stride`, compiled."""
        device = bucket.device
        packed = partial(
            stride_numbers,
            lr=pace.lr,
            decay=pace.decay,
            step=bucket.step,
            beta1=bucket.beta1,
            beta2=bucket.beta2,
            eps=numbers["eps"],
            device=device,
        )
        whole = packed(radius=numbers["radius"])
        allows = torch.ones((), dtype=torch.bool, device=device) if ok is None else ok
        form, parts = compiled_stride(), []
        rows = zip(bucket.params, bucket.grads, bucket.state[MOMENT], bucket.state[SQUARE], strict=True)
        for owner, row in zip(bucket.owners, rows, strict=True):
            portion = bucket.portions[owner] if bucket.portions else 1.0
            mine = whole if portion == 1 else packed(radius=numbers["radius"] * portion)
            # a view of something would be compiled anew for each shape of that
            parts.append(form(*(x.view(-1).data for x in row), allows, mine, cautious=pace.cautious))
            increment_version(row[0])
        return stacked(parts).to(wide_dtype(device)).sum()

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
                low, high = second.aminmax()
                # d c vh > sqrt(vh), nowhere at a radius of 0, where only the box limits
                active = (second * (scale * radius / bucket.correction2**0.5) > second.sqrt()).sum() if radius else None
                row = (low, high, second.sum(), torch.zeros_like(low) if active is None else active)
                rows.append(torch.stack([x.to(wide) for x in row]))
        table, factor = torch.stack(rows), scale / bucket.correction2
        low, high, trace = (x * factor for x in (table[:, 0].min(), table[:, 1].max(), table[:, 2].sum()))
        return torch.stack((low, high, trace, table[:, 3].sum()))
