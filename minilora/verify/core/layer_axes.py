"""What may differ between two layers: the axes of a case, and layers that combine their values.

An axis that is never drawn with another hides a bug where the two meet. `draw_combination` draws
every pair of values of two axes; what was drawn is read off the arguments of the calls (`Axis.of`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from minilora.verify.core.axes import Axis, Values
from minilora.verify.core.combinations import Row, pairwise
from minilora.verify.core.inputs import BEYOND, DROPOUT, Layer, draw_of_size, in_turn
from minilora.verify.core.types import Case

Array = np.ndarray
Lead = Callable[[int], tuple[int, ...]]

LEADS: dict[str, Lead] = {
    "(t,)": lambda t: (t,),
    "(2, t)": lambda t: (2, -(-t // 2)),
    "(n,) alone": lambda t: (),
    "(1,)": lambda t: (1,),
    "(1, t)": lambda t: (1, t),
    "(2, 3, t)": lambda t: (2, 3, -(-t // 6)),
    "(0,)": lambda t: (0,),
}
"""The leading axes of x, for about so many tokens. The last is an empty batch."""

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "wide": ((4, 7, 5, 3, 2), (6, 9, 4, 2, 4), (2, 19, 6, 5, 4)),
    "tall": ((4, 5, 8, 3, 2), (3, 6, 13, 4, 4), (5, 4, 9, 2, 2)),
    "square": ((5, 6, 6, 2, 4), (3, 8, 8, 5, 4), (7, 7, 7, 3, 2)),
    "rank 1": ((5, 4, 9, 1, 1), (3, 8, 6, 1, 1)),
    "rank above a side": ((4, 3, 5, 7, 8), (5, 9, 4, 6, 16), (3, 4, 4, 5, 16)),
    "beyond tiles": BEYOND,
}
"""Tokens, n, m, r, and r in the exact lane, of each shape of the weight."""


def lead_of(x: Array) -> str:
    """The leading axes of x, as `LEADS` names them."""
    lead = np.shape(x)[:-1]
    if 0 in lead:
        return "(0,)"
    if lead == (1,):
        return "(1,)"
    known = {0: "(n,) alone", 1: "(t,)", 3: "(2, 3, t)"}
    return known.get(len(lead)) or ("(1, t)" if lead[0] == 1 else "(2, t)")


def shape_of(W: Array, r: int, tokens: int) -> str:
    """The shape of the weight, as `SHAPES` names it."""
    m, n = np.shape(W)
    if max(m, n, r, tokens) > 60:
        return "beyond tiles"
    if r == 1:
        return "rank 1"
    if r > min(m, n):
        return "rank above a side"
    return "square" if m == n else "wide" if m < n else "tall"


def dropout_of(given: Mapping[str, Any]) -> str:
    """The dropout of a call, one of `DROPOUT`."""
    keep, p = given.get("keep"), given.get("p", 0.0)
    if keep is None:
        return "rate without a mask" if p else "none"
    if not p:
        return "mask without a rate"
    return "mask of ones" if np.all(keep) and np.size(keep) else "mask"


def _tokens(given: Mapping[str, Any]) -> int:
    x = given.get("x")
    return 0 if x is None or not x.size else x.size // x.shape[-1]


def _has_weight(given: Mapping[str, Any]) -> bool:
    return isinstance(given.get("W"), np.ndarray) and "r" in given


LEAD = Axis("x", tuple(LEADS), lambda given: lead_of(given["x"]) if "x" in given else None)
SHAPE = Axis(
    "shape",
    tuple(SHAPES),
    lambda given: shape_of(given["W"], given["r"], _tokens(given)) if _has_weight(given) else None,
)
BIAS = Axis("bias", (False, True), lambda given: given.get("bias") is not None)
MASK = Axis("dropout", DROPOUT, dropout_of)
RSLORA = Axis("rsLoRA", (False, True), lambda given: bool(given.get("use_rslora")))
STORAGE = Axis(
    "storage",
    ("(out, in)", "(in, out)"),
    lambda given: "(in, out)" if given.get("fan_in_fan_out") else "(out, in)",
)
SIGN = Axis("alpha", ("> 0", "< 0"), lambda given: "< 0" if given.get("alpha", 1) < 0 else "> 0")
LANE = Axis(
    "numbers",
    ("whole", "not whole"),
    lambda given: "whole" if _is_whole(given) else "not whole",
)


def _is_whole(given: Mapping[str, Any]) -> bool:
    """Whether A and B hold whole numbers: no sum of theirs is rounded."""
    arrays = [given[name].astype(float) for name in ("A", "B") if name in given]
    return all(bool((array == np.rint(array)).all()) for array in arrays)


LAYER = (LEAD, SHAPE, BIAS, MASK, RSLORA, STORAGE, SIGN)
"""The axes of a layer's forward and transpose, beside the lane."""

VARIANT = (
    replace(LEAD, values=("(t,)", "(2, t)", "(n,) alone", "(1,)")),
    replace(SHAPE, values=("wide", "tall", "square", "rank above a side", "beyond tiles")),
    *LAYER[2:],
)
"""Those of a variant, of fewer values: its answers cost more to know."""

WEIGHT = (SHAPE, RSLORA, STORAGE, SIGN)
"""Those of a merge."""


def is_possible(row: Mapping[str, Any]) -> bool:
    """An empty mask has neither ones nor zeros."""
    return row.get("x") != "(0,)" or row.get("dropout") != "mask of ones"


@cache
def rows_of(axes: tuple[Axis, ...]) -> tuple[Row, ...]:
    """Rows with all pairs of these axes' values, the usual ones first. Their number is odd.

    So the same row is in one lane at one time, and in the other when it comes again.
    """
    rows = pairwise({axis.name: axis.values for axis in axes}, is_possible)
    rows.sort(key=lambda row: row.get("shape") == "beyond tiles" or row.get("x") == "(0,)")
    return (*rows, *rows[: len(rows) % 2 == 0])


def draw_combination(case: Case, axes: Values = LAYER) -> tuple[Layer, bool]:
    """The layer of a case with the values of its row, and whether it is of the exact lane."""
    rows = rows_of(axes)
    return draw_row(case, rows[case.number % len(rows)]), case.number % 2 == 0


def draw_row(case: Case, row: Row, beyond: Sequence[Sequence[int]] = BEYOND) -> Layer:
    """A layer with the values of a row; ``beyond`` are the sizes beyond tiles."""
    rng = case.rng()
    sizes = beyond if row["shape"] == "beyond tiles" else SHAPES[row["shape"]]
    if "t" not in row.get("x", ""):  # a side of the weight has to be the large one
        sizes = [size for size in sizes if sizes is not beyond or max(size[1:4]) > 60]
    return draw_of_size(
        rng,
        case,
        in_turn(sizes, case, case.number),
        LEADS[row.get("x", "(t,)")],
        bias=row.get("bias", False),
        dropout=row.get("dropout", "none"),
        negative=row["alpha"] == "< 0",
        **{"use_rslora": True} if row["rsLoRA"] else {},
        **{"fan_in_fan_out": True} if row["storage"] == "(in, out)" else {},
    )
