"""Every mistake of the catalogue, made: the verdict names it, and no right merge."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from made import DTYPES, Stored, cast, change, delta, weight, wide

from minilora.audit.change import Around
from minilora.audit.floats import BF16, F16, F32, spacing
from minilora.audit.judge import judge
from minilora.audit.mistakes import MISTAKES
from minilora.audit.result import VERDICTS
from minilora.audit.scales import WRONG_SCALES, Settings
from minilora.spec.quantization import dequantize, quantize
from minilora.spec.variants import ADALORA, DORA

M, N, R = 64, 48, 8
EACH = [pytest.param(d, marks=[pytest.mark.slow] if d == F16 else [], id=str(d)) for d in DTYPES]
NAMED_FROM = (
    *("part-not-merged", "ranks-lost", "permuted", "dropped"),
    *("other-base", "other-change", "another-change", "after-merge"),
)
"""What `parts` and `remainder` find, beside the catalogue."""


class Made:
    """A base, a change and what is around, with all in float64 to make wrong merges from."""

    def __init__(self, dtype=F32, m=M, n=N, r=R, size=1e-2, seed=6, **fields):
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.W = weight(self.rng, m, n, dtype)
        self.c = change(self.rng, m, n, r, size=size, **fields)
        self.w, self.A, self.B = wide(self.W, self.c.parts["A"], self.c.parts["B"])
        self.D = delta(self.c)

    def other(self, **fields):
        m, n = len(self.B), self.A.shape[1]
        return change(self.rng, m, n, len(self.A), **fields)

    def entry(self, merged, changes=None, around=None):
        stored = Stored(cast(merged, self.dtype))
        return judge(Stored(self.W), stored, changes or [self.c], around)


def norm(V, axis=1):
    return np.sqrt((V * V).sum(axis, keepdims=True))


def plain(made):
    """Of LoRA's linear layers: the name of the mistake, and the weight that it makes."""
    w, A, B, D, s = made.w, made.A, made.B, made.D, made.c.s
    yield "ranks-cut", w + s * B[:, :4] @ A[:4]
    yield "ranks-cut", w + s * B[:, -1:] @ A[-1:]
    yield "ranks-lost", w + s * B[:, ::3] @ A[::3]
    yield "ranks-reversed", w + s * B @ A[::-1]
    yield "reshaped", w + s * B @ A.reshape(N, R).T
    yield "reshaped", w + s * B.reshape(R, M).T @ A
    yield "rows-permuted", w + D.reshape(4, 2, M // 8, N).swapaxes(1, 2).reshape(M, N)
    yield "rows-permuted", w + D.reshape(4, M // 8, 2, N).swapaxes(1, 2).reshape(M, N)
    yield "rows-permuted", w + np.roll(D, M // 2, 0)
    yield "rows-permuted", w + np.roll(D, 1, 0)
    yield "rows-permuted", w + D[::-1]
    yield "tensor-permuted", (w + D).reshape(4, 2, M // 8, N).swapaxes(1, 2).reshape(M, N)
    yield "columns-permuted", w + np.roll(D, N // 3, 1)
    yield "columns-permuted", w + D[:, ::-1]
    yield "permuted", w + D[made.rng.permutation(M)]
    yield "permuted", w + D[:, made.rng.permutation(N)]
    yield "base-lost", D
    yield "all-zero", 0 * D
    yield "part-not-merged", np.where(np.arange(M)[:, None] < 40, w + D, w)
    yield "part-not-merged", np.where(np.arange(N) < 10, w, w + D)
    yield "part-not-merged", np.where(made.rng.random((M, N)) < 0.5, w, w + D)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EACH)
def test_wrong_layouts_and_parts_are_named(dtype):
    made = Made(dtype)
    for name, merged in plain(made):
        entry = made.entry(merged, around=Around(heads=(4, 4)))
        assert entry.mistake == name, entry
    assert made.entry(made.w + made.D).severity == "ok"


@pytest.mark.parametrize("dtype", EACH)
def test_the_transpose_is_named_and_its_factor_told(dtype):
    made = Made(dtype, m=N)
    for factor in (1, 2, -1):
        entry = made.entry(made.w + factor * made.D.T)
        assert (entry.verdict, entry.mistake) == ("transposed", "transposed")
        if factor != 1:
            assert abs(entry.figures["factor"] - factor) <= entry.figures["factor_error"]


@pytest.mark.parametrize("dtype", EACH)
def test_any_order_is_found_in_a_table_too(dtype):
    """Of a tensor that stores the transpose, as embeddings do."""
    made = Made(dtype)
    W = Stored(np.ascontiguousarray(made.W.T))
    c = replace(made.c, kind="embedding", transposed=True)
    for D in (made.D[made.rng.permutation(M)], made.D[:, made.rng.permutation(N)]):
        entry = judge(W, Stored(cast((made.w + D).T, dtype)), [c])
        assert (entry.verdict, entry.mistake) == ("permuted", "permuted"), entry
    part = np.where(np.arange(N)[:, None] < 20, made.D.T, 0)
    entry = judge(W, Stored(cast(made.w.T + part, dtype)), [c])
    assert entry.text.startswith(f"rows 20 to {N - 1} of {N} lack the change")


@pytest.mark.parametrize("dtype", EACH)
def test_other_changes_are_named(dtype):
    made = Made(dtype)
    other, adapter = made.other(module="other"), made.other(adapter="B")
    A, B = wide(other.parts["A"], other.parts["B"])
    around = Around((other,), (adapter,))
    found = {
        "other-module": made.w + delta(other),
        "other-adapter": made.w + delta(adapter),
        "half-of-another": made.w + made.c.s * made.B @ A,
    }
    for name, merged in found.items():
        assert made.entry(merged, around=around).mistake == name
    both = made.entry(made.w + made.D + delta(adapter), around=around)
    assert both.text == "another adapter's change (that of B as well)"
    assert made.entry(made.w + made.c.s * B @ made.A, around=around).text.endswith("(B of other)")


def _scales():
    """Each wrong scale with settings for which nothing else explains it."""
    config = {"r": 12, "lora_alpha": 37.0, "use_rslora": False, "default_r": 5,
              "default_alpha": 11.0, "lora_dropout": 0.1}  # fmt: skip
    for wrong in WRONG_SCALES:
        rslora = wrong.id == "rslora-ignored"
        yield wrong, {**config, "use_rslora": rslora}, 37.0 / (12**0.5 if rslora else 12)


@pytest.mark.parametrize(("wrong", "config", "s"), [*_scales()], ids=lambda x: getattr(x, "id", ""))
def test_a_wrong_scale_is_named(wrong, config, s):
    for dtype in (F32, BF16):
        made = Made(dtype, r=12, s=s, config=config)
        factor = wrong.scale(Settings(made.c), s) / s
        entry = made.entry(made.w + factor * made.D)
        assert entry.verdict == "factor"
        assert abs(entry.figures["factor"] - factor) <= entry.figures["factor_error"]
        if dtype != BF16:
            assert entry.mistake == wrong.id, entry
        else:
            assert wrong.id == entry.mistake or wrong.text in entry.text or "(or" in entry.text


def test_a_factor_that_nothing_explains_is_measured():
    for dtype in DTYPES:
        made = Made(dtype)
        entry = made.entry(made.w + 0.617 * made.D)
        assert (entry.verdict, entry.mistake) == ("factor", "")
        assert abs(entry.figures["factor"] - 0.617) <= entry.figures["factor_error"]


def several(made, first, second):
    w, D1, D2 = made.w, delta(first), delta(second)
    (A1, B1), (A2, B2) = (wide(c.parts["A"], c.parts["B"]) for c in (first, second))
    s1, s2, weight_ = first.s, second.s, second.weight
    yield "some-of-several", w + D1
    yield "some-of-several", w + D2
    yield "weights-ignored", w + D1 + D2 / weight_
    yield "weights-averaged", w + D1 / 2 + D2 / weight_ / 2
    yield "weights-normalized", w + (D1 + D2) / (1 + weight_)
    yield "weights-exchanged", w + D1 * weight_ + D2 / weight_
    yield "weights-squared", w + D1 + D2 * weight_
    yield "one-scale-for-all", w + D1 + D2 / second.scale * first.scale
    yield "factors-added", w + (s1**0.5 * B1 + s2**0.5 * B2) @ (s1**0.5 * A1 + s2**0.5 * A2)
    yield "factors-added", w + s1 * (B1 + weight_ * B2) @ (A1 + weight_ * A2)
    yield "factors-added", w + s1 * (B1 + B2) @ (A1 + A2)
    yield "wrong-scale", w + D1 - D2
    yield "wrong-scale", w + 2 * (D1 + D2)


@pytest.mark.parametrize("dtype", EACH)
def test_mistakes_with_several_adapters_are_named(dtype):
    made = Made(dtype)
    second = made.other(adapter="B", s=1.5, weight=0.3)
    for name, merged in several(made, made.c, second):
        assert made.entry(merged, [made.c, second]).mistake == name, name
    assert made.entry(made.w + made.D + delta(second), [made.c, second]).severity == "ok"


def magnitudes(made, m, other):
    w, D, s = made.w, made.D, made.c.s
    V, BA = w + D, made.B @ made.A
    yield "norm-not-applied", V
    yield "magnitude-wrong", m * V
    yield "magnitude-wrong", m / norm(w) * V
    yield "magnitude-wrong", V / norm(V)
    yield "magnitude-wrong", norm(w) / norm(V) * V
    yield "magnitude-wrong", norm(V) / m * V
    yield "magnitude-wrong", m / norm(w + BA) * V
    yield "magnitude-wrong", m / norm(V) * w + D
    yield "magnitude-wrong", w + m / norm(V) * D
    yield "magnitude-permuted", m[::-1] / norm(V) * V
    yield "magnitude-of-another", other / norm(V) * V
    yield "norm-of-columns", V * m.T / norm(V, 0)
    for factor in (1 / s, 2, -1):
        yield "wrong-scale", m / norm(w + factor * D) * (w + factor * D)


@pytest.mark.parametrize("dtype", EACH)
def test_mistakes_with_dora_are_named(dtype):
    made = Made(dtype, m=N)
    m, other = ((norm(made.w) * (1 + 0.1 * made.rng.random((N, 1)))).astype(F32) for _ in range(2))
    c = replace(made.c, variant=DORA, parts={**made.c.parts, "magnitude": m})
    around = Around((replace(c, module="other", parts={**c.parts, "magnitude": other}),))
    for name, merged in magnitudes(made, *wide(m, other)):
        assert made.entry(merged, [c], around).mistake == name, name


@pytest.mark.parametrize("dtype", EACH)
def test_a_vector_left_out_is_named(dtype):
    made = Made(dtype)
    E = made.rng.normal(size=(R, 1)).astype(F32)
    c = replace(made.c, variant=ADALORA, parts={**made.c.parts, "E": E})
    for power in (0, 2):
        merged = made.w + c.s * made.B @ (E.astype(float) ** power * made.A)
        assert made.entry(merged, [c]).mistake == "column-missing"


@pytest.mark.parametrize("dtype", EACH)
def test_a_kernel_in_another_layout_is_named(dtype):
    rng = np.random.default_rng(7)
    K = weight(rng, 24, 12 * 9, dtype).reshape(24, 12, 3, 3)
    c = change(rng, 24, 12 * 9, 4, kind="conv")
    D, k = delta(c).reshape(K.shape), K.astype(float)
    moved = (D.swapaxes(2, 3), D[:, :, ::-1, ::-1], np.moveaxis(D, 1, -1).reshape(K.shape))
    for other in moved:
        entry = judge(Stored(K), Stored(cast(k + other, dtype)), [c])
        assert entry.mistake == "kernel-moved"
    assert judge(Stored(K), Stored(cast(k + D, dtype)), [c]).severity == "ok"


@pytest.mark.parametrize("dtype", EACH)
def test_tokens_and_saved_tensors_elsewhere_are_named(dtype):
    rng = np.random.default_rng(8)
    W = weight(rng, 20, 20, dtype)
    rows, ids = weight(rng, 3, 20, F32), np.array([15, 2, 7])
    tokens = change(rng, 1, 1, kind="tokens", parts={"ids": ids, "rows": rows})
    table, other = weight(rng, 20, 20, F32), weight(rng, 20, 20, F32)
    saved = change(rng, 1, 1, kind="saved", parts={"weight": table})
    around = Around((replace(saved, module="other", parts={"weight": other}),))

    def put(at, values):
        merged = W.astype(float)
        merged[at] = values
        return merged

    w = W.astype(float)
    made = [
        ("tokens-added", put(ids, w[ids] + rows), tokens),
        ("tokens-elsewhere", put(ids + 1, rows), tokens),
        ("tokens-elsewhere", put(np.sort(ids), rows), tokens),
        ("tokens-elsewhere", put(np.arange(3), rows), tokens),
        ("part-not-merged", put(ids[:2], rows[:2]), tokens),
        ("saved-added", w + table, saved),
        ("saved-averaged", (w + table) / 2, saved),
        ("saved-transposed", table.T, saved),
        ("saved-of-another", other, saved),
    ]
    for name, merged, c in made:
        entry = judge(Stored(W), Stored(cast(merged, dtype)), [c], around)
        assert entry.mistake == name, (name, entry)


def test_coarser_merges_are_named():
    made = Made(F32, n=64)
    w, D = made.w, made.D
    for dtype in (F16, BF16):
        for name, merged in (
            ("merged-coarse", cast(w + D, dtype)),
            ("base-coarse", cast(w, dtype).astype(float) + D),
        ):
            entry = made.entry(merged.astype(float))
            assert (entry.verdict, entry.mistake) == ("coarser", name)
            assert dtype.name in entry.text


@pytest.mark.slow
def test_an_adapter_rounded_first_is_named():
    made = Made(F32)
    s, w, A, B = made.c.s, made.w, made.A, made.B

    def narrow(x, dtype):
        return cast(x, dtype).astype(float)

    for dtype in (F16, BF16):
        product = narrow(B, dtype) @ narrow(A, dtype)
        for D in (s * product, s * narrow(product, dtype), narrow(s * product, dtype)):
            entry = made.entry(w + D)
            assert (entry.verdict, entry.mistake) == ("coarser", "adapter-coarse"), entry
            assert dtype.name in entry.text

    def tf32(x):
        return np.ldexp(np.rint(np.ldexp(*(m := np.frexp(x))[:1], 11)), m[1] - 11)

    entry = made.entry(w + s * tf32(B) @ tf32(A))
    assert entry.text.endswith("as by autocast (TF32)")
    made.A[:, ::5] = (1 + 2.0**-11) * np.sign(A[:, ::5])  # as far from one as from the other
    c = replace(made.c, parts={"A": made.A.astype(F32), "B": B.astype(F32)})
    away = np.where(np.arange(N) % 5 == 0, np.sign(made.A) * (1 + 2.0**-10), tf32(made.A))
    assert "ties away from zero" in made.entry(w + s * tf32(B) @ away, [c]).text


def test_sums_in_half_precision_cannot_be_decided():
    """Products that are added up in float16 one by one, as no bound of float32's sums allows."""
    made = Made(F16, r=256, size=1e-2)
    A, B = (x.astype(F16) for x in (made.A, made.B))
    c = replace(made.c, parts={"A": A, "B": B})
    total = np.zeros((M, N), F16)
    for k in range(256):
        total = total + B[:, k : k + 1] * A[k]
    entry = made.entry(made.w + c.s * total.astype(float), [c])
    assert (entry.verdict, entry.mistake) == ("undecided", "half-precision-sums"), entry


def cut(x, dtype):
    """Towards zero."""
    near = cast(x, dtype)
    beyond = abs(near.astype(float)) > abs(x)
    lower = np.nextafter(near, near.dtype.type(0))
    return np.where(beyond, lower, near).astype(float)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_numbers_cut_off_are_named(dtype):
    made = Made(dtype, size=1e-3)
    entry = made.entry(cut(made.w + made.D, dtype))
    assert (entry.mistake, dtype.name in entry.text) == ("truncated", True), entry


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double", "q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("dtype", EACH)
def test_quantized_steps_on_the_way_are_named(dtype, scheme):
    made = Made(dtype, n=64, size=1e-3)

    def through(x):
        return dequantize(quantize(cast(x, dtype), scheme)).astype(float)

    for name, merged in (
        ("base-quantized", through(made.w) + made.D),
        ("merged-quantized", through(made.w + made.D)),
    ):
        if scheme == "nf4-double" and name == "merged-quantized":
            continue
        entry = made.entry(merged)
        assert entry.mistake == name, entry
        assert f"({scheme}" in entry.text
    noise = made.w + made.D + 0.01 * abs(made.w).max() * made.rng.normal(size=made.D.shape)
    assert made.entry(noise).mistake in ("", "other-base")


@pytest.mark.parametrize("dtype", EACH)
def test_trimmed_changes_are_told(dtype):
    made = Made(dtype)
    small = abs(made.D) < np.quantile(abs(made.D), 0.8)
    assert "TIES" in made.entry(np.where(small, made.w, made.w + made.D)).text
    chance = made.rng.random(small.shape) < 0.8
    assert "TIES" not in made.entry(np.where(chance, made.w, made.w + made.D)).text


def svd(D, k):
    U, S, V = np.linalg.svd(D)
    return U[:, :k] * S[:k] @ V[:k]


@pytest.mark.parametrize("dtype", EACH)
def test_what_became_of_the_whole_is_named(dtype):
    made = Made(dtype, m=N)
    w, D = made.w, made.D
    found = {
        "ranks-cut": w + svd(D, 3),
        "rescaled": 1.02 * (w + D),
        "dropped": w + np.where(made.rng.random(D.shape) < 0.7, 0, D / 0.3),
        "tensor-transposed": (w + D).T,
    }
    for name, merged in found.items():
        assert made.entry(merged).mistake == name, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EACH)
def test_an_adapter_in_eight_bits_is_named(dtype):
    made = Made(dtype)
    s, A, B = made.c.s, made.A, made.B
    for code in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        a, b = (x.astype(code).astype(float) for x in (A, B))
        assert made.entry(made.w + s * b @ a).mistake == "adapter-quantized"
    for axis in (None, 0, 1):
        a, b = (np.rint(x / (top := abs(x).max(axis, keepdims=True) / 127)) * top for x in (A, B))
        assert made.entry(made.w + s * b @ a).mistake == "adapter-quantized"


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_rounding_at_random_is_named(dtype):
    made = Made(dtype, size=1e-3)
    T = made.w + made.D
    below = np.floor(T / spacing(T, dtype)) * spacing(T, dtype)
    share = (T - below) / spacing(T, dtype)
    merged = below + spacing(T, dtype) * (made.rng.random(T.shape) < share)
    assert made.entry(merged).mistake == "stochastic-rounding"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EACH)
def test_another_base_and_another_change_are_told_apart(dtype):
    made = Made(dtype, n=96)
    w, D = made.w, made.D
    moved = w * (1 + 0.05 * made.rng.normal(size=w.shape))
    found = {
        "other-base": moved + D,
        "other-change": w + delta(made.other(adapter="B")),
        "another-change": w + D + delta(made.other(adapter="B")),
    }
    for name, merged in found.items():
        assert made.entry(merged).mistake == name, name
    assert made.entry(moved).mistake == ""  # without the adapter's change


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_small_step_after_the_merge_is_told(dtype):
    made = Made(dtype, n=96, size=1e-2)
    merged, step = cast(made.w + made.D, dtype).astype(float), 0.02 * made.D.std()
    entry = made.entry(merged + step * made.rng.normal(size=merged.shape))
    assert entry.mistake in ("after-merge", "other-base"), entry
    assert "after the merge" in entry.text
    one_row = np.where(np.arange(M)[:, None] == 5, 1.05, 1) * merged
    assert made.entry(one_row).mistake == ""  # not all over the tensor


@pytest.mark.parametrize("dtype", EACH)
def test_merges_one_after_the_other_are_named(dtype):
    """Each rounds to the base's dtype, as no single merge by another factor does."""
    made = Made(dtype)
    once = cast(made.w + made.D, dtype).astype(float)
    assert made.entry(once + made.D).mistake == "twice"
    entry = made.entry(once - made.D)
    assert (entry.verdict, entry.mistake) == ("not-applied", "taken-out")
    assert made.entry(cast(once - made.D, dtype).astype(float) + made.D).mistake != "taken-out"


def test_bits_of_another_dtype_are_named():
    made, own, other = Made(F32), BF16, F16
    A, B = (x.astype(own) for x in (made.A, made.B))
    c = replace(made.c, parts={"A": A, "B": B})
    read_A, read_B = wide(A.view(other), B.view(other))
    entry = made.entry(made.w + c.s * read_B @ read_A, [c])
    assert (entry.mistake, str(other) in entry.text) == ("bits-misread", True)
    assert made.entry(made.w + delta(c), [c]).severity == "ok"


@np.errstate(all="ignore")
def test_numbers_beyond_the_dtype_are_said_to_overflow():
    made = Made(F16)
    made.B[3] *= 1e9
    c = replace(made.c, parts={"A": made.A.astype(F32), "B": made.B.astype(F32)})
    T = made.w + delta(c)
    entry = made.entry(T, [c])
    assert (entry.verdict, entry.mistake) == ("corrupt", "overflow")
    assert "float16 ends at 65504" in entry.text
    broken = cast(T, F16)
    broken[0, 0] = np.nan  # not by the change
    assert made.entry(broken.astype(float), [c]).mistake == ""
    assert made.entry(T.clip(-65504, 65504), [c]).mistake == "clipped"


def test_experts_taken_apart_in_another_order_are_named():
    made, E = Made(F32), 3
    W = np.stack([weight(made.rng, M, N, F32) for _ in range(E)])
    A, B = made.rng.normal(size=(E * R, N)), made.rng.normal(size=(M, R * E)) / 100
    of_A, of_B = A.reshape(E, R, N), B.reshape(M, R, E).transpose(2, 0, 1)

    def expert(e):
        parts = {"A": of_A[e].astype(F32), "B": of_B[e].astype(F32)}
        return replace(made.c, parts=parts, kind="expert", index=e)

    changes = [expert(e) for e in range(E)]

    def entry(of_A, of_B):
        merged = W + made.c.s * np.einsum("emr,ern->emn", of_B, of_A)
        return judge(Stored(W), Stored(cast(merged, F32)), changes, Around(modules=changes))

    other_A, other_B = A.reshape(R, E, N).swapaxes(0, 1), B.reshape(M, E, R).swapaxes(0, 1)
    for wrong in ((of_A, other_B), (other_A, of_B), (other_A, other_B)):
        assert entry(*wrong).mistake == "experts-packed"
    assert entry(of_A[[1, 2, 0]], of_B[[1, 2, 0]]).mistake == "other-module"
    assert entry(of_A, of_B).severity == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EACH)
def test_a_base_in_fp8_is_named(dtype):
    made = Made(dtype, m=160, n=64, size=1e-3)
    code = ml_dtypes.float8_e4m3fn

    def through(largest):
        scale = (largest / 448).astype(F32)
        return (made.W.astype(F32) / scale).astype(code).astype(F32) * scale

    w = abs(made.W.astype(F32))
    blocks = np.where(np.arange(160)[:, None] < 128, w[:128].max(), w[128:].max())
    for what, largest in (
        ("one scale", w.max(keepdims=True)),
        ("a scale for each row", w.max(1, keepdims=True)),
        ("a scale for each 128 x 128", blocks),
    ):
        entry = made.entry(through(largest).astype(float) + made.D)
        assert (entry.mistake, what in entry.text) == ("base-quantized", True), entry
    assert "(FP8, e4m3)" in made.entry(made.W.astype(code).astype(float) + made.D).text
    merged = cast(made.w + made.D, dtype).astype(code).astype(float)
    assert made.entry(merged).mistake == "merged-quantized"
    T = cast(made.w + made.D, dtype).astype(F32)
    for what, axis in (("one scale", None), ("a scale for each row", 1)):
        scale = abs(T).max(axis, keepdims=True) / F32.type(448)
        entry = made.entry(((T / scale).astype(code).astype(F32) * scale).astype(float))
        assert (entry.mistake, what in entry.text) == ("merged-quantized", True), entry


def test_rows_of_the_bases_lengths_are_named():
    made = Made()
    V = made.w + made.D
    assert made.entry(norm(made.w) / norm(V) * V).mistake == "lengths-kept"


def test_every_mistake_has_a_test_and_a_verdict():
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    ids = [mistake.id for mistake in MISTAKES]
    assert len({*ids, *NAMED_FROM}) == len(ids) + len(NAMED_FROM)
    assert len(ids) + len(NAMED_FROM) + len(WRONG_SCALES) >= 60
    for mistake in MISTAKES:
        assert f'"{mistake.id}"' in text, mistake.id
        assert mistake.verdict in VERDICTS
