"""Numbers that are no floating-point numbers, as entries of object arrays.

NumPy's arithmetic calls the operators of the entries, and its functions, such as ``np.exp``, their
methods of that name; so the code under test runs on them as it stands. `erf` alone comes from
SciPy, which has it for float32, float64 and complex numbers only: `every_erf` has it for the
others, and the tests put it in its place in ``minilora.spec.ops``.
"""

import functools
import heapq
import itertools
import operator

import mpmath
import numpy as np
import scipy.special
from calculus import UNIT_ROUNDOFF, gamma

mpmath.mp.dps = 40


def to_objects(array, number):
    """The array with each entry a ``number``; what is no array of reals stays as it is."""
    if not isinstance(array, np.ndarray) or array.dtype.kind in "biu":
        return array
    entries = np.empty(array.size, object)
    entries[:] = [number(v) for v in array.ravel()]
    return entries.reshape(array.shape)


def every_erf(x):
    if x.dtype == object:
        return np.frompyfunc(lambda v: v.erf(), 1, 1)(x)
    return long_erf(x) if x.dtype == np.longdouble else scipy.special.erf(x)


def long_erf(x):
    """erf by 2/√π exp(-x²) (x + 2x³/3 + 4x⁵/15 + …), DLMF 7.6.2, in which nothing cancels."""
    term = np.clip(x, -7, 7)  # 1 - erf(7) < 1e-22
    total, z = term, 2 * term * term
    for k in range(1, 300):
        term = term * z / (2 * k + 1)
        total = total + term
    pi = np.longdouble("3.14159265358979323846264338327950288")
    return total * np.exp(-z / 2) * 2 / np.sqrt(pi)


class Number:
    """The operators, by `operate(f, a, b)` of the class, and the order, by the value v."""

    def __add__(self, other):
        return self.operate(operator.add, self, other)

    def __sub__(self, other):
        return self.operate(operator.sub, self, other)

    def __mul__(self, other):
        return self.operate(operator.mul, self, other)

    def __truediv__(self, other):
        return self.operate(operator.truediv, self, other)

    def __radd__(self, other):
        return self.operate(operator.add, other, self)

    def __rsub__(self, other):
        return self.operate(operator.sub, other, self)

    def __rmul__(self, other):
        return self.operate(operator.mul, other, self)

    def __rtruediv__(self, other):
        return self.operate(operator.truediv, other, self)

    def __neg__(self):
        return self.operate(operator.mul, -1, self)

    def __eq__(self, other):
        return bool(self.v == getattr(other, "v", other))

    def __lt__(self, other):
        return bool(self.v < getattr(other, "v", other))

    __hash__ = None


@functools.total_ordering
class Real(Number):
    """A number of 40 decimal digits, by mpmath."""

    def __init__(self, value):
        self.v = mpmath.mpf(value)

    @staticmethod
    def operate(f, a, b):
        return Real(f(*(mpmath.mpf(getattr(v, "v", v)) for v in (a, b))))

    def __abs__(self):
        return Real(abs(self.v))

    def __float__(self):
        return float(self.v)

    def exp(self):
        return Real(mpmath.exp(self.v))

    def log(self):
        return Real(mpmath.log(self.v))

    def sqrt(self):
        return Real(mpmath.sqrt(self.v))

    def tanh(self):
        return Real(mpmath.tanh(self.v))

    def erf(self):
        return Real(mpmath.erf(self.v))


@functools.total_ordering
class Rounded(Number):
    """A long double v, what it was computed from, and how far float64 is off where it computes it.

    Each result is rounded by at most u |v|; a function is taken to be right to 4 units in the last
    place, as NumPy's and SciPy's own tests demand; a sum of n terms, in any order, is off by at
    most γ(n - 1) times the sum of their moduli (Higham 2002, section 4.2), which is added up, as n
    is, and charged when the sum is used. A float in the code is a rounded constant, off by u; a
    whole number is exact. `propagated` carries all of these errors to the results.
    """

    FUNCTION = 8 * UNIT_ROUNDOFF
    count = itertools.count()

    def __init__(self, value, error=0.0, operands=(), terms=1, mass=None):
        self.v = np.longdouble(value)
        self.error = error
        self.operands = operands
        self.terms = terms
        self.mass = abs(float(value)) if mass is None else mass
        self.order = next(self.count)

    @classmethod
    def of(cls, value):
        """The operand ``value``, which is used now: if it is a sum, it is complete."""
        if isinstance(value, cls):
            value.error += gamma(value.terms - 1) * value.mass
            value.terms, value.mass = 1, abs(float(value.v))
            return value
        return cls(value, abs(value) * UNIT_ROUNDOFF if isinstance(value, float) else 0.0)

    @classmethod
    def operate(cls, f, a, b):
        if f is operator.add or f is operator.sub:
            a, b = (v if isinstance(v, cls) else cls.of(v) for v in (a, b))
            slopes = (a, 1), (b, 1 if f is operator.add else -1)
            return cls(f(a.v, b.v), 0.0, slopes, a.terms + b.terms, a.mass + b.mass)
        a, b = cls.of(a), cls.of(b)
        v = f(a.v, b.v)
        if f is operator.mul:
            return cls.rounded(v, (a, float(b.v)), (b, float(a.v)))
        return cls.rounded(v, (a, float(1 / b.v)), (b, float(-v / b.v)))

    @classmethod
    def rounded(cls, v, *slopes, relative=UNIT_ROUNDOFF):
        return cls(v, abs(float(v)) * relative, slopes)

    def function(self, v, slope):
        return self.rounded(v, (self.of(self), float(slope)), relative=self.FUNCTION)

    def exp(self):
        if self.v == -np.inf:
            return Rounded(0)
        v = np.exp(self.v)
        return self.function(v, v)

    def log(self):
        return self.function(np.log(self.v), 1 / self.v)

    def sqrt(self):
        v = np.sqrt(self.v)
        return self.function(v, 1 / (2 * v))

    def tanh(self):
        v = np.tanh(self.v)
        return self.function(v, 1 - v * v)

    def erf(self):
        slope = np.exp(-self.v * self.v) * 2 / np.sqrt(np.pi)
        return self.function(long_erf(self.v[None])[0], slope)


def values(array):
    """The long doubles of an array of `Rounded`."""
    return np.vectorize(lambda number: Rounded.of(number).v, otypes=[np.longdouble])(array)


def propagated(results, weights):
    """The most by which float64 can miss Σ weight · result, its sum apart, to first order in u.

    A rounding error δ at a number z moves the sum by δ times the derivative of the sum by z. The
    derivatives come by the chain rule from the results back; the bound is Σ |derivative · error|
    over all numbers. What is neglected is u² times second derivatives.
    """
    slope, numbers = {}, {}
    for number, weight in zip(np.ravel(results), np.ravel(weights), strict=True):
        number = Rounded.of(number)
        numbers[number.order] = number
        slope[number.order] = slope.get(number.order, 0.0) + float(weight)
    open_, total = [-order for order in numbers], 0.0
    heapq.heapify(open_)
    while open_:
        number = numbers.pop(-heapq.heappop(open_))
        here = slope.pop(number.order)
        total += abs(here) * number.error
        for operand, partial in number.operands:
            if operand.order not in numbers:
                numbers[operand.order] = operand
                slope[operand.order] = 0.0
                heapq.heappush(open_, -operand.order)
            slope[operand.order] += here * partial
    return total
