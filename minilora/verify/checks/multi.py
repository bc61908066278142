"""Level ``multi``: one batch whose rows use different adapters, or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.verify.core.inputs import (
    Layer,
    Several,
    draw_several,
    in_exact_lane,
    limits,
    require_several,
    sigmas_by_row,
    wanted_by_row,
)
from minilora.verify.core.level import VECTOR_SIZES, Level
from minilora.verify.core.types import Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

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


def forward_rows(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Row j is x Wᵀ + s x Aᵀ Bᵀ with adapter index_j; index -1 is the base."""
    several, exact = draw_several(case)
    y = rows(subject, several, case.dtype)
    sigma = None if exact else sigmas_by_row(several, subject.precision(case.dtype))
    limit = limits(several.adapters[0], "y")
    yield Comparison("y", y, wanted_by_row(several), sigma, limit)


def base_rows(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Rows without an adapter have the bits of a batch without any adapter."""
    several, _ = draw_several(in_exact_lane(case))
    y = rows(subject, several, case.dtype)
    base = rows(subject, several, case.dtype, index=np.full_like(several.index, -1))
    none = several.index < 0
    yield Comparison("y of rows without an adapter", y[none], base[none])


def row_order(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Permuting the rows and their index permutes the output; compared by ==."""
    several, _ = draw_several(in_exact_lane(case))
    order = case.rng().permutation(len(several.index))
    y = rows(subject, several, case.dtype)
    x = several.adapters[0].x[order]
    moved = rows(subject, several, case.dtype, x=x, index=several.index[order])
    yield Comparison("y of permuted rows", moved, y[order])


def adapter_order(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Reordering the adapters, and the index with them, changes nothing; compared by ==."""
    several, _ = draw_several(in_exact_lane(case))
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
    several, _ = draw_several(in_exact_lane(case))
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
    several, _ = draw_several(in_exact_lane(case))
    if case.number % 2:
        several = several.of_rows(slice(1), several.index[:1])
    for i in (*range(len(several.adapters)), -1):
        alone = replace(several, index=np.full_like(several.index, i))
        y = rows(subject, alone, case.dtype)
        yield Comparison(f"y of adapter {i}" if i >= 0 else "y of none", y, wanted_by_row(alone))


def base_row_first(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A batch of two rows, the first without an adapter; compared by ==."""
    several, _ = draw_several(in_exact_lane(case))
    for i in range(len(several.adapters)):
        index = np.array([-1, i])
        x = several.adapters[0].x[:2]
        part = several.of_rows(slice(2), index)
        y = rows(subject, several, case.dtype, x=x, index=index)
        yield Comparison(f"y of [none, adapter {i}]", y, wanted_by_row(part))


def _law(run: Any, share: float) -> Check:
    title = (run.__doc__ or "").splitlines()[0]
    name = {"forward_rows": "forward"}.get(run.__name__, run.__name__.replace("_", "-"))
    return Check(f"multi.{name}", "multi", ("multi_adapter",), title, run, counter(CASES, share))


_CHECKS: tuple[Check, ...] = (
    _law(forward_rows, 1.0),
    _law(base_rows, 0.25),
    _law(row_order, 0.25),
    _law(adapter_order, 0.25),
    _law(unused_adapter, 0.25),
    _law(single, 0.25),
    _law(base_row_first, 0.25),
)

LEVEL = Level(
    "multi",
    _CHECKS,
    answers=("forward*",),
    relations=("base-rows", "row-order", "adapter-order", "unused-adapter"),
    vectors={"forward": VECTOR_SIZES, "single": (("bfloat16", 0), ("float32", 1))},
    exact=("single",),
)
