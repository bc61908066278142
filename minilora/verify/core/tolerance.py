"""How far rounding alone may carry a correct implementation: a standard deviation per element.

Two number systems run the specification's own code and measure it on the way. `Uncertain` carries
a variance beside each value by closed formulas, for a layer or a merge. `Noisy` rounds at random
after every operation; the spread of some runs is the standard deviation, for whole models and for
optimizers. Both model an implementation that stores every intermediate array in one dtype and
accumulates its sums in the same or another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from minilora.verify.core.dtypes import Precision

Array = np.ndarray

finfo: Any = ml_dtypes.finfo  # typed nowhere


def unit_roundoff(dtype: str) -> float:
    """u, the greatest relative error of rounding: half the distance from 1 to the next number."""
    return 2.0 ** -digits(dtype)


@cache
def digits(dtype: str) -> int:
    """The binary digits of a dtype's significand, the one that is not stored included."""
    return int(finfo(dtype).nmant) + 1


@cache
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
        own, shape = np.asarray(variance, np.float64), self.value.shape
        self.variance = own if own.shape == shape else np.broadcast_to(own, shape)
        self.rounding = rounding

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.value.shape

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


class Noisy(NDArrayOperatorsMixin):
    """float64 values whose every operation is followed by a rounding error drawn at random.

    y (1 + u U(-1, 1)) after each elementwise operation, and in products and sums an error of the
    accumulation's variance besides. Many runs go side by side: ``runs`` has one axis in front, a
    run each, that the code which computes does not see; what is the same in all stands once.
    """

    def __init__(self, runs: Array, source: Source) -> None:
        self.runs, self.source = runs, source

    shape = property(lambda self: self.runs.shape[1:])
    ndim = property(lambda self: self.runs.ndim - 1)
    dtype = property(lambda self: self.runs.dtype)
    size = property(lambda self: prod(self.shape))
    real = property(lambda self: self)  # as nothing here is complex
    T = property(lambda self: self.transpose(*reversed(range(self.ndim))))
    mT = property(lambda self: self._as(self.runs.mT))

    def _as(self, runs: Array) -> Noisy:
        return Noisy(runs, self.source)

    def _own(self) -> Array:
        """The runs, each with values of its own that may be changed."""
        if len(self.runs) < self.source.count:
            self.runs = np.repeat(self.runs, self.source.count, 0)
        return self.runs

    def _rounded(self, y: Array, accumulated: Array | None = None, units: float = 1.0) -> Noisy:
        """y with an error uniform in ± its greatest; a sum also has the accumulation's variance.

        Uniform in ± a has the variance a² / 3.
        """
        rounding, draws = self.source.rounding, self.source.draws
        shape = (self.source.count, *y.shape[1:])
        greatest = units * rounding.u * y
        if accumulated is not None:
            greatest *= greatest
            greatest = greatest + 3 * accumulated
            np.sqrt(greatest, out=greatest)
        result = greatest * draws.signed(shape)
        result += y
        if rounding.tiny > 1e-30:  # float16: its subnormal numbers lie within reach
            result += rounding.tiny * draws.signed(shape, np.float64)
            result = np.where(result * y > 0, result, 0)  # rounding changes no sign
        infinite = np.isinf(y)  # of a mask: they stay what they are
        return self._as(np.where(infinite, y, result) if infinite.any() else result)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method == "at":  # the scatter of an embedding's gradient: sums of a few rows
            into, rows, values = inputs
            getattr(ufunc, method)(into._own(), (slice(None), rows), values.runs)
            return None
        if method == "reduce":
            return self._reduced(ufunc, inputs[0], **kwargs)
        out = kwargs.pop("out", None)
        if method != "__call__" or kwargs:
            raise TypeError(f"{ufunc.__name__}.{method} with {sorted(kwargs)} has no noise yet")
        y = self._called(ufunc, inputs)
        if out is None or out[0] is None:
            return y
        into = out[0].runs
        if into.base is not None and into.shape == y.runs.shape:
            into[...] = y.runs  # it may be a part of another array
        else:
            out[0].runs = y.runs
        return out[0]

    def _called(self, ufunc: np.ufunc, inputs: Sequence[Any]) -> Any:
        plain = _lifted(inputs)
        with np.errstate(invalid="ignore"):
            y = ufunc(*plain)
            if not hasattr(y, "dtype"):
                return y  # a zero that stands for an array
            if y.dtype != np.float64 or ufunc in EXACT:
                return self._as(y)
            if ufunc is np.matmul:
                squares = np.matmul(plain[0] ** 2, plain[1] ** 2)
                return self._rounded(y, self.source.rounding.summed(plain[0].shape[-1], squares))
            return self._rounded(y, units=1.0 if ufunc in ARITHMETIC else 2 * FUNCTION_ULPS)

    def _reduced(
        self, ufunc: Any, x: Noisy, axis: Any = 0, keepdims: bool = False, **_: Any
    ) -> Any:
        axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        axes = tuple(a % x.ndim + 1 for a in axes)
        y = ufunc.reduce(x.runs, axis=axes, keepdims=keepdims)
        if y.dtype != np.float64 or ufunc in EXACT:
            return self._as(y)
        squares = np.square(x.runs).sum(axes, keepdims=keepdims)
        terms = prod(x.runs.shape[a] for a in axes)
        return self._rounded(y, self.source.rounding.summed(terms, squares))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        # Moves round nothing.
        if func not in MOVES:
            raise TypeError(f"np.{func.__name__} has no noise yet")
        return MOVES[func](*args, **kwargs)

    def sum(self, axis: Any = None, keepdims: bool = False) -> Any:
        """The sum, as of an array."""
        return self._reduced(np.add, self, axis, keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Any:
        """The mean, as of an array."""
        total = self.sum(axis, keepdims)
        return total / (self.size // max(1, total.size))

    def max(self, axis: Any = None, keepdims: bool = False) -> Any:
        """The greatest, as of an array."""
        return self._reduced(np.maximum, self, axis, keepdims)

    def reshape(self, *shape: Any) -> Noisy:
        """The same values in another shape."""
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        return self._as(self.runs.reshape(len(self.runs), *shape))

    def ravel(self) -> Noisy:
        """The same values in one row."""
        return self.reshape(-1)

    def transpose(self, *axes: int) -> Noisy:
        """The axes in another order."""
        return self._as(self.runs.transpose(0, *(a % self.ndim + 1 for a in axes)))

    def astype(self, dtype: Any) -> Noisy:
        """A copy: this system has one dtype."""
        return self.copy()

    def copy(self) -> Noisy:
        """A copy."""
        return self._as(self.runs.copy())

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise TypeError("the runs are several: no one array is all of them")

    def __len__(self) -> int:
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Noisy]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, at: Any) -> Noisy:
        return self._as(self.runs[_behind(at)])

    def __setitem__(self, at: Any, value: Any) -> None:
        self._own()[_behind(at)] = value.runs if isinstance(value, Noisy) else value

    def __bool__(self) -> bool:
        if self.runs.size != len(self.runs) or len({*map(bool, self.runs.ravel())}) > 1:
            raise ValueError("the runs do not agree which way to go")
        return bool(self.runs.ravel()[0])


def _behind(at: Any) -> tuple[Any, ...]:
    """An index of what lies behind the axis of the runs."""
    return (slice(None), *at) if isinstance(at, tuple) else (slice(None), at)


def _raised(value: Noisy, ndim: int) -> Array:
    """The runs with as many axes between the first and the others as ``ndim`` asks for."""
    runs = value.runs
    return runs.reshape(len(runs), *(1,) * (ndim - value.ndim), *value.shape)


def _lifted(values: Sequence[Any]) -> list[Any]:
    """Values that broadcast against one another as they do without the axis of the runs."""
    most = max(map(np.ndim, values))
    return [_raised(value, most) if isinstance(value, Noisy) else value for value in values]


def _joined(values: Sequence[Any], axis: int = 0) -> Noisy:
    (first, *_) = (value for value in values if isinstance(value, Noisy))
    count = max(len(value.runs) for value in values if isinstance(value, Noisy))
    runs = [value.runs if isinstance(value, Noisy) else np.asarray(value)[None] for value in values]
    runs = [np.broadcast_to(each, (count, *each.shape[1:])) for each in runs]
    return Noisy(np.concatenate(runs, axis % first.ndim + 1), first.source)


def _chosen(condition: Any, x: Any, y: Any) -> Noisy:
    source = next(v.source for v in (condition, x, y) if isinstance(v, Noisy))
    return Noisy(np.where(*_lifted((condition, x, y))), source)


def _filled(x: Noisy, value: float, dtype: Any = None, shape: Any = None) -> Noisy:
    shape = x.shape if shape is None else shape  # () is one too
    runs = np.full((x.source.count, *shape), value, dtype or x.dtype)
    return Noisy(runs, x.source)


def _copied(into: Noisy, value: Any, where: Any = True) -> None:
    runs = into._own()
    np.copyto(runs, _raised(value, into.ndim) if isinstance(value, Noisy) else value, where=where)


MOVES: dict[Any, Callable[..., Any]] = {
    np.copyto: _copied,
    np.atleast_1d: lambda x: x if x.ndim else x.reshape(1),
    np.result_type: lambda *_: np.dtype(np.float64),
    np.shape: lambda x: x.shape,
    np.ndim: lambda x: x.ndim,
    np.size: lambda x: x.size,
    np.sum: lambda x, axis=None, keepdims=False, **_: x.sum(axis, keepdims),
    np.concatenate: _joined,
    np.stack: lambda values: _joined([value[None] for value in values]),
    np.where: _chosen,
    np.zeros_like: lambda x, dtype=None, shape=None: _filled(x, 0, dtype, shape),
    np.ones_like: lambda x, dtype=None: _filled(x, 1, dtype),
    np.empty_like: lambda x, dtype=None, order="K", shape=None: _filled(x, 0, dtype, shape),
}
"""What moves and makes arrays, and rounds nothing."""


@dataclass(frozen=True)
class Source:
    """Where noise comes from: how many runs, the precision's variances, the random numbers."""

    count: int
    rounding: Rounding
    draws: Draws


class Draws:
    """Random numbers for several runs: from one generator for all, or from one for each."""

    def __init__(self, rng: np.random.Generator | Sequence[Any], count: int) -> None:
        self.rng, self.count = rng, count

    def signed(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Numbers uniform in (-1, 1)."""
        if isinstance(self.rng, np.random.Generator):
            drawn: Array = self.rng.random(shape, dtype=dtype)
        else:
            drawn = np.stack([rng.random(shape[1:], dtype=dtype) for rng in self.rng])
        drawn *= 2
        drawn -= 1
        return drawn


def noisy(array: Any, rounding: Precision | Rounding, draws: Draws) -> Noisy:
    """The array, exact so far, as the first operand of noisy operations."""
    rounding = rounding if isinstance(rounding, Rounding) else Rounding(rounding)
    return Noisy(np.array(array, np.float64)[None], Source(draws.count, rounding, draws))


def spread(
    run: Callable[[Any], dict[str, Any]],
    wanted: dict[str, Any],
    samples: int,
    seed: Sequence[int],
) -> dict[str, Array]:
    """σ of each element: the root mean square, over noisy runs, of run - wanted."""
    return rms(run(Draws(np.random.default_rng([*seed]), samples)), wanted)


def rms(got: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Array]:
    """The root mean square, over the runs, of what was got less what was wanted."""

    def of(name: str, value: Any) -> Array:
        runs = got[name].runs if isinstance(got[name], Noisy) else np.asarray(got[name])[None]
        difference = np.asarray(runs, np.float64) - np.asarray(value, np.float64)
        spread: Array = np.sqrt(np.mean(difference**2, 0))
        return spread

    return {name: of(name, value) for name, value in wanted.items()}
