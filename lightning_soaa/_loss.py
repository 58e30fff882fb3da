"""Losses: what a closure may return, and what becomes of it."""

from collections.abc import Callable, Sequence
from numbers import Complex, Real
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._dist import mean_over_ranks, world_size
from lightning_soaa._sums import wide_dtype

# Rounding of a loss is forgiven up to this many units in its last place.
LOSS_ULPS = 8


def scalar_loss(who: str, value: Any) -> Tensor:
    """Return what closure `who` returned as a detached 0-d real tensor of its own, which a reused buffer cannot change.

    Raises:
        TypeError: it is not a number or tensor of one element, or it is complex.
    """
    if not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0:
        value = torch.as_tensor(value)  # a number of numpy's, in its own precision
    if isinstance(value, Tensor):
        if value.numel() != 1:
            kind = f"a tensor of shape {tuple(value.shape)}"
            raise TypeError(f"SOAA: `{who}` must return a scalar loss, got {kind}")
        if value.is_complex():
            raise TypeError(f"SOAA: `{who}` must return a real loss, got a tensor of {value.dtype}")
        return value.detach().reshape(()).clone()
    if isinstance(value, Complex) and not isinstance(value, Real):
        raise TypeError(f"SOAA: `{who}` must return a real loss, got {value!r}")
    if not isinstance(value, Real):
        raise TypeError(f"SOAA: `{who}` must return a scalar loss, got {value!r}")
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def evaluated(loss_closure: Callable[[], Any]) -> Tensor:
    """Return the loss that a loss closure computes at the parameters as they are now.

    Inside of autocast torch keeps 16-bit copies of parameters from one forward to the next. A trial would be evaluated
    on those of the forward before, and leave behind copies without gradients for the forward after.
    """
    torch.clear_autocast_cache()
    try:
        return scalar_loss("loss_closure", loss_closure())
    finally:
        torch.clear_autocast_cache()


def minimised(loss: Tensor, home: torch.device, *, maximize: bool) -> Tensor:
    """Return a loss as it is minimised, 0-d on `home`: mean over ranks, negated to maximise.

    Itself where that is all to be done, else in the wide dtype.
    """
    if not maximize and world_size() == 1 and loss.device == home:
        return loss
    loss = loss.to(home, wide_dtype(home))
    return mean_over_ranks(-loss if maximize else loss)


def resolution(params: Sequence[Tensor]) -> float:
    """Return the machine epsilon of the coarsest parameters."""
    return max(torch.finfo(param.dtype).eps for param in params)


def rounding(loss: Tensor, params: Sequence[Tensor]) -> float:
    """Return the rounding error of a loss, relative to its size.

    A number may come from ``loss.item()``: it is taken for as coarse as the parameters, float32 at the coarsest.
    """
    coarse = min(resolution(params), torch.finfo(torch.float32).eps)
    return LOSS_ULPS * max(coarse, torch.finfo(loss.dtype).eps if loss.is_floating_point() else 0.0)
