"""The primitive equations: their values by the textbook, their gradients by their derivatives."""

from dataclasses import replace

import mpmath
import numpy as np
import pytest
from calculus import (
    COMPLEX_ERF,
    GRADIENT,
    UNIT_ROUNDOFF,
    derivative,
    directional,
    greatest,
    random_like,
    record_worst,
    relative_error,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples
from mpmath import mpf
from number_systems import Rounded, every_erf, propagated, to_objects, values

from minilora import testing as draw
from minilora.spec import ops, variants
from minilora.verify.properties import derivatives

EVERY = pytest.mark.parametrize("name", draw.OPERATIONS)
FEW = examples(3)


def with_norm_held(operation):
    """DoRA as its ``back`` sees it; every other operation as it is."""
    held = operation.f is variants.dora_linear
    return replace(operation, f=derivatives.constant_norm_linear) if held else operation


def contracted(operation):
    """Σ dy ∘ y as a function of what varies: its gradient is what ``back(dy)`` gives."""
    return lambda varying: (operation.dy * operation(**varying)[0]).sum()


def error_of_gradients(operation):
    """How far ``back`` is from the derivative, relative to the gradient or, if that is less, dy."""
    _, back = operation()
    found = operation.gradients(back, operation.dy)
    wanted = derivative(contracted(with_norm_held(operation)), operation.varying)
    floor = greatest(operation.dy)
    return max(
        relative_error(found[name], want, max(greatest(want), floor))
        for name, want in wanted.items()
    )


@EVERY
@FEW
@given(drawn=draw.operations())
def test_back_is_the_derivative_of_every_entry(name, drawn):
    error = error_of_gradients(drawn[name])
    record_worst("1. complex step, each entry, primitive equations", error)
    assert error <= GRADIENT


WRONG = {
    "linear": lambda x, W, b: (W @ x + b, lambda dy: W.T @ dy * (1 + 1e-12)),
    "tanh": lambda x: (np.tanh(x), lambda dy: (1 - np.tanh(x)) * dy),
    "rmsnorm": lambda x, w, eps: (
        ops.rmsnorm(x, w, eps)[0],
        lambda dy: (w * dy / np.sqrt((x * x).mean(0) + eps), ops.rmsnorm(x, w, eps)[1](dy)[1]),
    ),
    "rope": lambda x, cos, sin: (ops.rope(x, cos, sin)[0], ops.rope(x, cos, -sin)[1]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_back_is_not_the_derivative(name):
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)[name]
    assert error_of_gradients(replace(drawn, f=WRONG[name])) > GRADIENT


def asymmetry(operation, rng):
    """|u·Hv - v·Hu| over the sum of moduli, H v by a complex step through ``back``."""
    operation = with_norm_held(operation)
    u, v = (random_like(rng, operation.varying) for _ in "uv")

    def gradients(varying):
        _, back = operation(**varying)
        return operation.gradients(back, operation.dy)

    Hu, Hv = (directional(gradients, operation.varying, w) for w in (u, v))
    uHv, vHu = (np.concatenate([(a[k] * b[k]).ravel() for k in a]) for a, b in ((u, Hv), (v, Hu)))
    scale = max(abs(uHv).sum(), abs(vHu).sum())
    return abs(uHv.sum() - vHu.sum()) / scale if scale else 0.0


@EVERY
@FEW
@given(drawn=draw.operations(), rng=draw.generators())
def test_the_derivative_of_back_is_symmetric(name, drawn, rng):
    error = asymmetry(drawn[name], rng)
    record_worst("2. Hessian's symmetry, primitive equations", error)
    assert error <= GRADIENT


def test_the_norm_that_dora_holds_would_be_seen_if_it_were_not_held(monkeypatch):
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)["dora_linear"]
    assert error_of_gradients(drawn) <= GRADIENT
    monkeypatch.setattr(derivatives, "constant_norm_linear", variants.dora_linear)
    assert error_of_gradients(drawn) > GRADIENT
    assert asymmetry(drawn, np.random.default_rng(1)) > GRADIENT


def test_a_back_that_is_no_gradient_has_no_symmetric_derivative():
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)["rmsnorm"]
    assert asymmetry(replace(drawn, f=WRONG["rmsnorm"]), np.random.default_rng(1)) > GRADIENT


def converted(operation, convert):
    """The same operation with all arrays of real numbers converted."""
    varying, constant = (
        {name: convert(a) for name, a in arguments.items()}
        for arguments in (operation.varying, operation.constant)
    )
    return replace(operation, varying=varying, constant=constant, dy=convert(operation.dy))


def in_objects(operation, number):
    return converted(operation, lambda a: to_objects(a, number))


def as_long_double(a):
    return a.astype(np.longdouble) if getattr(a, "dtype", None) == np.float64 else a


def answers(operation):
    """The value and the gradients, by name."""
    y, back = operation()
    return {"y": np.asarray(y)} | operation.gradients(back, operation.dy)


def share_of_bound(found, wanted, rounded, rng):
    """|Σ v (found - wanted)| over its bound, v random: above 1, rounding does not explain it."""
    v = rng.standard_normal(np.shape(found))
    bound = propagated(rounded, v)
    difference = abs(float((v * (found - wanted)).sum()))
    return difference / bound if bound else float(difference > 0)


@EVERY
@FEW
@given(drawn=draw.operations(), rng=draw.generators())
def test_float64_is_as_near_to_long_double_as_rounding_allows(name, drawn, rng):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "erf", every_erf)
        rounded = answers(in_objects(drawn[name], Rounded))
    for argument, found in answers(drawn[name]).items():
        share = share_of_bound(found, values(rounded[argument]), rounded[argument], rng)
        record_worst("4. error of float64 / its bound, primitive equations", share)
        assert share <= 1


def test_scipys_complex_erf_is_off_by_more_than_roundings_and_less_than_its_source_says():
    """Its derivative by a complex step against 40 digits, wherever that is more than u."""
    x = np.linspace(-6, 6, 2001)
    slopes = ops.erf(x + 1j * derivatives.STEP).imag / derivatives.STEP
    with mpmath.workdps(40):
        wanted = [2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-(mpf(v) ** 2)) for v in x.tolist()]
        off = [
            float(abs(mpf(slope) / want - 1)) for slope, want in zip(slopes, wanted, strict=True)
        ]
    record_worst("SciPy's complex erf, over what its source says", max(off) / COMPLEX_ERF)
    assert 8 * UNIT_ROUNDOFF < max(off) <= COMPLEX_ERF


def test_one_rounding_to_float32_exceeds_the_bound():
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)["linear"]
    y = drawn()[0].astype(np.float32).astype(np.float64)
    rounded = in_objects(drawn, Rounded)()[0]
    assert share_of_bound(y, values(rounded), rounded, np.random.default_rng(1)) > 1


@EVERY
@FEW
@given(drawn=draw.operations())
def test_long_double_keeps_its_digits_through_the_same_code(name, drawn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "erf", every_erf)
        found = answers(converted(drawn[name], as_long_double))
        rounded = answers(in_objects(drawn[name], Rounded))
    finer = np.finfo(np.longdouble).eps / np.finfo(np.float64).eps
    for argument, answer in found.items():
        assert answer.dtype == np.longdouble
        # Both sides round, each as float64 would, on long double's finer scale.
        bound = 2 * finer * propagated(rounded[argument], np.ones(answer.shape))
        assert abs((answer - values(rounded[argument])).sum()) <= bound


def dot(a, b):
    return mpmath.fsum(p * q for p, q in zip(a, b, strict=True))


def by_entry(shape, entry):
    y = np.empty(shape, object)
    for index in np.ndindex(*shape):
        y[index] = entry(*index)
    return y


def mean(entries):
    entries = list(entries)
    return mpmath.fsum(entries) / len(entries)


def textbook_norm(x, eps, centre):
    mu = [mean(x[:, j]) if centre else mpf(0) for j in range(x.shape[1])]
    power = [mean((v - mu[j]) ** 2 for v in x[:, j]) for j in range(x.shape[1])]
    return by_entry(x.shape, lambda i, j: (x[i, j] - mu[j]) / mpmath.sqrt(power[j] + eps))


def textbook_linear(x, W, b=None):
    bias = [0] * len(W) if b is None else b[:, 0]
    return by_entry((len(W), x.shape[1]), lambda i, j: dot(W[i], x[:, j]) + bias[i])


def textbook_lora(x, A, B, W, b, s, K=None):
    """The merged matrix, each token with its own: column k of B A counts K[k, j] times."""
    BA = by_entry(W.shape, lambda i, k: s * dot(B[i], A[:, k]))
    factor = np.full(x.shape, mpf(1)) if K is None else K
    columns = [textbook_linear(x[:, [j]], W + BA * factor[:, j], b) for j in range(x.shape[1])]
    return np.concatenate(columns, axis=1)


def textbook_branch(x, W, b, D, K):
    """W x + b + D (K ∘ x)."""
    return textbook_linear(x, W, b) + textbook_linear(x if K is None else x * K, D)


def textbook_product(A, B, s):
    return by_entry((len(B), A.shape[1]), lambda i, k: s * dot(B[i], A[:, k]))


def textbook_norms(V):
    return by_entry((len(V), 1), lambda i, _: mpmath.sqrt(mpmath.fsum(v**2 for v in V[i])))


def textbook_rescaled(x, A, B, magnitude, v, W, b, s, K=None):
    """The matrix rows of norm v have become rows of norm m, all but W x dropped."""
    V = W + textbook_product(A, B, s)
    return textbook_branch(x, W, b, V / v * magnitude - W, K)


def textbook_rescaled_lora(x, A, B, magnitude, v, W, b, s, K=None):
    """W and B A are rescaled as one matrix; dropout acts on what B A is given."""
    y = textbook_branch(x, W / v * magnitude, None, textbook_product(A, B, s) / v * magnitude, K)
    return y if b is None else y + b


def textbook_dora(x, A, B, magnitude, W, b, s, K=None):
    v = textbook_norms(W + textbook_product(A, B, s))
    return textbook_rescaled(x, A, B, magnitude, v, W, b, s, K)


def textbook_vera(x, A, B, lambda_d, lambda_b, W, b, s, K=None):
    D = by_entry(
        W.shape,
        lambda i, k: s * lambda_b[i, 0] * mpmath.fsum(B[i] * lambda_d[:, 0] * A[:, k]),
    )
    return textbook_branch(x, W, b, D, K)


def textbook_adalora(x, A, B, E, W, b, s, K=None):
    """A sum over the components, each a matrix of rank one times its singular value."""
    D = sum(s * E[j, 0] * np.outer(B[:, j], A[j]) for j in range(len(E)))
    return textbook_branch(x, W, b, D, K)


def textbook_convolution(x, W, b, geometry, groups):
    """Output channel by output channel: its kernel over the inputs of its group, zeros outside."""
    m, of_group, *kernel = W.shape
    sizes, _ = geometry.places(x.shape[2:])

    def entry(o, row, *place):
        total = [b[o, 0]]
        for c, *k in np.ndindex(of_group, *kernel):
            at = [
                i * step + j * apart - before
                for i, step, j, apart, (before, _) in zip(
                    place, geometry.stride, k, geometry.dilation, geometry.padding, strict=True
                )
            ]
            if all(0 <= i < n for i, n in zip(at, x.shape[2:], strict=True)):
                channel = o // (m // groups) * of_group + c
                total.append(W[(o, c, *k)] * x[(channel, row, *at)])
        return mpmath.fsum(total)

    return by_entry((m, x.shape[1], *sizes), entry)


def textbook_unfold(x, geometry):
    """A convolution by a kernel that is 1 in a single place, for each place and channel."""
    rows = []
    for c, *k in np.ndindex(len(x), *geometry.kernel):
        W = np.full((1, 1, *geometry.kernel), mpf(0))
        W[(0, 0, *k)] = mpf(1)
        zero = np.full((1, 1), mpf(0))
        rows.append(textbook_convolution(x[[c]], W, zero, geometry, 1).ravel())
    return np.stack(rows)


def textbook_rope(x, cos, sin):
    """The pairs as complex numbers, each times cos + i sin."""
    d = x.shape[2]
    pair = [(i, i + d // 2) for i in range(d // 2)]
    y = np.empty(x.shape, object)
    for b, h, t in np.ndindex(x.shape[0], x.shape[1], x.shape[3]):
        for i, (first, second) in enumerate(pair):
            z = mpmath.mpc(x[b, h, first, t], x[b, h, second, t])
            z *= mpmath.mpc(cos[b, 0, i, t], sin[b, 0, i, t])
            y[b, h, first, t], y[b, h, second, t] = z.real, z.imag
    return y


def textbook_attention(q, k, v, mask):
    """Each query alone, over the list of keys that it may see."""
    d, group = q.shape[2], q.shape[1] // k.shape[1]

    def entry(b, h, i, t):
        keys = np.flatnonzero(mask[b, :, t])
        scores = [dot(k[b, h // group, :, s], q[b, h, :, t]) / mpmath.sqrt(d) for s in keys]
        weights = [mpmath.exp(score) for score in scores]
        return dot(weights, v[b, h // group, i, keys]) / mpmath.fsum(weights)

    return by_entry(q.shape, entry)


def textbook_cross_entropy(z, labels, count=None):
    counted = [j for j, label in enumerate(labels) if label != -100]
    terms = [
        -mpmath.log(mpmath.exp(z[labels[j], j]) / mpmath.fsum(map(mpmath.exp, z[:, j])))
        for j in counted
    ]
    return np.array(mpmath.fsum(terms) / (len(counted) if count is None else count), object)


def each(f):
    return lambda x: by_entry(x.shape, lambda *index: f(x[index]))


def textbook_softmax(z):
    e = each(mpmath.exp)(z)
    return by_entry(z.shape, lambda b, i, t: e[b, i, t] / mpmath.fsum(e[b, :, t]))


def gelu_by_tanh(x):
    c = mpmath.sqrt(2 / mpmath.pi)
    return x / 2 * (1 + mpmath.tanh(c * (x + mpf("0.044715") * x**3)))


TEXTBOOK = {
    "linear": textbook_linear,
    "dropout": lambda x, K: x if K is None else by_entry(x.shape, lambda i, j: x[i, j] * K[i, j]),
    "embedding": lambda E, ids: by_entry((E.shape[1], len(ids)), lambda i, j: E[ids[j], i]),
    "with_tokens": lambda rows, E, ids: by_entry(
        E.shape, lambda i, j: rows[list(ids).index(i), j] if i in ids else E[i, j]
    ),
    "rmsnorm": lambda x, w, eps: textbook_norm(x, eps, centre=False) * w,
    "layernorm": lambda x, w, b, eps: textbook_norm(x, eps, centre=True) * w + b,
    "tanh": each(mpmath.tanh),
    "silu": each(lambda x: x / (1 + mpmath.exp(-x))),
    "gelu": each(lambda x: x * mpmath.ncdf(x)),
    "gelu_tanh": each(gelu_by_tanh),
    "rope": textbook_rope,
    "softmax": textbook_softmax,
    "attention": textbook_attention,
    "cross_entropy": textbook_cross_entropy,
    "lora_linear": textbook_lora,
    "lora_bias_linear": lambda c, s, **given: textbook_lora(s=s, **given) + s * c,
    "row_norm": textbook_norms,
    "rescaled_linear": textbook_rescaled,
    "rescaled_lora_linear": textbook_rescaled_lora,
    "dora_linear": textbook_dora,
    "dora_full_linear": textbook_dora,
    "vera_linear": textbook_vera,
    "adalora_linear": textbook_adalora,
    "unfold": textbook_unfold,
    "block_diagonal": lambda W, groups: by_entry(
        (len(W), groups * W.shape[1]),
        lambda i, j: W[i, j % W.shape[1]] if j // W.shape[1] == i // (len(W) // groups) else mpf(0),
    ),
    "conv": textbook_convolution,
}


def share_by_textbook(operation, wanted_by, rng):
    in_digits = in_objects(operation, mpf)
    wanted = wanted_by(**in_digits.varying, **in_digits.constant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "erf", every_erf)
        rounded, _ = in_objects(operation, Rounded)()
    nearest = np.vectorize(lambda v: np.longdouble(mpmath.nstr(v, 25)), otypes=[np.longdouble])
    return share_of_bound(np.asarray(operation()[0]), nearest(wanted), rounded, rng)


@EVERY
@FEW
@given(drawn=draw.operations(), rng=draw.generators())
def test_the_value_is_the_textbooks_in_40_digits(name, drawn, rng):
    share = share_by_textbook(drawn[name], TEXTBOOK[drawn[name].f.__name__], rng)
    record_worst("4. error of float64 by 40 digits / its bound, primitive equations", share)
    assert share <= 1


def test_a_value_that_is_not_the_textbooks_exceeds_the_bound():
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)
    rng = np.random.default_rng(1)
    assert share_by_textbook(drawn["gelu"], TEXTBOOK["gelu_tanh"], rng) > 1
    shifted = replace(drawn["rmsnorm"], constant={"eps": 0.3 * (1 + 1e-12)})
    assert (
        share_by_textbook(shifted, lambda x, w, eps: TEXTBOOK["rmsnorm"](x, w, mpf(0.3)), rng) > 1
    )


@FEW
@given(shape=draw.sizes(2), rng=draw.generators())
def test_masks_admit_what_the_words_say(shape, rng):
    b, t = shape
    real = rng.random((b, t)) < 0.5
    causal, padding = ops.causal_mask(real), ops.padding_mask(real)
    assert causal.shape == padding.shape == (b, t, t)
    for row, key, query in np.ndindex(b, t, t):
        itself = key == query
        assert padding[row, key, query] == (real[row, key] or itself)
        assert causal[row, key, query] == ((key <= query and real[row, key]) or itself)


def test_embedded_tokens_lie_as_activations_do():
    y, _ = ops.embedding(np.array([2, 0]), np.arange(9.0).reshape(3, 3))
    assert y.tolist() == [[6, 0], [7, 1], [8, 2]]
    assert y.flags.c_contiguous


@FEW
@given(shape=draw.sizes(4), rng=draw.generators())
def test_heads_are_split_feature_by_feature_and_joined_again(shape, rng):
    b, h, d, t = shape
    x, dy = rng.standard_normal((h * d, b * t)), rng.standard_normal((b, h, d, t))
    y = ops.split_heads(x, b, h)
    assert y.shape == dy.shape
    for row, head, i, column in np.ndindex(*y.shape):
        assert y[row, head, i, column] == x[head * d + i, row * t + column]
    assert same_bits(ops.join_heads(y), x)
    assert same_bits(ops.split_heads(ops.join_heads(dy), b, h), dy)


def error_of_tables(rope_tables, position, half, theta, dtype):
    """The greatest error of cosines and sines, each over its bound."""
    tables = rope_tables(np.array([[position]]), 2 * half, theta, dtype)
    real = np.empty(0, dtype).real.dtype
    narrow, wide = (np.finfo(d).eps / 2 for d in (real, np.result_type(real, np.float64)))
    worst = 0.0
    for table, f in zip(tables, (mpmath.cos, mpmath.sin), strict=True):
        assert (table.shape, table.dtype) == ((1, 1, half, 1), real)
        for i, found in enumerate(table.ravel()):
            angle = position * mpf(theta) ** (-mpf(i) / half)
            # The exponent is off by 2 u, so the power by 2 u ln(theta) and 4 units in the last
            # place; the product is rounded; the function is right to 4 units; then the dtype's
            # rounding of a number that is at most 1.
            bound = float(angle) * (2 * np.log(theta) + 8 + 1) * wide + 8 * wide + narrow
            high = float(found)
            worst = max(worst, abs(mpf(high) + mpf(float(found - high)) - f(angle)) / bound)
    return float(worst)


@given(
    position=st.integers(0, 10**6),
    half=st.integers(1, 8),
    theta=st.sampled_from((100.0, 10000.0, 500000.0)),
)
@settings(max_examples=20)
def test_rope_tables_are_right_at_far_positions_in_every_dtype(position, half, theta):
    for dtype in (np.float64, np.float32, np.complex64, np.longdouble):
        assert error_of_tables(ops.rope_tables, position, half, theta, dtype) <= 1


def test_rope_tables_for_other_numbers_are_float64s():
    positions = np.arange(6).reshape(2, 3)
    for found, wanted in zip(
        ops.rope_tables(positions, 4, 100.0, object),
        ops.rope_tables(positions, 4, 100.0, np.float64),
        strict=True,
    ):
        assert found.dtype == object
        assert {type(v) for v in found.ravel()} == {float}
        assert (found == wanted).all()


def test_angles_in_float32_are_wrong_at_far_positions():
    def narrow(positions, d, theta, dtype):
        frequencies = np.float32(theta) ** (-np.arange(0, d, 2, dtype=dtype) / dtype(d))
        angles = positions[:, None, None, :].astype(dtype) * frequencies[:, None]
        return np.cos(angles), np.sin(angles)

    assert error_of_tables(narrow, 123457, 4, 10000.0, np.float32) > 100


@FEW
@given(drawn=draw.operations())
def test_grouped_heads_are_heads_with_repeated_keys_and_values(drawn):
    operation = drawn["attention, causal"]
    k, v = operation.varying["k"], operation.varying["v"]
    repeated = {"k": k.repeat(2, axis=1), "v": v.repeat(2, axis=1)}
    o, back = operation()
    many, back_many = operation(**repeated)
    assert same_bits(o, many)
    (dq, dk, dv), (dq_many, *both) = back(operation.dy), back_many(operation.dy)
    assert same_bits(dq, dq_many)
    for grouped, d in zip((dk, dv), both, strict=True):
        assert same_bits(grouped, d[:, 0::2] + d[:, 1::2])
    if k.shape[1] > 1:
        tiled = {"k": np.tile(k, (1, 2, 1, 1)), "v": np.tile(v, (1, 2, 1, 1))}
        assert not same_bits(o, operation(**tiled)[0])


@FEW
@given(drawn=draw.operations())
def test_no_query_sees_what_its_mask_hides(drawn):
    for name in ("attention, causal", "attention, padded"):
        operation = drawn[name]
        o, back = operation()
        _, dk, dv = back(operation.dy)
        hidden = ~operation.constant["mask"].any(2)  # (b, keys) that no query sees
        assert not dk[np.broadcast_to(hidden[:, None, None], dk.shape)].any()
        assert not dv[np.broadcast_to(hidden[:, None, None], dv.shape)].any()
    operation = drawn["attention, causal"]
    k, v = operation.varying["k"].copy(), operation.varying["v"].copy()
    k[..., -1], v[..., -1] = 9, 9
    changed = operation(k=k, v=v)[0]
    o = operation()[0]
    assert same_bits(changed[..., :-1], o[..., :-1])
    assert not same_bits(changed[..., -1], o[..., -1])


@FEW
@given(drawn=draw.operations())
def test_gradients_of_logits_sum_to_zero_and_vanish_at_ignored_labels(drawn):
    operation = drawn["cross_entropy"]
    labels = operation.constant["labels"]
    _, back = operation()
    dz = back(1.0)
    assert not dz[:, labels == ops.IGNORED].any()
    # p sums to 1 but for the rounding of its sum, its quotients and the factor; then the test's own
    # sum: fewer than 2 v + 4 roundings of moduli that add up to 2 / n at most in each column.
    n, v = (labels != ops.IGNORED).sum(), len(dz)
    assert (abs(dz.sum(0)) <= (2 * v + 4) * UNIT_ROUNDOFF * 2 / n).all()
    assert abs(dz[:-1].sum(0)).max() > (2 * v + 4) * UNIT_ROUNDOFF * 2 / n


@FEW
@given(drawn=draw.operations(), j=st.integers(-8, 8))
def test_the_loss_forgets_a_constant_on_the_logits(drawn, j):
    operation = drawn["cross_entropy"]
    # Multiples of 1/8 stay exact under the shift, so the differences from the maximum do too.
    z = np.round(operation.varying["z"] * 8) / 8
    (L, back), (shifted, back_shifted) = operation(z=z), operation(z=z + j)
    assert same_bits(back(1.0), back_shifted(1.0))
    error = abs(shifted - L)
    # log-sum-exp less the logit: c - z[label] is exact, the sum with the logarithm is rounded.
    assert error <= (z.shape[1] + 4) * UNIT_ROUNDOFF * max(abs(L), abs(shifted))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_frozen_norm_gives_the_same_dx_alone(norm):
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)[norm]
    _, back = drawn()
    (dx,) = back(drawn.dy, frozen=True)
    assert same_bits(dx, back(drawn.dy)[0])


def test_great_numbers_overflow_nowhere():
    great = np.array([[-1e4, -800.0, 0.0, 800.0, 1e4]])
    for f in (ops.silu, ops.gelu, ops.gelu_tanh, ops.tanh):
        y, back = f(great)
        dx = back(np.ones_like(great))
        assert np.isfinite(y).all()
        assert np.isfinite(dx).all()
        if f is not ops.tanh:
            assert (y == [[0, 0, 0, 800, 1e4]]).all()
            assert (dx == [[0, 0, 0.5, 1, 1]]).all()
    p, _ = ops.softmax(great.T[None])
    assert (p == np.array([0, 0, 0, 0, 1.0])[None, :, None]).all()
    L, back = ops.cross_entropy(great.T, np.array([0]))
    assert L == 2e4
    assert (back(1.0).ravel() == [-1, 0, 0, 0, 1]).all()


def test_cross_entropy_refuses_labels_that_name_no_class_and_batches_without_any():
    z = np.zeros((3, 2))
    for label in (3, -1, -99):
        with pytest.raises(ValueError, match=f"label {label}: expected 0 to 2, or -100 to ignore"):
            ops.cross_entropy(z, np.array([label, 0]))
    with pytest.raises(ValueError, match="no label counts: each is -100; leave this batch out"):
        ops.cross_entropy(z, np.array([-100, -100]))
    with pytest.raises(ValueError, match="no label counts"):
        ops.cross_entropy(z, np.array([0, 1]), count=0)
    L, _ = ops.cross_entropy(z, np.array([-100, 1]))
    assert np.log(3) == L
    sure, back = ops.cross_entropy(z[:1], np.array([-100, 0]))
    assert sure == 0
    assert not back(1.0).any()
    none, back = ops.cross_entropy(z, np.array([-100, -100]), count=4)
    assert none == 0
    assert not back(1.0).any()
