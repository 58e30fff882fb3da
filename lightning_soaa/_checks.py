"""Validation with one form of error: who, which argument, the rule, the value."""

from math import isfinite
from numbers import Real
from typing import Any, NoReturn


def refuse(owner: str, name: str, rule: str, value: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``owner: `name` must be rule, got value``."""
    raise error(f"{owner}: `{name}` must be {rule}, got {value!r}")


def refuse_sharded(fisher: object) -> NoReturn:
    """Refuse a Fisher that needs whole parameters, where they are sharded."""
    raise ValueError(
        f"SOAA: `fisher` must be DiagonalFisher() where parameters are sharded, got {type(fisher).__name__}; leave it "
        "out, or train with DDP"
    )


def check_real(owner: str, name: str, value: Any) -> float:
    """Return `value` as a finite float.

    Raises:
        TypeError: `value` is not a real number (a bool is not one).
        ValueError: `value` is nan or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(owner, name, "a real number", value, TypeError)
    number = float(value)
    if not isfinite(number):
        refuse(owner, name, "finite", number)
    return number


def check_positive(owner: str, name: str, value: Any) -> float:
    """Return `value` as a finite float > 0."""
    number = check_real(owner, name, value)
    if number <= 0:
        refuse(owner, name, "> 0", number)
    return number


def check_nonnegative(owner: str, name: str, value: Any) -> float:
    """Return `value` as a finite float >= 0."""
    number = check_real(owner, name, value)
    if number < 0:
        refuse(owner, name, ">= 0", number)
    return number


def check_between(owner: str, name: str, value: Any, low: float, high: float, rule: str) -> float:
    """Return `value` as a float inside the open interval (low, high); `rule` words it, as in ``in (0, 1)``."""
    number = check_real(owner, name, value)
    if not low < number < high:
        refuse(owner, name, rule, number)
    return number


def check_count(owner: str, name: str, value: Any, at_least: int = 1) -> int:
    """Return `value` as an int >= `at_least`.

    Raises:
        TypeError: `value` is not an int (a bool is not one).
        ValueError: `value` is smaller than `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(owner, name, "an int", value, TypeError)
    if value < at_least:
        refuse(owner, name, f">= {at_least}", value)
    return value
