"""The name of the bug: which known misreading gives the very answers that the implementation gives.

A misreading explains a failing check if it gives the same answers in several cases, within the
rounding of both, where the implementation deviates from what is right. Nothing is invented: where
none does, there is no diagnosis, and where several do, all are named.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from minilora.verify.contract import Fault, Raised, Skip, Subject
from minilora.verify.terms import Case, Check, Comparison, Diagnosis

if TYPE_CHECKING:
    from minilora.verify.misreadings import Misreading

ANSWERS = {
    "linear": ("linear.forward", "linear.vjp", "linear.evaluation", "linear.zero-B"),
    "merge": ("merge.weight", "merge.unmerge"),
    "variants": ("variants.",),
    "combine": ("combine.weighted", "combine.one"),
    "multi": ("multi.forward",),
    "lifecycle": ("lifecycle.",),
    "optimizer": ("optimizer.",),
    "model": ("model.",),
    "train": ("train.",),
    "init": ("init.",),
    "files": ("files.",),
    "grad-flow": ("grad-flow.",),
}
LAWS = (".balance", ".padding", ".vector", "-balance", "dora.start", "dora.vector", ".reproducible")
"""Of the checks of a level, those that compare answers themselves, and not a law of them."""

WHOLE = ("model", "optimizer", "train", "grad-flow", "files")
"""Levels whose cases are long: those of the profile ci are enough."""

CASES = (1, 3, 5)
"""Odd cases of a layer are of the lane with sigma, where no order of operations is excluded."""


class Direct(Subject):
    """A misreading is ours: it is called without a thread of its own."""

    def _within_limit(self, call: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is wrong, and some of it divides by zero
            try:
                return call()
            except Exception as error:  # one may be of another architecture than the case
                raise Raised(error) from error


def answers(check: Check, subject: Subject, case: Case) -> dict[str, Comparison]:
    """The comparisons of a case by the array's name; none where the implementation gives none."""
    try:
        return {each.array: each for each in check.run(subject, case)}
    except (Skip, Fault):
        return {}


def agree(theirs: Comparison, ours: Comparison) -> float | None:
    """The rms z between two implementations' answers, or None where they differ.

    Both have rounded, each by what its own precision loses, and their variances add.
    """
    sigma = None
    if theirs.sigma is not None and ours.sigma is not None:
        sigma = np.sqrt(np.square(theirs.sigma) + np.square(ours.sigma))
    judged = replace(theirs, want=ours.got, sigma=sigma).judge()
    return judged.rms if judged.verdict == "pass" else None


def explains(
    theirs: Sequence[dict[str, Comparison]], ours: Sequence[dict[str, Comparison]]
) -> float | None:
    """The greatest rms z over all arrays of all cases, or None if any of them differs."""
    worst = 0.0
    for their_case, our_case in zip(theirs, ours, strict=True):
        if not their_case.keys() <= our_case.keys():
            return None
        for array, comparison in their_case.items():
            rms = agree(comparison, our_case[array])
            if rms is None:
                return None
            worst = max(worst, rms)
    return worst


@lru_cache(maxsize=1024)
def given_by(
    m: Misreading, check: Check, cases: tuple[Case, ...]
) -> tuple[dict[str, Comparison], ...]:
    """What a misreading answers to these cases, one after another."""
    subject = Direct(m.make())
    return tuple(answers(check, subject, case) for case in cases)


def has_diagnosis(check: Check) -> bool:
    """Whether a check compares answers themselves, which another's answers may explain."""
    return check.id.startswith(ANSWERS.get(check.level, ())) and not check.id.endswith(LAWS)


def diagnose(check: Check, subject: Subject, dtype: str, seed: int) -> tuple[Diagnosis, ...]:
    """The misreadings that explain what an implementation answers to a check, the nearest first."""
    from minilora.verify.misreadings import MISREADINGS  # costs time only where something is wrong

    if not has_diagnosis(check):
        return ()
    numbers = CASES if check.level not in WHOLE else range(check.cases("ci", dtype))
    cases = tuple(Case(check.id, dtype, number, seed) for number in numbers)
    theirs = [answers(check, subject, case) for case in cases]
    deviates = [
        any(each.judge().verdict == "fail" for each in answer.values()) for answer in theirs
    ]
    if not all(theirs) or not any(deviates):
        return ()
    found = []
    for m in MISREADINGS:
        if m.level != check.level or m.equivalent:
            continue
        ours = given_by(m, check, cases)
        residual = explains(theirs, ours) if all(ours) else None
        if residual is not None:
            seen = f" Seen in {', '.join(m.seen)}." if m.seen else ""
            found.append(Diagnosis(m.id, f"{m.formula}.{seen}", residual))
    if not found:
        from minilora.verify.structure import describe

        return describe(check.id, cases, theirs)
    return tuple(sorted(found, key=lambda each: each.residual_z))
