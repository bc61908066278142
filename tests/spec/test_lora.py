"""LoRA itself: exact over the rationals, law by law, and to the bit where floating point allows."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from numbers import Rational

import numpy as np
import pytest
from calculus import same_bits
from hypothesis import given
from hypothesis import strategies as st
from marks import examples
from number_systems import to_objects

import minilora as ml
from minilora import testing as draw
from minilora.spec import initialization, lora, ops

EXACT = examples(3)


def equal(found, wanted):
    """Equal entries and shapes, all exact: a float that crept in would be no Rational."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert all(isinstance(v, Rational) for v in (*found.ravel(), *wanted.ravel()))
    return found.shape == wanted.shape and bool((found == wanted).all())


def fixed_layer():
    """Sizes 4, 5, 2, 3; nothing zero, one or square; a bias and a mask."""
    rng = np.random.default_rng(0)

    def entries(*shape):
        odd = 2 * rng.integers(-4, 4, shape) + 1
        return to_objects(odd.astype(float) / 4, Fraction)

    K = to_objects((np.arange(15).reshape(5, 3) % 4 > 0).astype(float), Fraction) * Fraction(4, 3)
    x, W, b, A, B, dy = (entries(*s) for s in ((5, 3), (4, 5), (4, 1), (2, 5), (4, 2), (4, 3)))
    return draw.LinearCase(x, W, b, A, B, Fraction(7, 3), K, dy, Fraction(14, 3), 2)


def answers(implementation, layer, **changed):
    """y, dx, dA, dB, with some of the layer's arguments replaced."""
    y, back = implementation(**(layer.arguments | changed))
    return y, *back(layer.dy)


def value_is_the_definition(implementation, layer):
    """Index by index: y[i, j] = Σ_k (W[i, k] + s Σ_p B[i, p] A[p, k] K[k, j]) x[k, j] + b[i]."""
    y, _ = implementation(**layer.arguments)
    wanted = np.empty(y.shape, object)
    for i, j in np.ndindex(*y.shape):
        wanted[i, j] = Fraction(0) if layer.b is None else layer.b[i, 0]
        for k in range(len(layer.x)):
            delta = sum(layer.B[i, p] * layer.A[p, k] for p in range(layer.r))
            kept = 1 if layer.K is None else layer.K[k, j]
            wanted[i, j] += (layer.W[i, k] + layer.s * delta * kept) * layer.x[k, j]
    assert equal(y, wanted)


def gradients_are_the_definition(implementation, layer):
    """Index by index from L = Σ dy ∘ y: each gradient the sum of what multiplies its entry."""
    x, W, A, B, s, dy = (getattr(layer, name) for name in ("x", "W", "A", "B", "s", "dy"))
    K = np.ones(x.shape, int) if layer.K is None else layer.K
    dx, dA, dB = (np.full(v.shape, Fraction(0)) for v in (x, A, B))
    for i, j, k in itertools.product(range(len(W)), range(x.shape[1]), range(len(x))):
        dx[k, j] += dy[i, j] * W[i, k]
        for p in range(layer.r):
            dx[k, j] += dy[i, j] * s * B[i, p] * A[p, k] * K[k, j]
            dA[p, k] += dy[i, j] * s * B[i, p] * K[k, j] * x[k, j]
            dB[i, p] += dy[i, j] * s * A[p, k] * K[k, j] * x[k, j]
    found = answers(implementation, layer)[1:]
    assert all(equal(f, w) for f, w in zip(found, (dx, dA, dB), strict=True))


def gradients_are_difference_quotients(implementation, layer):
    """y is affine in each argument alone, so that a step of 1 gives the derivative exactly."""

    def L(**changed):
        return (layer.dy * implementation(**(layer.arguments | changed))[0]).sum()

    for name, gradient in zip("xAB", answers(implementation, layer)[1:], strict=True):
        point = getattr(layer, name)
        for entry in np.ndindex(*point.shape):
            stepped = point.copy()
            stepped[entry] += 1
            assert gradient[entry] == L(**{name: stepped}) - L()


def weight_gradient(layer):
    """dW of the branch's own product: dy hᵀ, h = K ∘ x."""
    return layer.dy @ (layer.x if layer.K is None else layer.K * layer.x).T


def factors_follow_from_the_weights_gradient(implementation, layer):
    """dB = s dW Aᵀ and dA = s Bᵀ dW."""
    _, _, dA, dB = answers(implementation, layer)
    dW = weight_gradient(layer)
    assert equal(dB, layer.s * dW @ layer.A.T)
    assert equal(dA, layer.s * layer.B.T @ dW)


def factors_gradients_are_balanced(implementation, layer):
    """Bᵀ dB = dA Aᵀ."""
    _, _, dA, dB = answers(implementation, layer)
    assert equal(layer.B.T @ dB, dA @ layer.A.T)


def changes_of_basis_in_rank_space_change_nothing(implementation, layer):
    """A → R A, B → B R⁻¹: y and dx stay, dA → R⁻ᵀ dA, dB → dB Rᵀ; R a product of shears."""
    R = np.array([[Fraction(int(i == j)) for j in range(layer.r)] for i in range(layer.r)])
    inverse = R.copy()
    for step, (i, j) in enumerate(itertools.permutations(range(layer.r), 2)):
        shear = Fraction(step % 3 - 1, 2)
        R[i] = R[i] + shear * R[j]
        inverse[:, j] = inverse[:, j] - shear * inverse[:, i]
    assert equal(R @ inverse, np.eye(layer.r, dtype=int))
    y, dx, dA, dB = answers(implementation, layer)
    turned = answers(implementation, layer, A=R @ layer.A, B=layer.B @ inverse)
    assert all(equal(f, w) for f, w in zip(turned, (y, dx, inverse.T @ dA, dB @ R.T), strict=True))


def the_scale_can_move_into_b(implementation, layer):
    """(s, B) → (c s, B / c): y, dx and dA stay, dB → c dB."""
    c = Fraction(5, 3)
    y, dx, dA, dB = answers(implementation, layer)
    moved = answers(implementation, layer, s=c * layer.s, B=layer.B / c)
    assert all(equal(f, w) for f, w in zip(moved, (y, dx, dA, c * dB), strict=True))


def merging_changes_no_output(implementation, layer):
    """W x + b + s B A x = (W + s B A) x + b, and dx likewise."""
    y, dx, _, _ = answers(implementation, layer, K=None)
    merged = lora.merge_weight(layer.W, layer.A, layer.B, layer.s)
    y_merged, back = ops.linear(layer.x, merged, layer.b)
    assert equal(y_merged, y)
    assert equal(back(layer.dy), dx)


def a_dead_component_stays_dead(implementation, layer):
    """A zero column of B makes that row of dA exactly 0, and with A's row zero too, dB's column."""
    A, B = layer.A.copy(), layer.B.copy()
    B[:, 0] = Fraction(0)
    assert not answers(implementation, layer, B=B)[2][0].any()
    A[0] = Fraction(0)
    _, _, dA, dB = answers(implementation, layer, A=A, B=B)
    assert not dA[0].any()
    assert not dB[:, 0].any()


def the_mean_over_all_masks_is_no_dropout(implementation, layer):
    """Each of the 2ⁿ masks of one token, weighted with its probability."""
    n, p = min(len(layer.x), 4), Fraction(1, 4)
    x, W, A = layer.x[:n, :1], layer.W[:, :n], layer.A[:, :n]
    mean = 0
    for keep in itertools.product((0, 1), repeat=n):
        K = np.array([[Fraction(kept) / (1 - p)] for kept in keep])
        weight = (1 - p) ** sum(keep) * p ** (n - sum(keep))
        mean = mean + weight * implementation(x, W, layer.b, A, layer.B, layer.s, K)[0]
    assert equal(mean, implementation(x, W, layer.b, A, layer.B, layer.s, None)[0])


def changed(**formulas):
    """lora_linear with one of its answers replaced: a formula of the correct one and the layer."""

    def implementation(x, W, b, A, B, s, K=None):
        y, back = ml.lora_linear(x, W, b, A, B, s, K)
        given = {"x": x, "W": W, "b": b, "A": A, "B": B, "s": s, "K": K}

        def wrong_back(dy):
            right = dict(zip(("dx", "dA", "dB"), back(dy), strict=True))
            return tuple(formulas.get(k, lambda v, *_: v)(v, given, dy) for k, v in right.items())

        return formulas.get("y", lambda v, *_: v)(y, given, None), wrong_back

    return implementation


WRONG = {
    "no scale": lambda x, W, b, A, B, s, K=None: ml.lora_linear(x, W, b, A, B, 1, K),
    "no base": changed(y=lambda y, g, _: y - g["W"] @ g["x"]),
    "no bias": lambda x, W, b, A, B, s, K=None: ml.lora_linear(x, W, None, A, B, s, K),
    "a bent branch": changed(
        y=lambda y, g, _: y + (g["x"] if g["K"] is None else g["K"] * g["x"]).sum() ** 2
    ),
    "A's rows in another order": lambda x, W, b, A, B, s, K=None: ml.lora_linear(
        x, W, b, A[::-1], B, s, K
    ),
    "dropout on the base too": lambda x, W, b, A, B, s, K=None: ml.lora_linear(
        x if K is None else K * x, W, b, A, B, s
    ),
    "dropout without rescaling": lambda x, W, b, A, B, s, K=None: ml.lora_linear(
        x, W, b, A, B, s, None if K is None else K * Fraction(3, 4)
    ),
    "dB without s": changed(dB=lambda dB, g, _: dB / g["s"]),
    "dA of the undropped input": changed(dA=lambda dA, g, dy: g["s"] * g["B"].T @ dy @ g["x"].T),
    "dx without the branch": changed(dx=lambda dx, g, dy: g["W"].T @ dy),
    "dx without the base": changed(dx=lambda dx, g, dy: dx - g["W"].T @ dy),
    "a leak into dead components": changed(dA=lambda dA, g, dy: dA + 1),
    "s squared in dA": changed(dA=lambda dA, g, _: g["s"] * dA),
}

LAWS = {
    value_is_the_definition: ("no scale", "no base", "no bias", "dropout on the base too"),
    gradients_are_the_definition: ("dx without the base", "dA of the undropped input"),
    gradients_are_difference_quotients: ("dx without the branch", "dB without s"),
    factors_follow_from_the_weights_gradient: ("s squared in dA", "dA of the undropped input"),
    factors_gradients_are_balanced: ("dB without s", "s squared in dA"),
    changes_of_basis_in_rank_space_change_nothing: ("A's rows in another order",),
    the_scale_can_move_into_b: ("no scale", "dB without s"),
    merging_changes_no_output: ("no scale", "dx without the branch"),
    a_dead_component_stays_dead: ("a leak into dead components", "A's rows in another order"),
    the_mean_over_all_masks_is_no_dropout: ("dropout without rescaling", "a bent branch"),
}


@pytest.mark.parametrize("law", LAWS)
@EXACT
@given(layer=draw.layers("rational"))
def test_over_the_rationals_it_is_exact_that(law, layer):
    law(ml.lora_linear, layer)


@pytest.mark.parametrize(
    ("law", "wrong"), [(law, wrong) for law, several in LAWS.items() for wrong in several]
)
def test_a_wrong_implementation_breaks_the_law(law, wrong):
    law(ml.lora_linear, fixed_layer())
    with pytest.raises(AssertionError):
        law(WRONG[wrong], fixed_layer())


def test_every_wrong_implementation_breaks_some_law():
    assert set(WRONG) == {wrong for several in LAWS.values() for wrong in several}


def test_a_float_among_fractions_is_noticed():
    with pytest.raises(AssertionError):
        equal(fixed_layer().x * 0.5, fixed_layer().x / 2)


@EXACT
@given(layer=draw.layers("rational"))
def test_linear_dropout_and_embedding_are_exact(layer):
    y, back = ops.linear(layer.x, layer.W, layer.b)
    plain = replace(layer, A=layer.A * 0, K=None)
    assert equal(y, ml.lora_linear(**plain.arguments)[0])
    assert equal(back(layer.dy), layer.W.T @ layer.dy)
    kept, back = ops.dropout(layer.x, layer.K)
    K = 1 if layer.K is None else layer.K
    assert equal(kept, K * layer.x)
    assert equal(back(layer.x), K * layer.x)

    ids = np.arange(5) % len(layer.x)
    columns, back = ops.embedding(ids, layer.x)
    assert equal(columns, layer.x[ids].T)
    dE = back(columns)
    for i, row in enumerate(layer.x):
        assert equal(dE[i], row * int((ids == i).sum()))


@EXACT
@given(x=draw.fractions((2, 1, 4, 3)))
def test_rope_by_rational_angles_turns_there_and_back(x):
    triples = [(3, 4, 5), (5, 12, 13), (8, 15, 17)]
    cos = np.array([Fraction(a, c) for a, _, c in triples * 4]).reshape(2, 1, 2, 3)
    sin = np.array([Fraction(b, c) for _, b, c in triples * 4]).reshape(2, 1, 2, 3)
    y, back = ops.rope(x, cos, sin)
    assert equal(back(y), x)
    assert equal((y * y).sum(2), (x * x).sum(2))
    assert not equal(ops.rope(y, cos, sin)[0], x) or not x.any()


@EXACT
@given(layer=draw.layers("whole"))
def test_small_whole_numbers_give_the_exact_answer_in_every_dtype(layer):
    def with_entries(convert):
        arrays = {name: getattr(layer, name) for name in ("x", "W", "b", "A", "B", "K", "dy")}
        return replace(
            layer, **{name: None if a is None else convert(a) for name, a in arrays.items()}
        )

    exact = replace(with_entries(lambda a: to_objects(a, Fraction)), s=Fraction(layer.s))
    wanted = answers(ml.lora_linear, exact)
    for dtype in (np.float64, np.float32, np.longdouble):
        cast = with_entries(lambda a, dtype=dtype: a.astype(dtype))
        for found, want in zip(answers(ml.lora_linear, cast), wanted, strict=True):
            assert found.dtype == dtype
            assert (found == want.astype(float)).all()


def signs_pass_through(implementation, layer):
    y, dx, dA, dB = answers(implementation, layer, b=None)
    turned = answers(implementation, layer, b=None, x=-layer.x)
    for found, wanted in zip(turned, (-y, dx, -dA, -dB), strict=True):
        assert np.array_equal(found, wanted)


def powers_of_two_pass_through(implementation, layer):
    y, dx, dA, dB = answers(implementation, layer, b=None)
    scaled = answers(implementation, layer, b=None, x=4 * layer.x)
    for found, wanted in zip(scaled, (4 * y, dx, 4 * dA, 4 * dB), strict=True):
        assert np.array_equal(found, wanted)


def a_component_may_turn_its_sign_or_move_a_power_of_two(implementation, layer):
    c = (-2.0) ** np.arange(layer.r)[:, None]
    y, dx, dA, dB = answers(implementation, layer)
    moved = answers(implementation, layer, A=c * layer.A, B=layer.B / c.T)
    for found, wanted in zip(moved, (y, dx, dA / c, dB * c.T), strict=True):
        assert np.array_equal(found, wanted)


def without_b_it_is_the_base(implementation, layer):
    y, dx, dA, dB = answers(implementation, layer, B=np.zeros_like(layer.B))
    base, back = ops.linear(layer.x, layer.W, layer.b)
    assert np.array_equal(y, base)
    assert np.array_equal(dx, back(layer.dy))
    assert not dA.any()
    assert dB.any() or (layer.K is not None and not layer.K.any())


BITWISE = {
    signs_pass_through: changed(y=lambda y, *_: y + 1),
    powers_of_two_pass_through: changed(dB=lambda dB, *_: np.tanh(dB)),
    a_component_may_turn_its_sign_or_move_a_power_of_two: changed(
        y=lambda y, g, _: y * (1 + 1e-15 * np.sign(g["A"][-1, 0]))
    ),
    without_b_it_is_the_base: changed(dA=lambda dA, *_: dA + 1e-300),
}


@pytest.mark.parametrize("law", BITWISE)
@EXACT
@given(layer=draw.layers("normal"))
def test_to_the_bit_it_holds_that(law, layer):
    law(ml.lora_linear, layer)


@pytest.mark.parametrize("law", BITWISE)
def test_a_wrong_implementation_breaks_the_bitwise_law(law):
    floats = {
        name: getattr(fixed_layer(), name).astype(float) for name in ("x", "W", "A", "B", "K", "dy")
    }
    layer = replace(fixed_layer(), b=None, s=7 / 3, **floats)
    law(ml.lora_linear, layer)
    with pytest.raises(AssertionError):
        law(BITWISE[law], layer)


@EXACT
@given(layer=draw.layers("rational"), weights=st.lists(st.fractions(-2, 2), min_size=3, max_size=3))
def test_combined_adapters_add_exactly(layer, weights):
    A, B, s = layer.A, layer.B, layer.s
    several = [(A, B, s), (A[:1], B[:, :1], s + 1), (np.concatenate([A, A]) * 2, B.repeat(2, 1), 3)]
    combined = ml.combine(several, weights)
    assert [len(combined[0]), combined[1].shape[1]] == [3 * layer.r + 1] * 2
    delta = sum(w * s * (B @ A) for (A, B, s), w in zip(several, weights, strict=True))
    assert equal(combined[1] @ combined[0], delta)
    alone, with_one = ml.combine([(A, B, s)], [1])
    assert equal(with_one @ alone, s * B @ A)
    assert equal(lora.merge_weight(layer.W, *combined, 1), layer.W + delta)


def test_the_product_of_sums_is_not_the_sum_of_products():
    A, B, s = fixed_layer().A, fixed_layer().B, fixed_layer().s
    combined = ml.combine([(A, B, s), (2 * A, -B, s)], [1, 1])
    assert equal(combined[1] @ combined[0], -s * B @ A)
    assert not equal((s * B - s * B) @ (A + 2 * A), -s * B @ A)


def test_adapters_are_combined_one_weight_each():
    with pytest.raises(ValueError, match="0 adapters, 0 weights: expected one for each"):
        ml.combine([], [])
    A, B = np.ones((1, 2)), np.ones((3, 1))
    with pytest.raises(ValueError, match="2 adapters, 1 weights: expected one for each"):
        ml.combine([(A, B, 1), (A, B, 1)], [1])


@EXACT
@given(layer=draw.layers("rational"))
def test_a_fused_projection_is_its_parts_one_below_the_other(layer):
    parts = [(layer.A, layer.B), (layer.A[:1] * 2, layer.B[:2, :1]), (-layer.A, layer.B[:1])]
    A, B = ml.fuse(parts)
    assert A.shape == (2 * layer.r + 1, len(layer.x))
    assert B.shape == (sum(len(B_i) for _, B_i in parts), 2 * layer.r + 1)
    assert equal(B @ A, np.concatenate([B_i @ A_i for A_i, B_i in parts]))


def test_fused_factors_keep_the_dtype():
    A, B = ml.fuse([(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32))] * 2)
    assert A.dtype == B.dtype == np.float32


def test_fused_factors_are_as_wide_as_what_they_are_made_of():
    A, B = np.ones((1, 2), np.float32), np.full((3, 1), 1 / 3)
    _, fused = ml.fuse([(A, B), (A, B * 1j)])
    assert same_bits(fused[:3, :1], B.astype(complex))
    assert same_bits(fused[3:, 1:], B * 1j)


def test_a_scalar_of_numpy_is_the_number_that_it_is():
    alpha = np.float64(0.3)
    assert type(ml.scale(alpha, 2)) is float
    assert ml.scale(alpha, 2) == 0.3 / 2
    assert ml.scale(np.longdouble(1) / 3, 1) == np.longdouble(1) / 3
    assert ml.scale(np.longdouble(7), 3, True) == np.longdouble(7) / np.sqrt(np.longdouble(3))
    assert ml.scale(np.longdouble(7), 3, True) != np.longdouble(7 / math.sqrt(3))
    assert ml.scale(Fraction(7, 2), 4, True) == Fraction(7, 4)
    assert type(ml.scale(Fraction(7, 2), 4, True)) is Fraction
    x, W, A, B = (np.ones(shape, np.float32) for shape in ((2, 5), (3, 2), (1, 2), (3, 1)))
    y, back = ml.lora_linear(x, W, None, A, B, ml.scale(alpha, 1))
    assert {array.dtype for array in (y, *back(y))} == {np.dtype(np.float32)}
    keep = initialization.draw_dropout(
        np.random.default_rng(0), np.float64(0.5), {"q": (2, 3)}, np.float32
    )
    assert keep["q"].dtype == np.float32


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert ml.scale(Fraction(7), 3) == Fraction(7, 3)
    assert isinstance(ml.scale(Fraction(7), 3), Fraction)
    assert ml.scale(7, 4, rslora=True) == 3.5
    assert ml.scale(7, 2, rslora=True) == 7 / math.sqrt(2)
    assert ml.scale(1, 1) == 1
    for r in (0, -1):
        with pytest.raises(ValueError, match=f"rank {r}: expected at least 1"):
            ml.scale(1, r)


def weights_of(layer):
    """The layer as parameters of a model with a second, plain projection."""
    W = {"p.weight": layer.W, "p.A": layer.A, "p.B": layer.B, "plain.weight": layer.W}
    return W if layer.b is None else W | {"p.bias": layer.b, "plain.bias": layer.b}


@EXACT
@given(layer=draw.layers("rational"), data=st.sets(st.sampled_from(("weight", "bias", "A", "B"))))
def test_a_projection_gives_the_gradients_of_what_is_trained_and_no_other(layer, data):
    W = weights_of(layer)
    trained = frozenset(f"{at}.{part}" for at in ("p", "plain") for part in data)
    keep = {} if layer.K is None else {"p": layer.K}
    tuning = ml.TrainableSpec({"p": layer.s}, keep, trained)
    for at, f in (("p", ml.lora_linear), ("plain", None)):
        y, back = ml.project(layer.x, at, W, tuning)
        dx, gradients = back(layer.dy)
        if f:
            wanted, wanted_back = ml.lora_linear(**layer.arguments)
            wanted_dx, dA, dB = wanted_back(layer.dy)
        else:
            wanted, wanted_back = ops.linear(layer.x, layer.W, layer.b)
            wanted_dx, dA, dB = wanted_back(layer.dy), None, None
        assert equal(y, wanted)
        assert equal(dx, wanted_dx)
        every = {
            f"{at}.weight": layer.dy @ layer.x.T,
            f"{at}.bias": layer.dy.sum(1)[:, None],
            f"{at}.A": dA,
            f"{at}.B": dB,
        }
        assert gradients.keys() == trained & every.keys() & (W.keys() | {f"{at}.bias"})
        assert all(equal(g, every[name]) for name, g in gradients.items())


@EXACT
@given(layer=draw.layers("rational"))
def test_merging_makes_new_weights_and_unmerging_gives_the_old_ones_back(layer):
    W = weights_of(layer)
    tuning = ml.TrainableSpec({"p": layer.s})
    before = {name: array.copy() for name, array in W.items()}
    merged = ml.merge(W, tuning)
    assert merged.keys() == {name for name in W if not name.endswith((".A", ".B"))}
    assert equal(merged["p.weight"], layer.W + layer.s * (layer.B @ layer.A))
    assert merged["plain.weight"] is W["plain.weight"]
    assert all(equal(W[name], before[name]) for name in W)
    restored = ml.unmerge(merged)
    assert restored.keys() == W.keys()
    assert all(restored[name] is W[name] for name in W)
    y, _ = ml.project(layer.x, "p", W, tuning)
    assert equal(ml.project(layer.x, "p", merged, ml.TrainableSpec())[0], y)


def test_unmerging_by_subtraction_would_not_restore_the_bits():
    rng = np.random.default_rng(0)
    W, A, B = (rng.standard_normal(shape) for shape in ((9, 8), (2, 8), (9, 2)))
    weights = {"p.weight": W, "p.A": A, "p.B": B}
    merged = ml.merge(weights, ml.TrainableSpec({"p": 7 / 3}))
    assert same_bits(ml.unmerge(merged)["p.weight"], W)
    assert not same_bits(lora.merge_weight(merged["p.weight"], A, B, -7 / 3), W)


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused():
    W = weights_of(fixed_layer())
    tuning = ml.TrainableSpec({"p": 1})
    merged = ml.merge(W, tuning)
    with pytest.raises(ValueError, match="merged already; unmerge them first"):
        ml.merge(merged, tuning)
    with pytest.raises(TypeError, match="not merged; expected what merge returned"):
        ml.unmerge(dict(merged))
    with pytest.raises(ValueError, match=r"no adapter to merge: no parameter's name ends with \.A"):
        ml.merge(ml.disable(W), tuning)


def test_what_was_merged_stays_though_its_dict_changes():
    W = weights_of(fixed_layer())
    merged = ml.merge(W, ml.TrainableSpec({"p": 1}))
    del W["p.A"]
    assert "p.A" in ml.unmerge(merged)
    ml.unmerge(merged).clear()
    assert "p.A" in ml.unmerge(merged)


def test_disabling_leaves_the_base_alone():
    W = weights_of(fixed_layer())
    base = ml.disable(W)
    assert list(base) == ["p.weight", "plain.weight", "p.bias", "plain.bias"]
    assert all(base[name] is W[name] for name in base)


def test_gradients_of_one_name_are_summed_and_nothing_is_changed():
    one, two = {"a": np.ones(2), "b": np.ones(1)}, {"a": np.full(2, 5.0)}
    summed = lora.sum_gradients(one, two, {}, two)
    assert {name: g.tolist() for name, g in summed.items()} == {"a": [11, 11], "b": [1]}
    assert one["a"].tolist() == [1, 1]
    assert two["a"].tolist() == [5, 5]


def test_the_factors_are_drawn_as_the_paper_and_its_code_have_them():
    r, m, n = 50, 3, 256
    uniform = np.random.default_rng(0).random((r, n))
    A, B = initialization.draw_factors(np.random.default_rng(0), "kaiming", r, m, n)
    assert same_bits(A, (2 * uniform - 1) / 16)  # U(-1/√n, 1/√n)
    assert same_bits(B, np.zeros((m, r)))
    normal = np.random.default_rng(0).standard_normal((r, n))
    A, B = initialization.draw_factors(np.random.default_rng(0), "gaussian", r, m, n)
    assert same_bits(A, normal / r)
    assert same_bits(B, np.zeros((m, r)))


def test_the_same_seed_draws_the_same_factors_and_masks():
    for init in initialization.DRAW:
        one, two = (
            initialization.draw_factors(np.random.default_rng(5), init, 2, 3, 4)[0] for _ in "12"
        )
        other = initialization.draw_factors(np.random.default_rng(6), init, 2, 3, 4)[0]
        assert same_bits(one, two)
        assert not same_bits(one, other)


def test_dropout_keeps_the_share_that_it_should_and_rescales_it():
    p, shape = 0.3, (100, 90)
    K = initialization.draw_dropout(
        np.random.default_rng(0), p, {"a": shape, "b": (2, 3)}, np.float32
    )
    assert {name: k.shape for name, k in K.items()} == {"a": shape, "b": (2, 3)}
    assert all(k.dtype == np.float32 for k in K.values())
    assert set(K["a"].ravel().tolist()) == {0.0, float(np.float32(1) / np.float32(0.7))}
    deviation = (p * (1 - p) / K["a"].size) ** 0.5
    assert abs((K["a"] > 0).mean() - (1 - p)) < 6 * deviation
    everything = initialization.draw_dropout(np.random.default_rng(0), 0.0, {"a": shape}, float)[
        "a"
    ]
    assert (everything == 1).all()
