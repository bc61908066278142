"""A number system whose results are the same bits on every machine with IEEE 754 arithmetic.

Two things make the same program give other bits elsewhere: sums, whose order and fused operations
depend on the processor and the linear algebra library, and exp, tanh, erf, whose last bits depend
on the mathematics library. Training amplifies both. Arrays of this type avoid them, and the
specification's own code runs on them unchanged:

- +, -, ×, ÷ and √ round correctly, as IEEE 754 asks, and stay as they are;
- before a sum or a matrix product each operand is rounded to a grid, so that no partial sum rounds
  at all, and every order gives the same result;
- exp is made of +, × and rounding to integers, and tanh and erf are made of exp;
- a number from outside is rounded to float32, which hides the last bits that it came with;
- whatever else is refused, so that nothing slips through.

:class:`Portable` is for training that has to be repeated bit for bit, not for proofs: its products
are good to some 22 bits of each operand's largest element.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import erf

from minilora.spec.ops import Array

SIGNIFICAND = 53
"""The bits of float64's significand: integers up to 2 to this power are exact."""

TAYLOR = [1 / math.factorial(i) for i in range(11, -1, -1)]


def to_grid(x: Array, bits: int) -> Array:
    """x rounded to multiples of 2^(e - bits), where max |x| < 2^e: integers up to 2^bits, scaled.

    Adding and subtracting a number whose last bit is worth 2^(e - bits) leaves just these.

    Shapes: x (...) -> y (...).
    """
    _, e = math.frexp(np.abs(x).max(initial=0.0))
    shift = math.ldexp(1.5, e - bits + SIGNIFICAND - 1)
    return (x + shift) - shift


def exp(x: Array) -> Array:
    """eˣ = 2ᵏ eʳ, k = round(x / ln 2), r = x - k ln 2, eʳ by its Taylor polynomial of degree 11.

    Good to 1e-13 for |x| ≤ 700; beyond, 0 on the left and e⁷⁰⁰ on the right.

    Shapes: x (...) -> y (...).
    """
    inside = np.clip(x, -700.0, 700.0)
    k = np.rint(inside * (1 / math.log(2)))
    r = inside - k * math.log(2)
    y = np.full_like(r, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        y *= r
        y += coefficient
    power = ((k.astype(np.int64) + 1023) << 52).view(np.float64)  # 2ᵏ, by its exponent's bits
    y = np.where(x < -700.0, 0.0, y * power)
    return y


def _tanh(x: Array) -> Array:
    """(1 - e⁻²ˣ) / (1 + e⁻²ˣ) for x ≥ 0, and odd."""
    e = exp(-2 * np.abs(x))
    y: Array = np.copysign((1 - e) / (1 + e), x)
    return y


def _erf(x: Array) -> Array:
    """Good to 1.5e-7, which training does not notice.

    Source: Abramowitz and Stegun 1964, equation 7.1.26.
    """
    t = 1 / (1 + 0.3275911 * np.abs(x))
    y = 1.061405429 * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = (y + coefficient) * t
    result: Array = np.copysign(1 - y * exp(-x * x), x)
    return result


def _log(x: Array) -> Array:
    """The library's, as a number from outside: it enters the value of a loss, and no gradient."""
    y: Array = np.log(x).astype(np.float32).astype(np.float64)
    return y


FUNCTIONS: dict[Any, Callable[[Array], Array]] = {
    np.exp: exp,
    np.tanh: _tanh,
    erf: _erf,
    np.log: _log,
}
ROUNDED_CORRECTLY = {
    *(np.add, np.subtract, np.multiply, np.divide, np.sqrt, np.negative, np.absolute),
    *(np.minimum, np.maximum, np.equal, np.less, np.less_equal, np.greater, np.greater_equal),
}


class Portable(np.ndarray):
    """A float64 array whose operations give the same bits on every machine.

    Make one with :func:`portable`. Errors: TypeError for an operation that could differ.
    """

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """The operation on plain arrays, its operands prepared so that its bits are settled."""
        operands = [_plain(v) for v in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(np.asarray(v) for v in kwargs["out"])
        if (ufunc, method) == (np.matmul, "__call__"):
            terms = operands[0].shape[-1]
            bits = (SIGNIFICAND - terms.bit_length()) // 2
            y = np.matmul(*(to_grid(x, bits) for x in operands), **kwargs)
            y += 0.0  # the sign of a sum of zeros depends on how it began
        elif (ufunc, method) == (np.add, "reduce"):
            y = np.add.reduce(_summands(operands[0]), **kwargs)
        elif (ufunc, method) == (np.add, "at"):
            a, rows, b = operands
            return np.add.at(a, rows, _summands(b))
        elif (ufunc, method) == (np.maximum, "reduce"):
            y = np.maximum.reduce(operands[0], **kwargs)
        elif ufunc in FUNCTIONS and method == "__call__":
            y = FUNCTIONS[ufunc](*operands)
        elif ufunc in ROUNDED_CORRECTLY and method == "__call__":
            y = ufunc(*operands, **kwargs)
        else:
            raise TypeError(
                f"{ufunc.__name__} ({method}) may give other bits on another machine; "
                "use +, -, ×, ÷, √, sums, products, exp, tanh, erf, or a plain array"
            )
        return np.asarray(y).view(Portable)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """What moves numbers about, such as np.where; the result is of this type again."""
        y = super().__array_function__(func, types, args, kwargs)
        return y.view(Portable) if isinstance(y, np.ndarray) else y


def _summands(x: Array) -> Array:
    """x on a grid on which any sum of its elements is exact."""
    return to_grid(x, SIGNIFICAND - x.size.bit_length())


def _plain(v: Any) -> Array:
    """An operand as a plain array; floating numbers from outside lose their last bits."""
    if isinstance(v, Portable):
        return v.view(np.ndarray)
    x = np.asarray(v)
    return x.astype(np.float32).astype(np.float64) if x.dtype.kind == "f" else x


def portable(x: Array) -> Portable:
    """x rounded to float32, as a :class:`Portable` array.

    Shapes: x (...) -> y (...).
    """
    return _plain(x).view(Portable)
