"""Whole models: every gradient by its derivative, every rounding by its bound, and their laws."""

import functools
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from calculus import (
    GRADIENT,
    derivative,
    directional,
    greatest,
    random_like,
    record_worst,
    relative_error,
    same_bits,
)
from hypothesis import given, settings
from mpmath import mpf
from number_systems import Real, Rounded, every_erf, propagated, to_objects, values

import minilora as ml
from minilora import blocks, lora, models, ops
from minilora import strategies as draw

CONFIGS = {
    "Llama": ml.Llama(vocab=11, d=5, layers=2, heads=4, ffn=7, kv_heads=2, head_dim=2, eps=0.1),
    "Llama, tied": ml.Llama(
        vocab=9, d=5, layers=2, heads=3, ffn=7, kv_heads=1, head_dim=2, tied=True, theta=100.0
    ),
    "Qwen2": ml.Llama(
        vocab=11, d=5, layers=2, heads=4, ffn=7, kv_heads=2, head_dim=2, qkv_bias=True
    ),
    "GPT-2": ml.GPT2(vocab=11, d=6, layers=2, heads=3, ffn=7, positions=9, eps=0.1),
    "BERT": ml.Bert(vocab=11, d=6, layers=2, heads=3, ffn=7, positions=9, types=2, classes=4),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
FEW = settings(max_examples=10)
CAUSAL = (ml.Llama, ml.GPT2)


@functools.cache
def case(name, b=3, t=5, p=0.25):
    """Adapters on every projection, dropout, padding on both sides; everything is trained."""
    return draw.draw_model(CONFIGS[name], np.random.default_rng(0), b, t, p=p, everything=True)


def scale_of(name, gradients):
    """What an error is relative to: the greatest entry of the array.

    The bias of a key moves all scores of a query alike, so its gradient is 0, and what is computed
    is rounding alone; it is measured by the gradient of the weight beside it.
    """
    return greatest(gradients[name.replace(".k.bias", ".k.weight")])


def error_of_gradients(model):
    wanted = derivative(lambda W: model.loss(W)[0], model.W)
    found = model.loss()[1](1.0)
    assert found.keys() == wanted.keys()
    return max(relative_error(found[k], wanted[k], scale_of(k, wanted)) for k in wanted)


@EVERY
def test_every_gradient_is_the_derivative_entry_by_entry(name):
    error = error_of_gradients(case(name))
    record_worst(f"1. complex step, each entry, {name}", error)
    assert error <= GRADIENT


def directional_error(model, rng):
    v = random_like(rng, model.W)
    gradients = model.loss()[1](1.0)
    terms = np.concatenate([(g * v[k]).ravel() for k, g in gradients.items()])
    derivative = directional(lambda W: model.loss(W)[0], model.W, v)
    return abs(derivative - terms.sum()) / abs(terms).sum()


@FEW
@given(model=draw.model_cases(everything=True), rng=draw.generators())
def test_every_drawn_model_has_the_derivative_along_a_random_direction(model, rng):
    error = directional_error(model, rng)
    record_worst("1. complex step, along a direction through the whole model", error)
    assert error <= GRADIENT


def scaled(factor):
    """lora_linear with dB off by a factor."""

    def implementation(*arguments):
        y, back = ml.lora_linear(*arguments)

        def wrong(dy):
            dx, dA, dB = back(dy)
            return dx, dA, dB * factor

        return y, wrong

    return implementation


def test_a_gradient_off_in_the_twelfth_digit_is_noticed(monkeypatch):
    monkeypatch.setattr(lora, "lora_linear", scaled(1 + 1e-12))
    assert error_of_gradients(case("Llama", 2, 3)) > GRADIENT


def asymmetry(model, rng):
    """|u·Hv - v·Hu| over the sum of moduli, H v by a complex step through ``back``."""
    u, v = (random_like(rng, model.W) for _ in "uv")
    Hu, Hv = (directional(lambda W: model.loss(W)[1](1.0), model.W, w) for w in (u, v))
    uHv, vHu = (np.concatenate([(a[k] * b[k]).ravel() for k in a]) for a, b in ((u, Hv), (v, Hu)))
    return abs(uHv.sum() - vHu.sum()) / max(abs(uHv).sum(), abs(vHu).sum())


@FEW
@given(model=draw.model_cases(everything=True), rng=draw.generators())
def test_the_hessian_is_symmetric(model, rng):
    error = asymmetry(model, rng)
    record_worst("2. Hessian's symmetry, whole models", error)
    assert error <= GRADIENT


def test_what_is_no_gradient_has_no_symmetric_derivative(monkeypatch):
    monkeypatch.setattr(lora, "lora_linear", scaled(1 + 1e-9))
    assert asymmetry(case("GPT-2"), np.random.default_rng(0)) > GRADIENT


def converted(model, convert):
    """The model with all of its parameters and dropout multipliers converted."""
    W = {name: convert(w) for name, w in model.W.items()}
    keep = {at: convert(K) for at, K in model.tuning.keep.items()}
    return replace(model, W=W, tuning=replace(model.tuning, keep=keep))


def rounded_tables(positions, d, theta, dtype):
    """RoPE's tables with float64's error: see test_ops.error_of_tables."""
    tables = ops.rope_tables(positions, d, theta, np.longdouble)
    relative = (2 * np.log(theta) + 9) * Rounded.FUNCTION / 8
    error = float(positions.max()) * relative + Rounded.FUNCTION
    return tuple(to_objects(table, lambda v: Rounded(v, error)) for table in tables)


def exact_tables(positions, d, theta, dtype):
    frequencies = [mpf(theta) ** (-mpf(2 * i) / d) for i in range(d // 2)]
    angles = np.array([[[[p * f for p in row] for f in frequencies]] for row in positions.tolist()])
    return tuple(
        np.vectorize(lambda a, f=f: Real(f(a)), otypes=[object])(angles)
        for f in (mpmath.cos, mpmath.sin)
    )


@pytest.fixture
def any_number(monkeypatch):
    """Let the models run on long doubles and on numbers of Python's."""
    monkeypatch.setattr(ops, "erf", every_erf)

    def tables(number):
        monkeypatch.setattr(models, "rope_tables", number)

    return tables


def loss_and_gradients(model, dL=1.0):
    L, back = model.loss()
    return {"loss": np.asarray(L)} | back(dL)


def groups(names):
    """The loss; all gradients; those of each kind of parameter."""
    kinds = sorted({name.rsplit(".")[-1] for name in names})
    return [[name for name in names if name.endswith(kind)] for kind in (*kinds, "")]


def shares_of_bounds(found, rounded, rng):
    """For the loss, each kind of parameter, and all: |Σ v (found - exact)| over its bound."""
    for names in groups(found):
        v = np.concatenate([rng.standard_normal(found[k].size) for k in names])
        exact, float64 = (
            np.concatenate([f(answers[k]).ravel() for k in names])
            for f, answers in ((values, rounded), (np.asarray, found))
        )
        numbers = np.concatenate([rounded[k].ravel() for k in names])
        yield abs(float((v * (float64 - exact)).sum())) / propagated(numbers, v)


@EVERY
def test_float64_is_as_near_to_long_double_as_rounding_allows(name, any_number):
    model = case(name, 2, 4)
    found = loss_and_gradients(model)
    as_float32 = {k: g.astype(np.float32).astype(float) for k, g in found.items()}
    any_number(rounded_tables)
    rounded = loss_and_gradients(converted(model, lambda a: to_objects(a, Rounded)))
    worst = max(shares_of_bounds(found, rounded, np.random.default_rng(0)))
    record_worst("4. error of float64 / its bound, whole models", worst)
    assert worst <= 1
    assert min(shares_of_bounds(as_float32, rounded, np.random.default_rng(0))) > 1

    any_number(ops.rope_tables)
    wide = loss_and_gradients(converted(model, lambda a: a.astype(np.longdouble)))
    assert all(answer.dtype == np.longdouble for answer in wide.values())
    finer = np.finfo(np.longdouble).eps / np.finfo(np.float64).eps
    # Two runs in long double, each off by its own bound.
    assert max(shares_of_bounds(wide, rounded, np.random.default_rng(1))) <= 2 * finer


@pytest.mark.parametrize("name", ["Qwen2", "GPT-2", "BERT"])
def test_40_digits_give_the_same_loss_and_gradients(name, any_number):
    c = replace(CONFIGS[name], layers=1)
    model = draw.draw_model(c, np.random.default_rng(1), 2, 3, everything=True)
    found = loss_and_gradients(model)
    any_number(exact_tables)
    digits = converted(model, lambda a: to_objects(a, Real))
    wanted = {k: np.asarray(g) for k, g in loss_and_gradients(digits, dL=1).items()}
    as_floats = {k: np.vectorize(float)(g) for k, g in wanted.items()}
    error = max(relative_error(found[k], as_floats[k], scale_of(k, as_floats)) for k in as_floats)
    record_worst("4. float64 by 40 digits, small models", error)
    assert error <= GRADIENT

    # A central difference in 40 digits is right to h², about 26 digits: no complex numbers here.
    v = random_like(np.random.default_rng(2), model.W)
    h = mpf(10) ** -13
    ahead, behind = (
        digits.loss({k: w + v[k] * Real(sign * h) for k, w in digits.W.items()})[0]
        for sign in (1, -1)
    )
    slope = (ahead - behind).v / (2 * h)
    terms = [g * float(d) for k in model.W for g, d in zip(wanted[k].ravel(), v[k].ravel())]
    error = abs(slope - mpmath.fsum(t.v for t in terms)) / mpmath.fsum(abs(t.v) for t in terms)
    record_worst("4. central difference in 40 digits, small models", error)
    assert error <= GRADIENT
