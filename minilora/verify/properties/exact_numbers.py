"""Rational numbers with a square root where it is rational, in NumPy's arrays."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Rational
from typing import Any

import numpy as np

from minilora.spec.ops import Array


class SqrtFraction(Fraction):
    """A fraction with a square root, where that is rational; arithmetic gives the same type."""

    __slots__ = ()

    def sqrt(self) -> SqrtFraction:
        """The root; ArithmeticError if it is irrational."""
        root = SqrtFraction(math.isqrt(self.numerator), math.isqrt(self.denominator))
        if root * root != self:
            raise ArithmeticError(f"the root of {self} is irrational")
        return root


def _closed(name: str) -> None:
    operate = getattr(Fraction, name)

    def method(self: SqrtFraction, *other: Any) -> Any:
        value = operate(self, *other)
        if type(value) is Fraction:  # in lowest terms: a constructor would divide again
            value.__class__ = SqrtFraction
        return value

    setattr(SqrtFraction, name, method)


for _name in ("add", "sub", "mul", "truediv"):
    _closed(f"__{_name}__")
    _closed(f"__r{_name}__")
_closed("__neg__")


def exactly(array: Array) -> Array:
    """The entries as the rational numbers that they are."""
    entries: Array = np.frompyfunc(lambda v: SqrtFraction(Fraction(v)), 1, 1)(array.astype(object))
    return entries


def same(a: Any, b: Any) -> bool:
    """Equal shapes and entries, all of them rational: a float is refused. None equals None."""
    if a is None or b is None:
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    rational = all(isinstance(v, Rational) for v in (*a.ravel(), *b.ravel()))
    return rational and a.shape == b.shape and bool((a == b).all())
