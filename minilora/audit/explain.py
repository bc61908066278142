"""What explains a wrong merge: a factor, a mistake of the catalogue, or what a part lacks.

Each is tried on some rows first and then on all. It is told only if all entries lie within the
bound of what it does: a wrong explanation is worse than none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from minilora.audit import parts
from minilora.audit.explanation import Explanation
from minilora.audit.lengths import of_rows
from minilora.audit.mistakes import MISTAKES, Mistake
from minilora.audit.remainder import remainder
from minilora.audit.scales import WrongScale, named_factors
from minilora.audit.trial import SIGMAS, Bracket, Case, Trial, scaled

Finder = Callable[[Case], Explanation | None]


def explain(case: Case) -> Explanation | None:
    """The mistake that explains all entries, None if none does."""
    first = (factor, catalogue) if len(case.changes) == 1 else (catalogue, factor)
    finders: tuple[Finder, ...] = (
        *first,
        parts.lacking,
        parts.dropped,
        parts.ranks,
        parts.order,
        of_rows,
        named_by_chance,
        remainder,
    )
    with suppress(np.linalg.LinAlgError):  # of numbers that are not finite, or near the end
        return next((found for find in finders if (found := find(case))), None)
    return None


def factor(case: Case) -> Explanation | None:
    """The right change by another factor."""
    bracket = case.bracket(Trial(case.changes))
    if bracket is None:
        return None
    if 0 in bracket or 1 in bracket:
        return chance(case)
    found = _factor(case, bracket)
    return found if found.mistake else catalogue(case) or found


def _factor(case: Case, bracket: Bracket) -> Explanation:
    named = [wrong for wrong, f in _named(case) if f in bracket]
    error = (bracket.high - bracket.low) / 2
    middle = (bracket.high + bracket.low) / 2
    figures = {"factor": middle, "factor_error": error}
    text = f"the change is applied by {middle:.6g} ± {error:.1g}"
    if not named:
        return Explanation("factor", "", text + ", which no known mistake explains", figures)
    first, *others = named
    text += f": {first.text}"
    if others:
        text += " (or: " + "; ".join(wrong.text for wrong in others[:3]) + ")"
    unscaled = first.id == "no-scale" and case.changes[0].kind == "bias"
    return Explanation("bias-unscaled" if unscaled else "factor", first.id, text, figures)


def _named(case: Case) -> list[tuple[WrongScale, float]]:
    if len(case.changes) != 1:
        return []
    return list(named_factors(case.changes[0], case.around.modules))


def chance(case: Case) -> Explanation | None:
    """Another factor that the bound hides, but the bits show: it is told from least squares.

    Of the named factors it is the one whose merge is nearest to the tensor.
    """
    found = case.beside()
    if found is None:
        return None
    f, sigma = found
    if abs(f) <= SIGMAS * sigma and case.holds(Trial((), free=False)):
        text = f"it is the base, as far as {sigma:.1g} of the change can be told"
        return Explanation("not-applied", "", text, {"factor": f, "factor_error": sigma})
    figures = {"factor": f, "factor_error": sigma}
    text = (
        "the difference from a right merge is a multiple of the change, which is applied by about "
        f"{f:.3g} ± {sigma:.1g}"
    )
    right = case.residual(Trial(case.changes))
    best: tuple[float, WrongScale, float] | None = None
    for wrong, c in _named(case):
        trial = Trial((scaled(case.changes[0], c),))
        left = case.residual(trial)
        if left < right and (best is None or left < best[0] * (1 - 1e-6)) and case.holds(trial):
            best = left, wrong, c
    if best is None or abs(best[2] - f) > 0.5 * max(1.0, abs(best[2])):
        return Explanation("factor", "", text, figures)
    return Explanation("factor", best[1].id, f"{text}: {best[1].text}", figures)


def named_by_chance(case: Case) -> Explanation | None:
    """A named factor that `chance` finds, where no interval holds for all entries."""
    found = chance(case)
    return found if found and found.mistake else None


def catalogue(case: Case) -> Explanation | None:
    """The first mistake of the catalogue that explains all entries."""
    for mistake in MISTAKES:
        for trial in mistake.trials(case):
            if mistake.verdict == "coarser" and trial.adds_noise(case) and case.beside():
                continue  # roundings alone would not lean to a side
            if found := _tried(case, mistake, trial):
                return found
    return None


def _tried(case: Case, mistake: Mistake, trial: Trial) -> Explanation | None:
    detail = f" ({trial.detail})" if trial.detail else ""
    text = f"{mistake.text}{detail}"
    if trial.free and (bracket := case.bracket(trial)) and 0 not in bracket and 1 not in bracket:
        middle, error = (bracket.high + bracket.low) / 2, (bracket.high - bracket.low) / 2
        figures = {"factor": middle, "factor_error": error}
        text += f", and by a factor of {middle:.6g} ± {error:.1g}"
        return Explanation(mistake.verdict, mistake.id, text, figures)
    return Explanation(mistake.verdict, mistake.id, text) if case.holds(trial) else None
