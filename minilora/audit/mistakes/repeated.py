"""Merges one after the other, each of which rounds: twice, or taken out again."""

from __future__ import annotations

from collections.abc import Iterator

from minilora.audit.mistakes.mistake import Mistake
from minilora.audit.trial import Case, Trial, scaled


def _repeatable(case: Case) -> bool:
    """Whether all changes are added to what is there."""
    return all(c.variant.additive and c.kind not in ("tokens", "saved") for c in case.changes)


def twice(case: Case) -> Iterator[Trial]:
    """Merged into what is merged already, with a rounding between the two."""
    if _repeatable(case):
        yield Trial((*case.changes, *case.changes), "one merge after the other", free=False)


def taken_out(case: Case) -> Iterator[Trial]:
    """Merged, and subtracted again: what is left is the roundings of both."""
    if _repeatable(case):
        back = (scaled(change, -1.0) for change in reversed(case.changes))
        yield Trial((*case.changes, *back), free=False)


TWICE = Mistake("twice", "factor", "the change is applied twice", twice)

TAKEN_OUT = Mistake(
    "taken-out",
    "not-applied",
    "merged and taken out again: the base's numbers, but for the roundings of both",
    taken_out,
    ("diffusers 5000",),
)
