"""Floating-point formats: their grids, rounding to them once, and fast ways between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from minilora.spec.ops import Array

F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)
F16 = np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Format:
    """A floating-point format: p binary digits, the exponent of its smallest normal number."""

    digits: int
    lowest: int
    largest: float

    @property
    def u(self) -> float:
        """2⁻ᵖ, the unit roundoff."""
        return float(2.0**-self.digits)

    @property
    def eta(self) -> float:
        """The smallest positive number, the distance of the subnormal ones."""
        return float(2.0 ** (self.lowest - self.digits + 1))


@cache
def format_of(dtype: Any) -> Format:
    """The format of a floating-point dtype.

    Errors: TypeError for other dtypes.
    """
    dtype = np.dtype(dtype)
    try:
        finfo: Any = ml_dtypes.finfo
        info = finfo(dtype)
    except (TypeError, ValueError):
        info = None
    if info is None or dtype.itemsize > 8:
        raise TypeError(f"{dtype}: expected a floating-point dtype of up to 8 bytes")
    return Format(int(info.nmant) + 1, int(info.minexp), float(info.max))


def spacing(x: Array, dtype: Any) -> Array:
    """The distance of the dtype's numbers at x, a unit in the last place; x in float64."""
    f = format_of(dtype)
    exponent = np.frexp(x)[1]  # |x| in [2ᵉ⁻¹, 2ᵉ)
    gap: Array = np.ldexp(1.0, np.maximum(exponent - f.digits, f.lowest - f.digits + 1))
    return gap


def rounded(x: Array, dtype: Any) -> Array:
    """○(x): x in float64 rounded once to the dtype's nearest number, ties to even; in float64.

    A cast by ml_dtypes would round a float64 twice.
    """
    f = format_of(dtype)
    if f.digits >= 53:
        return x
    gap = spacing(x, dtype)
    y: Array = np.rint(x / gap) * gap  # powers of 2: only rint rounds
    beyond = abs(y) > f.largest
    return np.where(beyond, np.copysign(np.inf, y), y) if beyond.any() else y


def wide(x: Array) -> Array:
    """The numbers in float32, or as they are where that is wider.

    NumPy's own cast of float16 is six times slower.
    """
    if x.dtype != F16:
        return x if x.dtype.itemsize >= 4 else x.astype(F32)
    moved = x.view(np.int16).astype(np.int32)
    moved <<= 13
    moved &= np.int32(-0x70000001)  # sign, exponent and fraction at float32's places
    y = moved.view(F32)
    y *= F32.type(2.0**112)  # the exponents' biases differ by 112; subnormals come out right
    if y.size and max(y.max(), -y.min()) >= 65536:
        return x.astype(F32)
    return y


def differing(x: Array, y: Array, dtype: np.dtype[Any]) -> Array | None:
    """Which numbers of x, rounded to the dtype, are not those of y; None if all are.

    Both are in float32, y on the dtype's grid. Where the bits of the two are less than half a unit
    of the dtype apart, y is the nearest number to x, whatever the exponent: all others are rounded.
    """
    if dtype.itemsize >= 4:
        differ = x != y
        return differ if differ.any() else None
    half = 1 << (23 - format_of(dtype).digits)
    apart = x.view(np.int32) - y.view(np.int32)
    apart += half - 1
    far: Array = apart.view(np.uint32) > 2 * half - 2
    if far.any():
        far[far] = on_grid(x[far], dtype) != y[far]
    return far if far.any() else None


def on_grid(x: Array, dtype: np.dtype[Any]) -> Array:
    """An x of float32, rounded to the dtype where that is narrower, still in float32."""
    if dtype.itemsize >= 4:
        return x
    with np.errstate(over="ignore"):
        if dtype != F16:
            return x.astype(dtype).astype(F32)
        bits = x.view(np.uint32)
        cut = bits >> 13
        cut &= 1
        cut += bits
        cut += 0xFFF
        cut &= np.uint32(0xFFFFE000)  # ties to even at the 13th bit
        y = cut.view(F32)
        size = abs(x)
        odd = (size < 2.0**-14) | ~(size < 65504)
        if odd.any():
            y[odd] = x[odd].astype(F16).astype(F32)
    return y
