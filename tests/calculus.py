"""Derivatives by a complex step, the measure of an error, and the worst figures that tests meet."""

import math

import numpy as np
from reproducible_math import TAYLOR

from minilora.verify.properties.derivatives import STEP
from minilora.verify.properties.laws import UNIT_ROUNDOFF
from minilora.verify.properties.variant_matrix import PROMISE

GRADIENT = PROMISE
"""The promise of a gradient in float64, here relative to the greatest entry of its array."""

OPTIMIZER = 10 * GRADIENT
"""The same promise for parameters after ten steps of an optimizer: each may add a GRADIENT."""

COMPLEX_ERF = 1e-13
"""The relative error that SciPy's erf of complex numbers usually keeps below, by its source, the
Faddeeva package of S. G. Johnson. That a complex step's derivative does, test_ops.py measures."""

WORST = {}
"""The greatest figure of each name since the test began; conftest.py prints them at the end."""


def gamma(k):
    """What k roundings in a row can do, relatively: k u / (1 - k u) (Higham 2002, lemma 3.1)."""
    return k * UNIT_ROUNDOFF / (1 - k * UNIT_ROUNDOFF)


def bound_of_exp(largest):
    """How far `reproducible_math.exp` may be from NumPy's, relatively, at numbers up to a largest.

    r carries the rounding of k ln 2, three roundings of numbers up to |x|; the polynomial leaves
    out less than two of its next term at (ln 2) / 2, each of its steps rounds twice; NumPy's own is
    2 u off.
    """
    terms = len(TAYLOR)
    left_out = 2 * (math.log(2) / 2) ** terms / math.factorial(terms)
    return (3 * largest + 2 * terms + 2) * UNIT_ROUNDOFF + left_out


def record_worst(name, figure):
    WORST[name] = max(WORST.get(name, 0.0), float(figure))


def derivative(f, point):
    """{name: the gradient of the number f(point) by that array}, an entry at a time."""
    gradients = {name: np.empty(array.shape) for name, array in point.items()}
    for name, gradient in gradients.items():
        for entry in np.ndindex(gradient.shape):
            stepped = point[name].astype(complex)
            stepped[entry] += STEP * 1j
            gradient[entry] = f(point | {name: stepped}).imag / STEP
    return gradients


def directional(f, point, direction):
    """The derivative of f(point), a number or a dict of arrays, along a dict of arrays."""
    value = f(point | {name: point[name] + STEP * 1j * v for name, v in direction.items()})
    if isinstance(value, dict):
        return {name: v.imag / STEP for name, v in value.items()}
    return value.imag / STEP


def random_like(rng, arrays):
    return {name: rng.standard_normal(a.shape) for name, a in arrays.items()}


def greatest(array):
    """The greatest modulus of the array's entries, 0 if it has none."""
    return max((abs(v) for v in np.ravel(array)), default=0)


def relative_error(found, wanted, scale=None):
    """The greatest difference of two arrays, relative to the greatest entry of the second."""
    difference = greatest(np.asarray(found) - np.asarray(wanted))
    scale = greatest(wanted) if scale is None else scale
    return 0.0 if difference == 0 else float(difference / scale) if scale else np.inf


def same_bits(a, b):
    """Whether two arrays have the same dtype, shape and bytes."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
