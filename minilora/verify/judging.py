"""One case put to an implementation, and what came of it."""

from __future__ import annotations

import traceback
from dataclasses import replace

from minilora.verify.core.errors import Fault, Skip, describe
from minilora.verify.core.types import Case, Check, Comparison, Judgement
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.tally import is_worse


def judged(
    check: Check,
    subject: GuardedImplementation,
    case: Case,
    comparisons: list[Comparison] | None = None,
) -> tuple[list[Judgement], Skip | Fault | None]:
    """The judgements of a case, and what ended it early: those made before that count too.

    ``comparisons``: a list that takes what was judged.
    """
    kept = [] if comparisons is None else comparisons
    judgements: list[Judgement] = []
    worst: tuple[int, Comparison] | None = None
    end: Skip | Fault | None = None
    try:
        for comparison in check.run(subject, case):
            judgements.append(comparison.judge())  # kept when a later step raises
            kept.append(comparison)
            if worst is None or is_worse(judgements[-1], judgements[worst[0]]):
                worst = len(judgements) - 1, comparison
    except (Skip, Fault) as stopped:
        end = stopped
    except Exception as error:
        end = Fault("internal", our_error(error))
    if worst is None:
        return judgements, end or Fault("internal", f"{check.id} compared nothing")
    i, comparison = worst
    if judgements[i].verdict != "pass":
        judgements[i] = replace(judgements[i], picture=comparison.picture())
    return judgements, end


def our_error(error: Exception) -> str:
    """A fault of this package: the exception, and the calls that led to it."""
    places = traceback.extract_tb(error.__traceback__)[1:]
    chain = " < ".join(f"{place.name}:{place.lineno}" for place in reversed(places))
    return f"{describe(error)}; called from {chain}" if chain else describe(error)


def passes(check: Check, subject: GuardedImplementation, case: Case) -> bool:
    """Whether all of a case holds."""
    judgements, end = judged(check, subject, case)
    return end is None and all(judgement.verdict == "pass" for judgement in judgements)
