"""Quantized bases: each error under its derived bound, each rounding one, other libraries' bits."""

import math
import weakref
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import mpmath
import numpy as np
import pytest
from calculus import GRADIENT, derivative, record_worst, relative_error, same_bits
from extras import optional
from hypothesis import given
from hypothesis import strategies as st
from marks import examples

from minilora.spec import quantization
from minilora.spec.lora import lora_linear, merge_weight
from minilora.spec.ops import linear
from minilora.spec.quantization import (
    SCHEMES,
    Quantized,
    dequantize,
    dequantize_dynamic,
    dynamic_values,
    from_gguf,
    gguf_bytes,
    merge_errors,
    merge_onto_dequantized,
    merge_onto_original,
    nearest,
    nf4_absmax,
    nf4_values,
    norm,
    pack,
    qlora_linear,
    quantize,
    quantize_affine,
    quantize_dynamic,
    quantize_nf4,
    requantize,
    round_even,
    unpack,
)

FEW = examples(5)
F32 = np.float32
U = 2.0**-24  # the unit roundoff of float32
FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
AFFINE = ("int8", "int8-symmetric", "int4", "int4-symmetric")
GGUF = ("q8_0", "q4_0", "q4_1")
NF4 = ("nf4", "nf4-double")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def test_these_are_all_the_schemes():
    assert set(SCHEMES) == {*AFFINE, *GGUF, *NF4}


def weights(seed, shape=(6, 128), dtype=np.float32):
    """Rows large and small, of one sign, with zeros, with a spike: what is easily got wrong."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3, (shape[0], 1))
    W[1] = abs(W[1])
    W[2, :64] = 0
    W[3, 5] *= 100
    W[4] = -abs(W[4])
    return W.astype(dtype)


# The laws of the schemes: |w - w̃| under what their docstrings say.


def rounded_to(dtype, v):
    """How far rounding to the dtype can move what became v: u of it, or half its least number."""
    if dtype == F32:
        return 0.0
    info = ml_dtypes.finfo(dtype)
    u = float(info.eps) / 2
    return abs(v) * u / (1 - u) + float(info.smallest_subnormal) / 2


def affine_bound(W, q):
    bits = 4 if q.scheme.startswith("int4") else 8
    scale = q.constants["scale"].astype(float).repeat(q.block, -1)
    return scale.reshape(q.shape) * (0.5 + 6 * U * (2**bits - 1))


def half(v):
    """How far float16, which has 11 bits above 2⁻¹⁴, is from a constant that float32 rounded."""
    return np.maximum(abs(v) * 2.0**-11, 2.0**-25) * (1 + 4 * U)


def gguf_bound(W, q):
    """From W alone, in float64."""
    w = W.astype(F32).astype(float).reshape(len(W), -1, 32)
    if q.scheme == "q8_0":
        d = abs(w).max(-1, keepdims=True) / 127
        bound = d * (0.5 + 255 * U) + 127 * half(d) + 0 * w
    elif q.scheme == "q4_1":
        m = w.min(-1, keepdims=True)
        d = (w.max(-1, keepdims=True) - m) / 15
        found = abs(dequantize(q).astype(float).reshape(w.shape))
        bound = d * (0.5 + 62 * U) + 15 * half(d) + half(m) + U * found / (1 - U)
    else:
        d = np.take_along_axis(w, abs(w).argmax(-1)[..., None], -1) / -8
        v = np.divide(w, d, out=np.zeros_like(w), where=d != 0)
        bound = abs(d) * (np.maximum(0.5, v - 7) + 34 * U) + 8 * half(d)
    return bound.reshape(W.shape)


def dynamic_bound(absmax, points):
    t = dynamic_values().astype(float)
    gap = max(np.diff(t).max() / 2, 1 + t[0])  # the map ends short of -1
    return absmax.astype(float) * (gap + (1 / (points - 1) if points else 0) + 12 * U)


def nf4_bound(W, q):
    w = np.zeros(-(-W.size // q.block) * q.block)
    w[: W.size] = W.astype(F32).astype(float).ravel()
    absmax = abs(w.reshape(-1, q.block)).max(-1)
    bound = absmax * (np.diff(nf4_values().astype(float)).max() / 2 + 4 * U)
    if q.scheme == "nf4-double":
        nested = q.constants["nested"].repeat(256)[: absmax.size]
        expanded = abs(nf4_absmax(q).astype(float))
        # Two more roundings: of absmax - offset, and of the sum that gives it back.
        bound = bound + (dynamic_bound(nested, 2**16) + nested * U + expanded * U) * (1 + 4 * U)
    return bound.repeat(q.block)[: W.size].reshape(W.shape)


BOUND = (
    dict.fromkeys(AFFINE, affine_bound)
    | dict.fromkeys(GGUF, gguf_bound)
    | dict.fromkeys(NF4, nf4_bound)
)


def within_its_bound(W, q):
    """The greatest error as a share of its bound, which a right scheme keeps at 1 or below."""
    found = dequantize(q)
    error = abs(W.astype(float) - found.astype(float))
    bound = BOUND[q.scheme](W, q) + rounded_to(q.dtype, found.astype(float))
    share = np.divide(error, bound, out=np.where(error > 0, np.inf, 0.0), where=bound > 0)
    return float(share.max())


@every_scheme
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@FEW
@given(seed=st.integers(0, 2**32 - 1))
def test_no_entry_is_off_by_more_than_the_bound_of_its_scheme(scheme, dtype, seed):
    W = weights(seed, dtype=dtype)
    q = quantize(W, scheme)
    share = within_its_bound(W, q)
    record_worst(f"quantized: error over its bound, {scheme}", share)
    assert share <= 1
    assert dequantize(q).dtype == (F32 if scheme in GGUF else dtype)


def swapped(q):
    """The low half of each byte first."""
    return replace(q, codes=q.codes >> 4 | q.codes << 4)


def of_the_next_block(name):
    return lambda q: replace(
        q, constants=q.constants | {name: np.roll(q.constants[name], 1, axis=0)}
    )


def without(name):
    return lambda q: replace(q, constants=q.constants | {name: np.zeros_like(q.constants[name])})


WRONG = [
    ("int8", of_the_next_block("scale")),
    ("int8", without("zero")),
    ("int8-symmetric", lambda q: replace(q, scheme="int8", constants={**q.constants, "zero": 127})),
    ("int4", swapped),
    ("int4", lambda q: replace(q, constants=q.constants | {"zero": q.constants["zero"] + 1})),
    ("int4-symmetric", swapped),
    ("q8_0", of_the_next_block("d")),
    ("q8_0", lambda q: replace(q, codes=q.codes + (q.codes < 0))),
    ("q4_0", swapped),
    ("q4_0", of_the_next_block("d")),
    ("q4_0", lambda q: replace(q, codes=q.codes | 0x11)),
    ("q4_1", swapped),
    ("q4_1", without("m")),
    ("nf4", swapped),
    ("nf4", of_the_next_block("absmax")),
    ("nf4-double", of_the_next_block("absmax")),
    ("nf4-double", without("offset")),
    ("nf4-double", lambda q: replace(q, codes=q.codes ^ 0x11)),
]


@pytest.mark.parametrize(("scheme", "spoil"), WRONG)
def test_a_wrong_layout_or_constant_breaks_the_bound(scheme, spoil):
    W = weights(0)
    assert within_its_bound(W, quantize(W, scheme)) <= 1
    assert within_its_bound(W, spoil(quantize(W, scheme))) > 1


@pytest.mark.parametrize("scheme", ["q4_0", "q8_0", *NF4[:1]])
@FEW
@given(seed=st.integers(0, 2**32 - 1))
def test_quantizing_what_was_dequantized_changes_no_number(scheme, seed):
    """The entry that fixes a block's scale has a code of its own, so that it is met exactly."""
    q = quantize(weights(seed), scheme)
    assert (dequantize(requantize(q, dequantize(q))) == dequantize(q)).all()
    if scheme == "nf4":
        blocks = quantize(weights(seed), scheme, 32), quantize(weights(seed), scheme, 128)
        assert all(requantize(b, weights(seed)).block == b.block for b in blocks)
    moved = dequantize(q) * F32(1.01)
    assert not (dequantize(requantize(q, moved)) == dequantize(q)).all()


def fractions(array):
    return np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(array)


@pytest.mark.parametrize("scheme", AFFINE)
@FEW
@given(numbers=st.lists(st.integers(-99, 99), min_size=16, max_size=16))
def test_in_fractions_an_affine_entry_is_off_by_half_a_step_at_most(scheme, numbers):
    W = np.array([Fraction(n, 7) for n in numbers], object).reshape(2, 8)
    q = quantize(W, scheme, 4)
    found = dequantize(q)
    assert all(isinstance(v, Fraction) for v in found.ravel())
    scale = q.constants["scale"].repeat(4, -1).reshape(2, 8)
    assert (2 * abs(W - found) <= scale).all()
    assert all(f == 0 for w, f in zip(W.ravel(), found.ravel(), strict=True) if w == 0)
    coarser = replace(q, constants=q.constants | {"scale": q.constants["scale"] * 2})
    assert (W == 0).all() or not (2 * abs(W - dequantize(coarser)) <= scale).all()


def test_a_tie_of_the_affine_schemes_goes_to_the_even_number():
    W = np.array([[Fraction(n, 2) for n in (0, 1, 3, 5, 7, 14, -1, -14)]], object)
    q = quantize(W, "int4-symmetric", 8)
    assert q.constants["scale"].item() == 1
    codes = unpack(q.codes).astype(int) - 8
    assert codes.tolist() == [0, 0, 2, 2, 4, 7, 0, -7]
    assert same_bits(quantize(W.astype(float), "int4-symmetric", 8).codes, q.codes)
    away = [math.floor(abs(w) + Fraction(1, 2)) * (1 if w > 0 else -1) for w in W.ravel()]
    assert codes.tolist() != away
    for numbers in (W.ravel(), W.ravel().astype(float)):
        assert round_even(numbers).tolist() == [0, 0, 2, 2, 4, 7, 0, -7]


def test_an_affine_group_lies_along_the_input():
    W = np.repeat([[1.0, 1.0, 9.0, 9.0]], 2, 0)
    q = quantize_affine(W, bits=8, block=2)
    assert q.constants["scale"].ravel().tolist() == [1 / 255, 9 / 255] * 2
    columns = quantize_affine(np.ascontiguousarray(W.T), bits=8, block=2)
    assert columns.constants["scale"].ravel().tolist() == [1 / 255] * 2 + [9 / 255] * 2


@FEW
@given(codes=st.lists(st.integers(0, 15), min_size=2, max_size=20).filter(lambda c: not len(c) % 2))
def test_the_first_of_two_codes_lies_in_the_high_half(codes):
    codes = np.array(codes, np.uint8)
    p = pack(codes)
    assert p.tolist() == [16 * int(a) + int(b) for a, b in codes.reshape(-1, 2)]
    assert same_bits(unpack(p), codes)
    assert not same_bits(pack(np.array([1, 2], np.uint8)), np.array([0x21], np.uint8))


def exactly(q):
    """W̃ in fractions, by the equation and without a rounding; {name: of each entry}."""
    kept = {name: fractions(np.asarray(v, float)) for name, v in q.constants.items()}
    if q.scheme == "nf4":
        codes = np.stack([q.codes // 16, q.codes % 16], 1).ravel()
        return fractions(nf4_values())[codes] * kept["absmax"].repeat(q.block)
    if q.scheme == "q8_0":
        codes = q.codes.astype(int)
    else:
        codes = np.concatenate([q.codes % 16, q.codes // 16], -1).astype(int)
    d = kept["d"]
    offset = {"q8_0": 0, "q4_0": -8 * d, "q4_1": kept.get("m")}[q.scheme]
    return (d * codes.astype(object) + offset).ravel()


@pytest.mark.parametrize("scheme", [*GGUF, "nf4"])
def test_dequantizing_rounds_once_at_most(scheme):
    q = quantize(weights(1, (6, 64)), scheme)
    found, exact = dequantize(q).ravel(), exactly(q)
    # Each exact number has few enough bits for float64, so that only the cast to float32 rounds.
    assert all(Fraction(float(v)) == v for v in exact)
    assert (found == exact.astype(float).astype(F32)).all()
    if scheme in ("q8_0", "q4_0"):
        assert all(Fraction(float(f)) == v for f, v in zip(found, exact, strict=True))
    assert not (found == exact.astype(float).astype(np.float16)).all()


def test_the_values_of_nf4_are_the_quantiles_to_forty_digits():
    """float32's spacing is far wider than ndtri's error: 40 digits round to the same numbers."""
    with mpmath.workdps(40):
        found = set()
        for points, sign in ((9, 1), (8, -1)):
            for p in quantization._spaced(0.9677083, 0.5, points)[:-1]:
                found.add(
                    sign * F32(float(mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(float(p)) - 1)))
                )
    values = np.array(sorted({*found, F32(0)}), F32)
    assert same_bits(values / values[-1], nf4_values())
    assert len(values) == 16
    assert not same_bits((values.astype(float) / values[-1]).astype(F32)[::-1], nf4_values())


def test_a_value_between_two_is_given_to_the_nearest_and_a_tie_to_the_lower():
    t = np.array([-1, 0, 0.5, 1], F32)
    v = np.array([-1, -0.51, -0.5, -0.49, 0.25, 0.2500001, 0.75, 2], F32)
    assert nearest(v, t).tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    for values in (nf4_values(), dynamic_values()):
        assert (np.diff(values) > 0).all()
        assert nearest(values, values).tolist() == list(range(len(values)))
        assert nearest(values[:-1], values[1:]).tolist() != list(range(len(values) - 1))


@pytest.mark.parametrize("points", [2**16, None])
@FEW
@given(seed=st.integers(0, 2**32 - 1))
def test_the_dynamic_map_is_within_its_bound(points, seed):
    rng = np.random.default_rng(seed)
    v = (rng.standard_normal(300) * 10.0 ** rng.integers(-6, 1, 300)).astype(F32)
    codes, absmax = quantize_dynamic(v, points=points)
    bound = dynamic_bound(absmax, points).repeat(256)[:300]
    assert (abs(v - dequantize_dynamic(codes, absmax).astype(float)) <= bound).all()
    assert not (abs(v - dequantize_dynamic(codes, absmax[::-1] * 3).astype(float)) <= bound).all()


def test_only_the_table_of_points_moves_what_is_nearly_zero():
    v = np.array([0, 1e-6, 1], F32)
    for points, wanted in ((None, [0, 5.5e-7, 1]), (2**16, [2.125e-5, 2.125e-5, 1])):
        codes, absmax = quantize_dynamic(v, points=points)
        assert absmax.tolist() == [1]
        assert codes.tolist() == nearest(np.array(wanted, F32), dynamic_values()).tolist()


# Arrays that stay as they are.


@every_scheme
def test_frozen_codes_keep_their_bits(scheme):
    W = weights(0)
    q = quantize(W, scheme)
    for array in (q.codes, *q.constants.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(TypeError):
        q.constants["other"] = W
    with pytest.raises(AttributeError):
        q.codes = W
    assert same_bits(W, weights(0))
    assert same_bits(dequantize(q), dequantize(q))


def test_whoever_hands_in_an_array_may_go_on_writing_it():
    codes = np.zeros(4, np.uint8)
    q = Quantized("nf4", (2, 4), np.dtype(F32), 8, codes, {"absmax": np.ones(1, F32)})
    codes[0] = 1
    assert q.codes[0] == 1
    assert not q.codes.flags.writeable


def test_the_bits_of_an_entry_are_those_of_the_codes_and_the_constants():
    W = weights(0, (64, 256))
    bits = {scheme: quantize(W, scheme).bits for scheme in SCHEMES}
    assert bits["q4_0"] == 4 + 16 / 32
    assert bits["q4_1"] == 4 + 32 / 32
    assert bits["q8_0"] == 8 + 16 / 32
    assert bits["int4"] == 4 + 40 / 64
    assert bits["int8-symmetric"] == 8 + 32 / 64
    assert bits["nf4"] == 4 + 32 / 64
    assert bits["nf4-double"] == 4 + 8 / 64 + 32 / (64 * 256) + 32 / W.size


# LoRA beside a quantized weight.


def layer(scheme="nf4", dtype=np.float64, seed=0, m=6, n=64, r=2, t=3):
    rng = np.random.default_rng(seed)
    q = quantize(weights(seed, (m, n)), scheme)
    x, b, A, B, K, dy = (
        rng.standard_normal(shape).astype(dtype)
        for shape in ((n, t), (m, 1), (r, n), (m, r), (n, t), (m, t))
    )
    return {"x": x, "q": q, "b": b, "A": A, "B": B, "s": 1.5, "K": K}, dy


@every_scheme
def test_it_is_lora_on_the_dequantized_weight_bit_for_bit(scheme):
    for dtype in (np.float64, np.float32):
        given, dy = layer(scheme, dtype)
        y, back = qlora_linear(**given)
        expanded = {name: v for name, v in given.items() if name != "q"}
        wanted, wanted_back = lora_linear(W=dequantize(given["q"]), **expanded)
        assert same_bits(y, wanted)
        assert y.dtype == dtype
        assert all(same_bits(g, w) for g, w in zip(back(dy), wanted_back(dy), strict=True))
        W = weights(0, (6, 64))
        assert not same_bits(y, lora_linear(W=W, **expanded)[0])


@pytest.mark.parametrize("scheme", ["int4", "q4_1", "nf4-double"])
def test_its_gradients_are_those_of_a_complex_step(scheme):
    given, dy = layer(scheme, n=64, t=2)
    point = {name: given[name] for name in ("x", "A", "B")}
    wanted = derivative(lambda p: (dy[:, :2] * qlora_linear(**given | p)[0]).sum(), point)
    _, back = qlora_linear(**given)
    found = dict(zip(point, back(dy[:, :2]), strict=True))
    for name, want in wanted.items():
        error = relative_error(found[name], want)
        record_worst(f"qlora_linear: d{name}", error)
        assert error < GRADIENT
        assert relative_error(found[name] * (1 + 1e-12), want) > GRADIENT


def test_in_fractions_it_is_the_merged_weight_and_the_original_is_another_function():
    rng = np.random.default_rng(0)

    def rational(*shape):
        return np.vectorize(lambda n: Fraction(int(n), 7), otypes=[object])(
            rng.integers(-9, 10, shape)
        )

    x, W, b, A, B = (rational(*s) for s in ((8, 3), (4, 8), (4, 1), (2, 8), (4, 2)))
    s, dy, q = Fraction(7, 3), rational(4, 3), quantize(W, "int4", 4)
    y, back = qlora_linear(x, q, b, A, B, s)
    dx, dA, dB = back(dy)
    merged = merge_onto_dequantized(q, A, B, s)
    assert (linear(x, merged, b)[0] == y).all()
    assert (dx == merged.T @ dy).all()
    assert (B.T @ dB == dA @ A.T).all()
    other = linear(x, merge_onto_original(W, A, B, s, object), b)[0]
    assert (other - y == (W - dequantize(q)) @ x).all()
    assert not (other == y).any()


@pytest.mark.parametrize("keeps", [False, True])
def test_between_forward_and_back_no_expanded_weight_is_held(monkeypatch, keeps):
    expanded, right = [], quantization._expanded

    def watched(*arguments):
        W = right(*arguments)
        expanded.append(weakref.ref(W))
        return W

    monkeypatch.setattr(quantization, "_expanded", watched)
    given, dy = layer()
    if keeps:  # LoRA on the expanded weight, which its back holds
        given["W"] = watched(given.pop("q"), given["A"])
    _, back = (lora_linear if keeps else qlora_linear)(**given)
    given.clear()
    assert [ref() is not None for ref in expanded] == [keeps]
    first, second = back(dy), back(dy)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    assert len(expanded) == (1 if keeps else 3)


# What a merge costs.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_merge_is_one_rounding_of_merge_weight(dtype):
    given, _ = layer(dtype=F32)
    A, B, s, q = (given[name] for name in ("A", "B", "s", "q"))
    W = weights(0, (6, 64), dtype)
    found = merge_onto_original(W, A, B, s, dtype)
    assert same_bits(found, merge_weight(W.astype(F32), A, B, s).astype(dtype))
    assert same_bits(merge_onto_dequantized(q, A, B, s), merge_weight(dequantize(q), A, B, s))
    half = ml_dtypes.bfloat16
    twice = (W.astype(F32) + (s * (B @ A)).astype(half).astype(F32)).astype(dtype)
    assert not same_bits(found, twice)


@every_scheme
def test_what_each_merge_costs_is_measured_against_what_was_trained(scheme):
    W, rng = weights(0, (6, 128), ml_dtypes.bfloat16), np.random.default_rng(0)
    q = quantize(W, scheme)
    A, B = (rng.standard_normal(s).astype(F32) for s in ((2, 128), (6, 2)))
    errors = merge_errors(W, q, A, B, 0.5)
    trained = dequantize(q).astype(float) + 0.5 * (B.astype(float) @ A.astype(float))
    size = norm(trained)

    # One rounding of each entry: at most u of it, and so of the norm.
    half = ml_dtypes.bfloat16
    assert 0 < errors["onto dequantized"] <= float(ml_dtypes.finfo(half).eps) / 2
    assert errors["onto dequantized"] == norm(trained.astype(half).astype(float) - trained) / size
    onto_original = merge_onto_original(W, A, B, 0.5, half).astype(float)
    assert errors["onto original"] == norm(onto_original - trained) / size
    assert errors["onto original"] > errors["onto dequantized"]
    again = quantize(trained.astype(q.dtype), scheme)
    assert errors["re-quantized"] == norm(dequantize(again) - trained) / size
    bound = BOUND[scheme](trained.astype(q.dtype), again)
    u = 2.0**-8 if q.dtype != F32 else U  # what is quantized again is rounded before, and after
    assert errors["re-quantized"] * size <= norm(bound) + 3 * u * size
    # W is off from W̃ by what quantizing costs: the triangle inequality, and one rounding.
    assert errors["onto original"] * size <= norm(BOUND[scheme](W, q)) + 3 * 2.0**-8 * size
    # Without an adapter there is nothing to lose but roundings.
    none = merge_errors(W, q, A, 0 * B, 0.5)
    assert none["adapter"] == 0
    assert none["onto original"] == norm(W.astype(float) - dequantize(q)) / norm(dequantize(q))


def test_requantizing_can_lose_all_that_was_trained():
    """Each entry of s B A is under half the distance to the next value, and ‖s B A‖ is all lost."""
    W = np.resize(np.array([-8, -3, 2, 5], F32), (4, 32))
    q = quantize(W, "q4_0")
    A, B = np.full((1, 32), F32(0.25)), np.ones((4, 1), F32)
    B[:, 0] = [1, -1, 1, -1]
    A[0, ::4] = 0  # the entries that fix the scales stay
    errors = merge_errors(W, q, A, B, 1)
    assert errors["re-quantized"] == errors["adapter"] > 0
    assert errors["onto original"] == errors["onto dequantized"] == 0
    larger = merge_errors(W, q, A * 4, B, 1)
    assert larger["re-quantized"] == 0 < larger["adapter"]


def test_the_norm_is_the_root_of_the_sum_of_squares():
    assert norm(np.array([[3, 0], [0, 4]], ml_dtypes.bfloat16)) == 5
    assert norm(np.full((1, 2), 300, np.float16)) == norm(np.full((1, 2), 300.0))  # no overflow


# What is refused.


@every_scheme
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_is_refused_with_its_place(scheme, value):
    W = weights(0)
    W[3, 7] = value
    with pytest.raises(ValueError, match=rf"W\[3, 7\] is {value}: expected finite numbers"):
        quantize(W, scheme)


@pytest.mark.parametrize("scheme", [*AFFINE, *GGUF])
def test_a_row_must_be_whole_blocks_where_the_scheme_has_no_short_one(scheme):
    with pytest.raises(ValueError, match=r"rows of 80 entries: expected a multiple of the block"):
        quantize(weights(0, (6, 80)), scheme)
    quantize(weights(0, (6, 64)), scheme)


def test_what_is_wrong_with_a_weight_or_a_scheme_is_said():
    W = weights(0)
    with pytest.raises(ValueError, match=r"scheme 'q4': expected one of int8, .*nf4-double"):
        quantize(W, "q4")
    with pytest.raises(ValueError, match="block of 64: expected 32, which q4_0 fixes"):
        quantize(W, "q4_0", 64)
    assert quantize(W, "q4_0", 32).block == 32
    for block in (0, -64, 3):
        with pytest.raises(ValueError, match=f"block of {block}: expected a positive multiple"):
            quantize(W, "nf4", block)
    for shape in ((5,), (2, 0), (1, 2, 64)):
        with pytest.raises(ValueError, match=r"W of shape .*: expected two dimensions"):
            quantize(np.ones(shape, F32), "nf4")
    for wrong in (W.astype(int), W.astype(complex)):
        with pytest.raises(TypeError, match=r"W of dtype .*: expected real numbers"):
            quantize(wrong, "int8")
    with pytest.raises(TypeError, match="W of dtype object: expected float16, bfloat16, float32"):
        quantize(fractions(W), "nf4")
    with pytest.raises(ValueError, match=r"W reaches 1e\+300: expected what float32 holds"):
        quantize(np.full((1, 64), 1e300), "nf4")
    with pytest.raises(ValueError, match=r"W reaches .*: max - min overflows float32"):
        quantize(np.array([[3e38, -3e38]], F32), "int8", 2)
    for scheme, name in (("q4_0", "d"), ("q8_0", "d"), ("q4_1", "d")):
        with pytest.raises(ValueError, match=rf"{name} = .* in a block: expected what float16"):
            quantize(np.array([[1e8, *[0] * 31]], F32), scheme)
    for number in (1e5, 3e38):
        with pytest.raises(ValueError, match=r"[dm] = .* in a block: expected what float16"):
            quantize(np.array([[number, -number, *[0] * 30]], F32), "q4_1")
    with pytest.raises(ValueError, match="scheme 'nf4': expected q4_0, q4_1 or q8_0"):
        from_gguf(np.zeros((1, 18), np.uint8), "nf4")
    with pytest.raises(ValueError, match=r"expected rows of bytes, 20 for each block of q4_1"):
        from_gguf(np.zeros((1, 18), np.uint8), "q4_1")


# Other libraries.


@pytest.mark.parametrize("scheme", GGUF)
def test_the_bytes_are_those_of_gguf(scheme):
    gguf = optional("gguf")
    kind = gguf.GGMLQuantizationType[scheme.upper()]
    for seed in range(5):
        W = weights(seed, (40, 96))
        W[7, :32] = [0.5, -0.5] * 16  # of equal moduli the first counts
        W[8, 32:64] = np.arange(32) / 2
        W[9, :32] = np.resize([127, 0.5, -1.5, 2.5], 32)  # ties of Q8_0, where d = 1
        W[10, :32] = np.resize([-8, 0.5, -1.5, 2.5], 32)  # and of Q4_0
        W[11, :32] = np.resize([-1, 14, -0.5, 2.5], 32)  # and of Q4_1
        q = quantize(W, scheme)
        data = gguf.quants.quantize(W, kind)
        assert same_bits(gguf_bytes(q), data)
        assert same_bits(dequantize(q), gguf.quants.dequantize(data, kind))
        read = from_gguf(data, scheme)
        assert same_bits(read.codes, q.codes)
        assert read.constants.keys() == q.constants.keys()
        assert same_bits(dequantize(read), dequantize(q))
        if scheme != "q8_0":
            assert not same_bits(gguf_bytes(swapped(q)), data)
        assert not same_bits(gguf_bytes(quantize(-W, scheme)), data)


@pytest.fixture(scope="module")
def torch():
    torch = optional("torch")
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles where rows are odd
        yield torch


@pytest.fixture(scope="module")
def bnb(torch):
    return optional("bitsandbytes")


def tensor(torch, W):
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return torch.from_numpy(W.astype(F32)).to(kind[str(W.dtype)])


def array(t):
    return t.detach().float().numpy()


def peer_constants(state):
    """bitsandbytes' constants by the names that they have here."""
    if not state.nested:
        return {"absmax": state.absmax.numpy()}
    nested = state.state2.absmax.numpy()
    return {"absmax": state.absmax.numpy(), "nested": nested, "offset": state.offset.numpy()}


def test_the_values_are_those_of_bitsandbytes(bnb):
    F = bnb.functional
    assert same_bits(nf4_values(), F.get_4bit_type("nf4", device="cpu").numpy())
    assert same_bits(dynamic_values(), F.create_dynamic_map().numpy())
    uniform = np.linspace(-1, 1, 16, dtype=F32)
    assert not same_bits(uniform, F.get_4bit_type("nf4", device="cpu").numpy())


NORMAL = np.random.default_rng(0).standard_normal
TO_QUANTIZE = [
    weights(1),
    weights(2, (40, 448)),
    *(NORMAL(shape) for shape in ((3, 64), (5, 30), (3, 7), (1, 1))),
    *(np.full(shape, value) for shape in ((2, 64), (1, 5)) for value in (0, -3)),
]


@pytest.mark.parametrize("double", [False, True], ids=NF4)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block", [64, 32])
def test_codes_constants_and_weights_are_those_of_bitsandbytes(torch, bnb, double, dtype, block):
    F = bnb.functional
    for numbers in TO_QUANTIZE:
        W = numbers.astype(dtype)
        codes, state = F.quantize_4bit(
            tensor(torch, W), blocksize=block, quant_type="nf4", compress_statistics=double
        )
        wanted = peer_constants(state)
        q = quantize_nf4(W, block, double, wanted.get("offset"))
        assert same_bits(q.codes, codes.numpy().ravel())
        assert q.constants.keys() == wanted.keys()
        assert all(same_bits(q.constants[name], v) for name, v in wanted.items())
        found = dequantize(q)
        assert found.dtype == dtype
        assert same_bits(found.astype(F32), array(F.dequantize_4bit(codes, state)))
        other = quantize_nf4(W, 2 * block, double, wanted.get("offset"))
        if W.size > 2 * block and np.ptp(numbers):
            assert not same_bits(dequantize(other), found)
            assert not same_bits(swapped(q).codes, codes.numpy().ravel())


def test_no_block_is_divided_by_less_than_the_least(torch, bnb):
    """Where 1 / absmax would overflow, or nearly: numbers below float32's normal range."""
    for size in (1e-37, 2e-39, 1e-44):
        for shape in ((2, 64), (1, 30)):
            W = (size * NORMAL(shape)).astype(F32)
            codes, state = bnb.functional.quantize_4bit(torch.from_numpy(W), quant_type="nf4")
            q = quantize(W, "nf4")
            assert same_bits(q.codes, codes.numpy().ravel())
            assert same_bits(q.constants["absmax"], state.absmax.numpy())
            assert same_bits(q.codes, quantize(W * F32(2**20), "nf4").codes) == (size == 1e-37)


def test_a_short_last_block_is_divided_and_a_whole_one_is_not(torch, bnb):
    """w / absmax and w (1 / absmax) round to two sides of a midpoint: seen in the codes."""
    rng = np.random.default_rng(0)
    middles = (nf4_values()[:-1] + nf4_values()[1:]) / F32(2)
    differ = 0
    for absmax in rng.uniform(0.5, 2, 100).astype(F32):
        W = np.resize(np.concatenate([[absmax], middles * absmax]), (1, 32))
        short, whole = (quantize_nf4(W, block).codes for block in (64, 32))
        differ += not same_bits(short, whole)
        for codes, block in ((short, 64), (whole, 32)):
            peer, _ = bnb.functional.quantize_4bit(
                torch.from_numpy(W), blocksize=block, quant_type="nf4"
            )
            assert same_bits(peer.numpy().ravel(), codes)
    assert differ


def distance(number, exact):
    return abs(Fraction(float(number)) - exact)


def test_the_mean_of_the_blocks_is_the_true_one_rounded_once():
    """In whole fractions no float32 is nearer to it; a sum in float32 loses more."""
    sums_lose = []
    for seed in range(8):
        W = np.random.default_rng(seed).standard_normal((70, 256)).astype(F32)
        absmax = quantize_nf4(W).constants["absmax"]
        mean = sum(Fraction(float(a)) for a in absmax) / absmax.size
        offset = quantize_nf4(W, double=True).constants["offset"]
        beside = [np.nextafter(offset, F32(way)) for way in (0, np.inf)]
        assert distance(offset, mean) <= min(distance(number, mean) for number in beside)
        sums_lose.append(distance(absmax.mean(), mean) > distance(offset, mean))
    assert any(sums_lose)


def test_the_mean_alone_is_rounded_otherwise_by_pytorch(torch, bnb):
    """Any order of n - 1 sums is off by γ(n - 1) of the mean at most, the division by u more."""
    for seed in range(5):
        W = np.random.default_rng(seed).standard_normal((70, 256)).astype(F32)
        _, state = bnb.functional.quantize_4bit(
            torch.from_numpy(W), quant_type="nf4", compress_statistics=True
        )
        q = quantize_nf4(W, double=True)
        n = nf4_absmax(q).size
        bound = n * U / (1 - n * U) + 2 * U  # and ours is rounded too
        error = abs(float(q.constants["offset"]) / state.offset.item() - 1)
        record_worst("quantized: PyTorch's mean, over its bound", error / bound)
        assert error <= bound
        assert abs(float(q.constants["offset"]) / (state.offset.item() * n / (n - 1)) - 1) > bound


def test_where_the_mean_is_exact_double_quantization_needs_no_help(torch, bnb):
    rng = np.random.default_rng(0)
    W = rng.uniform(-1, 1, (64, 256)).astype(F32)
    W[:, ::64] = rng.integers(4, 12, (64, 4)) / 4  # absmax: quarters, 256 of them
    codes, state = bnb.functional.quantize_4bit(
        torch.from_numpy(W), quant_type="nf4", compress_statistics=True
    )
    q = quantize(W, "nf4-double")
    assert same_bits(q.codes, codes.numpy().ravel())
    assert all(same_bits(q.constants[name], v) for name, v in peer_constants(state).items())
    assert same_bits(dequantize(q), bnb.functional.dequantize_4bit(codes, state).numpy())
    moved = quantize_nf4(W, double=True, offset=1.01 * state.offset.numpy())
    assert not same_bits(moved.constants["absmax"], state.absmax.numpy())


def test_the_dynamic_codes_are_those_of_bitsandbytes(torch, bnb):
    rng = np.random.default_rng(0)
    v = (rng.standard_normal(5000) * 10.0 ** rng.integers(-6, 1, 5000)).astype(F32)
    v[256:512] = 0
    codes, state = bnb.functional.quantize_blockwise(torch.from_numpy(v), blocksize=256)
    found, absmax = quantize_dynamic(v)
    assert same_bits(found, codes.numpy())
    assert same_bits(absmax, state.absmax.numpy())
    wanted = bnb.functional.dequantize_blockwise(codes, state).numpy()
    assert same_bits(dequantize_dynamic(found, absmax), wanted)
    assert not same_bits(quantize_dynamic(v, points=None)[0], codes.numpy())


def qlora_of_peft(torch, bnb, W, A, B, double, alpha=3):
    """PEFT's adapter beside bitsandbytes' Linear4bit, with these factors, and its weight here."""
    peft = optional("peft")
    m, n = W.shape
    base = bnb.nn.Linear4bit(
        n, m, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double
    )
    base.weight = bnb.nn.Params4bit(
        torch.from_numpy(W), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    model = torch.nn.Sequential(base.to("cpu"))
    model.is_loaded_in_4bit = True  # by which PEFT knows
    config = peft.LoraConfig(r=len(A), lora_alpha=alpha, target_modules=["0"])
    wrapped = peft.get_peft_model(model, config)
    adapted = wrapped.base_model.model[0]
    adapted.lora_A.default.weight.data = torch.from_numpy(A)
    adapted.lora_B.default.weight.data = torch.from_numpy(B)
    state = base.weight.quant_state
    q = quantize_nf4(W, 64, double, state.offset.numpy() if double else None)
    return wrapped, adapted, q


@pytest.mark.parametrize("double", [False, True], ids=NF4)
def test_it_is_what_peft_trains_beside_linear4bit(torch, bnb, double):
    given, dy = layer(dtype=F32, n=128, m=8)
    given["K"] = None
    W = weights(3, (8, 128))
    wrapped, adapted, q = qlora_of_peft(torch, bnb, W, given["A"], given["B"], double)
    b = array(adapted.base_layer.bias)[:, None]
    assert same_bits(adapted.base_layer.weight.data.numpy().ravel(), q.codes)

    x = torch.from_numpy(given["x"].T.copy()).requires_grad_()
    y = wrapped(x)
    y.backward(torch.from_numpy(dy.T.copy()))
    pair = adapted.lora_A.default.weight.grad, adapted.lora_B.default.weight.grad
    found = array(y).T, array(x.grad).T, *map(array, pair)

    exact = given | {"q": q, "b": b, "s": 1.5}
    wide = {k: v.astype(float) if isinstance(v, np.ndarray) else v for k, v in exact.items()}
    y, back = qlora_linear(**wide)
    wanted = y, *back(dy.astype(float))
    # Sums of products, one in another, in any order: each is off by γ_k at most times the same
    # with every modulus (Higham 2002, section 3.5), k the roundings on the longest way.
    k = sum(given["x"].shape) + len(W) + len(given["A"]) + 4
    moduli = {name: abs(v) if isinstance(v, np.ndarray) else v for name, v in wide.items()}
    moduli["W"] = abs(dequantize(moduli.pop("q")).astype(float))
    y, back = lora_linear(**moduli)
    bounds = [k * U / (1 - k * U) * v for v in (y, *back(abs(dy.astype(float))))]
    for f, w, bound in zip(found, wanted, bounds, strict=True):
        assert (abs(f - w) <= bound).all()
        assert not (abs(f * F32(1.001) - w) <= bound).all()
        record_worst("quantized: PEFT on Linear4bit, over its bound", (abs(f - w) / bound).max())


@pytest.mark.parametrize("double", [False, True], ids=NF4)
def test_peft_merges_onto_the_dequantized_weight_and_quantizes_again(torch, bnb, double):
    """The factors are powers of two: s B A is exact, and the sum is rounded once by both."""
    W = weights(3, (8, 128))
    A = np.resize(np.array([0.5, -0.25, 0.125], F32), (1, 128))
    B = np.resize(np.array([1, -2], F32), (8, 1))
    _, adapted, q = qlora_of_peft(torch, bnb, W, A, B, double, alpha=1)
    with pytest.warns(UserWarning, match="due to rounding errors"):
        adapted.merge()
    weight = adapted.base_layer.weight
    merged = merge_onto_dequantized(q, A, B, 1)
    constants = peer_constants(weight.quant_state)
    again = quantize_nf4(merged, 64, double, constants.get("offset"))
    assert same_bits(again.codes, weight.data.numpy().ravel())
    assert all(same_bits(again.constants[name], v) for name, v in constants.items())
    onto_original = merge_onto_original(W, A, B, 1, F32)
    assert not same_bits(requantize(q, onto_original).codes, again.codes)


@pytest.mark.parametrize("bits", [2, 3, 16])
def test_other_bits_than_four_and_eight_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits {bits}: expected 4 or 8"):
        quantize_affine(np.ones((1, 64)), bits)
