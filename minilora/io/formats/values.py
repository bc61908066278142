"""Whether the value of a setting, as JSON has it, is of the kind that is expected."""

import sys
from collections.abc import Callable
from typing import Any

Fits = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """A finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    """True or false."""
    return type(value) is bool


def is_integer(least: float, most: float = sys.maxsize) -> Fits:
    """A whole number from ``least`` to ``most``."""
    return lambda value: type(value) is int and least <= value <= most


def is_list(fits: Fits) -> Fits:
    """A list of values that fit."""
    return lambda value: isinstance(value, list) and all(map(fits, value))


def is_object(fits: Fits) -> Fits:
    """An object whose values fit."""
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def is_either(*kinds: Fits) -> Fits:
    """A value of one of these kinds."""
    return lambda value: any(fits(value) for fits in kinds)
