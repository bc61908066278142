"""The lengths of DoRA's rows, where the bound of single entries is wide."""

from dataclasses import replace

import numpy as np
import pytest
from made import Stored, cast, change, narrow, weight, wide

from minilora.audit.floats import BF16, F16, F32
from minilora.audit.judge import judge
from minilora.spec.variants import DORA, row_norm


def drawn(dtype, m=24, n=512, size=1e-3, of_adapter=F32, even=False, seed=0, transposed=False):
    """A base, a change of DoRA's, and V."""
    rng = np.random.default_rng(seed)
    W = weight(rng, m, n, dtype)
    if even:
        W = (W / row_norm(W.astype(F32))[0]).astype(dtype)  # all norms' roundings are alike
    c = change(rng, m, n, 8, of_adapter, size)
    A, B, w = wide(c.parts["A"], c.parts["B"], W)
    V = w + c.s * B @ A
    magnitude = (row_norm(V)[0] * (1 + 0.1 * rng.normal(size=(m, 1)))).astype(of_adapter)
    parts = {**c.parts, "magnitude": magnitude}
    return W, replace(c, variant=DORA, parts=parts, transposed=transposed), V


def judged(W, M, c, dtype):
    turn = (lambda x: x.T) if c.transposed else (lambda x: x)
    return judge(Stored(turn(W)), Stored(cast(turn(M), dtype)), [c])


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(("dtype", "factor"), [(BF16, 1.04), (BF16, 0.96), (F16, 1.005)], ids=str)
def test_a_magnitude_by_another_factor_is_told_with_its_error(dtype, factor, transposed):
    W, c, V = drawn(dtype, of_adapter=dtype, transposed=transposed)
    m = c.parts["magnitude"].astype(float)
    entry = judged(W, factor * m / row_norm(V)[0] * V, c, dtype)
    assert (entry.verdict, entry.mistake) == ("factor", "norm-factor")
    assert abs(entry.figures["factor"] - factor) < entry.figures["factor_error"] < abs(factor - 1)
    assert "24 of 24 rows" in entry.text


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_one_row_of_another_length_is_told(dtype):
    W, c, V = drawn(dtype)
    m = c.parts["magnitude"].astype(float)
    m[7] *= 1.06
    entry = judged(W, m / row_norm(V)[0] * V, c, dtype)
    assert (entry.mistake, "1 of 24 rows" in entry.text) == ("norm-factor", True)


@pytest.mark.parametrize("even", [False, True], ids=["", "even norms"])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_right_merges_are_as_long_however_they_round(dtype, size, even):
    """Each result rounded, and none; towards zero too, where nothing cancels."""
    for seed in range(2):
        W, c, V = drawn(dtype, size=size, of_adapter=dtype, even=even, seed=seed)
        m = c.parts["magnitude"].astype(F32)
        delta = narrow(V - W.astype(float), dtype)
        rough = narrow(W.astype(F32) + delta, dtype)
        v = narrow(row_norm(rough)[0], dtype)
        for g, sums in (
            (narrow(m / v, dtype), rough),
            (m / row_norm(V)[0], V),
            (m / v, W.astype(F32) + delta),
            (narrow(m, dtype) / v, rough),
        ):
            assert judged(W, np.asarray(g * sums, float), c, dtype).severity in ("ok", "warning")
