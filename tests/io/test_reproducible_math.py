"""Portable arrays: no result depends on the order of a sum or on a library's last bits."""

from fractions import Fraction

import numpy as np
import pytest
from calculus import bound_of_exp
from reproducible_math import SIGNIFICAND, Portable, exp, portable, to_grid
from scipy.special import erf

from minilora.spec.ops import attention, cross_entropy, gelu, rmsnorm

U = np.finfo(float).eps / 2


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random(rng, *shape):
    """Numbers of very different sizes, in full float64 precision."""
    return rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 9, shape)


SUMS = {
    "sum": lambda x, y, at: x[:, at].sum(1),
    "mean": lambda x, y, at: x[:, at].mean(1),
    "product": lambda x, y, at: x[:, at] @ y[at],
    "batched product": lambda x, y, at: np.concatenate([x[None], -x[None]])[:, :, at] @ y[at],
}


def in_several_orders(name, x, y, rng):
    """The different bits that a sum has in twenty orders of its terms."""
    orders = [rng.permutation(x.shape[1]) for _ in range(20)]
    return {np.asarray(SUMS[name](x, y, at)).tobytes() for at in orders}


@pytest.mark.parametrize("name", SUMS)
def test_the_order_of_a_sum_changes_no_bit(name, rng):
    x, y = random(rng, 3, 300), random(rng, 300, 4)
    as_they_are, on_grids = (v.view(Portable) for v in (x, y)), (portable(v) for v in (x, y))
    assert len(in_several_orders(name, *as_they_are, rng)) == 1
    assert len(in_several_orders(name, *on_grids, rng)) == 1
    assert len(in_several_orders(name, x, y, rng)) > 1  # plain arrays


def test_the_order_of_rows_that_are_gathered_changes_no_bit(rng):
    rows, terms = rng.integers(3, size=300), random(rng, 300, 4)

    def gathered(kind):
        found = set()
        for order in (rng.permutation(300) for _ in range(20)):
            y = np.zeros((3, 4)).view(kind)
            np.add.at(y, rows[order], terms[order].view(kind))
            found.add(np.asarray(y).tobytes())
        return found

    assert len(gathered(Portable)) == 1
    assert len(gathered(np.ndarray)) > 1


def exactly(x, y):
    """The product of matrices in fractions."""
    rows, columns = ([[Fraction(v) for v in row] for row in a.tolist()] for a in (x, y.T))
    return [[sum(map(Fraction.__mul__, row, column)) for column in columns] for row in rows]


def test_a_product_is_exact_for_its_operands_on_the_grid(rng):
    x, y = random(rng, 3, 17), random(rng, 17, 4)
    bits = (SIGNIFICAND - (17).bit_length()) // 2
    found = x.view(Portable) @ y.view(Portable)
    assert found.tolist() == exactly(to_grid(x, bits), to_grid(y, bits))
    assert (x @ y).tolist() != exactly(x, y)


def test_a_product_is_as_near_as_its_grid_is_fine(rng):
    """An element moves by half a step of the grid at most, which is 2^-bits of the largest."""
    x, y = random(rng, 30, 70), random(rng, 70, 40)
    bits, largest = (SIGNIFICAND - (70).bit_length()) // 2, abs(x).max() * abs(y).max()
    bound = 70 * (2 * 2.0**-bits + 2.0 ** (-2 * bits) + 70 * U) * largest
    assert abs(np.asarray(x.view(Portable) @ y.view(Portable)) - x @ y).max() <= bound
    assert abs(to_grid(x, bits // 2) @ to_grid(y, bits // 2) - x @ y).max() > bound


def test_a_sum_of_zeros_has_no_sign():
    zeros, minus = np.zeros((2, 2)), np.full((2, 2), -1.0)
    products = zeros.view(Portable) @ minus.view(Portable), (-zeros).view(Portable).sum(0)
    assert not any(np.signbit(np.asarray(y)).any() for y in products)
    assert np.signbit(zeros * minus).all()


def test_exp_is_as_near_as_its_arithmetic_allows():
    x = np.linspace(-700, 700, 10_001)
    assert abs(exp(x) / np.exp(x) - 1).max() <= bound_of_exp(700)
    assert abs(exp(x * (1 + 1e-12)) / np.exp(x) - 1).max() > bound_of_exp(700)


def test_exp_far_out_is_zero_and_its_last_value():
    assert exp(np.array([-np.inf, -1e300, -701.0])).tolist() == [0, 0, 0]
    assert exp(np.array([701.0, 1e300, np.inf])).tolist() == [exp(np.array([700.0]))[0]] * 3


def test_tanh_and_erf_are_as_near_as_they_say():
    """tanh moves by half of e's relative error at most, and rounds three times; NumPy's own is 2 u
    off. erf's bound is its source's, beside which rounding is nothing."""
    x = np.linspace(-20, 20, 10_001)
    found_tanh, found_erf = (np.asarray(f(x.view(Portable))) for f in (np.tanh, erf))
    assert abs(found_tanh - np.tanh(x)).max() <= bound_of_exp(40) / 2 + 5 * U
    assert abs(found_erf - erf(x)).max() <= 1.5e-7
    assert abs(found_erf - np.tanh(x)).max() > 1.5e-7


def test_a_number_from_outside_comes_without_its_last_bits(rng):
    x, third = portable(random(rng, 5)), 1 / 3
    beside = np.nextafter(third, 1)
    table, table_beside = np.full(5, third), np.full(5, beside)
    assert (x * third).tobytes() == (x * beside).tobytes()
    assert (x + table).tobytes() == (x + table_beside).tobytes()
    assert portable(table).tobytes() == portable(table_beside).tobytes()
    assert (np.asarray(x) * third).tobytes() != (np.asarray(x) * beside).tobytes()


REFUSED = {
    "sin": np.sin,
    "power": lambda x: x**0.3,
    "expm1": np.expm1,
    "running sum": np.add.accumulate,
    "product of all": np.multiply.reduce,
    "outer product": lambda x: np.multiply.outer(x, x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_differ_elsewhere_is_refused(name, rng):
    x = abs(random(rng, 5))
    with pytest.raises(TypeError, match="may give other bits on another machine"):
        REFUSED[name](portable(x))
    REFUSED[name](x)


def test_numbers_that_are_moved_about_stay_portable(rng):
    x = portable(random(rng, 3, 4))
    moved = [x.T, x[1], x[[0, 2]], x.reshape(4, 3), np.where(x > 0, x, -np.inf), np.zeros_like(x)]
    moved += [np.concatenate([x, x]), x.max(0), x.sum(), x.real, np.empty_like(x)]
    assert {type(y) for y in moved} == {Portable}


def test_the_equations_run_unchanged_and_stay_portable(rng):
    x, w = portable(random(rng, 6, 8)), portable(np.ones((6, 1)))
    q, k, v = (portable(random(rng, 1, 2, 3, 4)) for _ in "qkv")
    mask = np.triu(np.ones((1, 4, 4), bool))
    L, back = cross_entropy(x, np.arange(8) % 6)
    pairs = [rmsnorm(x, w, 1e-5), gelu(x), attention(q, k, v, mask)]
    results = [L, back(1.0), *(y for y, _ in pairs)]
    for y, back_y in pairs:
        dy = back_y(y)
        results += dy if isinstance(dy, tuple) else [dy]
    assert {type(y) for y in results} == {Portable}
