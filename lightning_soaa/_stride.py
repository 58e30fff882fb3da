"""The step of one tensor in one pass over it, written to be compiled: pure functions."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lightning_soaa._moments import representable
from lightning_soaa._sums import sent


def stride(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, ok: Tensor, numbers: Tensor, *, cautious: bool) -> Tensor:
    """Steps 1 to 6 of one tensor where only the radius limits, written to be compiled into one pass.

    Args:
        param: the parameter (modified in place where `ok`).
        grad: its gradient.
        m: first moment (modified in place where `ok`).
        v: second moment (modified in place where `ok`).
        ok: 0-d bool on the tensors' device.
        numbers: what :func:`stride_numbers` returns.
        cautious: leave out coordinates on which the direction does not descend.

    Returns:
        The squared norm of the step, weight decay apart, 0-d.
    """
    rise1, decay2, rise2, factor, shift, keep = numbers.unbind()
    first, second = m + (grad - m) * rise1, v * decay2 + grad * grad * rise2
    step = first / (second.sqrt() + shift) * factor
    if cautious:
        step = torch.where(step * grad > 0, step, 0.0)
    step = torch.where(ok, step, 0.0)
    m.copy_(torch.where(ok, first, m))
    v.copy_(torch.where(ok, second, v))
    param.copy_(torch.where(ok, param * keep - step, param))
    return (step * step).sum()


def stride_numbers(
    *, radius: float, lr: float, decay: float, step: int, beta1: float, beta2: float, eps: float, device: torch.device
) -> Tensor:
    """Return what depends on the step in :func:`stride`, so that it is compiled once, shape (6,).

    Args:
        radius: d.
        lr: what multiplies the direction.
        decay: share of the parameters that weight decay takes.
        step: t, with this gradient.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
        device: that of the tensors.
    """
    root = (1 - beta2**step) ** 0.5
    factor, shift = lr * radius * root / (1 - beta1**step), representable(eps * root)
    numbers = [1 - beta1, beta2, 1 - beta2, factor, shift, 1 - decay]
    return sent(numbers, device)


@cache
def compiled_stride() -> Callable[..., Tensor]:
    """Return :func:`stride` as torch.compile makes it, for tensors of any size."""
    return torch.compile(stride, dynamic=True, fullgraph=True)
