"""What a check leaves of the parameters' portions in their state."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite
from typing import Any

from torch import Tensor

from lightning_soaa._state import (
    LAST_PORTION,
    LEFT_OVER,
    LEFT_OVER_MEAN,
    PORTION,
    PORTIONS,
    PROMISED,
    PROMISED_MEAN,
)
from lightning_soaa.portions import Portion, move_portions


def keep_portions(
    params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]], slopes: Sequence[float], *, moves: bool
) -> None:
    """Move portions by what was found since the last check, and keep what this one promised (`state` modified).

    Args:
        params: the parameters that this check's step moved; none if it was rejected.
        state: by parameter.
        slopes: what their parts of the step promised.
        moves: False to leave the portions as they are.
    """
    known = [kept for kept in state.values() if PORTION in kept]
    for kept in known:
        kept[LAST_PORTION] = kept[PORTION]
    if moves:
        _move(known)
    for kept in known:
        kept[PROMISED], kept[LEFT_OVER] = 0.0, -inf
    for param, slope in zip(params, slopes, strict=True):
        state[param][PROMISED] = max(0.0, slope)


def _move(known: Sequence[dict[str, Any]]) -> None:
    before = [Portion(kept[PORTION], kept[PROMISED_MEAN], kept[LEFT_OVER_MEAN]) for kept in known]
    pairs = [(kept[PROMISED], kept[LEFT_OVER]) if isfinite(kept[LEFT_OVER]) else (0.0, 0.0) for kept in known]
    promised, left = ([pair[place] for pair in pairs] for place in (0, 1))
    for kept, new in zip(known, move_portions(before, promised, left), strict=True):
        kept[PORTION], kept[PROMISED_MEAN], kept[LEFT_OVER_MEAN] = new.portion, new.promised, new.left


def portions_of(params: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]], *, last: bool = False) -> list[float]:
    """Return the portions of parameters, or those of the last check; nothing if all are 1."""
    key = LAST_PORTION if last else PORTION
    found = [float(state[param].get(key, PORTIONS[key])) for param in params]
    return found if any(portion != 1 for portion in found) else []
