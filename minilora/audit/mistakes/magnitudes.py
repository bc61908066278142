"""DoRA with another magnitude or norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from minilora.audit.change import Change
from minilora.audit.floats import F64, format_of
from minilora.audit.low_rank import coarsest
from minilora.audit.mistakes.mistake import Mistake, dora, factors_of
from minilora.audit.rounding import gamma
from minilora.audit.trial import Case, Ending, Trial, with_parts
from minilora.spec.lora import LORA, merge_weight
from minilora.spec.ops import Array
from minilora.spec.variants.dora import rescaled_rows, row_norm


def with_rows(case: Case, V: Array, e: Array, m: Array, v: Array) -> tuple[Array, Array]:
    """Rows of V rescaled from v to m, with the errors of `Rescaled`, those of m and v counted."""
    h = max(case.region.dtypes.with_adapter(coarsest(c))[0] for c in case.changes)
    rho = row_norm(e)[0] / np.maximum(v, 1e-300) + gamma(V.shape[1] + 2) / 2 + h
    grown = (1 + h) ** 3 / (1 - np.minimum(rho, 0.5))
    T = rescaled_rows(V, m, v)
    return T, abs(T) * (grown - 1) + abs(m / v) * e * grown


def _plain(change: Change) -> Change:
    """DoRA's factors as LoRA's."""
    parts = {name: change.parts[name] for name in "AB"}
    return replace(change, variant=LORA, parts=parts)


def norm_not_applied(case: Case) -> Iterator[Trial]:
    """W + s B A."""
    if (change := dora(case)) is not None:
        yield Trial((_plain(change),))


def magnitude_wrong(case: Case) -> Iterator[Trial]:
    """The magnitude or the norm is another, or acts on a part alone."""
    change = dora(case)
    if change is None or change.transposed or change.rows:
        return
    m = np.asarray(change.parts["magnitude"]).reshape(-1, 1).astype(F64)
    plain = _plain(change)
    A, B = (part.astype(F64) for part in factors_of(change))

    def rows(what: Callable[[Array, Array, Array], tuple[Array, Array]]) -> Ending:
        def end(W: Array, V: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
            return with_rows(case, V, e, *what(W, V, m[i:j]))

        return end

    def one(m: Array) -> Array:
        return np.ones_like(m)

    acts: dict[str, Callable[[Array, Array, Array], tuple[Array, Array]]] = {
        "not divided by the norm": lambda W, V, m: (m, one(m)),
        "divided by the base's norm": lambda W, V, m: (m, row_norm(W)[0]),
        "left out, rows of norm 1": lambda W, V, m: (one(m), row_norm(V)[0]),
        "that of the base, untrained": lambda W, V, m: (row_norm(W)[0], row_norm(V)[0]),
        "the norm's inverse": lambda W, V, m: (row_norm(V)[0], m),
    }
    for what, act in acts.items():
        yield Trial((plain,), f"the magnitude is {what}", end=rows(act), free=False)

    def unscaled(W: Array, V: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        v = row_norm(merge_weight(W, A, B[i:j], 1.0))[0]
        return with_rows(case, V, e, m[i:j], v)

    def change_unscaled(W: Array, V: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        v = row_norm(V)[0]
        T, error = with_rows(case, W, e, m[i:j], v)
        return T + (V - W), error + e + format_of(case.region.dtypes.merged).u * abs(T)

    def base_unscaled(W: Array, V: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        v = row_norm(V)[0]
        T, error = with_rows(case, V - W, e, m[i:j], v)
        return T + W, error + e + format_of(case.region.dtypes.merged).u * abs(T)

    yield Trial(
        (plain,), "the norm is that of W + B A, without the scale", end=unscaled, free=False
    )
    yield Trial((plain,), "the base's rows alone are rescaled", end=change_unscaled, free=False)
    yield Trial((plain,), "the change's rows alone are rescaled", end=base_unscaled, free=False)


def norm_of_columns(case: Case) -> Iterator[Trial]:
    """The norm of V's columns in place of its rows'."""
    change = dora(case)
    if change is None or change.transposed or change.rows:
        return
    m = np.asarray(change.parts["magnitude"]).reshape(-1, 1).astype(F64)
    plain, squares = _plain(change), 0.0
    if len(m) != case.region.width:
        return
    merge = case.merged(Trial((plain,)))
    for i, j, W, _ in case.everything():
        V, _ = merge.rows(W, i, j)
        squares = squares + (V * V).sum(0)
    v = np.sqrt(squares)

    def end(W: Array, V: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        T, error = with_rows(case, V, e, np.ones((j - i, 1)), np.ones((j - i, 1)))
        g = m.T / v
        return T * g, error * g + abs(T * g) * gamma(len(m) + 2)

    yield Trial((plain,), end=end, free=False)


def magnitude_permuted(case: Case) -> Iterator[Trial]:
    """The magnitudes of other rows."""
    if (change := dora(case)) is None:
        return
    m = np.asarray(change.parts["magnitude"]).reshape(-1, 1)
    orders = {"reversed": m[::-1], "shifted by 1": np.roll(m, 1), "shifted by -1": np.roll(m, -1)}
    for what, other in orders.items():
        yield Trial((with_parts(change, magnitude=other),), what)


def magnitude_of_another(case: Case) -> Iterator[Trial]:
    """Another module's magnitude."""
    if (change := dora(case)) is None:
        return
    m = change.parts["magnitude"]
    for other in case.around.modules:
        if np.shape(other.parts.get("magnitude", ())) == np.shape(m):
            yield Trial((with_parts(change, magnitude=other.parts["magnitude"]),), other.module)


MAGNITUDES = (
    Mistake(
        "norm-not-applied",
        "norm-not-applied",
        "W + s B A, without DoRA's magnitude",
        norm_not_applied,
    ),
    Mistake(
        "magnitude-wrong",
        "norm-not-applied",
        "DoRA's magnitude or norm is another",
        magnitude_wrong,
    ),
    Mistake(
        "norm-of-columns",
        "norm-not-applied",
        "the norm of the columns in place of the rows'",
        norm_of_columns,
    ),
    Mistake("magnitude-permuted", "permuted", "the magnitudes of other rows", magnitude_permuted),
    Mistake(
        "magnitude-of-another",
        "other-module",
        "the magnitude of another module",
        magnitude_of_another,
    ),
)
