"""Numbers that are the same on every machine: exact truths, and draws from a hash.

Floating-point sums depend on their order, and hence on the processor and its library of linear
algebra; a random generator's stream may change with NumPy's version. Neither enters here. `Exact`
runs the specification's own code over integers, and `Shake` draws from SHAKE-128, which is a
standard. What is left to floating point is ÷, √ and the rounding of a single number, which IEEE 754
settles to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import total_ordering
from hashlib import shake_128
from math import isqrt, prod
from typing import Any

import numpy as np

Array = np.ndarray

BITS = 256
"""The binary digits of a quotient or a root; sums and products have as many as they need."""


@total_ordering
class Exact:
    """n 2ᵉ with whole numbers n and e: +, - and × are exact, ÷ and √ are cut after `BITS` digits.

    A float or an int beside it counts as the number that it is. ``float()`` rounds once, to the
    nearest. An array of them is made by `exact`.
    """

    __slots__ = ("e", "n")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, n: int, e: int) -> None:
        self.n, self.e = n, e

    def __add__(self, other: Any) -> Any:
        return self._with(other, _sum)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: Exact(a.n * b.n, a.e + b.e))

    __rmul__ = __mul__

    def __neg__(self) -> Exact:
        return Exact(-self.n, self.e)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: _sum(a, -b))

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: _sum(b, -a))

    def __truediv__(self, other: Any) -> Any:
        return self._with(other, _quotient)

    def __rtruediv__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: _quotient(b, a))

    def __pow__(self, exponent: int) -> Exact:
        return Exact(self.n**exponent, self.e * exponent)

    def __eq__(self, other: object) -> Any:
        return self._with(other, lambda a, b: _sum(a, -b).n == 0)

    def __lt__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: _sum(a, -b).n < 0)

    def __float__(self) -> float:
        return float(self.n << self.e) if self.e >= 0 else self.n / (1 << -self.e)

    def sqrt(self) -> Exact:
        """√, for NumPy, which calls a method of an object's function's name."""
        shift = max(0, 2 * BITS - self.n.bit_length())
        shift += (self.e - shift) % 2
        return Exact(isqrt(self.n << shift), (self.e - shift) // 2)

    def _with(self, other: Any, operation: Callable[[Exact, Exact], Any]) -> Any:
        if not isinstance(other, Exact):
            if not isinstance(other, int | float | np.integer):
                return NotImplemented  # an array applies it to each of its entries
            other = _exact(other)
        return operation(self, other)


def _sum(a: Exact, b: Exact) -> Exact:
    e = min(a.e, b.e)
    return Exact((a.n << (a.e - e)) + (b.n << (b.e - e)), e)


def _quotient(a: Exact, b: Exact) -> Exact:
    shift = max(0, BITS + b.n.bit_length() - a.n.bit_length())
    return Exact((a.n << shift) // b.n, a.e - shift - b.e)


def _exact(number: Any) -> Exact:
    numerator, denominator = number.as_integer_ratio()
    return Exact(numerator, 1 - denominator.bit_length())


def exact(array: Any) -> Array:
    """An array of `Exact` numbers, whose values are those of the floating-point array."""
    values = np.asarray(array).astype(np.float64)
    entries = np.empty(values.size, object)
    entries[:] = [_exact(v) for v in values.ravel().tolist()]
    return entries.reshape(values.shape)


def rounded(array: Any) -> Array:
    """The float64 numbers that are nearest to exact ones."""
    return np.asarray(array).astype(np.float64)


class Portable(int):
    """A seed whose draws are the same on every machine; it equals no other kind of seed."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Portable) and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((Portable, int(self)))

    def __str__(self) -> str:
        return f"portable-{int(self)}"


class Shake:
    """A generator with the methods of NumPy's that cases are drawn with, from SHAKE-128 of a name.

    What a call gives depends on the name and on the number of the call, and on nothing else.
    """

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, 0

    def _words(self, shape: Any, width: int) -> Array:
        """Whole numbers, uniform below 256 to the power of ``width``, as the hash gives them."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.calls += 1
        data = shake_128(f"{self.name}/{self.calls}".encode()).digest(prod(shape) * width)
        return np.frombuffer(data, f"<u{width}").reshape(shape)

    def random(self, shape: Any = (), dtype: Any = np.float64) -> Array:
        """Uniform in [0, 1): multiples of 2⁻⁵³, or of 2⁻²⁴ for float32."""
        if dtype == np.float32:
            return (self._words(shape, 4) >> 8).astype(np.float32) * np.float32(2.0**-24)
        uniform: Array = (self._words(shape, 8) >> 11).astype(np.float64) * 2.0**-53
        return uniform

    def uniform(self, low: float, high: float, shape: Any = ()) -> Array:
        """Uniform between the two."""
        return low + (high - low) * self.random(shape)

    def standard_normal(self, shape: Any = ()) -> Array:
        """Nearly normal, of mean 0 and variance 1: a sum of twelve uniform numbers, less 6.

        Sums of whole numbers, which need no logarithm.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        total = self._words((12, *shape), 4).astype(np.int64).sum(0)
        normal: Array = (total + 6 - 6 * 2**32).astype(np.float64) * 2.0**-32
        return normal

    def integers(self, low: int, high: int | None = None, shape: Any = ()) -> Array:
        """Whole numbers from low to high - 1; with one number, from 0 to low - 1."""
        low, high = (0, low) if high is None else (low, high)
        return (self._words(shape, 8) % np.uint64(high - low)).astype(np.int64) + low

    def choice(self, values: Sequence[Any], shape: Any = (), replace: bool = True) -> Array:
        """Some of the values, each drawn from all, or without ``replace`` from what is left."""
        drawn = self.integers(0, len(values), shape) if replace else None
        at = self.permutation(len(values))[: int(shape)] if drawn is None else drawn
        chosen: Array = np.asarray(values)[at]
        return chosen

    def permutation(self, n: Any) -> Array:
        """0, …, n - 1 in another order, or the entries of an array."""
        values = np.arange(n) if isinstance(n, int | np.integer) else np.asarray(n)
        order: Array = values[np.argsort(self._words(len(values), 8), kind="stable")]
        return order
