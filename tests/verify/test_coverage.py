"""What the checks draw: every pair of values that may meet, sizes beyond tiles, sums that tell."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from minilora.verify import coverage
from minilora.verify.checks.registry import CHECKS, LEVELS
from minilora.verify.core import accumulation, combinations
from minilora.verify.core.inputs import wanted
from minilora.verify.core.types import Case
from minilora.verify.plan import plan
from tests.marks import others_slow

WITH_AXES = {level.name: level for level in LEVELS if level.axes}


def drawn(level, profile="ci"):
    plans = plan(CHECKS, levels=[level.name], dtypes=["float32"], profile=profile)
    (found,) = coverage.coverage([level], plans)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", others_slow([*WITH_AXES], "merge"))
def test_each_pair_of_values_that_may_meet_is_drawn(name):
    found = drawn(WITH_AXES[name])
    assert found.possible
    assert not found.missing


def test_a_level_whose_values_never_meet_is_found_out():
    level = WITH_AXES["merge"]
    plain = replace(level, checks=tuple(c for c in level.checks if c.id == "merge.weight"))
    plans = [
        p
        for p in plan(CHECKS, levels=["merge"], dtypes=["float32"])
        if p.check.id == "merge.weight"
    ]
    (found,) = coverage.coverage([plain], plans)
    assert (("rsLoRA", True), ("storage", "(in, out)")) in found.missing
    assert "never together: rsLoRA yes and storage (in, out)" in found.text()


def test_each_profile_has_sizes_beyond_tiles():
    assert drawn(WITH_AXES["merge"], "quick").values["shape", "beyond tiles"]


def test_pairs_that_may_not_meet_do_not():
    axes = {"a": (1, 2, 3), "b": (1, 2), "c": (1, 2)}

    def allowed(row):
        return row.get("a") != 1 or row.get("b") != 1

    rows = combinations.pairwise(axes, allowed)
    assert all(allowed(row) for row in rows)
    met = {frozenset(pair) for row in rows for pair in combinations.combinations(row.items(), 2)}
    assert met == {frozenset(pair) for pair in combinations.pairs(axes, allowed)}
    assert len(rows) < 3 * 2 * 2 - 2


def in_order(P, Q, dtype):
    """P Q, every partial sum rounded to a dtype."""
    total = np.zeros((len(P), Q.shape[1]), dtype)
    for k in range(len(Q)):
        total = (total.astype(np.float32) + P[:, k : k + 1] * Q[k : k + 1]).astype(dtype)
    return total


@pytest.mark.parametrize("axis", "nrtm")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_of_pairs_that_cancel_needs_the_digits_of_float32(axis, dtype):
    layer = accumulation.draw_cancelling(Case("a", dtype, 0, 0), axis)
    x, W, A, B, dy = (getattr(layer, n).astype(np.float32) for n in ("x", "W", "A", "B", "dy"))
    u = x @ A.T
    P, Q = {"n": (x, W.T), "r": (u, B.T), "t": (dy.T, x), "m": (dy, W)}[axis]
    exact = np.float64(P) @ np.float64(Q)
    half = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    assert (in_order(P, Q, np.float32) == exact).all()
    assert (exact.astype(half) == exact).all()
    assert (in_order(P, Q, half) != exact).any()
    assert all((v.astype(half) == v).all() for v in wanted(layer, np.float64).values())
