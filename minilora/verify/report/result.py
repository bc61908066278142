"""The result of one check in one dtype, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minilora.verify.core.dtypes import Precision
from minilora.verify.core.types import Diagnosis, Judgement

NOT_DIAGNOSED = "Not diagnosed (limit reached). Run the command below to diagnose it."


NOT_SHRUNK = (
    "No smallest counterexample (limit reached). Run the command below to look for one as well."
)


STATUSES = ("fail", "error", "loose", "known", "skip", "pass")
"""Worst first."""


@dataclass(frozen=True)
class FaultSeen:
    """One kind of fault, as it was first met, and in how many cases."""

    kind: str
    message: str
    case: str
    cases: int


@dataclass(frozen=True)
class Known:
    """A deviation that was declared: why, where it is discussed, in which versions, and what it is.

    ``versions`` are ranges like ``>=0.18,<0.20``, of which one has to hold; none means all.
    ``until``, a date or a version of the target: from then on nothing is excused. ``seen`` says
    what the deviation looks like, in the form that `seen.read_seen` reads; without it nothing is.
    """

    reason: str
    link: str = ""
    versions: tuple[str, ...] = ()
    until: str = ""
    seen: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Result:
    """What one check found in one dtype.

    ``status`` is pass, loose, fail, error, known (it deviates, and that was declared) or skip.
    ``cases`` were tried, ``skipped_cases`` of them not supported and ``deviating_cases`` failed; in
    ``known_cases`` all that deviates was declared.
    ``is_relation``: the check compares two answers of the implementation. ``worst`` is the worst
    array of all cases and ``worst_case`` its case; ``arrays`` are all those of ``case``, the first
    one that deviates. ``only`` is what all cases that deviate have in common and no case that
    passes has. ``reason`` says why cases were skipped, all or some, and ``known`` what was declared
    about this check beforehand. Of its ``seconds`` the target's own calls took ``in_target``.
    """

    check: str
    level: str
    title: str
    dtype: str
    precision: Precision
    status: str
    cases: int = 0
    skipped_cases: int = 0
    deviating_cases: int = 0
    known_cases: int = 0
    is_relation: bool = False
    worst: Judgement | None = None
    worst_case: str = ""
    case: str = ""
    only: tuple[str, ...] = ()
    arrays: tuple[Judgement, ...] = ()
    faults: tuple[FaultSeen, ...] = ()
    smallest: Mapping[str, Any] | None = None
    diagnosis: tuple[Diagnosis, ...] = ()
    reason: str = ""
    known: Known | None = None
    note: str = ""
    reproduce: str = ""
    seconds: float = 0.0
    in_target: float = 0.0

    @property
    def no_longer_fails(self) -> bool:
        """Whether a deviation was declared here and was not found, though another may have been."""
        ran = self.status not in ("skip", "error") and self.cases > self.skipped_cases
        return self.known is not None and bool(self.known.seen) and ran and not self.known_cases

    @property
    def severity(self) -> tuple[int, float]:
        """Sorts results worst first, and leaves those that pass in the order of the checks."""
        deviates = self.status in ("fail", "loose", "known") and self.worst is not None
        return STATUSES.index(self.status), -self.worst.excess if self.worst and deviates else 0.0
