"""The mutants of the catalogue that explain answers, wholly or in part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import STRUCTURE, Diagnosis
from minilora.verify.diagnosis.fit import Fit, agreeing, fit, sigma_of

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant

from minilora.verify.diagnosis.answers import Answers, explains

Array = np.ndarray


@dataclass(frozen=True)
class Candidate:
    """A mutant that gives the implementation's answers, and the rms z of the residual."""

    mutant: Mutant
    residual: float

    def named(self, separating: str = "") -> Diagnosis:
        """The diagnosis in words."""
        m = self.mutant
        seen = f" Seen in {', '.join(m.seen)}." if m.seen else ""
        return Diagnosis(m.id, f"{m.formula}.{seen}", self.residual, separating)


def _mutants_of(level: str) -> list[Mutant]:
    """The level's mutants that are no equivalents."""
    from minilora.verify.mutants import MUTANTS  # costs time only where something is wrong

    return [m for m in MUTANTS if m.level == level and not m.equivalent]


def candidates(
    level: str,
    theirs: Iterable[Answers],
    ours_of: Callable[[Mutant], Iterable[Answers]],
) -> list[Candidate]:
    """The level's mutants that explain these answers, the nearest first."""
    explaining = []
    for m in _mutants_of(level):
        ours = ours_of(m)
        residual = explains(theirs, ours)
        if residual is not None and matched_filter(theirs, ours).agrees(1.0):
            explaining.append(Candidate(m, residual))
    return sorted(explaining, key=lambda candidate: candidate.residual)


def matched_filter(theirs: Iterable[Answers], ours: Iterable[Answers]) -> Fit:
    """The matched filter c = ⟨e, d⟩ / ⟨d, d⟩ over all arrays of all cases, each element over its σ.

    e is the implementation's deviation, d the mutant's: c is 1 where the implementation is that
    mutant, and 0 where it is correct. It sums what no single element shows.
    """
    e, d = _whitened(theirs, ours)
    c, _ = fit(e, d, 0 * e, np.ones_like(e))
    # A factor that is rounded once moves all elements alike, which the standard error leaves out.
    dtypes = {str(comparison.got.dtype) for answer in theirs for comparison in answer.values()}
    once = max((unit_roundoff(d) for d in dtypes if d in DTYPES), default=0.0)
    return Fit(c.value, c.error + once)


def _whitened(theirs: Iterable[Answers], ours: Iterable[Answers]) -> tuple[Array, Array]:
    """Both deviations from the correct answer, over σ, in all arrays of all cases."""
    deviations: tuple[list[Array], list[Array]] = ([], [])
    for their_case, our_case in zip(theirs, ours, strict=True):
        for array in their_case.keys() & our_case.keys():
            pair = their_case[array], our_case[array]
            sigma, want = np.maximum(sigma_of(pair[0]), 1e-300), np.asarray(pair[0].want, float)
            for collected, comparison in zip(deviations, pair, strict=True):
                collected.append(((np.asarray(comparison.got, float) - want) / sigma).ravel())
    e, d = map(np.concatenate, deviations)
    return e, d


def part_of(
    level: str,
    theirs: Iterable[Answers],
    ours_of: Callable[[Mutant], Iterable[Answers]],
    is_refuted: Callable[[Mutant], bool],
) -> Diagnosis | None:
    """The mutant of which a part c, the same in all cases, is the whole deviation."""
    for m in _mutants_of(level):
        ours = ours_of(m)
        if not all(a.keys() <= b.keys() for a, b in zip(theirs, ours, strict=True)):
            continue
        c = matched_filter(theirs, ours)
        if not (0 < c.value < 1 and c.value > 8 * c.error):
            continue
        e, d = _whitened(theirs, ours)
        if agreeing(e - c.value * d) and not is_refuted(m):
            sentence = f"The deviation is {c} times that of {m.id} ({m.formula}), in every case."
            return Diagnosis(f"{STRUCTURE}part", sentence, 0.0)
    return None
