"""The verdicts on a tensor that is right, and on each way to be no merge at all."""

from dataclasses import replace

import numpy as np
import pytest
from made import DTYPES, Stored, cast, change, delta, weight, wide

from minilora.audit.floats import BF16, F16, F32
from minilora.audit.judge import judge
from minilora.spec.quantization import SCHEMES, dequantize, quantize
from minilora.spec.variants import ADALORA, DORA, LORA_BIAS, VERA, merge_dora


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def verdict(W, M, *changes):
    return judge(Stored(W), Stored(M), changes).verdict


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_named_way_are_exact(rng, dtype):
    W, c = weight(rng, 40, 30, dtype), change(rng, 40, 30, 4)
    A, B = c.parts["A"], c.parts["B"]
    entry = judge(Stored(W), Stored(cast(W.astype(F32) + F32.type(2) * (B @ A), dtype)), [c])
    assert (entry.verdict, entry.figures["rounding"]) == ("exact", "float32")
    assert entry.figures["share_of_bits"] == 1
    moved = cast(W.astype(F32) + F32.type(2) * (B @ A), dtype)
    moved[0, 0] = np.nextafter(moved[0, 0], moved.dtype.type(1))
    assert verdict(W, moved, c) in ("within", "factor", "mismatch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bases_bits_are_not_applied(rng, dtype):
    W, c = weight(rng, 40, 30, dtype), change(rng, 40, 30, 4)
    assert verdict(W, W, c) == "not-applied"


def test_a_change_of_zero_is_right(rng):
    W, c = weight(rng, 40, 30, F32), change(rng, 40, 30, 4, size=0)
    entry = judge(Stored(W), Stored(W), [c])
    assert (entry.verdict, entry.figures["survived"]) == ("exact", None)


def test_a_change_below_half_a_unit_cannot_be_told(rng):
    W, c = np.full((40, 30), 0.02, F32).astype(BF16), change(rng, 40, 30, 4, size=1e-6)
    entry = judge(Stored(W), Stored(W), [c])
    assert (entry.verdict, entry.figures["survived"]) == ("rounded-away", 0)
    assert entry.severity == "warning"
    W[3, 4] = 1e-5  # here the change is above half a unit
    assert verdict(W, W, c) == "not-applied"


def test_what_survives_is_told(rng):
    W, c = weight(rng, 200, 100, BF16), change(rng, 200, 100, 4, size=1e-5)
    entry = judge(Stored(W), Stored(cast(W.astype(float) + delta(c), BF16)), [c])
    assert entry.verdict == "rounded-away"
    moved = cast(W.astype(float) + delta(c), BF16).astype(float) - W.astype(float)
    survived = (moved * delta(c)).sum() / (delta(c) ** 2).sum()
    assert entry.figures["survived"] == pytest.approx(survived, rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_is_corrupt(rng, value):
    W, c = weight(rng, 40, 30, F32), change(rng, 40, 30, 4)
    M = cast(W.astype(float) + delta(c), F32)
    M[3, 4] = value
    entry = judge(Stored(W), Stored(M), [c])
    assert (entry.verdict, entry.figures["corrupt"]) == ("corrupt", 1)


@pytest.mark.parametrize("part", ["A", "B"])
def test_an_adapter_with_nan_is_corrupt(rng, part):
    W, c = weight(rng, 40, 30, F32), change(rng, 40, 30, 4)
    c.parts[part][0, 0] = np.nan
    entry = judge(Stored(W), Stored(W), [c])
    assert (entry.verdict, f"adapter's {part}" in entry.text) == ("corrupt", True)


def test_an_adapter_of_another_shape_is_a_mismatch(rng):
    W = weight(rng, 40, 30, F32)
    entry = judge(Stored(W), Stored(W), [change(rng, 30, 40, 4)])
    assert entry.text == "the change is 30 x 40, the tensor 40 x 30: the adapter is another model's"


def test_a_tensor_without_entries_is_right(rng):
    W = weight(rng, 0, 30, F32)
    assert verdict(W, W, change(rng, 0, 30, 4)) == "exact"


def test_another_shape_is_a_mismatch(rng):
    W = weight(rng, 40, 30, F32)
    entry = judge(Stored(W), Stored(W[:20]), [change(rng, 40, 30, 4)])
    assert (entry.verdict, entry.text) == ("mismatch", "its shape is (20, 30), the base's (40, 30)")


def test_noise_is_a_mismatch_that_nothing_explains(rng):
    W, c = weight(rng, 40, 30, F32), change(rng, 40, 30, 4)
    entry = judge(Stored(W), Stored(weight(rng, 40, 30, F32)), [c])
    assert (entry.verdict, entry.mistake) == ("mismatch", "")
    assert entry.figures["explained"] < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_changes_are_right_in_turn_and_together(rng, dtype):
    W = weight(rng, 40, 30, dtype)
    changes = [change(rng, 40, 30, r, weight=w) for r, w in ((4, 1.0), (2, 0.3), (8, -1.0))]
    turn = W
    for c in changes:
        turn = cast(turn.astype(float) + delta(c), dtype)
    together = cast(W.astype(float) + sum(map(delta, changes)), dtype)
    for M in (turn, together):
        assert verdict(W, M, *changes) in ("exact", "within")
    assert verdict(W, cast(W.astype(float) + delta(changes[0]), dtype), *changes) == "partly"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variants_are_right(rng, dtype):
    W, c = weight(rng, 40, 30, dtype), change(rng, 40, 30, 4)
    A, B, w = wide(c.parts["A"], c.parts["B"], W)
    column = rng.normal(size=(4, 1)).astype(F32)
    long = rng.normal(size=(40, 1)).astype(F32)
    adalora = replace(c, variant=ADALORA, parts={**c.parts, "E": column})
    assert verdict(W, cast(w + c.s * B @ (column * A), dtype), adalora) in ("exact", "within")
    vera = replace(c, variant=VERA, parts={**c.parts, "lambda_d": column, "lambda_b": long})
    assert verdict(W, cast(w + c.s * (long * B) @ (column * A), dtype), vera) in ("exact", "within")
    dora = replace(c, variant=DORA, parts={**c.parts, "magnitude": abs(long)})
    M, _ = merge_dora(w, None, A, B, abs(long).astype(float), c.s)
    assert verdict(W, cast(M, dtype), dora) in ("exact", "within")
    assert verdict(W, cast(w + c.s * B @ A, dtype), dora) == "norm-not-applied"
    bias = replace(c, kind="bias", variant=LORA_BIAS, parts={"c": long})
    b = W[:, 0]
    assert verdict(b, cast(b.astype(float) + c.s * long[:, 0], dtype), bias) in ("exact", "within")
    assert verdict(b, cast(b.astype(float) + long[:, 0], dtype), bias) == "bias-unscaled"


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_transposed_weight_is_judged_as_it_is_stored(rng, variant):
    W, c = weight(rng, 30, 40, F16), change(rng, 40, 30, 4, transposed=True)
    A, B, w = wide(c.parts["A"], c.parts["B"], W)
    M = w.T + c.s * (B @ A)
    if variant == "dora":
        m = 1 + rng.random((40, 1)).astype(F32)
        c = replace(c, variant=DORA, parts={**c.parts, "magnitude": m})
        M, _ = merge_dora(w.T, None, A, B, m.astype(float), c.s)
    assert verdict(W, cast(M.T, F16), c) in ("exact", "within")
    assert verdict(W, cast(M.T * 1.1, F16), c) not in ("exact", "within")


def test_rows_and_matrices_that_no_change_touches_stay(rng):
    W = weight(rng, 60, 30, BF16)
    c = change(rng, 20, 30, 4, rows=(20, 40))
    M = W.copy()
    M[20:40] = cast(W[20:40].astype(float) + delta(c), BF16)
    assert verdict(W, M, c) == "exact"
    M[0, 0] = 1
    assert verdict(W, M, c) == "changed"
    experts = weight(rng, 60, 30, F32).reshape(3, 20, 30)
    c = change(rng, 20, 30, 4, index=1, kind="expert")
    M = experts.copy()
    M[1] = cast(experts[1].astype(float) + delta(c), F32)
    assert verdict(experts, M, c) in ("exact", "within")
    M[2] += 1e-3
    assert verdict(experts, M, c) == "changed"


def test_tokens_and_saved_tensors_replace(rng):
    W = weight(rng, 50, 16, BF16)
    rows, ids = weight(rng, 3, 16, F32), np.array([40, 2, 7])
    tokens = change(rng, 1, 1, kind="tokens", parts={"ids": ids, "rows": rows})
    M = W.copy()
    M[ids] = cast(rows, BF16)
    assert verdict(W, M, tokens) == "exact"
    M[3] = M[2]
    assert verdict(W, M, tokens) == "mismatch"
    saved = change(rng, 1, 1, kind="saved", parts={"weight": weight(rng, 50, 16, F32)})
    assert verdict(W, cast(saved.parts["weight"], BF16), saved) == "exact"
    assert verdict(W, W, saved) == "not-applied"


STEPS = {"q8_0": 1 / 127, "q4_0": 1 / 8, "q4_1": 1 / 7.5, "nf4": 0.31}
"""The greatest step beside the greatest entry of a block."""


def quantized(x, scheme, dtype=F32):
    """x quantized through a dtype, as a tensor of a file."""
    stored = dequantize(quantize(cast(x, dtype).astype(F32), scheme)).astype(F32)
    block = SCHEMES[scheme].block or 64
    largest = abs(stored).reshape(len(stored), -1, block).max(-1).repeat(block, 1)
    return Stored(stored, scheme=scheme, spacing=(largest * STEPS[scheme]).astype(F32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", STEPS)
def test_a_quantized_merge_is_within_its_steps(rng, scheme, dtype):
    """Its bits are those of a merge quantized again; a bit apart it is within the steps."""
    W, c = weight(rng, 48, 128, dtype), change(rng, 48, 128, 4, size=2e-2)
    w, D = W.astype(float), delta(c)
    M = quantized(w + D, scheme, dtype)
    found = judge(Stored(W), M, [c]).verdict
    assert found == "exact" or (scheme == "nf4" and found == "within")  # its scales are float32
    close = quantized(w + D + 1e-5 * rng.normal(size=D.shape), scheme)
    assert judge(Stored(W), close, [c]).severity in ("ok", "warning")
    for factor in (-1, 2, 0.5):
        entry = judge(Stored(W), quantized(w + factor * D, scheme, dtype), [c])
        assert entry.verdict == "factor", entry


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0"])
def test_a_small_change_of_a_quantized_weight_is_told_by_least_squares(rng, scheme):
    """A tenth of a step in each entry: 60 000 entries tell it from none, and from twice."""
    W, c = (
        weight(rng, 240, 256, F32),
        change(rng, 240, 256, 4, size=3e-4 if scheme == "q4_0" else 3e-5),
    )
    w, D = W.astype(float), delta(c)
    assert judge(Stored(W), quantized(w + D, scheme), [c]).severity in ("ok", "warning")
    for factor, found in ((0, "not-applied"), (3, "factor")):
        entry = judge(Stored(W), quantized(w + factor * D, scheme), [c])
        assert entry.verdict == found, (factor, entry)


def test_into_four_bits_the_change_may_be_gone(rng):
    """The base is quantized, too, and has these very bits: they tell nothing."""
    base = quantized(weight(rng, 48, 128, F32), "q4_0")
    c = change(rng, 48, 128, 4, size=1e-5)
    entry = judge(base, base, [c])
    assert (entry.verdict, entry.figures["survived"]) == ("rounded-away", 0)


def test_a_k_quant_may_clip_the_ends_of_its_parts(rng):
    W, c = weight(rng, 8, 64, F32), change(rng, 8, 64, 4, size=2e-2)
    V = (W.astype(float) + delta(c)).reshape(8, 2, 32)
    step = (V.max(-1, keepdims=True) - V.min(-1, keepdims=True)) / 12  # 16 codes would need 15
    middle = (V.max(-1, keepdims=True) + V.min(-1, keepdims=True)) / 2
    M = middle + step * np.round((V - middle) / step).clip(-4, 4)
    gap = np.broadcast_to(step, M.shape).reshape(8, 64).astype(F32)
    stored = M.reshape(8, 64).astype(F32)
    given = {"spacing": gap, "scheme": "q4_k"}
    assert judge(Stored(W), Stored(stored, **given), [c]).severity in ("ok", "warning")
    stored[3, 5] = stored[3].mean()
    stored[3, 6] = stored[3, 5] + 3 * gap[3, 6]
    assert judge(Stored(W), Stored(stored, **given), [c]).severity == "deviation"


def test_what_no_change_touches_has_the_bases_bits_or_a_cast_of_them(rng):
    W = weight(rng, 40, 30, F32)
    assert verdict(W, W) == "unchanged"
    assert judge(Stored(W), Stored(W.astype(F16)), []).text.endswith("from float32 to float16")
    assert verdict(W, W + F32.type(1e-3)) == "changed"
