"""Level ``multi``: one batch whose rows use different adapters, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from minilora.verify.core.axes import Axis
from minilora.verify.core.combinations import Row, pairwise
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.inputs import (
    BEYOND,
    Layer,
    Several,
    draw_several,
    in_exact_lane,
    limits,
    require_several,
    sigmas_by_row,
    wanted_by_row,
)
from minilora.verify.core.layer_axes import SHAPES, shape_of
from minilora.verify.core.level import VECTOR_SIZES, Level
from minilora.verify.core.types import CLOSED_FORM, Case, Check, Comparison, Limits, counter
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

ADAPTERS = {1: (2,), 2: (2, 2), 3: (2, 4, 1), 5: (4, 1, 2, 16, 2), 12: (1, 2, 4) * 4}
"""The ranks of so many adapters."""

MANY = 64
"""A rank beyond a kernel's tiles, which the second adapter has, or the only one."""

INDICES = ("all", "none alone", "one alone", "all have one")
"""Rows of every adapter and of none; of none; of the last adapter; of every adapter."""

AXES = (
    Axis("adapters", tuple(ADAPTERS), lambda given: len(given["adapters"])),
    Axis("rows", (1, 7, 19, 131, 300), lambda given: _rounded_up(len(given["index"]))),
    Axis("index", INDICES, lambda given: index_of(given["index"])),
    Axis(
        "shape",
        ("wide", "tall", "square", "beyond tiles"),
        lambda given: shape_of(given["W"], 0, 0),
    ),
    Axis("rank", ("few", "many"), lambda given: ("few", "many")[_most(given, "r") > 32]),
    Axis("alpha", ("> 0", "< 0"), lambda given: ("> 0", "< 0")[_least(given, "alpha") < 0]),
)


def _most(given: Mapping[str, Any], name: str) -> Any:
    return max(adapter[name] for adapter in given["adapters"])


def _least(given: Mapping[str, Any], name: str) -> Any:
    return min(adapter[name] for adapter in given["adapters"])


def _rounded_up(rows: int) -> int:
    """The least of the axis' values that has so many rows."""
    return next(n for n in (1, 7, 19, 131, 300) if rows <= n)


def index_of(index: Array) -> str:
    """The kind of an index, one of `INDICES`."""
    if len({*index.tolist()}) == 1:
        return "one alone" if index[0] >= 0 else "none alone"
    return "all" if (index < 0).any() else "all have one"


@cache
def rows_of_axes() -> tuple[Row, ...]:
    """The rows of the axes: an odd number, the smaller cases first."""
    rows = pairwise({axis.name: axis.values for axis in AXES}, is_possible)
    rows.sort(key=lambda row: (row["shape"] == "beyond tiles", row["rows"] > 19))
    return (*rows, *rows[: len(rows) % 2 == 0])


def is_possible(row: Mapping[str, Any]) -> bool:
    """One row has one index; where all rows have the only adapter, that is one alone."""
    if row.get("adapters") == 1 and row.get("index") == "all have one":
        return False
    return row.get("rows") != 1 or row.get("index", "one alone") in ("none alone", "one alone")


def draw(case: Case, mixed: bool = False) -> tuple[Several, bool]:
    """Adapters of one weight by a row of the axes, and whether the case is of the exact lane.

    ``mixed``: there are rows of every adapter and of none.
    """
    row = rows_of_axes()[case.number % len(rows_of_axes())]
    ranks, count, kind = ADAPTERS[row["adapters"]], row["rows"], row["index"]
    if row["rank"] == "many":
        ranks = (*ranks[: len(ranks) > 1], MANY, *ranks[2:])
    if mixed:
        count, kind = max(count, len(ranks) + 2), "all"
    sizes = BEYOND if row["shape"] == "beyond tiles" else SHAPES[row["shape"]]
    sizes = tuple(size for size in sizes if sizes is not BEYOND or max(size[1:3]) > 60)
    size = sizes[case.number % len(sizes)]
    several, exact = draw_several(case, (size,), (ranks,), (count,), combined=False)
    if row["alpha"] == "< 0" and case.fixed.alpha is None:
        several = several.negated()
    return several.of_kind(kind), exact


CASES = {"quick": 4, "ci": 24, "nightly": 480}


def rows(
    subject: GuardedImplementation,
    several: Several,
    dtype: str,
    x: Array | None = None,
    adapters: Sequence[Layer] | None = None,
    index: Array | None = None,
) -> Array:
    """The implementation's y, a row for each of x."""
    adapters = several.adapters if adapters is None else adapters
    first = several.adapters[0]
    x = first.x if x is None else x
    given = [{"A": a.A, "B": a.B, **a.merge_options()} for a in adapters]
    index = several.index if index is None else index
    y = subject.call("multi_adapter", x, first.W, given, index)
    return subject.answer(y, "y", (len(x), len(first.W)), dtype)


def _of_rows(
    name: str, y: Array, several: Several, sigma: Any = None, limit: Limits = CLOSED_FORM
) -> Comparison:
    """A batch's output against the correct one; of each row, what else it may be."""

    def parts() -> dict[str, Array]:
        names = {"the base": -1, **{f"adapter {i}": i for i in range(len(several.adapters))}}
        return {
            part: wanted_by_row(replace(several, index=np.full_like(several.index, i)))
            for part, i in names.items()
        }

    return Comparison(name, y, wanted_by_row(several), sigma, limit, parts, parts_by_row=True)


def smallest_batch(subject: GuardedImplementation, dtype: str) -> dict[str, Any] | None:
    """The fewest rows that are wrong, with two adapters of one number each: s B A = 2 and 6."""
    one = np.ones((1, 1), DTYPES[dtype])
    adapters = [{"A": one, "B": k * one, "alpha": 2.0, "r": 1} for k in (one[0, 0], 3 * one[0, 0])]
    for count in range(1, 4):
        for index in product(range(-1, 2), repeat=count):
            x = np.ones((count, 1), DTYPES[dtype])
            y = subject.call("multi_adapter", x, one, adapters, np.array(index))
            got = subject.answer(y, "y", (count, 1), dtype)
            want = np.array([[{-1: 1, 0: 3, 1: 7}[i]] for i in index], DTYPES[dtype])
            if (got != want).any():
                given = {"x": x, "W": one, "B of each": [1, 3], "A": one, "alpha": 2, "r": 1}
                return {**given, "index": list(index), "got": got, "want": want}
    return None


def forward_rows(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Row j is x Wᵀ + s x Aᵀ Bᵀ with adapter index_j; index -1 is the base."""
    several, exact = draw(case)
    y = rows(subject, several, case.dtype)
    sigma = None if exact else sigmas_by_row(several, subject.precision(case.dtype))
    limit = limits(several.adapters[0], "y")
    yield _of_rows("y", y, several, sigma, limit)


def base_rows(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Rows without an adapter have the bits of a batch without any adapter."""
    several, _ = draw(in_exact_lane(case), mixed=True)
    y = rows(subject, several, case.dtype)
    base = rows(subject, several, case.dtype, index=np.full_like(several.index, -1))
    none = several.index < 0
    yield Comparison("y of rows without an adapter", y[none], base[none])


def row_order(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Permuting the rows and their index permutes the output; compared by ==."""
    several, _ = draw(in_exact_lane(case), mixed=True)
    order = case.rng().permutation(len(several.index))
    y = rows(subject, several, case.dtype)
    x = several.adapters[0].x[order]
    moved = rows(subject, several, case.dtype, x=x, index=several.index[order])
    yield Comparison("y of permuted rows", moved, y[order])


def adapter_order(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Reordering the adapters, and the index with them, changes nothing; compared by ==."""
    several, _ = draw(in_exact_lane(case), mixed=True)
    require_several(several)
    count = len(several.adapters)
    places = np.roll(np.arange(count), 1)  # the adapter i stands at place places[i] now
    adapters = [several.adapters[int(np.flatnonzero(places == i)[0])] for i in range(count)]
    index = np.where(several.index < 0, -1, places[several.index])
    y = rows(subject, several, case.dtype)
    yield Comparison(
        "y with the adapters relabelled",
        rows(subject, several, case.dtype, adapters=adapters, index=index),
        y,
    )


def unused_adapter(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """An adapter that no row uses changes nothing; compared by ==."""
    several, _ = draw(in_exact_lane(case), mixed=True)
    require_several(several)
    index = np.where(several.index == 1, 0, several.index)
    y = rows(subject, several, case.dtype, index=index)
    other = Layer(**vars(several.adapters[1]) | {"B": several.adapters[1].B[::-1]})
    adapters = [several.adapters[0], other, *several.adapters[2:]]
    again = rows(subject, several, case.dtype, adapters=adapters, index=index)
    yield Comparison("y with another unused adapter", again, y)


def single(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A batch with one adapter gives its layer's output, one without any the base's; by ==.

    Every other case has a batch of one row.
    """
    several, _ = draw(in_exact_lane(case), mixed=True)
    if case.number % 2:
        several = several.of_rows(slice(1), several.index[:1])
    for i in (*range(len(several.adapters)), -1):
        alone = replace(several, index=np.full_like(several.index, i))
        y = rows(subject, alone, case.dtype)
        yield _of_rows(f"y of adapter {i}" if i >= 0 else "y of none", y, alone)


def base_row_first(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A batch of two rows, the first without an adapter; compared by ==."""
    several, _ = draw(in_exact_lane(case), mixed=True)
    for i in range(len(several.adapters)):
        index = np.array([-1, i])
        x = several.adapters[0].x[:2]
        part = several.of_rows(slice(2), index)
        y = rows(subject, several, case.dtype, x=x, index=index)
        yield _of_rows(f"y of [none, adapter {i}]", y, part)


def again(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The same batch again, with others in between, gives the same; compared by ==."""
    several, _ = draw(in_exact_lane(case), mixed=True)
    orders = (several.index, np.full_like(several.index, -1), several.index[::-1])
    for time, index in enumerate((*orders, *orders[:1] * 2, *orders[1:])):
        batch = replace(several, index=np.ascontiguousarray(index))
        y = rows(subject, batch, case.dtype)
        yield _of_rows(f"y of the {time + 1}. batch", y, batch)


def _law(run: Any, share: float) -> Check:
    title = (run.__doc__ or "").splitlines()[0]
    name = {"forward_rows": "forward"}.get(run.__name__, run.__name__.replace("_", "-"))
    cases = {**CASES, "ci": len(rows_of_axes())} if share == 1 else CASES
    count = counter(cases, share)
    return Check(f"multi.{name}", "multi", ("multi_adapter",), title, run, count, smallest_batch)


_CHECKS: tuple[Check, ...] = (
    _law(forward_rows, 1.0),
    _law(base_rows, 0.25),
    _law(row_order, 0.25),
    _law(adapter_order, 0.25),
    _law(unused_adapter, 0.25),
    _law(single, 0.25),
    _law(base_row_first, 0.25),
    _law(again, 0.25),
)

LEVEL = Level(
    "multi",
    _CHECKS,
    answers=("forward*",),
    relations=("base-rows", "row-order", "adapter-order", "unused-adapter"),
    vectors={"forward": VECTOR_SIZES, "single": (("bfloat16", 0), ("float32", 1))},
    exact=("single",),
    axes=AXES,
    is_possible=is_possible,
)
