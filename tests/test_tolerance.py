"""The tolerances: what rounding may do, by formula and by sampling, and no more."""

import numpy as np
import pytest

from minilora.ops import attention, causal_mask
from minilora.verify.contract import DTYPES, Precision
from minilora.verify.tolerance import Rounding, Uncertain, digits, noisy, spread, unit_roundoff


def precisions():
    return [pytest.param(Precision(dtype, dtype), id=dtype) for dtype in DTYPES]


@pytest.mark.parametrize("precision", precisions())
def test_the_infinities_of_a_mask_pass_through_the_noise(precision):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 3, 4)) for _ in range(3))
    mask = causal_mask(np.ones((1, 4), bool))
    o, _ = attention(*(noisy(a, precision, rng) for a in (q, k, v)), mask)
    changed = v.copy()
    changed[..., 1:] += 1e3  # the future of the first token
    o2, _ = attention(*(noisy(a, precision, rng) for a in (q, k, changed)), mask)
    # The first token sees itself alone: o = v · 1, off by the roundings of exp, sum and product.
    first, second = (np.asarray(each)[..., 0] for each in (o, o2))
    bound = 64 * unit_roundoff(precision.storage) * np.abs(v[..., 0])
    assert (np.abs(first - v[..., 0]) <= bound).all()
    assert (np.abs(second - v[..., 0]) <= bound).all()


@pytest.mark.parametrize("precision", precisions())
def test_formula_and_samples_agree_on_a_product(precision):
    rng = np.random.default_rng(1)
    P, Q = rng.standard_normal((5, 9)), rng.standard_normal((9, 4))
    rounding = Rounding(precision)
    by_formula = (Uncertain(P, 0.0, rounding) @ Uncertain(Q, 0.0, rounding)).sigma
    samples = 400
    want = {"C": np.longdouble(P) @ np.longdouble(Q)}
    sampled = spread(
        lambda r: {"C": noisy(P, precision, r) @ noisy(Q, precision, r)}, want, samples, [2]
    )["C"]
    # An estimate of sigma from N samples is off by 1/√(2N) of itself, one in a million by five.
    ratio = sampled / by_formula
    room = 5 / np.sqrt(2 * samples)
    if (
        precision.storage == "float64"
    ):  # its noise is rounded to float64 itself: up to as much again
        assert (ratio > 1 - room).all()
        assert (ratio < 2**0.5 * (1 + room)).all()
    else:
        assert np.abs(ratio - 1).max() <= room
    assert np.abs(sampled / (2 * by_formula) - 1).max() > room, "twice the sigma is told apart"


def test_the_digits_of_each_dtype_are_those_of_its_standard():
    assert [digits(dtype) for dtype in DTYPES] == [53, 24, 8, 11]
