"""The name of the bug: which mutant of the catalogue gives the implementation's own answers.

A mutant explains a failing check if it gives the same answers in several cases, within the
rounding of both, where the implementation deviates from the correct answer, and if no case that
passes refutes it. Nothing is guessed: where no mutant does, there is no diagnosis, and where
several do, all are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minilora.verify.core.level import FIRST_CASES, Level
from minilora.verify.core.types import STRUCTURE, Case, Check, Diagnosis
from minilora.verify.diagnosis.answers import (
    Answers,
    Direct,
    answers,
    explains,
    mutant_answers,
    verdicts,
)
from minilora.verify.diagnosis.candidates import Candidate, candidates, part_of
from minilora.verify.diagnosis.patterns import describe
from minilora.verify.implementation.contract import CONVENTIONS
from minilora.verify.implementation.guard import GuardedImplementation

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant

MAX_SEPARATING = 12
"""The greatest number of cases of each check that are tried to separate two mutants."""

BOTH_LANES = (0, 1)
"""Cases that refute a mutant if they pass: one of the exact lane, one of that with sigma."""

SIMPLE_PATTERNS = ("scale", "factor", "zero", "transposed", "permuted", "steps")
"""Patterns that say more than that the deviation is a part of some mutant's."""


def other_convention(
    check: Check, subject: GuardedImplementation, cases: Sequence[Case]
) -> tuple[Diagnosis, ...]:
    """The convention under which all answers are correct, where another one is declared."""
    declared = subject.conventions
    try:
        for name, values in CONVENTIONS.items():
            for value in values if name in declared else ():
                subject.conventions = {**declared, name: value}
                if all(verdicts(answers(check, subject, case)) == {"pass"} for case in cases):
                    sentence = f"The answers are correct by the convention {name} = {value!r}; "
                    sentence += f"the implementation declares {name} = {declared[name]!r}."
                    return (Diagnosis(f"{STRUCTURE}convention", sentence, 0.0),)
    finally:
        subject.conventions = declared
    return ()


@dataclass(frozen=True)
class Diagnoser:
    """A check of a level that failed, and whom it was put to."""

    level: Level
    check: Check
    subject: GuardedImplementation
    dtype: str
    seed: int

    def ask(self, check: Check, number: int) -> tuple[Case, Answers]:
        """A case of a check, and the implementation's answers."""
        case = Case(check.id, self.dtype, number, self.seed, self.subject.fixed)
        return case, answers(check, self.subject, case)

    def telling_cases(self) -> tuple[tuple[Case, ...], list[Answers]]:
        """The cases that identify a deviation, and the answers to them.

        The first ones; if none of them deviates, as of a bug in rare cases only, those that do.
        """
        every = range(self.check.cases("ci", self.dtype))
        first = tuple(every) if self.level.cases is None else self.level.cases
        rounded = every[1::2] if self.level.has_exact_lane else every
        for numbers in (first, tuple(n for n in rounded if n not in first)):
            asked = [self.ask(self.check, number) for number in numbers]
            deviating = [pair for pair in asked if "fail" in verdicts(pair[1])]
            if deviating:
                chosen = asked if numbers is first else deviating[: len(FIRST_CASES)]
                return tuple(case for case, _ in chosen), [answer for _, answer in chosen]
        return (), []

    def refutes(self, m: Mutant, ids: set[str]) -> bool:
        """Whether a case passes in which the mutant deviates.

        The cases are of this check, and of those of the ``ids`` that call no further methods of the
        implementation: another method may be right where this one is wrong.
        """
        others = [c for c in self.level.checks if c.id in ids and {*c.needs} <= {*self.check.needs}]
        for check in {self.check.id: self.check, **{c.id: c for c in others}}.values():
            for number in BOTH_LANES[: check.cases("ci", self.dtype)]:
                case = Case(check.id, self.dtype, number, self.seed, self.subject.fixed)
                (ours,) = mutant_answers(m, check, (case,))
                if "fail" in verdicts(ours) and self._passes(check, number):
                    return True
        return False

    def _passes(self, check: Check, number: int) -> bool:
        return verdicts(self.ask(check, number)[1]) == {"pass"}

    def separate(self, remaining: list[Candidate]) -> tuple[list[Candidate], str]:
        """The candidates that remain, and the case that separated the last, or would.

        Where two of them differ in a further case of the level, the implementation is asked that
        too. If it cannot answer, the case is named all the same, and all remain.
        """
        separated = would_separate = ""
        for check, number in self._separating_cases():
            if len(remaining) == 1:
                return remaining, separated
            case = Case(check.id, self.dtype, number, self.seed, self.subject.fixed)
            ours = [answers(check, Direct(c.mutant.make()), case) for c in remaining]
            if not all(ours) or all(explains([a], [ours[0]]) is not None for a in ours[1:]):
                continue
            theirs = answers(check, self.subject, case)
            if not theirs:
                would_separate = would_separate or case.id
                continue
            explaining = [
                candidate
                for candidate, answer in zip(remaining, ours, strict=True)
                if explains([theirs], [answer]) is not None
            ]
            if explaining and len(explaining) < len(remaining):
                remaining, separated = explaining, case.id
        return remaining, separated if len(remaining) == 1 else would_separate

    def _separating_cases(self) -> Iterator[tuple[Check, int]]:
        """The cases of the level that may separate two mutants, those of this check first."""
        checks = [check for check in self.level.checks if self.level.is_diagnosed(check)]
        for check in sorted(checks, key=lambda check: check.id != self.check.id):
            for number in range(min(check.cases("ci", self.dtype), MAX_SEPARATING)):
                yield check, number


@np.errstate(all="ignore")  # what is wrong may be wrong beyond all bounds
def diagnose(
    level: Level, check: Check, subject: GuardedImplementation, dtype: str, seed: int
) -> tuple[Diagnosis, ...]:
    """The mutants that explain an implementation's answers to a check, the nearest first.

    Where there is none, the pattern of the deviation.
    """
    diagnoser = Diagnoser(level, check, subject, dtype, seed)
    cases, theirs = diagnoser.telling_cases()
    if not theirs or not all(theirs):
        return ()

    def ours_of(m: Mutant) -> Iterable[Answers]:
        return mutant_answers(m, check, cases)

    if convention := other_convention(check, subject, cases):
        return convention
    explaining = candidates(level.name, theirs, ours_of)
    explaining, separating = diagnoser.separate(explaining)

    def is_refuted(m: Mutant) -> bool:
        best = {m.caught_by, *(c.mutant.caught_by for c in explaining)}
        return diagnoser.refutes(m, best)

    # Each has to hold where the others show best: what they answer alike here they may not there.
    explaining = [c for c in explaining if not is_refuted(c.mutant)]
    if explaining:
        return tuple(candidate.named(separating) for candidate in explaining)
    patterns = describe(level, cases, theirs)
    if any(pattern.id.removeprefix(STRUCTURE).startswith(SIMPLE_PATTERNS) for pattern in patterns):
        return patterns
    part = part_of(level.name, theirs, ours_of, is_refuted)
    return patterns if part is None else (part, *patterns)
