"""The name of a fault: the mutants that are refused for the same reason in the same cases.

An answer of another dtype or shape, one that is not finite and a changed input are never compared:
there are no numbers that a mutant could explain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.types import Case, Check
from minilora.verify.diagnosis.answers import Direct
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.judging import judged

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant

NAMED = ("dtype", "shape", "nan", "changes its inputs", "changes its answers")
"""The kinds of faults that mutants show, too."""

MAX_CASES = 4
"""So many cases that end in a fault are compared, and so many that do not."""


def with_the_same_fault(
    mutants: Iterable[Mutant], check: Check, subject: GuardedImplementation, cases: Sequence[Case]
) -> list[Mutant]:
    """The mutants that end these cases as the implementation does, where some end in a fault."""
    ends: dict[Case, str] = {}
    for case in cases:
        end = ending(check, subject, case)
        if end is not None and sum(bool(e) == bool(end) for e in ends.values()) < MAX_CASES:
            ends[case] = end
    if not any(ends.values()):
        return []
    return [m for m in mutants if _ends_so(m, check, ends)]


def _ends_so(m: Mutant, check: Check, ends: dict[Case, str]) -> bool:
    made = Direct(m.make())
    faults_first = sorted(ends.items(), key=lambda pair: not pair[1])
    return all(ending(check, made, case) == end for case, end in faults_first)


def ending(check: Check, subject: GuardedImplementation, case: Case) -> str | None:
    """The fault that ends a case, "fails" where a number is wrong, "" where all holds; or None."""
    judgements, end = judged(check, subject, case)
    if isinstance(end, Skip) or (isinstance(end, Fault) and end.kind not in NAMED):
        return None
    if isinstance(end, Fault):
        return f"{end.kind}: {end.message.partition(' (it is ')[0]}"
    return "fails" if any(j.verdict == "fail" for j in judgements) else ""
