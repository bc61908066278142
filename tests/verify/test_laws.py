"""Every variant on every kind of layer keeps the laws that its entry does not say it breaks."""

import operator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from calculus import GRADIENT, record_worst
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples

from minilora import testing as draw
from minilora.spec import initialization, layers, lora, multi_adapter, variants
from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.ops import linear
from minilora.spec.variants import REGISTRY
from minilora.verify.properties import exact_numbers, laws, layer_kinds
from minilora.verify.properties.derivatives import derivative_error
from minilora.verify.properties.exact_numbers import SqrtFraction
from minilora.verify.properties.laws import LAWS, holds
from minilora.verify.properties.layer_kinds import KINDS, draw_case

CELLS = [(entry, kind) for kind in KINDS for entry in REGISTRY if kind not in REGISTRY[entry].lacks]
LIKE_LORA = {
    entry
    for entry in REGISTRY
    if REGISTRY[entry].variant is lora.LORA and entry not in ("lora", "alora")
}
"""Entries that have LoRA's equation and act on all tokens: "lora" speaks for them."""

EVERY = pytest.mark.parametrize(("entry", "kind"), CELLS, ids=lambda name: name)


def laws_for(entry, kind):
    """The laws to try in a quick run; LoRA's equation is not run over every kind ten times."""
    return (
        ("merge", "initial-output", "frozen-weight")
        if entry in LIKE_LORA and kind != "linear"
        else LAWS
    )


def case_of(entry, kind, exact=True, square=False):
    return draw_case(entry, kind, np.random.default_rng(3), exact, square)


def as_the_registry_says(entry, kind, case, names=LAWS, another=None):
    """A law that is broken may hold by chance; with the numbers of ``another`` case it does not."""
    for law in names:
        kept = holds(law, case)
        if kept is None:
            assert law == "dropout-mean"
            assert case.K is None
        elif law not in REGISTRY[entry].breaks:
            assert kept, law
        elif kept and another is not None:
            assert not all(holds(law, another()) for _ in range(3)), law
        else:
            assert not kept, law


def drawn_says_so(entry, kind, rng, square, names=LAWS):
    def draw_one():
        return draw_case(entry, kind, rng, square=square)

    as_the_registry_says(entry, kind, draw_one(), names, draw_one)


@pytest.mark.parametrize(
    ("entry", "kind"),
    [pytest.param(*cell, marks=[pytest.mark.slow] * (cell[1] != "linear")) for cell in CELLS],
)
def test_a_law_is_kept_exactly_when_the_registry_says_so(entry, kind):
    as_the_registry_says(entry, kind, case_of(entry, kind), laws_for(entry, kind))


@pytest.mark.slow
@examples(8)
@given(cell=st.sampled_from(CELLS), rng=draw.generators(), square=st.booleans())
def test_of_every_drawn_case_the_registry_says_what_holds(cell, rng, square):
    drawn_says_so(*cell, rng, square, laws_for(*cell))


@pytest.mark.very_slow
@EVERY
@settings(max_examples=30)
@given(rng=draw.generators(), square=st.booleans())
def test_every_law_is_kept_exactly_when_the_registry_says_so(entry, kind, rng, square):
    drawn_says_so(entry, kind, rng, square)


@EVERY
@settings(max_examples=3)
@given(rng=draw.generators(), square=st.booleans())
def test_every_gradient_is_the_derivative_of_the_layer(entry, kind, rng, square):
    error = derivative_error(draw_case(entry, kind, rng, exact=False, square=square), rng)
    record_worst("1. complex step, variants × kinds", error)
    assert error <= GRADIENT


def test_the_laws_are_those_that_the_registry_speaks_of_each_with_its_sentence():
    assert list(LAWS) == list(variants.LAWS)
    for entry in REGISTRY.values():
        assert entry.breaks.keys() <= LAWS.keys()
        assert all(entry.breaks.values())
        assert set(entry.trained) <= set(entry.variant.parts)
        assert entry.lacks.keys() <= KINDS.keys()


def test_a_registry_that_says_otherwise_is_refused(monkeypatch):
    for entry, breaks in (("lora", {"rank": "so it says"}), ("dora", {})):
        monkeypatch.setitem(REGISTRY, entry, replace(REGISTRY[entry], breaks=breaks))
        with pytest.raises(AssertionError):
            as_the_registry_says(entry, "linear", case_of(entry, "linear"))


# What is wrong below is put in the place of a variant, of a kind or of a start.


def variant(entry, **changed):
    """The entry with another equation, merge or whatever else is changed of its variant."""

    def patch(monkeypatch):
        known = REGISTRY[entry]
        wrong = replace(known, variant=replace(known.variant, **changed))
        monkeypatch.setitem(REGISTRY, entry, wrong)

    return patch


def kind(name, **changed):
    def patch(monkeypatch):
        monkeypatch.setitem(KINDS, name, replace(KINDS[name], **changed))

    return patch


def attribute(module, name, wrong):
    return lambda monkeypatch: monkeypatch.setattr(module, name, wrong)


def start(init, wrong):
    return lambda patch: patch.setitem(
        INITIALIZATIONS, init, replace(INITIALIZATIONS[init], start=wrong)
    )


def answering(f, **formulas):
    """The linear with an answer changed: y, or d0, d1, … of `back`'s, from the right one."""

    def wrong(x, W, b, *rest):
        y, back = f(x, W, b, *rest)

        def wrong_back(dy):
            numbered = enumerate(back(dy))
            return tuple(formulas.get(f"d{i}", lambda d, *_: d)(d, *rest) for i, d in numbered)

        return formulas.get("y", lambda y, *_: y)(y, x, *rest), wrong_back

    return wrong


def dora(norm=None, full=False, **changed):
    """DoRA with another norm, of V, W, A, B and s, or another use of it."""

    def wrong(x, W, b, A, B, magnitude, s, K=None):
        V = lora.merge_weight(W, A, B, s)
        v = variants.row_norm(V)[0] if norm is None else norm(V, W, A, B, s)
        g = changed.get("factor", lambda m, v: m / v)(magnitude, v)
        bias = changed.get("bias", lambda b, g: b)(b, g)
        y, back = variants.rescaled_linear(x, W, bias, A, B, g * v, v, s, K)
        return y, lambda dy: back(dy)[:4]

    return wrong


def columns(V, *_):
    return np.sqrt((V * V).sum(0))[:, None]


def frobenius(V, *_):
    return np.sqrt((V * V).sum()) + 0 * V[:, :1]


def of_the_weight_alone(V, W, *_):
    return variants.row_norm(W)[0]


def without_the_scale(V, W, A, B, s):
    return variants.row_norm(W + B @ A)[0]


def squared(V, *_):
    return (V * V).sum(1, keepdims=True)


def sum_of_moduli(V, *_):
    return abs(V).sum(1, keepdims=True)


def given(f, **changed):
    """The linear of other arguments: each changed by a formula of all of them by name."""

    def wrong(x, W, b, *rest):
        names = f.__code__.co_varnames[3 : 3 + len(rest)]
        named = dict(zip(names, rest, strict=True))
        values = {
            name: changed[name](**named) if name in changed else named[name] for name in named
        }
        return f(x, W, b, *values.values())

    return wrong


def embedding_with_its_factor_on_the_base(case, f):
    y, back = layers.adapted_embedding(f, case.x, case.W, case.P[0], case.s)
    return y - case.W[case.x].T + KINDS["embedding"].base(case)[0], lambda dy: (None, back(dy))


def experts_with_one_a(case, f):
    A = case.P[0][0]
    return layer_kinds._experts(replace(case, P=tuple((A, *rest) for _, *rest in case.P)), f)


def interleaved(W, groups):
    """Row i in group i modulo their number."""
    m, n = W.shape
    y = np.zeros((m, n * groups), W.dtype)
    own = np.arange(m)[:, None], np.arange(n) + n * (np.arange(m) % groups)[:, None]
    y[own] = W
    return y, lambda dy: dy[own]


def with_a_flipped(case, f):
    """A's kernel the other way round, as a convolution has it in mathematics."""
    A, *rest = case.P[0]
    kernels = A.reshape(len(A), -1, *case.extra["geometry"].kernel)
    turned = np.flip(kernels, tuple(range(2, kernels.ndim))).reshape(A.shape)
    return layer_kinds._conv(replace(case, P=((turned, *rest),)), f)


def with_a_moving_otherwise(**change):
    """The branch over another geometry than the base."""

    def wrong(case, f):
        moves = replace(case.extra["geometry"], **change)
        moved = replace(case, extra=case.extra | {"geometry": moves})
        branch = layer_kinds._conv(moved, f)[0] - KINDS[case.kind].base(moved)[0]
        return KINDS[case.kind].base(case)[0] + branch, layer_kinds._conv(case, f)[1]

    return wrong


def with_values_adapter_on_the_keys(case, f):
    (q, v), rows = case.P, case.extra["rows"]
    return layers.adapted_fused(f, case.x, case.W, case.b, (q, v, None), rows, case.s, case.K)


def with_b_drawn_too(rng, W, r, s):
    m, n = W.shape
    return W, rng.uniform(-1, 1, (r, n)), rng.uniform(-1, 1, (m, r))


def of_a_copy(rng, W, r, s):
    m, n = W.shape
    return W + 0, np.ones((r, n)), np.zeros((m, r))


def pissa_without_s_in_its_residual(rng, W, r, s):
    _, A, B = initialization.pissa(W, r, s)
    return W - B @ A, A, B


def vera_on_the_whole(x, W, b, A, B, lambda_d, lambda_b, s, K=None):
    """λ_b ∘ (W x + b + s B (λ_d ∘ A x)): the base is scaled too."""
    y, back = variants.vera_linear(x, W, b, A, B, lambda_d, lambda_b / lambda_b, s, K)
    return lambda_b * y, back


def lora_of_full_rank(W, b, A, B, s):
    return W + s * (B @ A) + np.eye(*W.shape, dtype=int), b


def combined_without_scales(adapters, weights):
    return multi_adapter.combine([(A, B, 1) for A, B, _ in adapters], weights)


LORA, BIAS, DORA, FULL, VERA, ADALORA = (
    lora.lora_linear,
    variants.lora_bias_linear,
    variants.dora_linear,
    variants.dora_full_linear,
    variants.vera_linear,
    variants.adalora_linear,
)
DERIVATIVE = "derivative"
WRONG = {
    "dora by columns": ("dora", "linear", "merge", variant("dora", linear=dora(columns))),
    "dora by one norm": ("dora", "fused", "merge", variant("dora", linear=dora(frobenius))),
    "dora by the norm of W": (
        "dora", "linear", "merge", variant("dora", linear=dora(of_the_weight_alone)),
    ),
    "dora without s in the norm": (
        "dora", "linear", "merge", variant("dora", linear=dora(without_the_scale)),
    ),
    "dora by the squared norm": (
        "dora", "experts", "merge", variant("dora", linear=dora(squared)),
    ),
    "dora by the sum of moduli": (
        "dora", "conv1", "merge", variant("dora", linear=dora(sum_of_moduli)),
    ),
    "dora without its magnitude": (
        "dora", "linear", "merge", variant("dora", linear=dora(factor=lambda m, v: 1 / v)),
    ),
    "dora with 1 + m / v": (
        "dora", "tied", "merge", variant("dora", linear=dora(factor=lambda m, v: 1 + m / v)),
    ),
    "dora that scales the bias": (
        "dora", "linear", "merge", variant("dora", linear=dora(bias=lambda b, g: g * b)),
    ),
    "dora that merges its directions": (
        "dora", "linear", "merge",
        variant("dora", merge=lambda W, b, A, B, m, s: variants.merge_dora(W, b, A, B, m / m, s)),
    ),
    "dora started at a magnitude of 1": (
        "dora", "linear", "initial-output",
        attribute(laws, "row_norm", lambda V: (1 + 0 * V[:, :1], None)),
    ),
    "dora without dm": (
        "dora", "linear", DERIVATIVE,
        variant("dora", linear=answering(DORA, d3=lambda d, *_: 0 * d)),
    ),
    "dora-full with its norm held": (
        "dora-full", "linear", DERIVATIVE, variant("dora-full", linear=DORA),
    ),
    "dora with its norm differentiated": (
        "dora", "linear", DERIVATIVE, variant("dora", linear=FULL),
    ),
    "vera on the whole": ("vera", "linear", "merge", variant("vera", linear=vera_on_the_whole)),
    "vera without λ_d": (
        "vera", "fused", "merge",
        variant("vera", linear=given(VERA, lambda_d=lambda lambda_d, **_: lambda_d / lambda_d)),
    ),
    "vera with λ_d in the other order": (
        "vera", "linear", "merge",
        variant("vera", linear=given(VERA, lambda_d=lambda lambda_d, **_: lambda_d[::-1])),
    ),
    "vera's dB without λ_d": (
        "vera", "linear", DERIVATIVE,
        variant("vera", linear=answering(VERA, d2=lambda d, A, B, lambda_d, *_: d / lambda_d.T)),
    ),
    "adalora with its values squared": (
        "adalora", "linear", "merge",
        variant("adalora", linear=given(ADALORA, E=lambda E, **_: E * E)),
    ),
    "adalora's dE without s": (
        "adalora", "linear", DERIVATIVE,
        variant("adalora", linear=answering(ADALORA, d3=lambda d, A, B, E, s, *_: d / s)),
    ),
    "lora-bias with c outside the scale": (
        "lora-bias", "linear", "merge",
        variant("lora-bias", linear=given(BIAS, c=lambda c, s, **_: c / s)),
    ),
    "an embedding with its factor on the base alone": (
        "lora", "embedding", "merge",
        kind("embedding", forward=embedding_with_its_factor_on_the_base),
    ),
    "a tied merge that touches the table": (
        "lora", "tied", "merge", kind("tied", put=layer_kinds._put),
    ),
    "experts with one A": (
        "lora", "experts", "merge", kind("experts", forward=experts_with_one_a),
    ),
    "groups interleaved": (
        "lora", "conv1", "merge", attribute(layers, "block_diagonal", interleaved),
    ),
    "a flipped kernel": ("lora", "conv2", "merge", kind("conv2", forward=with_a_flipped)),
    "an A padded otherwise": (
        "lora", "conv1", "merge",
        kind("conv1", forward=with_a_moving_otherwise(padding=((0, 1),))),
    ),
    "an adapter of V on K": (
        "lora", "fused", "merge", kind("fused", forward=with_values_adapter_on_the_keys),
    ),
    "a merge that forgets the transpose": (
        "lora", "transposed", "merge", kind("transposed", put=layer_kinds._put),
    ),
    "an invocation that is not heeded": (
        "alora", "linear", "merge",
        attribute(layer_kinds.LayerCase, "without_dropout", lambda case: replace(case, K=None)),
    ),
    "a start with B drawn too": (
        "lora", "linear", "initial-output", start("kaiming", with_b_drawn_too),
    ),
    "a start from a copy": ("lora", "linear", "frozen-weight", start("kaiming", of_a_copy)),
    "a start that its entry denies": (
        "pissa", "linear", "frozen-weight", start("pissa", INITIALIZATIONS["kaiming"].start),
    ),
    "a residual without s": (
        "pissa", "linear", "initial-output", start("pissa", pissa_without_s_in_its_residual),
    ),
    "a loftq that quantizes nothing": (
        "loftq", "linear", "initial-output", start("loftq", INITIALIZATIONS["pissa"].start),
    ),
    "a branch with a constant": (
        "lora", "linear", "zero-B", variant("lora", linear=answering(LORA, y=lambda y, *_: y + 1)),
    ),
    "dB without s": (
        "lora", "conv2", "balance",
        variant("lora", linear=answering(LORA, d2=lambda d, A, B, s, *_: d / s)),
    ),
    "components in another order": (
        "lora", "linear", "basis-change",
        variant("lora", linear=given(LORA, A=lambda A, **_: A[::-1])),
    ),
    "the scale squared": (
        "lora", "linear", "rescaling", variant("lora", linear=given(LORA, s=lambda s, **_: s * s)),
    ),
    "a merge of full rank": ("lora", "linear", "rank", variant("lora", merge=lora_of_full_rank)),
    "a bent branch": (
        "lora", "linear", "concatenation",
        variant("lora", linear=answering(LORA, y=lambda y, x, A, B, *_: y + (B @ (A @ x)) ** 2)),
    ),
    "adapters combined without their scales": (
        "lora", "linear", "single-combination", attribute(laws, "combine", combined_without_scales),
    ),
    "dropout twice": (
        "lora", "linear", "dropout-mean",
        variant("lora", linear=given(LORA, K=lambda K, **_: K * K)),
    ),
    "tokens that see each other": (
        "lora", "linear", "token-independence",
        variant("lora", linear=answering(LORA, y=lambda y, *_: y + y.sum(1, keepdims=True))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name, monkeypatch):
    entry, of, law, patch = WRONG[name]

    def check(case):
        if law == DERIVATIVE:
            assert derivative_error(case, np.random.default_rng(0)) <= GRADIENT
        else:
            as_the_registry_says(entry, of, case, [law])

    case = case_of(entry, of, law != DERIVATIVE, square=of == "transposed")
    check(case)
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        check(case)


def test_each_law_has_refused_something():
    assert {law for _, _, law, _ in WRONG.values()} == {*LAWS, DERIVATIVE}
    assert {kind for _, kind, _, _ in WRONG.values()} == KINDS.keys()


def test_a_gradient_off_in_the_twelfth_digit_is_no_derivative(monkeypatch):
    off = answering(LORA, d1=lambda d, *_: d * (1 + 1e-12))
    variant("lora", linear=off)(monkeypatch)
    for of in KINDS:
        case = case_of("lora", of, exact=False)
        assert derivative_error(case, np.random.default_rng(0)) > GRADIENT


def test_exact_numbers_stay_exact_and_have_the_roots_that_they_have():
    a, b = SqrtFraction(9, 4), SqrtFraction(-3, 2)
    for name in ("add", "sub", "mul", "truediv"):
        operate = getattr(operator, name)
        for other in (b, Fraction(-3, 2), -3):
            for found, wanted in (
                (operate(a, other), operate(Fraction(9, 4), Fraction(other))),
                (operate(other, a), operate(Fraction(other), Fraction(9, 4))),
            ):
                assert type(found) is SqrtFraction
                assert found == wanted
    assert type(-a) is SqrtFraction
    assert a.sqrt() == SqrtFraction(3, 2)
    assert type(a.sqrt()) is SqrtFraction
    assert Fraction(9, 4) * Fraction(4, 9) == 1
    with pytest.raises(ArithmeticError, match="the root of 1/2 is irrational"):
        SqrtFraction(1, 2).sqrt()
    assert type(a + 0.5) is float


def test_only_exact_entries_of_one_shape_are_the_same():
    a = np.array([[SqrtFraction(1, 3), SqrtFraction(2)]])
    assert exact_numbers.same(a, a.copy())
    assert exact_numbers.same(None, None)
    for other in (a.T, a + SqrtFraction(1, 10**30), a.astype(float), a[0], None):
        assert not exact_numbers.same(a, other)
        assert not exact_numbers.same(other, a)
    assert not exact_numbers.same(np.array([2.0]), np.array([SqrtFraction(2)]))


def test_a_law_that_leads_out_of_the_rationals_is_not_kept():
    case = case_of("dora", "linear")
    assert holds("merge", case)
    moved = replace(case, W=case.W + 1)  # whose norms are no longer rational
    with pytest.raises(ArithmeticError):
        LAWS["merge"](moved)
    assert holds("merge", moved) is False


@pytest.mark.slow
def test_a_case_is_nowhere_special():
    for entry, of in CELLS:
        case = case_of(entry, of)
        for W, _, P in case.matrices():
            parts = dict(zip(case.variant.parts, P, strict=True))
            assert {part: p.shape for part, p in parts.items()} == variants.part_shapes(
                case.variant, case.r, *W.shape
            )
            assert min(W.shape) > case.r
        assert case.s == SqrtFraction(7, 4)
        assert all(p.any() for part in case.P for p in part)
        assert of == "embedding" or case.K is None or 0 in case.K
        assert case.forward()[0].shape == case.base()[0].shape == case.dy.shape
        assert not exact_numbers.same(case.forward()[0], case.base()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_square_case_is_square(kind):
    for square in (True, False):
        matrices = case_of("lora", kind, square=square).matrices()
        equal = {m == n for W, *_ in matrices for m, n in [W.shape]}
        assert equal == {square} or kind in ("conv1", "conv2")


def test_the_base_of_a_kind_is_the_layer_whose_parameters_are_zero():
    for of in KINDS:
        case = case_of("lora", of)
        y, dx, _ = layer_kinds.answers(case.with_parts(B=lambda B: 0 * B))
        base, back = case.base()
        assert exact_numbers.same(y, base)
        assert exact_numbers.same(back(case.dy), dx)


def test_a_linear_kind_is_a_linear():
    case = case_of("lora", "linear").without_dropout()
    y, _ = case.merged().base()
    assert exact_numbers.same(
        y, linear(case.x, lora.merge_weight(case.W, *case.P[0], case.s), case.b)[0]
    )
