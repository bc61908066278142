"""The name of the bug: which mutant of the catalogue gives the implementation's own answers.

A mutant explains a failing check if it gives the same answers in several cases, within the
rounding of both, where the implementation deviates from the correct answer, and if no case that
passes refutes it. Nothing is guessed: where no mutant does, there is no diagnosis, and where
several do, all are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from minilora.verify.core.level import FIRST_CASES, Level
from minilora.verify.core.types import STRUCTURE, Case, Check, Diagnosis
from minilora.verify.diagnosis.answers import (
    Answers,
    answers,
    deviates,
    explains,
    mutant_answers,
    verdicts,
    wrong_arrays,
)
from minilora.verify.diagnosis.candidates import (
    WHOSE,
    Candidate,
    candidates,
    explanation,
    forms,
    mutants_for,
    part_of,
    whole,
)
from minilora.verify.diagnosis.faults import with_the_same_fault
from minilora.verify.diagnosis.pairs import both_at_once
from minilora.verify.diagnosis.patterns import describe, fitted_scales
from minilora.verify.implementation.contract import CONVENTIONS
from minilora.verify.implementation.guard import GuardedImplementation

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant

MAX_PARTLY = 6
"""So many cases that deviate are looked at for a mutant that shows in these cases alone."""

MAX_SEPARATING = 12
"""The greatest number of cases of each check that are tried to separate two mutants."""

SIMPLE_PATTERNS = (
    "accepted", "composition", "scale", "factor", "zero", "transposed", "permuted", "steps",
)  # fmt: skip
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
    passed: dict[tuple[str, int], bool] = field(default_factory=dict)
    """Whether a case of a check holds, where that was asked."""

    def ask(self, check: Check, number: int) -> tuple[Case, Answers]:
        """A case of a check, and the implementation's answers."""
        case = Case(check.id, self.dtype, number, self.seed, self.subject.fixed)
        return case, answers(check, self.subject, case)

    def ours(self, m: Mutant, check: Check, cases: tuple[Case, ...]) -> Iterable[Answers]:
        """A mutant's answers to these cases, by the methods that the implementation has."""
        return mutant_answers(m, check, cases, self.subject.session_lacks)

    def telling_cases(self) -> tuple[tuple[Case, ...], list[Answers]]:
        """The cases that identify a deviation, and the answers to them, where there are any.

        The first ones; if none of them deviates, as of a bug in rare cases only, those that do.
        """
        every = range(self.check.cases("ci", self.dtype))
        first = tuple(every) if self.level.cases is None else self.level.cases
        rounded = every[1::2] if self.level.has_exact_lane else every
        later = tuple(n for n in rounded if n not in first)
        for numbers in (first, later, tuple(n for n in every if n not in (*first, *later))):
            asked = [pair for number in numbers if (pair := self.ask(self.check, number))[1]]
            deviating = [pair for pair in asked if "fail" in verdicts(pair[1])]
            if deviating:
                chosen = asked if numbers is first else deviating[: len(FIRST_CASES)]
                return tuple(case for case, _ in chosen), [answer for _, answer in chosen]
        return (), []

    def forms_of(self, m: Mutant) -> list[Mutant]:
        """What a mistake may look like to this check, under the declared convention."""
        declared = self.subject.conventions.get("dora_norm", "detached")
        return forms(m, self.check, declared == "detached")

    def refutes(self, m: Mutant, ids: set[str]) -> bool:
        """Whether a case passes in which the mutant deviates.

        The cases are all of this check, and of those of the ``ids`` that call no further methods of
        the implementation: another method may be right where this one is wrong. A mutant of this
        check alone is refuted as well by a check of which this one is a special case.
        """
        for check in self._refuting(ids):
            for number in range(check.cases("ci", self.dtype)):
                case = Case(check.id, self.dtype, number, self.seed, self.subject.fixed)
                (ours,) = self.ours(m, check, (case,))
                if "fail" in verdicts(ours) and self.passes(check, number):
                    return True
        return False

    def distance(self, m: Mutant) -> int:
        """0 of a mutant that this check shows best, 1 of one whose check answers, 2 of others.

        Of several that explain, the first is told as the cause.
        """
        if m.caught_by == self.check.id:
            return 0
        case = Case(m.caught_by, self.dtype, 0, self.seed, self.subject.fixed)
        best = (check for check in self.level.checks if check.id == m.caught_by)
        return 1 if any(answers(check, self.subject, case) for check in best) else 2

    def _refuting(self, ids: set[str]) -> Iterator[Check]:
        """This check, then the others that may refute."""
        yield self.check
        for other in self.level.checks:
            is_asked = other.id in ids or self.check.id.startswith(f"{other.id}.")
            if is_asked and other.id != self.check.id and {*other.needs} <= {*self.check.needs}:
                yield other

    def passes(self, check: Check, number: int) -> bool:
        """Whether a case of a check holds, with answers."""
        if (check.id, number) not in self.passed:
            self.passed[check.id, number] = verdicts(self.ask(check, number)[1]) == {"pass"}
        return self.passed[check.id, number]

    def explained_by(
        self, causes: Iterable[Mutant], cases: tuple[Case, ...], theirs: Sequence[Answers]
    ) -> list[Candidate]:
        """Those of the causes that other checks have shown which explain these answers too."""
        explaining = []
        for m in causes if theirs else ():
            shapes = self.forms_of(m)
            if self.level.is_diagnosed(self.check):
                found = explanation(theirs, shapes, lambda f: self.ours(f, self.check, cases))
            else:
                found = self._fails_alike(shapes, cases, theirs)
            if found and not self.refutes(found.mutant, set()):
                explaining.append(found)
        return whole(explaining)

    def fitted(self, cases: Sequence[Case], theirs: Sequence[Answers]) -> Candidate | None:
        """A layer with another scale, which is fitted, that explains these answers."""
        from minilora.verify.mutants.derived import with_scale

        layers = [layer for case in cases if (layer := self.level.layer(case)) is not None]
        for words, scale in fitted_scales(layers, theirs):
            m = with_scale(words, scale)
            found = explanation(
                theirs, self.forms_of(m), lambda f: self.ours(f, self.check, tuple(cases))
            )
            if found and not self.refutes(found.mutant, set()):
                return found
        return None

    def only_here(self, explaining: Sequence[Candidate]) -> Diagnosis | None:
        """The one that explains this check, and that no case of it refutes."""
        alone = [c for c in explaining if not self.refutes(c.mutant, set())]
        return _partly(alone[0], "checks") if len(alone) == 1 else None

    def partly(self, mutants: Sequence[Mutant]) -> Diagnosis | None:
        """The one mutant that gives the answers of all cases that deviate, but not of others.

        A layer of several ways, of which one is wrong, is a mutant in these alone.
        """
        asked = (self.ask(self.check, n) for n in range(self.check.cases("ci", self.dtype)))
        wrong = list(islice((pair for pair in asked if "fail" in verdicts(pair[1])), MAX_PARTLY))
        cases, theirs = tuple(case for case, _ in wrong), [answer for _, answer in wrong]
        found = candidates(
            mutants, theirs, lambda m: self.ours(m, self.check, cases), self.forms_of
        )
        if len(cases) < 2 or len(found) != 1:
            return None
        return _partly(found[0], "cases")

    def of_fault(self, mutants: Iterable[Mutant]) -> tuple[Diagnosis, ...]:
        """The mutants that end in the same faults, where no number deviates."""
        every = range(self.check.cases("ci", self.dtype))
        fixed = self.subject.fixed
        cases = [Case(self.check.id, self.dtype, n, self.seed, fixed) for n in every]
        found = with_the_same_fault(mutants, self.check, self.subject, cases)
        return tuple(Candidate(m, 0.0).named() for m in found)

    def _fails_alike(
        self, shapes: Sequence[Mutant], cases: tuple[Case, ...], theirs: Sequence[Answers]
    ) -> Candidate | None:
        """The form of a mistake that breaks a law in the same arrays of the same cases."""
        wrong = [wrong_arrays(answer) for answer in theirs]
        for form, whose in zip(shapes, WHOSE, strict=False):
            ours = self.ours(form, self.check, cases)
            if [wrong_arrays(answer) for answer in ours] == wrong:
                return Candidate(form, 0.0, whose)
        return None

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
            ours = [answer for c in remaining for answer in self.ours(c.mutant, check, (case,))]
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


def _partly(found: Candidate, where: str) -> Diagnosis:
    """A mutant that explains what deviates, and not why other cases, or checks, hold."""
    m = found.mutant
    sentence = (
        f"Where they deviate, the answers are those of {m.id} ({m.formula}); in other {where}, in "
        "which that deviates too, they are right."
    )
    return Diagnosis(f"{STRUCTURE}partly-{m.id}", sentence, found.residual)


def _mutants_of(ids: Iterable[str]) -> list[Mutant]:
    """The mutants of these ids."""
    from minilora.verify.mutants.derived import mutant_of

    return [m for m in map(mutant_of, ids) if m is not None]


@np.errstate(all="ignore")  # what is wrong may be wrong beyond all bounds
def follows(
    level: Level,
    check: Check,
    subject: GuardedImplementation,
    dtype: str,
    seed: int,
    causes: Sequence[str],
) -> tuple[Diagnosis, ...]:
    """Those of the causes, ids of mutants, that explain this check too, or fail it alike.

    Of a cause that is a pattern: the patterns of this check, if it is among them.
    """
    diagnoser = Diagnoser(level, check, subject, dtype, seed)
    cases, theirs = diagnoser.telling_cases()
    if not theirs:
        return diagnoser.of_fault(_mutants_of(causes))
    if explaining := diagnoser.explained_by(_mutants_of(causes), cases, theirs):
        return tuple(candidate.named() for candidate in explaining)
    known = {id for id in causes if id.startswith(STRUCTURE)}
    if not known or not level.is_diagnosed(check):
        return ()
    patterns = describe(level, cases, theirs)
    return patterns if known & {pattern.id for pattern in patterns} else ()


def _alone(diagnoser: Diagnoser, explaining: list[Candidate]) -> tuple[Diagnosis, ...]:
    """The candidates that no further case refutes.

    Each has to hold where the others show best: what they answer alike here they may not there.
    """
    explaining, separating = diagnoser.separate(explaining)
    best = {c.mutant.caught_by for c in explaining}
    held = [c for c in explaining if not diagnoser.refutes(c.mutant, best)]
    held.sort(key=lambda c: diagnoser.distance(c.mutant))
    return tuple(candidate.named(separating) for candidate in held)


@np.errstate(all="ignore")
def shown(
    level: Level,
    check: Check,
    subject: GuardedImplementation,
    dtype: str,
    seed: int,
    causes: Sequence[str] = (),
) -> tuple[Diagnosis, ...]:
    """The mutant that the wrong arrays of a law show by themselves (`Comparison.shows`).

    Of several the first whose own check fails: one for all kinds of layers before that of one kind.
    """
    diagnoser = Diagnoser(level, check, subject, dtype, seed)
    return _shown_by(diagnoser, diagnoser.telling_cases()[1])


def _shown_by(diagnoser: Diagnoser, theirs: Sequence[Answers]) -> tuple[Diagnosis, ...]:
    level, check, dtype = diagnoser.level, diagnoser.check, diagnoser.dtype
    shows = [c.shows() for answer in theirs for c in answer.values() if c.shows and deviates(c)]
    found = _mutants_of(id for id in (shows[0] if shows else ()) if all(id in s for s in shows))
    for m in found:
        own = next((each for each in level.checks if each.id == m.caught_by), check)
        numbers = range(own.cases("ci", dtype))
        if own.id == check.id or not all(diagnoser.passes(own, n) for n in numbers):
            return (Candidate(m, 0.0).named(),)
    return tuple(_partly(Candidate(m, 0.0), "checks") for m in found[-1:])


@np.errstate(all="ignore")
def diagnose(
    level: Level,
    check: Check,
    subject: GuardedImplementation,
    dtype: str,
    seed: int,
    causes: Sequence[str] = (),
) -> tuple[Diagnosis, ...]:
    """The mutants that explain an implementation's answers to a check, the nearest first.

    Where there is none, two at once, of which the first may be one of the ``causes`` of other
    checks; else the pattern of the deviation.
    """
    from minilora.verify.mutants.derived import AND

    diagnoser = Diagnoser(level, check, subject, dtype, seed)
    cases, theirs = diagnoser.telling_cases()
    if not theirs:
        return diagnoser.of_fault(mutants_for(level.name, check, keep_state=True))

    def ours_of(m: Mutant) -> Iterable[Answers]:
        return diagnoser.ours(m, check, cases)

    if convention := other_convention(check, subject, cases):
        return convention
    if by_itself := _shown_by(diagnoser, theirs):
        return by_itself
    mutants = mutants_for(level.name, check)
    explaining = candidates(mutants, theirs, ours_of, diagnoser.forms_of)
    if alone := _alone(diagnoser, explaining):
        return alone
    if fitted := diagnoser.fitted(cases, theirs):
        return (fitted.named(),)
    if partly := diagnoser.only_here(explaining) or diagnoser.partly(mutants):
        return (partly,)
    best_first = sorted(mutants, key=lambda m: m.caught_by != check.id)

    def both(first: Sequence[Mutant]) -> tuple[Diagnosis, ...]:
        pair = both_at_once(best_first, first, theirs, ours_of, diagnoser.forms_of)
        return (pair.named(),) if pair and not diagnoser.refutes(pair.mutant, set()) else ()

    known = [m for m in _mutants_of(causes) if AND not in m.id]
    if known and (pair := both(known)):
        return pair
    patterns = describe(level, cases, theirs)
    if any(p.id.removeprefix(STRUCTURE).startswith(SIMPLE_PATTERNS) for p in patterns):
        return patterns
    if pair := both(()):
        return pair
    part = part_of(mutants, theirs, ours_of, lambda m: diagnoser.refutes(m, {m.caught_by}))
    return patterns if part is None else (part, *patterns)
