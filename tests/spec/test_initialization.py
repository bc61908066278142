"""How an adapter starts: what part of the weight it takes, and that the output is the base's."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
from calculus import UNIT_ROUNDOFF, gamma, record_worst, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples
from number_systems import to_objects

from minilora import testing as draw
from minilora.spec import initialization, lora
from minilora.spec.initialization import (
    INITIALIZATIONS,
    convert_to_lora,
    converted_alpha,
    loftq,
    olora,
    orthogonal,
    pissa,
)
from minilora.spec.quantization import dequantize, quantize
from minilora.spec.variants import REGISTRY
from minilora.verify.properties import exact_numbers

FEW = examples(5)
SCALES = st.sampled_from((7 / 3, 1 / 4))


def weights(smallest=2):
    """High, wide and square."""
    return draw.sizes(2, smallest, 6).flatmap(draw.normal)


def norm(M):
    return math.sqrt((M * M).sum())


def orthogonal_to(k):
    """How far from orthogonal a factor is that k numbers went into.

    Householder's Q of an m × n matrix has Qᵀ Q = I but for γ(8 m n) in norm (Higham 2002, theorem
    19.4, with 8 for its small constant); LAPACK's singular vectors come from such factors too.
    """
    return gamma(8 * k)


def best_of_its_rank(split, W, r, s):
    """M = s B A, R = W - M: neither has anything of the other, and M's part is the greater one.

    That characterises the nearest matrix of rank r (Eckart and Young 1936). Its distance comes by
    another route: the eigenvalues of Wᵀ W. In norms all of that holds but for rounding.
    """
    R, A, B = split(W, r, s)
    assert A.shape == (r, W.shape[1])
    assert B.shape == (len(W), r)
    M = s * (B @ A)
    bound = 4 * orthogonal_to(W.size) * norm(W) ** 2
    assert norm(M.T @ R) <= bound
    assert norm(M @ R.T) <= bound
    eigenvalues = scipy.linalg.eigvalsh(W.T @ W)[::-1]
    assert abs(norm(R) ** 2 - eigenvalues[r:].sum()) <= bound
    assert abs(norm(M) ** 2 - eigenvalues[:r].sum()) <= bound


def factors_are_alike(split, W, r, s):
    """√(Σ / s) goes into each: A Aᵀ and Bᵀ B are one diagonal matrix, from the greatest down."""
    _, A, B = split(W, r, s)
    bound = 4 * orthogonal_to(W.size) * norm(W) / s
    assert norm(A @ A.T - B.T @ B) <= bound
    assert norm(A @ A.T - np.diag(np.diag(A @ A.T))) <= bound
    assert (np.diff(np.diag(A @ A.T)) <= bound).all()


def test_pissa_takes_the_best_part_of_its_rank():
    @FEW
    @given(W=weights(), s=SCALES, data=st.data())
    def every(W, s, data):
        r = data.draw(st.integers(1, min(W.shape)))
        best_of_its_rank(pissa, W, r, s)
        factors_are_alike(pissa, W, r, s)

    every()


def least_part(W, r, s):
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[-r:] / s)
    A, B = root[:, None] * Vh[-r:], U[:, -r:] * root
    return W - s * (B @ A), A, B


WRONG = {
    "the least singular values": (best_of_its_rank, least_part),
    "√s forgotten": (
        best_of_its_rank,
        lambda W, r, s: (W - s * (pissa(W, r, 1)[2] @ pissa(W, r, 1)[1]), *pissa(W, r, 1)[1:]),
    ),
    "a residual without s": (
        best_of_its_rank,
        lambda W, r, s: (W - pissa(W, r, s)[2] @ pissa(W, r, s)[1], *pissa(W, r, s)[1:]),
    ),
    "QR's first columns": (best_of_its_rank, olora),
    "all of Σ in B": (
        factors_are_alike,
        lambda W, r, s: (
            None,
            *(f * 2.0**j for f, j in zip(pissa(W, r, s)[1:], (1, -1), strict=True)),
        ),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_part_is_not_pissas(name):
    law, wrong = WRONG[name]
    W = np.random.default_rng(0).standard_normal((5, 4))
    law(pissa, W, 2, 7 / 3)
    with pytest.raises(AssertionError):
        law(wrong, W, 2, 7 / 3)


def orthonormal_from_the_first_columns(split, W, r, s):
    """Bᵀ B = I, A is triangular, and B A is W in its first r columns."""
    _, A, B = split(W, r, s)
    off = orthogonal_to(W.size) * math.sqrt(r)
    assert norm(B.T @ B - np.eye(r)) <= 2 * off
    assert not np.tril(A[:, :r], -1).any()
    assert norm((B @ A - W)[:, :r]) <= 2 * off * norm(W)


@FEW
@given(W=weights(), s=SCALES, data=st.data())
def test_olora_takes_orthonormal_columns_and_what_the_first_of_w_are_in_them(W, s, data):
    r = data.draw(st.integers(1, min(W.shape)))
    orthonormal_from_the_first_columns(olora, W, r, s)


def test_singular_vectors_are_not_oloras():
    W = np.random.default_rng(0).standard_normal((5, 4))
    with pytest.raises(AssertionError):
        orthonormal_from_the_first_columns(pissa, W, 2, 1.0)
    with pytest.raises(AssertionError):
        orthonormal_from_the_first_columns(lambda *a: (None, *least_part(*a)[1:]), W, 2, 1.0)


def product_is_zero(factors, r, m, n):
    """|s B A| by norms: P' Pᵀ is what Householder's Q leaves, and each factor is rounded."""
    A, B = factors(np.random.default_rng(r + m + n), r, m, n)
    k = orthogonal_to(r * r) + gamma(2 * r)
    assert norm(B @ A) <= k * math.sqrt(r) * norm(B) * norm(A)


@FEW
@given(r=st.sampled_from((2, 4, 6)), shape=draw.sizes(2))
def test_the_orthogonal_starts_product_is_zero_and_its_factors_are_not(r, shape):
    m, n = shape
    product_is_zero(orthogonal, r, m, n)
    rng = np.random.default_rng(0)
    A, B = orthogonal(rng, r, m, n)
    again = np.random.default_rng(0)
    again.standard_normal((r, r))
    # A rotation does not change the norm of N / 10 but for its own distance from orthogonal.
    for factor, shape in ((A, (r // 2, n)), (B, (m, r // 2))):
        wanted = norm(again.standard_normal(shape)) / 10
        assert abs(norm(factor) - wanted) <= 2 * orthogonal_to(r * r) * wanted


def test_factors_from_one_half_are_not_orthogonal():
    def wrong(rng, r, m, n):
        A, B = orthogonal(rng, r, m, n)
        return A, B[:, ::-1]

    product_is_zero(orthogonal, 4, 5, 3)
    with pytest.raises(AssertionError):
        product_is_zero(wrong, 4, 5, 3)


def quarter(W):
    """To multiples of ½: coarse, as four bits are."""
    return np.round(2 * W) / 2


def nearer_than_the_base_alone(start, W, r, s, steps):
    """W is nearer to Q + s B A than to Q, by what the greatest singular values of W - Q are."""
    Q, A, B = start(W, r, s, quarter, steps)
    assert same_bits(Q, quarter(Q))
    lost = W - Q
    left = lost - s * (B @ A)
    eigenvalues = scipy.linalg.eigvalsh(lost.T @ lost)[::-1]
    bound = 4 * orthogonal_to(W.size) * norm(lost) ** 2
    assert abs(norm(left) ** 2 - eigenvalues[r:].sum()) <= bound
    assert norm(left) < norm(lost)


@FEW
@given(W=weights(), s=SCALES, steps=st.integers(1, 4))
def test_loftq_takes_what_quantizing_lost_with_the_scale(W, s, steps):
    nearer_than_the_base_alone(loftq, W, 1, s, steps)


def test_loftq_without_its_scale_or_of_the_whole_weight_is_refused():
    W = np.random.default_rng(0).standard_normal((5, 4))
    nearer_than_the_base_alone(loftq, W, 2, 7 / 3, 1)
    for wrong in (
        lambda W, r, s, quantize, steps: loftq(W, r, 1.0, quantize, steps),
        lambda W, r, s, quantize, steps: (quantize(W), *pissa(W, r, s)[1:]),
    ):
        with pytest.raises(AssertionError):
            nearer_than_the_base_alone(wrong, W, 2, 7 / 3, 1)


def test_loftqs_first_step_quantizes_the_weight_and_the_next_what_the_adapter_leaves():
    W, s = np.random.default_rng(0).standard_normal((5, 4)), 7 / 3
    Q, A, B = loftq(W, 2, s, quarter)
    assert same_bits(Q, quarter(W))
    second, *_ = loftq(W, 2, s, quarter, 2)
    assert same_bits(second, quarter(lora.merge_weight(W, A, B, -s)))
    assert not same_bits(second, Q)


def start_is_the_base(split, W, x, r, s):
    """|R x + s B (A x) - W x| by its roundings, entry by entry.

    R is off by γ(r + 4) (|W| + s |B| |A|): r - 1 additions, two products, a difference, s itself.
    A product over n is off by γ(n), the branch's two by γ(n + r + 2), their sum by u: γ(2 n + 2 r +
    8) covers each, of moduli |W| + 2 s |B| |A| at most.
    """
    R, A, B = split(W, r, s)
    assert {v.dtype for v in (R, A, B)} == {W.dtype}
    y, _ = lora.lora_linear(x, R, None, A, B, s)
    k = (2 * W.shape[1] + 2 * r + 8) * float(np.finfo(W.dtype).eps / 2)
    moduli = (abs(W) + 2 * s * (abs(B) @ abs(A))).astype(float) @ abs(x)
    share = (abs(y.astype(float) - W.astype(float) @ x) / (k / (1 - k) * moduli)).max()
    assert share <= 1
    return share


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("split", [pissa, olora])
def test_the_output_at_the_start_is_the_bases_but_for_rounding(split, dtype):
    @FEW
    @given(W=weights(), s=SCALES, rng=draw.generators())
    def every(W, s, rng):
        r = min(W.shape) // 2
        for M in (W.astype(dtype), W.T.astype(dtype)):
            x = rng.standard_normal((M.shape[1], 3)).astype(dtype)
            share = start_is_the_base(split, M, x, r, s)
            record_worst("a start's output against the base's / its bound", share)

    every()


def test_a_start_in_float32_of_a_float64_weight_is_off():
    W = np.random.default_rng(0).standard_normal((5, 4))
    x = np.random.default_rng(1).standard_normal((4, 3))
    start_is_the_base(pissa, W, x, 2, 7 / 3)

    def narrow(W, r, s):
        return tuple(v.astype(np.float64) for v in pissa(W.astype(np.float32), r, s))

    def of_another_scale(W, r, s):
        return pissa(W, r, s * (1 + 1e-12))

    for wrong in (narrow, of_another_scale):
        with pytest.raises(AssertionError):
            start_is_the_base(wrong, W, x, 2, 7 / 3)


def test_what_has_no_such_part_is_refused():
    W = np.random.default_rng(0).standard_normal((5, 4))
    for r in (0, 5):
        with pytest.raises(ValueError, match=rf"rank {r}: a weight \(5, 4\) has singular values 1"):
            pissa(W, r, 1.0)
        with pytest.raises(ValueError, match=rf"rank {r}: a weight \(5, 4\) has 1 to 4 orthogonal"):
            olora(W, r, 1.0)
        with pytest.raises(ValueError, match=f"rank {r}: a weight"):
            loftq(W, r, 1.0, quarter)
    for s in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="expected more than 0, to divide the singular values"):
            pissa(W, 2, s)
    for bad in (np.nan, np.inf):
        holed = W.copy()
        holed[1, 2] = bad
        with pytest.raises(ValueError, match="holds NaN or infinity: it has no singular values"):
            pissa(holed, 2, 1.0)
        with pytest.raises(ValueError, match="holds NaN or infinity: it has no orthogonal factor"):
            olora(holed, 2, 1.0)
    with pytest.raises(ValueError, match="0 steps: expected at least 1"):
        loftq(W, 2, 1.0, quarter, 0)
    for r in (0, 1, 3):
        with pytest.raises(ValueError, match=f"rank {r}: expected an even"):
            orthogonal(np.random.default_rng(0), r, 5, 4)
    pissa(W, 4, 1.0)
    olora(W, 4, 1.0)


@pytest.mark.parametrize("init", INITIALIZATIONS)
def test_a_drawn_start_leaves_the_very_weight_and_has_a_product_of_zero_or_vectors_beside_it(init):
    W = np.random.default_rng(0).standard_normal((4, 6))
    base, A, B = INITIALIZATIONS[init].start(np.random.default_rng(1), W, 2, 7 / 3)
    assert (A.shape, B.shape) == ((2, 6), (4, 2))
    assert (base is W) == (INITIALIZATIONS[init].base == "kept")
    assert ((B @ A == 0).all()) == (init in ("kaiming", "gaussian", "embedding"))
    assert A.any() or init == "embedding"


def test_the_drawn_starts_are_these():
    W, (m, n, r) = np.zeros((4, 5)), (4, 5, 2)

    def found(init):
        return INITIALIZATIONS[init].start(np.random.default_rng(1), W, r, 1.0)[1:]

    rng = np.random.default_rng(1)
    assert same_bits(found("embedding")[1], rng.standard_normal((m, r)))
    assert not found("embedding")[0].any()
    rng = np.random.default_rng(1)
    wanted = rng.standard_normal((r, n)), rng.standard_normal((m, r))
    assert all(same_bits(f, 0.02 * w) for f, w in zip(found("adalora"), wanted, strict=True))
    rng = np.random.default_rng(1)
    A, B = found("vera")
    assert same_bits(A, rng.uniform(-((6 / n) ** 0.5), (6 / n) ** 0.5, (r, n)))
    assert same_bits(B, rng.uniform(-((6 / r) ** 0.5), (6 / r) ** 0.5, (m, r)))
    assert {entry.init for entry in REGISTRY.values()} <= INITIALIZATIONS.keys()


def test_veras_factors_are_shared_and_each_projection_takes_its_part():
    A, B = initialization.draw_vera(np.random.default_rng(0), 2, 4, 6)
    for m, n in ((4, 6), (4, 5), (1, 6), (3, 2)):
        part_A, part_B = initialization.shared_part(A, B, m, n)
        assert np.shares_memory(part_A, A)
        assert np.shares_memory(part_B, B)
        assert same_bits(part_A, A[:, :n])
        assert same_bits(part_B, B[:m])
    for m, n in ((5, 6), (4, 7), (5, 7)):
        with pytest.raises(ValueError, match=r"shared A \(2, 6\) and B \(4, 2\)"):
            initialization.shared_part(A, B, m, n)


def test_loftq_by_name_is_one_step_with_nf4():
    W = np.random.default_rng(0).standard_normal((4, 6))
    Q, A, B = INITIALIZATIONS["loftq"].start(np.random.default_rng(1), W, 2, 7 / 3)
    nearest = dequantize(quantize(W.astype(np.float32), "nf4")).astype(float)
    assert same_bits(Q, nearest)
    wanted = loftq(W, 2, 7 / 3, lambda V: nearest)
    assert all(same_bits(f, w) for f, w in zip((Q, A, B), wanted, strict=True))
    assert not same_bits(loftq(W, 2, 7 / 3, quarter)[0], Q)


def in_fractions(array):
    return to_objects(array, Fraction)


def trained(split, W, r, s, x, rng):
    """The residual and the factors at the start and after three steps, all in fractions."""
    _, A0, B0 = map(in_fractions, split(W, r, float(s)))
    R = in_fractions(W) - s * (B0 @ A0)
    A, B = A0, B0
    for _ in range(3):
        dy = in_fractions(np.round(4 * rng.standard_normal((len(W), x.shape[1]))) / 4)
        _, dA, dB = lora.lora_linear(x, R, None, A, B, s)[1](dy)
        A, B = A - dA / 64, B - dB / 64
    return R, (A0, B0), (A, B)


@pytest.mark.parametrize("split", [pissa, olora])
@settings(max_examples=3)
@given(rng=draw.generators(), shape=draw.sizes(2, 2, 4))
def test_an_adapter_trained_from_a_part_of_the_weight_is_a_plain_one_of_twice_the_rank(
    split, rng, shape
):
    """The same function, exactly, on the weight as it was; not without the start taken off."""
    W, r, alpha = np.round(8 * rng.standard_normal(shape)) / 8, 1, Fraction(7, 3)
    s = lora.scale(alpha, r)
    x = in_fractions(np.round(4 * rng.standard_normal((shape[1], 2))) / 4)
    R, (A0, B0), (A, B) = trained(split, W, r, s, x, rng)
    wanted, _ = lora.lora_linear(x, R, None, A, B, s)
    A2, B2 = convert_to_lora(A, B, A0, B0)
    assert len(A2) == 2 * r
    doubled = lora.scale(converted_alpha(alpha), 2 * r)
    assert doubled == s
    assert exact_numbers.same(
        lora.lora_linear(x, in_fractions(W), None, A2, B2, doubled)[0], wanted
    )
    for wrong in ((A2, B2, lora.scale(alpha, 2 * r)), (A2, abs(B2), s), (A2[:r], B2[:, :r], s)):
        y, _ = lora.lora_linear(x, in_fractions(W), None, *wrong)
        assert not exact_numbers.same(y, wanted) or not x.any() or not A0.any()


@pytest.mark.parametrize("r", range(1, 9))
def test_twice_the_rank_has_the_same_scale(r):
    """For rsLoRA √2 α: three roots, a product and two quotients are rounded."""
    alpha = 7 / 3
    assert lora.scale(converted_alpha(alpha), 2 * r) == lora.scale(alpha, r)
    wanted = lora.scale(alpha, r, rslora=True)
    found = lora.scale(converted_alpha(alpha, rslora=True), 2 * r, rslora=True)
    assert abs(found - wanted) <= 6 * UNIT_ROUNDOFF * wanted
    assert abs(lora.scale(2 * alpha, 2 * r, rslora=True) - wanted) > 6 * UNIT_ROUNDOFF * wanted


def test_the_residual_and_the_scale_are_the_starts_own():
    assert initialization.converted_alpha(3) == 6
    W = np.random.default_rng(0).standard_normal((4, 6))
    for init, split in (("pissa", pissa), ("olora", olora)):
        found = INITIALIZATIONS[init].start(np.random.default_rng(1), W, 2, 7 / 3)
        assert all(same_bits(f, w) for f, w in zip(found, split(W, 2, 7 / 3), strict=True))
