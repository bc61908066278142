"""Several adapters: one lacks, their weights are others, their factors are mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import copysign, sqrt

import numpy as np

from minilora.audit.change import Change
from minilora.audit.floats import F32, F64
from minilora.audit.mistakes.mistake import Mistake
from minilora.audit.scales import named_factors
from minilora.audit.trial import Case, Trial, scaled, with_parts
from minilora.spec.ops import Array


def some_of_several(case: Case) -> Iterator[Trial]:
    """One or some of several changes."""
    changes = case.changes
    if not 1 < len(changes) <= 5:
        return
    for k in range(len(changes) - 1, 0, -1):
        for some in combinations(range(len(changes)), k):
            names = ", ".join(_label(changes[i]) for i in some)
            kept = tuple(changes[i] for i in some)
            yield Trial(kept, f"{names} alone", free=len(kept) == 1)


def _label(change: Change) -> str:
    return change.adapter or change.module


def _weighted(case: Case, weight: Callable[[float, Sequence[Change]], float]) -> Iterator[Trial]:
    changes = case.changes
    if len(changes) > 1 and all(c.variant.additive for c in changes):
        edited = tuple(replace(c, weight=weight(c.weight, changes)) for c in changes)
        if [c.weight for c in edited] != [c.weight for c in changes]:
            yield Trial(edited, free=False)


def weights_ignored(case: Case) -> Iterator[Trial]:
    """Every weight is 1."""
    return _weighted(case, lambda w, _: 1.0)


def weights_averaged(case: Case) -> Iterator[Trial]:
    """The mean of the changes."""
    return _weighted(case, lambda w, all_: 1 / len(all_))


def weights_normalized(case: Case) -> Iterator[Trial]:
    """Each weight divided by the sum of all."""
    return _weighted(case, lambda w, all_: w / (sum(c.weight for c in all_) or 1))


def weights_squared(case: Case) -> Iterator[Trial]:
    """Each weight applied twice, to A and to B."""
    return _weighted(case, lambda w, _: w * w)


def weights_exchanged(case: Case) -> Iterator[Trial]:
    """The weights in the reverse order."""
    weights = [c.weight for c in case.changes]
    pairs = zip(case.changes, reversed(weights), strict=True)
    exchanged = tuple(replace(c, weight=w) for c, w in pairs)
    if weights != weights[::-1] and all(c.variant.additive for c in case.changes):
        yield Trial(exchanged, free=False)


def one_scale_for_all(case: Case) -> Iterator[Trial]:
    """The first adapter's scale for all."""
    first, *_ = case.changes
    if len(case.changes) > 1 and any(c.scale != first.scale for c in case.changes):
        yield Trial(tuple(replace(c, scale=first.scale) for c in case.changes), free=False)


def factors_added(case: Case) -> Iterator[Trial]:
    """A and B added up apart, so that each B meets each A, as PEFT's combination "linear" does."""
    changes = case.changes
    if len(changes) < 2 or any(set(c.parts) != {"A", "B"} for c in changes):
        return
    r = min(len(c.parts["A"]) for c in changes)
    s, weights = changes[0].scale, [c.weight for c in changes]
    ones = [1.0] * len(changes)
    kinds = {
        "the roots of the weighted scales": (_roots([c.s for c in changes]), 1.0),
        "the roots of the scales": (_roots([c.scale for c in changes]), 1.0),
        "the weights on both factors": ((weights, weights), s),
        "the weights on B alone": ((ones, weights), s),
        "no weights": ((ones, ones), s),
    }
    for what, ((of_A, of_B), scale) in kinds.items():
        A = _sum(w * c.parts["A"][:r].astype(F64) for w, c in zip(of_A, changes, strict=True))
        B = _sum(w * c.parts["B"][:, :r].astype(F64) for w, c in zip(of_B, changes, strict=True))
        joined = with_parts(changes[0], A=A.astype(F32), B=B.astype(F32))
        yield Trial((replace(joined, scale=scale, weight=1.0),), f"with {what}", free=False)


def _roots(shares: Sequence[float]) -> tuple[list[float], list[float]]:
    roots = [sqrt(abs(share)) for share in shares]
    return roots, [copysign(root, share) for root, share in zip(roots, shares, strict=True)]


def _sum(arrays: Iterable[Array]) -> Array:
    total: Array = np.sum([*arrays], axis=0)
    return total


def wrong_scales(case: Case) -> Iterator[Trial]:
    """A wrong scale of several changes, or of DoRA, where the factor is not that of W' - W."""
    changes = case.changes
    if len(changes) == 1 and changes[0].variant.additive:
        return
    if any(c.kind in ("tokens", "saved") for c in changes):
        return
    tables = [{w.id: (w.text, f) for w, f in named_factors(c)} for c in changes]
    for name in dict.fromkeys(name for table in tables for name in table):
        factors = [table.get(name, ("", 1.0))[1] for table in tables]
        text = next(table[name][0] for table in tables if name in table)
        yield Trial(tuple(map(scaled, changes, factors)), text, free=False)
        if len(changes) > 1:
            for k, factor in enumerate(factors):
                if factor != 1:
                    one = [scaled(c, factor) if i == k else c for i, c in enumerate(changes)]
                    yield Trial(tuple(one), f"{_label(changes[k])}: {text}", free=False)


SEVERAL = (
    Mistake(
        "some-of-several", "partly", "not all of the adapters", some_of_several, ("peft 1836",)
    ),
    Mistake("weights-ignored", "factor", "every adapter's weight is 1", weights_ignored),
    Mistake("weights-averaged", "factor", "the mean of the adapters' changes", weights_averaged),
    Mistake(
        "weights-normalized", "factor", "the weights are divided by their sum", weights_normalized
    ),
    Mistake("weights-squared", "factor", "the weights are applied twice", weights_squared),
    Mistake("weights-exchanged", "factor", "the adapters' weights exchanged", weights_exchanged),
    Mistake("one-scale-for-all", "factor", "the first adapter's scale for all", one_scale_for_all),
    Mistake(
        "factors-added",
        "known-mistake",
        "A and B are added up apart: each B meets each A",
        factors_added,
        ("peft's combination_type linear",),
    ),
    Mistake("wrong-scale", "factor", "another scale", wrong_scales),
)
