"""The tolerances: what rounding may do, by formula and by sampling, and no more."""

import numpy as np
import pytest

from minilora.io import reference_models
from minilora.spec.ops import attention, causal_mask
from minilora.verify.checks import model, model_answers
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.tolerance import (
    Draws,
    Rounding,
    Uncertain,
    digits,
    noisy,
    spread,
    unit_roundoff,
)
from minilora.verify.core.types import Case


def precisions():
    return [pytest.param(Precision(dtype, dtype), id=dtype) for dtype in DTYPES]


@pytest.mark.parametrize("precision", precisions())
def test_the_infinities_of_a_mask_pass_through_the_noise(precision):
    rng = np.random.default_rng(0)
    draws = Draws(rng, 3)
    q, k, v = (rng.standard_normal((1, 2, 3, 4)) for _ in range(3))
    mask = causal_mask(np.ones((1, 4), bool))
    o, _ = attention(*(noisy(a, precision, draws) for a in (q, k, v)), mask)
    changed = v.copy()
    changed[..., 1:] += 1e3  # the future of the first token
    o2, _ = attention(*(noisy(a, precision, draws) for a in (q, k, changed)), mask)
    # The first token sees itself alone: o = v · 1, off by the roundings of exp, sum and product.
    first, second = (each.runs[..., 0] for each in (o, o2))
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


FLOAT32 = Precision("float32", "float32")


class One:
    """A generator of numbers for one run, of a name."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def random(self, shape, dtype):
        return self.rng.random(shape, dtype=dtype)


@pytest.mark.parametrize("name", reference_models.names())
def test_runs_side_by_side_are_the_runs_one_after_another(name):
    c, W, tuning, _ = model.read_back(name, "float64")
    batch = model.draw(name, Case("", "float64", 0, 0))

    def loss_and_gradients(draws):
        noisy_W = {key: noisy(array, FLOAT32, draws) for key, array in W.items()}
        return model_answers.specified(batch, noisy_W, c, tuning)

    together = loss_and_gradients(Draws([One(7), One(8), One(9)], 3))
    for i, seed in enumerate((7, 8, 9)):
        alone = loss_and_gradients(Draws([One(seed)], 1))
        for key, array in alone.items():
            assert (together[key].runs[i] == array.runs[0]).all(), key
    first, second = (together["loss"].runs[i] for i in (0, 1))
    assert first != second, "each run has a noise of its own"


def test_what_the_runs_disagree_about_or_what_has_no_noise_is_refused():
    draws = Draws(np.random.default_rng(0), 64)
    x = noisy(np.ones(3), FLOAT32, draws)
    assert x[0] == 1  # no operation yet: all runs are alike
    with pytest.raises(ValueError, match="do not agree"):
        bool(x[0] * 1 > 1)
    with pytest.raises(TypeError, match="no noise yet"):
        np.linalg.norm(x)
    with pytest.raises(TypeError, match="no noise yet"):
        np.cumsum(x)
    with pytest.raises(TypeError, match="no one array"):
        np.asarray(x)


def test_what_is_written_into_a_part_is_there():
    """As in NumPy, where a slice is a part of its array."""
    draws = Draws(np.random.default_rng(0), 8)
    x = 2.0 * noisy(np.ones((4, 3)), FLOAT32, draws)
    y = np.zeros_like(x * 1.0)
    bound = 4 * 3 * unit_roundoff("float32")  # at most 4, after at most 3 operations
    np.add(x[:2], x[2:], out=y[:2])
    assert (abs(y.runs[:, :2] - 4) <= bound).all()
    assert (y.runs[:, 2:] == 0).all()
    y[:] = 1.0
    y[1:3] += x[:2]
    assert (abs(y.runs[:, 1:3] - 3) <= bound).all()
    assert (y.runs[:, [0, 3]] == 1).all()
