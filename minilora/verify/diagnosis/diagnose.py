"""The name of the bug: which mutant of the catalogue gives the implementation's own answers.

A mutant explains a failing check if it gives the same answers in several cases, within the
rounding of both, where the implementation deviates from the correct answer, and if no case that
passes refutes it. Nothing is guessed: where no mutant does, there is no diagnosis, and where
several do, all are named.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.level import FIRST_CASES, Level
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import STRUCTURE, Case, Check, Comparison, Diagnosis
from minilora.verify.diagnosis.fit import Fit, agreeing, fit, sigma_of
from minilora.verify.diagnosis.patterns import describe
from minilora.verify.implementation.contract import CONVENTIONS
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.worker import Raised

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant

Array = np.ndarray

Answers = dict[str, Comparison]
"""The comparisons of one case, by the array's name."""

MAX_SEPARATING = 12
"""The greatest number of cases of each check that are tried to separate two mutants."""

BOTH_LANES = (0, 1)
"""Cases that refute a mutant if they pass: one of the exact lane, one of that with sigma."""

SIMPLE_PATTERNS = ("scale", "factor", "zero", "transposed", "permuted", "steps")
"""Patterns that say more than that the deviation is a part of some mutant's."""


class Direct(GuardedImplementation):
    """A mutant, called in this thread: it is part of this package."""

    def _within_limit(self, call: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is wrong, and some of it divides by zero
            try:
                return call()
            except Exception as error:  # one may be of another architecture than the case
                raise Raised(error) from error


def answers(check: Check, subject: GuardedImplementation, case: Case) -> Answers:
    """The comparisons of a case by the array's name; none where the implementation gives none."""
    try:
        return {comparison.array: comparison for comparison in check.run(subject, case)}
    except (Skip, Fault):
        return {}


def agree(theirs: Comparison, ours: Comparison) -> float | None:
    """The rms z between two implementations' answers, or None where they differ.

    Both have rounded, each by what its own precision loses, and their variances add. σ is that of
    the correct answer; a deviation has been rounded too, in proportion to its size.
    """
    sigma = None
    if theirs.sigma is not None and ours.sigma is not None:
        sigma = np.hypot(theirs.sigma * _growth(theirs), ours.sigma * _growth(ours))
    judged = replace(theirs, want=ours.got, sigma=sigma).judge()
    return judged.rms if judged.verdict == "pass" else None


def _growth(answer: Comparison) -> float:
    """1 + ‖got - want‖ / ‖want‖: how much greater than the correct answer's its rounding may be."""
    got, want = (np.asarray(a, float).ravel() for a in (answer.got, answer.want))
    size = np.linalg.norm(want)
    grown = 1 + np.linalg.norm(got - want) / size if size else 1.0
    return float(grown) if np.isfinite(grown) else 1.0


def explains(theirs: Iterable[Answers], ours: Iterable[Answers]) -> float | None:
    """The greatest rms z over all arrays of all cases, or None if any of them differs."""
    worst = 0.0
    for their_case, our_case in zip(theirs, ours, strict=True):
        rms = _explains_case(their_case, our_case)
        if rms is None:
            return None
        worst = max(worst, rms)
    return worst


def _explains_case(theirs: Answers, ours: Answers) -> float | None:
    """The same of one case."""
    if not theirs.keys() <= ours.keys():
        return None
    if any(_is_extra(ours[array]) for array in ours.keys() - theirs.keys()):
        return None
    residuals = []
    for array, comparison in theirs.items():
        rms = agree(comparison, ours[array])
        if rms is None:
            return None
        residuals.append(rms)
    return max(residuals, default=0.0)


def _is_extra(ours: Comparison) -> bool:
    """Whether a mutant gives an array other than 0 that should be 0, and that others leave out."""
    return not np.any(ours.want) and ours.judge().verdict == "fail"


class LazyAnswers(Iterable[Answers]):
    """An implementation's answers to these cases, each asked when it is first looked at.

    The first case refutes most mutants, and the others need not be asked.
    """

    def __init__(self, check: Check, subject: GuardedImplementation, cases: Sequence[Case]) -> None:
        self._next = (answers(check, subject, case) for case in cases)
        self._answered: list[Answers] = []

    def __iter__(self) -> Iterator[Answers]:
        for number in count():
            if number == len(self._answered):
                self._answered.extend(islice(self._next, 1))
            if number == len(self._answered):
                return
            yield self._answered[number]


@lru_cache(maxsize=1024)
def mutant_answers(m: Mutant, check: Check, cases: tuple[Case, ...]) -> LazyAnswers:
    """A mutant's answers to these cases."""
    return LazyAnswers(check, Direct(m.make()), cases)


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


def _verdicts(answer: Answers) -> set[str]:
    """Those of a case's comparisons; none where there is no answer."""
    return {comparison.judge().verdict for comparison in answer.values()}


def other_convention(
    check: Check, subject: GuardedImplementation, cases: Sequence[Case]
) -> tuple[Diagnosis, ...]:
    """The convention under which all answers are correct, where another one is declared."""
    declared = subject.conventions
    try:
        for name, values in CONVENTIONS.items():
            for value in values if name in declared else ():
                subject.conventions = {**declared, name: value}
                if all(_verdicts(answers(check, subject, case)) == {"pass"} for case in cases):
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
        case = Case(check.id, self.dtype, number, self.seed)
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
            deviating = [pair for pair in asked if "fail" in _verdicts(pair[1])]
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
                case = Case(check.id, self.dtype, number, self.seed)
                (ours,) = mutant_answers(m, check, (case,))
                if "fail" in _verdicts(ours) and self._passes(check, number):
                    return True
        return False

    def _passes(self, check: Check, number: int) -> bool:
        return _verdicts(self.ask(check, number)[1]) == {"pass"}

    def separate(self, remaining: list[Candidate]) -> tuple[list[Candidate], str]:
        """The candidates that remain, and the case that separated the last, or would.

        Where two of them differ in a further case of the level, the implementation is asked that
        too. If it cannot answer, the case is named all the same, and all remain.
        """
        separated = would_separate = ""
        for check, number in self._separating_cases():
            if len(remaining) == 1:
                return remaining, separated
            case = Case(check.id, self.dtype, number, self.seed)
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
