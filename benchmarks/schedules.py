"""Learning-rate schedules as factors in (0, 1] of the step and the number of steps."""

from collections.abc import Callable
from math import cos, pi

Schedule = Callable[[int, int], float]


def _half_cosine(part: float) -> float:
    return 0.5 * (1 + cos(pi * part))


def constant(step: int, total: int) -> float:
    """Return 1."""
    return 1.0


def cosine(step: int, total: int) -> float:
    """Fall from 1 to 0 along half a cosine."""
    return _half_cosine(step / total)


def warmup_cosine(step: int, total: int) -> float:
    """Rise over the first tenth, then fall to 0 along half a cosine."""
    warm = max(1, total // 10)
    return (step + 1) / warm if step < warm else _half_cosine((step - warm) / max(1, total - warm))


def warmup_linear(step: int, total: int) -> float:
    """Rise over the first tenth, then fall to 0 along a line."""
    warm = max(1, total // 10)
    return (step + 1) / warm if step < warm else 1 - (step - warm) / max(1, total - warm)


def one_cycle(step: int, total: int) -> float:
    """Rise from 1/25 over 30 % of the steps, then fall to 4e-6, both along half a cosine."""
    top = 0.3 * total
    if step < top:
        return 1 - (1 - 1 / 25) * _half_cosine(step / top)
    return 4e-6 + (1 - 4e-6) * _half_cosine((step - top) / max(1.0, total - top))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "cosine": cosine,
    "warmup_cosine": warmup_cosine,
    "warmup_linear": warmup_linear,
    "one_cycle": one_cycle,
}
