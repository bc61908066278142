"""Another module's change, or another adapter's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minilora.audit.change import Change
from minilora.audit.mistakes.mistake import Mistake, additive, factors_of, only, same_place
from minilora.audit.trial import Case, Trial, with_parts


def _shape(change: Change) -> tuple[int, int] | None:
    if "A" not in change.parts or "B" not in change.parts:
        return None
    return len(change.parts["B"]), np.shape(change.parts["A"])[1]


MOST = 256
"""How many modules are tried: models of many experts have tens of thousands."""


def _likeliest(change: Change, others: Sequence[Change]) -> list[Change]:
    """The first modules, those of the same kind before all others."""
    kind = change.module.rpartition(".")[2]
    return sorted(others, key=lambda other: other.module.rpartition(".")[2] != kind)[:MOST]


def _others(change: Change, others: Sequence[Change]) -> Iterator[Change]:
    """Other changes whose matrix has the same shape."""
    fitting = [c for c in others if _other(c, change) and _shape(c) == _shape(change) is not None]
    for other in _likeliest(change, fitting):
        yield same_place(change, other)


def _other(one: Change, change: Change) -> bool:
    """Whether it is not the change itself, read anew."""
    return _of(one) != _of(change)


def _of(change: Change) -> tuple[object, ...]:
    return change.adapter, change.module, change.tensor, change.index, change.rows


def _named(other: Change) -> str:
    """The module, and which of its matrices."""
    return other.module if other.index is None else f"{other.module}, matrix {other.index}"


def of_another_module(case: Case) -> Iterator[Trial]:
    """The change of another module of the same shape."""
    if (change := only(case)) is not None:
        for other in _others(change, case.around.modules):
            yield Trial((other,), f"that of {_named(other)}")


def of_another_adapter(case: Case) -> Iterator[Trial]:
    """Another adapter's change of this tensor, alone or with this one's."""
    if (change := only(case)) is None:
        return
    for other in _others(change, case.around.adapters):
        yield Trial((other,), f"that of {other.adapter}")
        if change.variant.additive and other.variant.additive:
            yield Trial((change, other), f"that of {other.adapter} as well", free=False)


def half_of_another(case: Case) -> Iterator[Trial]:
    """A of one change with B of another."""
    if (change := additive(case)) is None:
        return
    A, B = factors_of(change)
    adapters = {id(other) for other in case.around.adapters}
    modules = [c for c in case.around.modules if {"A", "B"} <= c.parts.keys() and _other(c, change)]
    for other in [*case.around.adapters, *_likeliest(change, modules)]:
        if not {"A", "B"} <= other.parts.keys():
            continue
        there = other.adapter if id(other) in adapters else _named(other)
        if np.shape(other.parts["A"]) == A.shape:
            yield Trial((with_parts(change, A=other.parts["A"]),), f"A of {there}")
        if np.shape(other.parts["B"]) == B.shape:
            yield Trial((with_parts(change, B=other.parts["B"]),), f"B of {there}")


OTHERS = (
    Mistake("other-adapter", "other-adapter", "another adapter's change", of_another_adapter),
    Mistake("other-module", "other-module", "the change of another module", of_another_module),
    Mistake("half-of-another", "other-module", "one factor of another change", half_of_another),
)
