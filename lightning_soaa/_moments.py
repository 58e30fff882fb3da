"""Moments and the step inside the box: the pure functions of :mod:`lightning_soaa.fisher`. No loss is known here.

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

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_soaa._sums import gated

# An eps that vanishes in float32, which moments are at least, leaves 0/0 where a gradient is zero.
SMALLEST = torch.finfo(torch.float32).smallest_normal

# The integers that the bits of moments are read as.
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

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
            denominator = corrected.sqrt()
            torch.maximum(denominator, corrected.mul_(scale * radius), out=denominator)
        denominator.add_(shift)
        directions.append(torch.div(first, denominator, out=denominator).mul_(factor))
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


def drop_disagreement(directions: Sequence[Tensor], grads: Sequence[Tensor], *, room: Tensor | None = None) -> None:
    """Set to zero the coordinates on which a direction does not descend (arXiv 2411.16085; modified in place).

    Those whose gradient is nan stay.

    Args:
        directions: modified in place.
        grads: of the same shapes.
        room: memory for the products, of the shape of each direction; newly allocated if None.
    """
    for direction, grad in zip(directions, grads, strict=True):
        keep_above(direction, torch.mul(direction, grad, out=room), 0.0, grad_input=direction)


def mark_moved(m: Sequence[Tensor], v: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Keep in the lowest bit of ``v`` which coordinates :func:`drop_disagreement` has let move (`v` modified in place).

    The gradient that tells it is gone when the next one is held against the step, and a mask of its own would be held
    between steps. It changes v by a rounding.
    """
    for first, second, grad in zip(m, v, grads, strict=True):
        kind = BITS[second.dtype]
        moved = (first * grad).view(kind).clamp_(0, 1)  # the bits of a positive number make a positive integer
        second.view(kind).bitwise_and_(-2).bitwise_or_(moved)


def drop_unmarked(directions: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """Set to zero the coordinates that :func:`mark_moved` has not marked as moved (`directions` modified in place)."""
    for direction, second in zip(directions, v, strict=True):
        kind = BITS[second.dtype]
        direction.view(kind).bitwise_and_(second.view(kind).bitwise_and(1).neg_())  # with all bits, or none


def advance_fused(
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    ok: Tensor | None,
    *,
    radius: float,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    room: list[Tensor] | None = None,
    age: Tensor | None = None,
) -> list[Tensor]:
    """:func:`update_moments` and then :func:`box_direction` without a scale, in one pass by torch's own AdamW kernel.

    The kernel moves tensors of zeros, which are the direction then. It agrees with the two up to rounding. It neither
    checks strides on every device nor minds shapes: the tensors have to be contiguous, and on a device that has it.

    Args:
        grads: gradients.
        m: first moments (modified in place where `ok`).
        v: second moments (modified in place where `ok`).
        ok: 0-d bool; where it is false the direction is zero. None for true.
        radius: d.
        step: t, with this gradient.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
        room: memory for the direction (overwritten), flat like all tensors then; newly allocated if None.
        age: `step` on the device of the tensors, float32, 0-d; made if None.
    """
    directions = [torch.zeros_like(first) for first in m] if room is None else [u.zero_() for u in room]
    u = directions
    if room is None:
        u, grads, m, v = ([tensor.view(-1) for tensor in tensors] for tensors in (directions, grads, m, v))
    if age is None:
        age = torch.full((), float(step), dtype=torch.float32, device=m[0].device)
    torch._fused_adamw_(
        u,
        grads,
        m,
        v,
        [],
        [age] * len(m),
        lr=-radius,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=max(eps, SMALLEST),
        amsgrad=False,
        maximize=False,
        found_inf=None if ok is None else (~ok).float(),
    )
    return directions


def move(params: list[Tensor], directions: list[Tensor], *, lr: float, keep: Tensor | None, foreach: bool) -> None:
    """Step 6: ``theta <- keep theta - lr u``.

    Args:
        params: modified in place.
        directions: of the same shapes.
        lr: what multiplies the direction.
        keep: what is left by weight decay, 0-d, since multi-tensor operations round a number to the dtype of the
            parameters; None for all.
        foreach: use multi-tensor operations.
    """
    mixed = params[0].dtype != directions[0].dtype
    if foreach and len(params) > 1 and not mixed:
        if keep is not None:
            torch._foreach_mul_(params, keep)
        torch._foreach_add_(params, directions, alpha=-lr)
        return
    for param, direction in zip(params, directions, strict=True):
        if keep is not None:
            param.mul_(keep)
        if mixed:  # one operation would round as much, but take an entry at a time
            param.copy_(param.to(direction.dtype).add_(direction, alpha=-lr))
        else:
            param.add_(direction, alpha=-lr)
