"""Averages of weights: what takes the place of a schedule where the number of steps is not known."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_soaa._checks import check_nonnegative

AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]


def get_polynomial_avg_fn(eta: float = 8.0) -> AvgFn:
    r"""Return the function that averages weights over the last part of a run, however long the run is.

    After t steps of weights w the polynomial-decay average (arXiv 1212.1824, section 4) is

    .. code-block:: text

        a_t <- (1 - (eta + 1) / (t + eta)) a_(t-1) + (eta + 1) / (t + eta) w_t

    in which those of step t count as about ``t^eta``: two thirds of it are the last ``1 / (eta + 1)`` of the steps. An
    exponential average remembers as many steps at the start of a run as at its end; its decay has to fit the length.

    For Lightning's ``WeightAveraging(avg_fn=...)``, with which validation sees the averaged weights while training goes
    on with its own, and for ``torch.optim.swa_utils.AveragedModel(avg_fn=...)`` in a plain loop. Its arguments are an
    average, the weights now and the number of weights averaged so far. Buffers of integers or bools are not averaged.

    Args:
        eta: how fast the past is forgotten, >= 0 (default: 8); 0 is the plain mean of all steps.

    Raises:
        TypeError: `eta` is no number.
        ValueError: it is negative or not finite.

    Example::

        >>> import torch
        >>> from torch.optim.swa_utils import AveragedModel
        >>> from lightning_soaa import get_polynomial_avg_fn
        >>> model = torch.nn.Linear(1, 1)
        >>> averaged = AveragedModel(model, avg_fn=get_polynomial_avg_fn(eta=0))
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     averaged.update_parameters(model)
        >>> averaged.module.weight.item()
        3.0
    """
    return partial(polynomial_average, eta=check_nonnegative("get_polynomial_avg_fn", "eta", eta))


def polynomial_average(averaged: Tensor, current: Tensor, num_averaged: Tensor | int, *, eta: float) -> Tensor:
    """Return the average with one more tensor in it, see :func:`get_polynomial_avg_fn`; integers and bools as they are.

    Args:
        averaged: the average so far, of any shape.
        current: what is added to it, of the same shape.
        num_averaged: how many there are in it so far, a number or 0-d.
        eta: how fast the past is forgotten.
    """
    if not (averaged.is_floating_point() or averaged.is_complex()):
        return current
    new = averaged + (current - averaged) * (eta + 1) / (num_averaged + 1 + eta)
    return torch.where(current == averaged, averaged, new)  # infinities, of which a mask is made, stay
