"""Trained rows and saved tensors, added or put elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minilora.audit.change import Change
from minilora.audit.floats import F64
from minilora.audit.mistakes.mistake import Mistake, fits, same_place
from minilora.audit.trial import Case, Trial, with_parts
from minilora.spec.ops import Array


def _kind(case: Case, kind: str) -> Change | None:
    found = [c for c in case.changes if c.kind == kind]
    return found[0] if len(found) == 1 == len(case.changes) else None


def tokens_added(case: Case) -> Iterator[Trial]:
    """The trained rows are added to the base's."""
    if (change := _kind(case, "tokens")) is None:
        return
    ids = np.asarray(change.parts["ids"]).reshape(-1)
    rows = np.asarray(change.parts["rows"]).astype(F64)

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        here = (ids >= i) & (ids < j)
        T, e = T.copy(), e.copy()
        T[ids[here] - i] = W[ids[here] - i] + rows[here]
        e[ids[here] - i] += 2 * case.region.dtypes.w * abs(T[ids[here] - i])
        return T, e

    yield Trial(case.changes, end=end, free=False)


def tokens_elsewhere(case: Case) -> Iterator[Trial]:
    """The trained rows at other tokens."""
    if (change := _kind(case, "tokens")) is None:
        return
    ids = np.asarray(change.parts["ids"]).reshape(-1)
    size = case.region.rows
    for by in (1, -1):
        yield Trial((with_parts(change, ids=(ids + by) % size),), f"{by:+d}", free=False)
    order = np.argsort(ids)
    for what, other in (("sorted", ids[order]), ("reversed", ids[::-1])):
        if (other != ids).any():
            yield Trial((with_parts(change, ids=other),), f"ids {what}", free=False)
    first = np.arange(len(ids))
    yield Trial((with_parts(change, ids=first),), "at the table's start", free=False)
    yield Trial((with_parts(change, ids=size - len(ids) + first),), "at its end", free=False)


def saved_added(case: Case) -> Iterator[Trial]:
    """The saved tensor is added to the base's."""
    if _kind(case, "saved") is None:
        return

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        return W + T, e + 2 * case.region.dtypes.w * (abs(W) + abs(T))

    yield Trial(case.changes, end=end, free=False)


def saved_averaged(case: Case) -> Iterator[Trial]:
    """The mean of the base's tensor and the saved one."""
    if _kind(case, "saved") is None:
        return

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        return (W + T) / 2, e + 2 * case.region.dtypes.w * (abs(W) + abs(T))

    yield Trial(case.changes, end=end, free=False)


def saved_transposed(case: Case) -> Iterator[Trial]:
    """The saved tensor's transpose, of a square one."""
    if (change := _kind(case, "saved")) is None:
        return
    weight = np.asarray(change.parts["weight"])
    if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        yield Trial((with_parts(change, weight=weight.T),), free=False)


def saved_of_another(case: Case) -> Iterator[Trial]:
    """Another saved tensor."""
    if (change := _kind(case, "saved")) is None:
        return
    for other in [*case.around.modules, *case.around.adapters]:
        if other.kind == "saved" and fits(change, other):
            yield Trial((same_place(change, other),), other.module, free=False)


KINDS = (
    Mistake(
        "tokens-added", "known-mistake", "the trained rows are added to the base's", tokens_added
    ),
    Mistake("tokens-elsewhere", "permuted", "the trained rows at other tokens", tokens_elsewhere),
    Mistake("saved-added", "known-mistake", "the saved tensor is added to the base's", saved_added),
    Mistake("saved-averaged", "factor", "half the base's, half the adapter's", saved_averaged),
    Mistake("saved-transposed", "transposed", "the saved tensor is transposed", saved_transposed),
    Mistake("saved-of-another", "other-module", "another saved tensor", saved_of_another),
)
