"""What a mistake of the catalogue is, and which changes a mistake can edit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from minilora.audit.change import Change
from minilora.audit.trial import Case, Trial
from minilora.spec.ops import Array


@dataclass(frozen=True)
class Mistake:
    """A way to merge wrongly.

    ``verdict``: a name of `VERDICTS`; ``text``: what was done; ``trials``: the merges that do it,
    none where it does not apply; ``seen``: where it was reported.
    """

    id: str
    verdict: str
    text: str
    trials: Callable[[Case], Iterable[Trial]]
    seen: tuple[str, ...] = ()


def only(case: Case) -> Change | None:
    """The one change with factors A and B; None where there are several, or of another kind."""
    if len(case.changes) == 1 and case.changes[0].kind in ("linear", "conv", "embedding", "expert"):
        return case.changes[0]
    return None


def additive(case: Case) -> Change | None:
    """The one change with factors, unless the variant rescales the base."""
    change = only(case)
    return change if change is not None and change.variant.additive else None


def dora(case: Case) -> Change | None:
    """The one change, if it is DoRA's."""
    change = only(case)
    return change if change is not None and "magnitude" in change.parts else None


def factors_of(change: Change) -> tuple[Array, Array]:
    """A and B as stored."""
    return np.asarray(change.parts["A"]), np.asarray(change.parts["B"])


def fits(change: Change, other: Change) -> bool:
    """Whether the parts of the two have the same shapes."""
    return {n: np.shape(p) for n, p in change.parts.items()} == {
        n: np.shape(p) for n, p in other.parts.items()
    }


def same_place(change: Change, other: Change) -> Change:
    """The other change, acting where this one does."""
    return replace(
        other,
        transposed=change.transposed,
        index=change.index,
        rows=change.rows,
        kind=change.kind,
        tensor=change.tensor,
    )
