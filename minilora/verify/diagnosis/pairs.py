"""Two mistakes at once: both mutants' edits in one implementation explain what neither does.

All pairs are too many to be tried. The first of two is a cause that other checks have shown, a
mutant that explains some arrays or some cases alone, or a scale, which can be fitted beside any
other mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from minilora.verify.diagnosis.answers import Answers, agree, deviates
from minilora.verify.diagnosis.candidates import Candidate, explanation
from minilora.verify.diagnosis.fit import agreeing, fit, sigma_of

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant

Places = frozenset[tuple[int, str]]
"""Arrays of cases: the case's place among all, and the array's name."""

AnswersOf = Callable[["Mutant"], Iterable[Answers]]

MAX_FIRST = 4
"""So many mutants that explain a part are tried as the first of two."""

MAX_PAIRS = 60
"""So many pairs of each kind are tried for a check: each is a source text to be compiled."""

SCALE_ZERO = "scale-zero"
"""The mutant whose difference from another is that one's branch."""


def both_at_once(
    mutants: Sequence[Mutant],
    causes: Sequence[Mutant],
    theirs: Sequence[Answers],
    ours_of: AnswersOf,
    forms_of: Callable[[Mutant], Sequence[Mutant]],
) -> Candidate | None:
    """Two mutants that explain these answers together, one of them a cause if there are any."""
    from minilora.verify.mutants.derived import of_layer

    editable = [m for m in mutants if of_layer(m)]
    searches = [_beside(editable, causes, ours_of)]
    if not causes:
        searches = [_in_parts(editable, theirs, ours_of), _scaled(editable, theirs, ours_of)]
    for both in chain.from_iterable(islice(search, MAX_PAIRS) for search in searches):
        if found := explanation(theirs, forms_of(both), ours_of):
            return found
    return None


def _pair(a: Mutant, b: Mutant) -> Mutant | None:
    from minilora.verify.mutants.derived import pair

    return None if a.id == b.id else pair(a, b)


def _wrong(answers: Iterable[Answers]) -> Places:
    """Where an implementation deviates from the correct answers."""
    return frozenset(
        (i, name)
        for i, answer in enumerate(answers)
        for name, comparison in answer.items()
        if deviates(comparison)
    )


def _alike(theirs: Iterable[Answers], ours: Iterable[Answers]) -> Places:
    """Where two implementations agree."""
    return frozenset(
        (i, name)
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True))
        for name in a.keys() & b.keys()
        if agree(a[name], b[name]) is not None
    )


def _beside(
    mutants: Sequence[Mutant],
    causes: Sequence[Mutant],
    ours_of: AnswersOf,
) -> Iterator[Mutant]:
    """A cause that is known already with each mutant that deviates here."""
    for cause in causes:
        for m in mutants:
            if _wrong(ours_of(m)) and (both := _pair(cause, m)):
                yield both


def _in_parts(
    mutants: Sequence[Mutant], theirs: Sequence[Answers], ours_of: AnswersOf
) -> Iterator[Mutant]:
    """Two that deviate in different places, which are together where the answers deviate."""
    wrong = _wrong(theirs)
    own = {m: _wrong(ours_of(m)) for m in mutants}
    explained = {m: own[m] & _alike(theirs, ours_of(m)) for m in mutants if own[m]}
    halves = sorted(
        (m for m, places in explained.items() if places and places != wrong),
        key=lambda m: -len(explained[m]),
    )
    for first in islice(halves, MAX_FIRST):
        rest = wrong - explained[first]
        for second in mutants:
            fits = rest <= own[second] and not own[second] & explained[first]
            if fits and (both := _pair(first, second)):
                yield both


def _scaled(
    mutants: Sequence[Mutant], theirs: Sequence[Answers], ours_of: AnswersOf
) -> Iterator[Mutant]:
    """A wrong scale with each mutant whose output has the right form but for the branch's size."""
    scales = [m for m in mutants if m.family == "SCALE"]
    none = next((m for m in scales if m.id == SCALE_ZERO), None)
    for m in mutants if none is not None else ():
        without = _pair(none, m) if none is not None else None
        if m.family == "SCALE" or without is None or not _wrong(ours_of(m)):
            continue
        if _is_scaled(theirs, ours_of(m), ours_of(without)):
            yield from filter(None, (_pair(scale, m) for scale in scales))


def _is_scaled(
    theirs: Iterable[Answers], whole: Iterable[Answers], base: Iterable[Answers]
) -> bool:
    """Whether every y is the base and a multiple of the branch, of one mutant."""
    for their_case, our_case, our_base in zip(theirs, whole, base, strict=True):
        if "y" not in their_case or "y" not in our_case or "y" not in our_base:
            return False
        got, rest = (np.asarray(case["y"].got, float) for case in (their_case, our_base))
        branch = np.asarray(our_case["y"].got, float) - rest
        sigma = sigma_of(their_case["y"]) * 2
        if not agreeing(fit(got, branch, rest, sigma)[1]):
            return False
    return True
