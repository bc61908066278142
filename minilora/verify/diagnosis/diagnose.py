"""The name of the bug: which known mutant gives the very answers that the implementation gives.

A mutant explains a failing check if it gives the same answers in several cases, within the
rounding of both, where the implementation deviates from what is right, and if no case that holds
refutes it. Nothing is invented: where none does, there is no diagnosis, and where several do, all
are named.
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
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import STRUCTURE, Case, Check, Comparison, Diagnosis
from minilora.verify.diagnosis.patterns import Fit, agreeing, describe, fit, sigma_of
from minilora.verify.implementation.contract import CONVENTIONS
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.worker import Raised

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant

Array = np.ndarray

Given = Iterable[dict[str, Comparison]]
"""The comparisons of several cases, each by its array's name."""

ANSWERS = {
    "linear": ("linear.forward", "linear.vjp", "linear.evaluation", "linear.zero-B"),
    "merge": ("merge.weight", "merge.unmerge"),
    "variants": ("variants.",),
    "combine": ("combine.weighted", "combine.single"),
    "multi": ("multi.forward",),
    "lifecycle": ("lifecycle.",),
    "optimizer": ("optimizer.",),
    "model": ("model.",),
    "train": ("train.",),
    "init": ("init.",),
    "files": ("files.",),
    "grad-flow": ("grad-flow.",),
}
LAWS = (
    ".balance",
    ".padding",
    ".vector",
    "-balance",
    "dora.init",
    "dora.unbatched",
    ".reproducible",
)
"""Of the checks of a level, those that compare answers themselves, and not a law of them."""

WHOLE = ("model", "optimizer", "train", "grad-flow", "files")
"""Levels whose cases are long: those of the profile ci are enough."""

CASES = (1, 3, 5)
"""Odd cases of a layer are of the lane with sigma, where no order of operations is excluded."""


FURTHER = 12
"""So many cases of each check of the level may be asked to tell two mutants apart."""

BOTH_LANES = (0, 1)
"""Cases that refute a mutant if they hold: of the exact lane, and of that with sigma."""

PLAIN = ("scale", "factor", "zero", "transposed", "permuted", "steps")
"""What is said of the structure that is plainer than a part of some mutant."""


class Direct(GuardedImplementation):
    """A mutant is ours: it is called without a thread of its own."""

    def _within_limit(self, call: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is wrong, and some of it divides by zero
            try:
                return call()
            except Exception as error:  # one may be of another architecture than the case
                raise Raised(error) from error


def answers(check: Check, subject: GuardedImplementation, case: Case) -> dict[str, Comparison]:
    """The comparisons of a case by the array's name; none where the implementation gives none."""
    try:
        return {each.array: each for each in check.run(subject, case)}
    except (Skip, Fault):
        return {}


def agree(theirs: Comparison, ours: Comparison) -> float | None:
    """The rms z between two implementations' answers, or None where they differ.

    Both have rounded, each by what its own precision loses, and their variances add. σ is that of
    the right answer; what goes beyond it has been rounded too, in proportion to its size.
    """
    sigma = None
    if theirs.sigma is not None and ours.sigma is not None:
        sigma = np.hypot(theirs.sigma * _growth(theirs), ours.sigma * _growth(ours))
    judged = replace(theirs, want=ours.got, sigma=sigma).judge()
    return judged.rms if judged.verdict == "pass" else None


def _growth(answer: Comparison) -> float:
    """1 + ‖got - want‖ / ‖want‖: how much greater than of what is right its rounding may be."""
    got, want = (np.asarray(a, float).ravel() for a in (answer.got, answer.want))
    size = np.linalg.norm(want)
    grown = 1 + np.linalg.norm(got - want) / size if size else 1.0
    return float(grown) if np.isfinite(grown) else 1.0


def explains(theirs: Given, ours: Given) -> float | None:
    """The greatest rms z over all arrays of all cases, or None if any of them differs."""
    worst = 0.0
    for their_case, our_case in zip(theirs, ours, strict=True):
        if not their_case.keys() <= our_case.keys():
            return None
        if any(_beside(our_case[array]) for array in our_case.keys() - their_case.keys()):
            return None
        for array, comparison in their_case.items():
            rms = agree(comparison, our_case[array])
            if rms is None:
                return None
            worst = max(worst, rms)
    return worst


def _beside(ours: Comparison) -> bool:
    """Whether a mutant answers something where nothing should be, and others answer nothing."""
    return not np.any(ours.want) and ours.judge().verdict == "fail"


class Asked(Iterable[dict[str, Comparison]]):
    """What an implementation answers to these cases, each put to it when it is first looked at.

    The first case refutes most mutants, and the further ones need not be put to them.
    """

    def __init__(self, check: Check, subject: GuardedImplementation, cases: Sequence[Case]) -> None:
        self._next = (answers(check, subject, case) for case in cases)
        self._given: list[dict[str, Comparison]] = []

    def __iter__(self) -> Iterator[dict[str, Comparison]]:
        for number in count():
            if number == len(self._given):
                self._given.extend(islice(self._next, 1))
            if number == len(self._given):
                return
            yield self._given[number]


@lru_cache(maxsize=1024)
def given_by(m: Mutant, check: Check, cases: tuple[Case, ...]) -> Asked:
    """What a mutant answers to these cases."""
    return Asked(check, Direct(m.make()), cases)


def has_diagnosis(check: Check) -> bool:
    """Whether a check compares answers themselves, which another's answers may explain."""
    return check.id.startswith(ANSWERS.get(check.level, ())) and not check.id.endswith(LAWS)


@dataclass(frozen=True)
class Candidate:
    """A mutant that gives the answers that were got, and the rms z that it leaves."""

    mutant: Mutant
    residual: float

    def named(self, separating: str = "") -> Diagnosis:
        """The diagnosis in words."""
        m = self.mutant
        seen = f" Seen in {', '.join(m.seen)}." if m.seen else ""
        return Diagnosis(m.id, f"{m.formula}.{seen}", self.residual, separating)


def _wrong(level: str) -> list[Mutant]:
    """The level's mutants that are no equivalents."""
    from minilora.verify.mutants import MUTANTS  # costs time only where something is wrong

    return [m for m in MUTANTS if m.level == level and not m.equivalent]


def candidates(
    level: str,
    theirs: Given,
    ours_of: Callable[[Mutant], Given],
) -> list[Candidate]:
    """The level's mutants that explain these answers, the nearest first."""
    found = []
    for m in _wrong(level):
        ours = ours_of(m)
        residual = explains(theirs, ours)
        if residual is not None and filtered(theirs, ours).agrees(1.0):
            found.append(Candidate(m, residual))
    return sorted(found, key=lambda each: each.residual)


def filtered(theirs: Given, ours: Given) -> Fit:
    """The matched filter c = ⟨e, d⟩ / ⟨d, d⟩ over all arrays of all cases, each element over its σ.

    e is what was got less what is right, d what a mutant gives less what is right: c is 1 where
    the implementation reads so, and 0 where it does not. It sums what no single element shows.
    """
    e, d = _whitened(theirs, ours)
    c, _ = fit(e, d, 0 * e, np.ones_like(e))
    # A factor that is rounded once moves all elements alike, which the standard error leaves out.
    dtypes = {str(each.got.dtype) for answer in theirs for each in answer.values()}
    once = max((unit_roundoff(d) for d in dtypes if d in DTYPES), default=0.0)
    return Fit(c.value, c.error + once)


def _whitened(theirs: Given, ours: Given) -> tuple[Array, Array]:
    """What both have beyond what is right, over σ, in all arrays of all cases."""
    deviations: tuple[list[Array], list[Array]] = ([], [])
    for their_case, our_case in zip(theirs, ours, strict=True):
        for array in their_case.keys() & our_case.keys():
            mine, other = their_case[array], our_case[array]
            sigma, want = np.maximum(sigma_of(mine), 1e-300), np.asarray(mine.want, float)
            for own, each in zip(deviations, (mine, other), strict=True):
                own.append(((np.asarray(each.got, float) - want) / sigma).ravel())
    e, d = map(np.concatenate, deviations)
    return e, d


def part_of(
    level: str,
    theirs: Given,
    ours_of: Callable[[Mutant], Given],
    is_refuted: Callable[[Mutant], bool],
) -> Diagnosis | None:
    """The mutant of which a part c, the same in all cases, is the whole deviation."""
    for m in _wrong(level):
        ours = ours_of(m)
        if not all(a.keys() <= b.keys() for a, b in zip(theirs, ours, strict=True)):
            continue
        c = filtered(theirs, ours)
        if not (0 < c.value < 1 and c.value > 8 * c.error):
            continue
        e, d = _whitened(theirs, ours)
        if agreeing(e - c.value * d) and not is_refuted(m):
            says = f"The deviation is {c} times that of {m.id} ({m.formula}), in every case."
            return Diagnosis(f"{STRUCTURE}part", says, 0.0)
    return None


def refuted(
    m: Mutant, ids: set[str], check: Check, subject: GuardedImplementation, dtype: str, seed: int
) -> bool:
    """Whether a case holds in which the mutant deviates.

    The cases are of this check, and of those of the ``ids`` that call no further methods of the
    implementation: another method may be right where this one is wrong.
    """
    from minilora.verify.checks.registry import CHECKS

    others = [c for c in CHECKS if c.id in ids and {*c.needs} <= {*check.needs}]
    for each in {check.id: check, **{c.id: c for c in others}}.values():
        for number in BOTH_LANES[: each.cases("ci", dtype)]:
            case = Case(each.id, dtype, number, seed)
            (ours,) = given_by(m, each, (case,))
            if "fail" in _verdicts(ours) and _verdicts(answers(each, subject, case)) == {"pass"}:
                return True
    return False


def _verdicts(answer: dict[str, Comparison]) -> set[str]:
    """Those of a case's comparisons; none where there is no answer."""
    return {each.judge().verdict for each in answer.values()}


def another_convention(
    check: Check, subject: GuardedImplementation, cases: Sequence[Case]
) -> tuple[Diagnosis, ...]:
    """The convention by which all answers are right, where another one is declared."""
    declared = subject.conventions
    try:
        for name, values in CONVENTIONS.items():
            for value in values:
                subject.conventions = {**declared, name: value}
                if name in declared and all(
                    _verdicts(answers(check, subject, case)) == {"pass"} for case in cases
                ):
                    says = f"The answers are right by the convention {name} = {value!r}; "
                    says += f"{name} = {declared[name]!r} is declared."
                    return (Diagnosis(f"{STRUCTURE}convention", says, 0.0),)
    finally:
        subject.conventions = declared
    return ()


def tell_apart(
    check: Check, subject: GuardedImplementation, dtype: str, seed: int, found: Sequence[Candidate]
) -> tuple[list[Candidate], str]:
    """Those of several candidates that remain, and the case that separated the last, or would.

    Where two of them differ in a further case of the level, the implementation is asked that too.
    If it cannot answer, the case is given all the same, and all remain.
    """
    from minilora.verify.checks.registry import CHECKS

    remaining, separated, would = list(found), "", ""
    level = [each for each in CHECKS if each.level == check.level and has_diagnosis(each)]
    for each in sorted(level, key=lambda each: each.id != check.id):
        for number in range(min(each.cases("ci", dtype), FURTHER)):
            if len(remaining) == 1:
                return remaining, separated
            case = Case(each.id, dtype, number, seed)
            ours = [answers(each, Direct(c.mutant.make()), case) for c in remaining]
            if not all(ours) or all(explains([a], [ours[0]]) is not None for a in ours[1:]):
                continue
            theirs = answers(each, subject, case)
            left = [
                c
                for c, own in zip(remaining, ours, strict=True)
                if theirs and explains([theirs], [own]) is not None
            ]
            if left and len(left) < len(remaining):
                remaining, separated = left, case.id
            elif not theirs:
                would = would or case.id
    return remaining, separated if len(remaining) == 1 else would


def telling(
    check: Check, subject: GuardedImplementation, dtype: str, seed: int
) -> tuple[tuple[Case, ...], list[dict[str, Comparison]]]:
    """The cases by which a deviation is to be known, and what is answered to them.

    The first ones; if none of them deviates, as of what is wrong in rare cases only, those that do.
    """
    every = range(check.cases("ci", dtype))
    first = tuple(every) if check.level in WHOLE else CASES
    rounded = every if check.level == "variants" else every[1::2]  # which has no exact lane
    for numbers in (first, tuple(n for n in rounded if n not in first)):
        cases = [Case(check.id, dtype, number, seed) for number in numbers]
        found = [(case, answers(check, subject, case)) for case in cases]
        deviating = [each for each in found if "fail" in _verdicts(each[1])]
        if deviating:
            chosen = found if numbers is first else deviating[: len(CASES)]
            return tuple(case for case, _ in chosen), [answer for _, answer in chosen]
    return (), []


@np.errstate(all="ignore")  # what is wrong may be wrong beyond all bounds
def diagnose(
    check: Check, subject: GuardedImplementation, dtype: str, seed: int
) -> tuple[Diagnosis, ...]:
    """The mutants that explain what an implementation answers to a check, the nearest first."""
    if not has_diagnosis(check):
        return ()
    cases, theirs = telling(check, subject, dtype, seed)
    if not theirs or not all(theirs):
        return ()

    def ours_of(m: Mutant) -> Given:
        return given_by(m, check, cases)

    def is_refuted(m: Mutant) -> bool:
        best = {m.caught_by, *(c.mutant.caught_by for c in found)}
        return refuted(m, best, check, subject, dtype, seed)

    if said := another_convention(check, subject, cases):
        return said
    found = candidates(check.level, theirs, ours_of)
    found, separating = tell_apart(check, subject, dtype, seed, found)
    # Each has to hold where the others show best: what they answer alike here they may not there.
    found = [c for c in found if not is_refuted(c.mutant)]
    if not found:
        said = describe(check.id, cases, theirs)
        if any(each.id.removeprefix(STRUCTURE).startswith(PLAIN) for each in said):
            return said
        part = part_of(check.level, theirs, ours_of, is_refuted)
        return said if part is None else (part, *said)
    return tuple(each.named(separating) for each in found)
