"""The answers of an implementation and of a mutant to the same cases, and whether they agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.worker import Raised

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant


Array = np.ndarray

Answers = dict[str, Comparison]
"""The comparisons of one case, by the array's name."""


class Direct(GuardedImplementation):
    """A mutant, called in this thread: it is part of this package.

    Its sessions are taken not to have the methods in ``session_lacks``, which the target's lack:
    both then answer the same arrays.
    """

    hidden: frozenset[str] = frozenset()

    def has(self, method: str) -> bool:
        """Whether it has this method, and the target too."""
        return method not in self.hidden and super().has(method)

    def session(self, layer: Any) -> GuardedImplementation:
        """The session that the mutant opens. Raises Skip or Fault."""
        lacks = self.session_lacks
        session = super().session(layer)
        if isinstance(session, Direct):
            session.hidden = lacks
        self.session_lacks = lacks
        return session

    def _within_limit(self, call: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is wrong, and some of it divides by zero
            try:
                return call()
            except Exception as error:  # one may be of another architecture than the case
                raise Raised(error) from error


def answers(check: Check, subject: GuardedImplementation, case: Case) -> Answers:
    """The comparisons of a case by the array's name.

    Of a case that ends early those before, if one of them is wrong already; else none.
    """
    made: Answers = {}
    try:
        for comparison in check.run(subject, case):
            made[comparison.array] = comparison
    except (Skip, Fault):
        return made if any(map(deviates, made.values())) else {}
    return made


def agree(theirs: Comparison, ours: Comparison) -> float | None:
    """The rms z between two implementations' answers, or None where they differ.

    Both have rounded, each by what its own precision loses, and their variances add. σ is that of
    the correct answer; a deviation has been rounded too, in proportion to its size.
    """
    sigma = None
    if theirs.sigma is None and not deviates(theirs) and not deviates(ours):
        return 0.0  # of two answers that must have the same bits, each its own
    if theirs.sigma is not None and ours.sigma is not None:
        sigma = sigma_of_both(theirs, ours)
    elif theirs.sigma is None and deviates(theirs):
        sigma = _where_inexact(theirs, ours)
    judged = replace(theirs, want=ours.got, sigma=sigma).judge()
    return judged.rms if judged.verdict == "pass" else None


def _where_inexact(theirs: Comparison, ours: Comparison) -> Array | None:
    """σ of two deviations from whole numbers, which round where these did not.

    A unit in the last place of the greatest entry. None where either deviates by no more.
    """
    got = np.asarray(theirs.got, float)
    dtype = str(theirs.got.dtype)
    if dtype not in DTYPES or not np.isfinite(got).all():
        return None
    sigma = np.full(got.shape, 2 * unit_roundoff(dtype) * max(float(np.abs(got).max()), 1e-30))
    for answer in (theirs, ours):
        if replace(answer, sigma=sigma).judge().verdict != "fail":
            return None
    return sigma


def sigma_of_both(theirs: Comparison, ours: Comparison) -> Array:
    """σ of the difference of two answers in the lane with σ."""
    both: Array = np.hypot(_rounded(theirs), _rounded(ours))
    return both


def _rounded(answer: Comparison) -> Array:
    """σ of an answer that deviates: that of the correct one, and what rounds in the deviation.

    That is σ times ‖got - want‖ / ‖want‖. An element that deviates may lie where the correct one
    has few terms: its σ is at least the array's mean, up to a part of its deviation.
    """
    got, want = (np.asarray(a, float) for a in (answer.got, answer.want))
    sigma = np.broadcast_to(np.asarray(answer.sigma, float), want.shape)
    size, off = np.linalg.norm(want), np.abs(got - want)
    grown = float(np.linalg.norm(off) / size) if size else 0.0
    if not np.isfinite(grown):
        return sigma
    mean = float(np.sqrt((sigma * sigma).mean()))
    added: Array = sigma + np.maximum(sigma * grown, np.minimum(mean * grown, off / 64))
    return added


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
def mutant_answers(
    m: Mutant, check: Check, cases: tuple[Case, ...], session_lacks: frozenset[str] = frozenset()
) -> LazyAnswers:
    """A mutant's answers to these cases; its sessions lack the methods that the target's lack."""
    mutant = Direct(m.make())
    mutant.session_lacks = session_lacks
    return LazyAnswers(check, mutant, cases)


def verdicts(answer: Answers) -> set[str]:
    """Those of a case's comparisons; none where there is no answer."""
    return {comparison.judge().verdict for comparison in answer.values()}


def deviates(comparison: Comparison) -> bool:
    """Whether one array is wrong."""
    return comparison.judge().verdict == "fail"


def wrong_arrays(answer: Answers) -> frozenset[str]:
    """The names of the arrays that are wrong in a case."""
    return frozenset(name for name, comparison in answer.items() if deviates(comparison))
