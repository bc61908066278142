"""How far rounding alone may carry a correct implementation: a standard deviation per element.

Two number systems run the specification's own code and measure it on the way. `Uncertain` carries
a variance beside each value by closed formulas, for a layer or a merge. `Noisy` rounds at random
after every operation; the spread of some runs is the standard deviation, for whole models and for
optimizers. Both model an implementation that stores every intermediate array in one dtype and
accumulates its sums in the same or another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from minilora.verify.contract import Precision

Array = np.ndarray

finfo: Any = ml_dtypes.finfo  # typed nowhere


def unit_roundoff(dtype: str) -> float:
    """u, the greatest relative error of rounding: half the distance from 1 to the next number."""
    return 2.0 ** -digits(dtype)


def digits(dtype: str) -> int:
    """The binary digits of a dtype's significand, the one that is not stored included."""
    return int(finfo(dtype).nmant) + 1


def underflow(dtype: str) -> float:
    """The greatest absolute error of rounding among the subnormal numbers."""
    return float(finfo(dtype).smallest_subnormal) / 2


class Rounding:
    """The variances of one precision: of a stored value, and of a sum's accumulation."""

    def __init__(self, precision: Precision) -> None:
        self.u = unit_roundoff(precision.storage)
        self.u_sum = unit_roundoff(precision.accumulation)
        self.tiny = underflow(precision.storage)

    def stored(self, value: Array) -> Array:
        """Var of rounding to storage: uniform in ± u |value|, hence u² value² / 3."""
        return (self.u * value) ** 2 / 3 + self.tiny**2 / 3

    def summed(self, terms: int, squares: Array) -> Array:
        """Var of accumulating K terms in any order: u_sum² (K / 3) Σ term².

        For terms of mean zero the K partial sums have squares of Σ term² · K / 2 in all, each is
        rounded with variance u_sum² / 3 of its square; K / 3 in place of K / 6 leaves room for
        orders that add large terms first.
        """
        return self.u_sum**2 * (terms / 3) * squares


class Uncertain:
    """A value with the variance that rounding has given it so far, errors taken as independent.

    C = P Q:   V_C = V_P (Q ∘ Q) + (P ∘ P) V_Q + u_sum² (K/3) (P ∘ P)(Q ∘ Q) + u² C² / 3;
    sums add variances; each result is stored.
    """

    __array_ufunc__ = None  # NumPy leaves `array @ uncertain` to __rmatmul__ below

    def __init__(self, value: Array, variance: Array | float, rounding: Rounding) -> None:
        self.value = np.asarray(value, np.float64)
        self.variance = np.broadcast_to(np.asarray(variance, np.float64), self.value.shape)
        self.rounding = rounding

    @property
    def T(self) -> Uncertain:
        """The transpose."""
        return Uncertain(self.value.T, self.variance.T, self.rounding)

    @property
    def sigma(self) -> Array:
        """The standard deviation."""
        return np.sqrt(self.variance)

    def _of(self, other: Any) -> tuple[Array, Array]:
        if isinstance(other, Uncertain):
            return other.value, other.variance
        value = np.asarray(other, np.float64)
        return value, np.zeros_like(value)

    def _stored(self, value: Array, variance: Array) -> Uncertain:
        return Uncertain(value, variance + self.rounding.stored(value), self.rounding)

    def _product(self, P: tuple[Array, Array], Q: tuple[Array, Array]) -> Uncertain:
        (p, v_p), (q, v_q) = P, Q
        squares = (p * p) @ (q * q)
        carried = v_p @ (q * q) + (p * p) @ v_q
        return self._stored(p @ q, carried + self.rounding.summed(p.shape[-1], squares))

    def __matmul__(self, other: Any) -> Uncertain:
        return self._product(self._of(self), self._of(other))

    def __rmatmul__(self, other: Any) -> Uncertain:
        return self._product(self._of(other), self._of(self))

    def __add__(self, other: Any) -> Uncertain:
        value, variance = self._of(other)
        return self._stored(self.value + value, self.variance + variance)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Uncertain:
        value, variance = self._of(other)
        return self._stored(self.value - value, self.variance + variance)

    def __mul__(self, other: Any) -> Uncertain:
        value, variance = self._of(other)
        carried = self.variance * value**2 + self.value**2 * variance
        return self._stored(self.value * value, carried)

    __rmul__ = __mul__


EXACT = {
    np.negative, np.positive, np.maximum, np.minimum, np.absolute,
    np.greater, np.greater_equal, np.less, np.less_equal, np.equal, np.not_equal,
    np.isfinite, np.isnan, np.logical_and, np.logical_or, np.logical_not,
}  # fmt: skip
"""The ufuncs that round nothing."""


ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide, np.square, np.sqrt}
"""The ufuncs that IEEE 754 rounds correctly, to within u."""

FUNCTION_ULPS = 2.0
"""Of exp, log, tanh and erf, fast libraries promise 1 to 2 units in the last place, each worth 2 u:
SLEEF its 1.0 ULP functions, which PyTorch's CPU kernels call, NVIDIA its tables for CUDA."""


class Noisy(np.ndarray):
    """float64 values whose every operation is followed by a rounding error drawn at random.

    y (1 + u U(-1, 1)) after each elementwise operation, and in products and sums an error of the
    accumulation's variance besides.
    """

    rounding: Rounding
    rng: np.random.Generator

    def __array_finalize__(self, obj: Any) -> None:
        if isinstance(obj, Noisy):
            self.rounding, self.rng = obj.rounding, obj.rng

    def _noisy(self, y: Any) -> Any:
        y = np.asarray(y).view(Noisy)
        y.rounding, y.rng = self.rounding, self.rng
        return y

    def _rounded(self, y: Array, accumulated: Array | None = None, units: float = 1.0) -> Any:
        """y with an error uniform in ± its greatest; a sum also has the accumulation's variance.

        Uniform in ± a has the variance a² / 3.
        """
        rounding = self.rounding
        greatest = units * rounding.u * y
        if accumulated is not None:
            greatest = np.sqrt(greatest * greatest + 3 * accumulated)
        noise = 2 * self.rng.random(np.shape(y), dtype=np.float32) - 1
        with np.errstate(invalid="ignore"):
            result = y + greatest * noise
            if rounding.tiny > 1e-30:  # float16: its subnormal numbers lie within reach
                result = result + rounding.tiny * self.rng.uniform(-1, 1, np.shape(y))
                result = np.where(result * y > 0, result, 0)  # rounding changes no sign
        infinite = np.isinf(y)  # of a mask: they stay what they are
        return self._noisy(np.where(infinite, y, result) if infinite.any() else result)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = [np.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs]
        out = kwargs.pop("out", None)
        if method == "at":  # the scatter of an embedding's gradient: sums of a few rows
            getattr(ufunc, method)(*plain, **kwargs)
            return None
        y = getattr(ufunc, method)(*plain, **kwargs)
        y = self._result(ufunc, method, plain, kwargs, y)
        if out is None:
            return y
        out[0][...] = y
        return out[0]

    def _result(self, ufunc: Any, method: str, plain: list[Any], kwargs: Any, y: Any) -> Any:
        if getattr(y, "dtype", None) != np.float64:  # comparisons
            return y
        if ufunc is np.matmul:
            squares = np.matmul(plain[0] ** 2, plain[1] ** 2)
            return self._rounded(y, self.rounding.summed(plain[0].shape[-1], squares))
        if ufunc in EXACT:
            return self._noisy(y)
        if method == "reduce":
            squares = np.add.reduce(np.square(plain[0]), **kwargs)
            terms = plain[0].size // max(1, np.size(y))
            return self._rounded(y, self.rounding.summed(terms, squares))
        return self._rounded(y, units=1.0 if ufunc in ARITHMETIC else 2 * FUNCTION_ULPS)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        # Moves (where, concatenate, reshape …) round nothing; what they lose is the class.
        y = func(*_plain(args), **_plain(kwargs))
        return self._noisy(y) if getattr(y, "dtype", None) == np.float64 else y


def _plain(value: Any) -> Any:
    if isinstance(value, Noisy):
        return value.view(np.ndarray)
    if isinstance(value, list | tuple):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return value


def noisy(array: Any, precision: Precision, rng: np.random.Generator) -> Noisy:
    """The array, exact so far, as the first operand of noisy operations."""
    result = np.array(array, np.float64).view(Noisy)
    result.rounding, result.rng = Rounding(precision), rng
    return result


def spread(
    run: Callable[[np.random.Generator], dict[str, Any]],
    wanted: dict[str, Any],
    samples: int,
    seed: Sequence[int],
) -> dict[str, Array]:
    """σ of each element: the root mean square, over noisy runs, of run - wanted."""
    squares = {name: np.zeros(np.shape(value)) for name, value in wanted.items()}
    for i in range(samples):
        got = run(np.random.default_rng([*seed, i]))
        for name, value in wanted.items():
            difference = np.asarray(got[name], np.float64) - np.asarray(value, np.float64)
            squares[name] += difference**2
    return {name: np.sqrt(total / samples) for name, total in squares.items()}
