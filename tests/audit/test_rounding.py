"""The bound of right merges: no right merge exceeds it, and some nearly reach it."""

from itertools import product

import numpy as np
import pytest
from made import DTYPES, Stored, cast, change, narrow, weight
from marks import others_slow

from minilora.audit.floats import BF16, F16, F32
from minilora.audit.judge import judge
from minilora.audit.merges import Merge
from minilora.audit.outside import beyond, deviations
from minilora.audit.region import Region

RANKS = (1, 3, 16, 256)
SIZES = (1e-7, 1e-4, 1e-2, 3.0)


def styles(W, A, B, s, merged):
    """Right merges as libraries write them, in float32 and in the dtypes at hand."""
    b, a = W.dtype, A.dtype
    w, A32, B32, s = W.astype(F32), A.astype(F32), B.astype(F32), F32.type(s)
    product = s * (B32 @ A32)
    yield "float32", w + product
    yield "float64", W.astype(float) + float(s) * (B.astype(float) @ A.astype(float))
    yield "delta in the adapter's dtype", w + narrow(product, a)
    yield "delta in the base's dtype", w + narrow(narrow(product, a), b)
    yield "scale on B", w + narrow(s * B32, a) @ A32
    yield "scale on A, rounded", w + narrow(B32 @ narrow(narrow(s, a) * A32, a), a)
    yield "product rounded, then scaled", w + narrow(s * narrow(B32 @ A32, a), a)
    yield "adapter in the base's dtype", w + narrow(s * (narrow(B32, b) @ narrow(A32, b)), b)
    yield "base in the merged dtype", narrow(w, merged) + narrow(product, merged)
    yield (
        "all in the merged dtype",
        narrow(w, merged)
        + narrow(
            narrow(s, merged) * narrow(narrow(B32, merged) @ narrow(A32, merged), merged), merged
        ),
    )
    yield "summed in the base's dtype", narrow(w + product, b)
    into = w
    for k in range(len(A)):
        into = into + s * B32[:, k : k + 1] * A32[k : k + 1]
    yield "rank by rank into W", into
    yield "ranks backwards", w + sum(s * np.outer(B32[:, k], A32[k]) for k in range(len(A))[::-1])


MIXED = {f"{b} + {a} -> {m}": (b, a, m) for b, a, m in product(DTYPES, repeat=3)}
QUICK = [name for name, (b, a, m) in MIXED.items() if b == m and a in (b, F32)]


@pytest.mark.parametrize("dtypes", others_slow([*MIXED], *QUICK))
def test_right_merges_are_right(dtypes):
    base, adapter, merged = MIXED[dtypes]
    rng = np.random.default_rng(0)
    for r in RANKS:
        for size in SIZES:
            W, c = weight(rng, 12, 20, base), change(rng, 12, 20, r, adapter, size, 1.7)
            for name, V in styles(W, c.parts["A"], c.parts["B"], c.s, merged):
                entry = judge(Stored(W), Stored(cast(V, merged)), [c])
                assert entry.severity in ("ok", "warning"), (name, r, size, entry)


@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_subnormal_numbers_are_within_it(base):
    """Weights, factors and changes near the smallest number of float16."""
    rng = np.random.default_rng(1)
    for adapter in DTYPES:
        for left, right in ((1e-7, 1.0), (1e-4, 1e-4), (1.0, 1e-7)):
            W = weight(rng, 12, 20, base, 1e-6)
            A = (rng.normal(size=(4, 20)) * left).astype(adapter)
            B = (rng.normal(size=(12, 4)) * right).astype(adapter)
            c = change(rng, 12, 20, 4, parts={"A": A, "B": B}, scale=0.3)
            for name, V in styles(W, A, B, c.s, base):
                entry = judge(Stored(W), Stored(cast(V, base)), [c])
                assert entry.severity in ("ok", "warning"), (name, adapter, left, entry)


def test_ties_are_within_it():
    """Sums that lie halfway between two numbers go either way by the least rounding before."""
    W = (1 + 2.0**-7 * np.arange(64)).astype(BF16).reshape(8, 8)
    c = change(np.random.default_rng(0), 8, 8, 1, parts={
        "A": np.full((1, 8), 2.0**-8, F32), "B": np.ones((8, 1), F32)}, scale=1.0)  # fmt: skip
    for V in (W.astype(F32) + 2.0**-8, W.astype(F32) + 2.0**-8 * (1 + 2.0**-20)):
        entry = judge(Stored(W), Stored(cast(V, BF16)), [c])
        assert entry.verdict in ("exact", "within")
    entry = judge(Stored(W), Stored(cast(W.astype(F32) + 2.0**-6, BF16)), [c])
    assert entry.severity == "deviation"


def _worst(W, c, merged):
    """How much of the bound the right merges use at most, with the bound as it is."""
    region = Region(Stored(W), Stored(W.astype(merged)), (c,), 0, len(W))
    T, e = Merge.of(region).rows(W.astype(float), 0, len(W))
    worst = 0.0
    for _, V in styles(W, c.parts["A"], c.parts["B"], c.s, merged):
        M = cast(V, merged).astype(float)
        worst = max(worst, float(deviations(M, T, e, region, None).max()))
    return worst


@pytest.mark.parametrize(
    ("base", "adapter", "merged", "least"),
    [(d, d, d, 0.8) for d in DTYPES]
    + [(BF16, F32, BF16, 0.8), (F32, F32, F16, 0.5), (F16, BF16, BF16, 0.5)],
    ids=str,
)
def test_it_is_nearly_reached(base, adapter, merged, least):
    """Some right merge takes that much of it: a bound below that share would accuse it falsely."""
    rng = np.random.default_rng(2)
    used = 0.0
    for r, size in ((1, 1e-3), (4, 1e-2), (16, 1.0)):
        W = weight(rng, 64, 64, base)
        used = max(used, _worst(W, change(rng, 64, 64, r, adapter, size, 1.7), merged))
    if base == adapter == merged == F32:  # each product is lost in W: r roundings to one side
        W, half = np.ones((1, 1), F32), 0.99 * 2.0**-24
        for r in (16, 256):
            parts = {"A": np.full((r, 1), half, F32), "B": np.ones((1, r), F32)}
            used = max(used, _worst(W, change(rng, 1, 1, r, parts=parts, scale=1.0), F32))
    assert least <= used <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_beyond_it_is_found(dtype):
    """A single entry, moved by two units in its last place more than the bound allows."""
    rng = np.random.default_rng(3)
    W, c = weight(rng, 16, 16, dtype), change(rng, 16, 16, 4, F32, 1e-2)
    region = Region(Stored(W), Stored(W), (c,), 0, 16)
    T, e = Merge.of(region).rows(W.astype(float), 0, 16)
    M = cast(T, dtype)
    u = 2 * np.float64(
        np.spacing(np.float32(1)) if dtype == F32 else 2.0**-7 if dtype == BF16 else 2.0**-10
    )
    M[3, 5] = M[3, 5].astype(float) + 2 * e[3, 5] + u * abs(T[3, 5])
    found = beyond(M.astype(float), T, e, region, None)
    assert found.sum() == 1
    assert found[3, 5]
    assert judge(Stored(W), Stored(M), [c]).severity == "deviation"


@pytest.mark.parametrize("merged", [F16, BF16], ids=str)
def test_another_factor_is_found_where_the_bound_hides_it(merged):
    """Most entries of a small change are rounded away: what is left is 0.6 of it."""
    rng = np.random.default_rng(4)
    W = weight(rng, 128, 128, merged)
    c = change(rng, 128, 128, 64, F16 if merged == BF16 else F32, 2e-5 if merged == BF16 else 2e-6)
    A, B = (c.parts[name].astype(float) for name in "AB")
    for factor, severities in ((1.0, ("ok", "warning")), (0.6, ("deviation",))):
        M = cast(W.astype(float) + factor * c.s * (B @ A), merged)
        assert judge(Stored(W), Stored(M), [c]).severity in severities, factor


def test_what_is_lost_rank_by_rank_is_no_factor(monkeypatch):
    """Each of 64 small products loses more in W than their sum would."""
    rng = np.random.default_rng(5)
    W, c = weight(rng, 64, 64, F32, 1.0), change(rng, 64, 64, 64, F32, 1e-7)
    merges = dict(styles(W, c.parts["A"], c.parts["B"], c.s, F32))
    M = Stored(merges["rank by rank into W"])
    assert judge(Stored(W), M, [c]).severity in ("ok", "warning")
    monkeypatch.setattr(Merge, "slow_replays", lambda merge: [])
    assert judge(Stored(W), M, [c]).verdict == "factor"
