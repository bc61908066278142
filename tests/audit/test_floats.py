"""Rounding to a dtype once, and the quick casts, against NumPy and against fractions."""

from fractions import Fraction

import numpy as np
import pytest
from made import DTYPES

from minilora.audit.floats import (
    BF16,
    F16,
    F32,
    differing,
    format_of,
    on_grid,
    rounded,
    spacing,
    wide,
)


def test_every_float16_is_widened():
    halves = np.arange(2**16, dtype=np.uint16).view(F16)
    finite = np.isfinite(halves)
    for some in (halves, halves[finite], halves[: 2**10]):
        assert np.array_equal(wide(some), some.astype(F32), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rounded_number_is_the_nearest(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000) * 2.0 ** rng.integers(-30, 12, 2000)
    y = rounded(x, dtype)
    assert np.array_equal(y.astype(dtype).astype(np.float64), y)
    for a, b, gap in zip(x, y, spacing(x, dtype), strict=True):
        assert abs(Fraction(a) - Fraction(b)) <= Fraction(gap) / 2


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_ties_go_to_even_numbers(dtype):
    u = format_of(dtype).u
    assert list(rounded(np.array([1 + u, 1 + 3 * u]), dtype)) == [1, 1 + 4 * u]
    eta = format_of(dtype).eta
    assert list(rounded(np.array([eta / 2, 3 * eta / 2, -eta / 2]), dtype)) == [0, 2 * eta, 0]


def test_a_cast_in_two_steps_is_another():
    x = np.array([1 + 2.0**-8 + 2.0**-30])  # above the tie, on which float32 puts it
    assert rounded(x, BF16) == 1 + 2.0**-7
    assert x.astype(F32).astype(BF16).astype(np.float64) == 1


def test_what_is_beyond_the_largest_number_is_infinite():
    assert list(rounded(np.array([65519.0, 65520.0, -7e4]), F16)) == [65504, np.inf, -np.inf]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_on_the_grid_is_the_cast_and_back(dtype):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=4000) * 2.0 ** rng.integers(-32, 20, 4000)).astype(F32)
    ties = (1 + np.arange(64, dtype=F32) * F32.type(format_of(dtype).u)) * F32.type(2.0**-13)
    x = np.concatenate([x, ties, -ties, [0, -0.0, np.inf, -np.inf]], dtype=F32)
    with np.errstate(over="ignore"):
        assert np.array_equal(on_grid(x, dtype), x.astype(dtype).astype(F32))
    assert on_grid(x, F32) is x


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_numbers_differ_where_the_rounded_ones_do(dtype):
    rng = np.random.default_rng(2)
    x = (rng.normal(size=4000) * 2.0 ** rng.integers(-32, 17, 4000)).astype(F32)
    ties = (1 + np.arange(64, dtype=F32) * F32.type(format_of(dtype).u)) * F32.type(2.0**-13)
    x = np.concatenate([x, ties, -ties, [0, -0.0, 65519, 65520]], dtype=F32)
    right = on_grid(x, dtype)
    assert differing(x, right, dtype) is None
    assert differing(x, -right, dtype)[0]
    finite = right[np.isfinite(right)]
    beside = np.nextafter(finite.astype(dtype), dtype.type(1)).astype(F32)
    found = differing(x[np.isfinite(right)], beside, dtype)
    assert np.array_equal(found, finite != beside)


def test_an_integer_has_no_format():
    with pytest.raises(TypeError, match="int32: expected a floating-point dtype"):
        format_of(np.int32)
