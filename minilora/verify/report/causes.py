"""The probable causes of a report: what the failing checks have in common, most explained first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from minilora.verify.core.errors import ASKED
from minilora.verify.core.types import STRUCTURE, Diagnosis
from minilora.verify.report.result import Result
from minilora.verify.report.words import MAX_ONLY, fault_words, is_one_rounding, only_words

AND = " + "
"""Between the ids of two mutants at once (`mutants.derived`)."""


@dataclass(frozen=True)
class Cause:
    """What explains some of the failing checks.

    ``id`` is a mutant's, two mutants', a pattern's or a fault's; "" where nothing explains them.
    ``results`` are those that it explains, the lowest level first, of ``failing`` that fail in all.
    ``others`` are further mutants that explain as many.
    """

    id: str
    sentence: str
    results: tuple[Result, ...]
    failing: int
    others: tuple[Diagnosis, ...] = ()
    only: tuple[str, ...] = ()
    """Words of the ids of all its checks, and of no check that passes: conv1d, rslora."""

    @property
    def first(self) -> Result:
        """The result that is told in full: the lowest one, where it was looked into."""
        return self.results[0]

    @property
    def checks(self) -> list[str]:
        """The checks that it explains, each once."""
        return list(dict.fromkeys(result.check for result in self.results))

    @property
    def is_mutant(self) -> bool:
        """Whether it is a known mistake, and no pattern or fault."""
        found = any(d.id == self.id for r in self.results for d in r.diagnosis)
        return found and not self.id.startswith(STRUCTURE)

    def sureness(self) -> str:
        """How sure it is, in words."""
        many = f"{len(self.results)} of {self.failing} failing results"
        if self.is_mutant and not self.others:
            return f"Sure: it alone gives the answers of {many}, and no case that passes refutes it"
        if self.is_mutant:
            names = ", ".join(each.id for each in self.others[:3])
            return f"Likely: it gives the answers of {many}, and so does {names}"
        if self.id.startswith(STRUCTURE):
            return f"Likely: the numbers of {many} show it; no known mistake gives them"
        if self.id:
            return f"Sure: {many} show it"
        return f"Not known: no known mistake explains {many}"


def causes(results: Sequence[Result]) -> list[Cause]:
    """The causes of the results that fail, the one that explains most of them first.

    A result without a diagnosis has that of its check in another dtype, which was looked into.
    """
    failing = [result for result in results if result.status in ("fail", "error")]
    of_check: dict[tuple[str, str], tuple[Diagnosis, ...]] = {}
    for result in failing:
        if result.diagnosis:
            of_check.setdefault((result.check, result.status), result.diagnosis)
    named = [(r, r.diagnosis or of_check.get((r.check, r.status), ())) for r in failing]
    left = [(result, _keys(result, diagnosis), diagnosis) for result, diagnosis in named]
    _join_parts(left)
    _excuse_roundings(left)
    passing = {w for r in results if r.status == "pass" for w in _words_of(r.check)}
    found = [_with_only(cause, passing) for cause in _grouped(left, len(failing))]
    return sorted(found, key=lambda cause: (not cause.id, cause.id == ONE_ROUNDING))


def _words_of(check: str) -> set[str]:
    return set(check.split(".")[1:])


def _with_only(cause: Cause, passing: set[str]) -> Cause:
    """With what all its checks have in their names, and no check that passes, if it has several."""
    common = set.intersection(*(_words_of(check) for check in cause.checks))
    only = sorted(common - passing) if len(cause.checks) > 1 else []
    return replace(cause, only=tuple(only))


Keyed = tuple[Result, dict[str, str], tuple[Diagnosis, ...]]
"""A result, its causes with a sentence each, and its diagnoses."""


def _keys(result: Result, diagnosis: Sequence[Diagnosis]) -> dict[str, str]:
    """What may be the cause of a result: its diagnoses, or else its faults; the sentences by id."""
    if diagnosis:
        return {each.id: each.sentence for each in diagnosis}
    if result.status == "error":
        words = [fault_words(fault).partition(ASKED)[0] for fault in result.faults[:1]]
        return {each: each for each in words}
    return {}


def _join_parts(left: Sequence[Keyed]) -> None:
    """What one of two mistakes at once explains alone, the two explain."""
    pairs = {id: words for _, keys, _ in left for id, words in keys.items() if AND in id}
    for _, keys, _ in left:
        for pair, words in pairs.items():
            if keys.keys() & set(pair.split(AND)):
                keys.setdefault(pair, words)


ONE_ROUNDING = f"{STRUCTURE}one-rounding"


def _excuse_roundings(left: Sequence[Keyed]) -> None:
    """An exact check accuses nobody of one rounding while another check fails by more.

    Wrong numbers need more digits than those that were drawn to need none.
    """
    unexplained = [(result, keys) for result, keys, _ in left if not keys]
    rounded = [(result, keys) for result, keys in unexplained if _is_rounding(result)]
    if len(rounded) < len(left):
        for _, keys in rounded:
            keys[ONE_ROUNDING] = "what must be equal differs by one rounding, after another failure"


def _is_rounding(result: Result) -> bool:
    off = [judged for judged in result.arrays if judged.verdict != "pass"]
    return bool(off) and all(is_one_rounding(judged, result.dtype) for judged in off)


def _grouped(left: list[Keyed], failing: int) -> Iterator[Cause]:
    """The causes, each of what those before it leave."""
    while left:
        counts = Counter(id for _, keys, _ in left for id in keys)
        if not counts:
            yield Cause("", "", tuple(result for result, _, _ in left), failing)
            return
        most = max(counts.values())
        # Of those that explain as many, two at once first, then the one that is named first.
        id = max((id for id in counts if counts[id] == most), key=lambda id: AND in id)
        chosen = [entry for entry in left if id in entry[1]]
        yield Cause(id, _sentence(id, chosen), *_told(chosen), failing, _others(id, chosen))
        left = [entry for entry in left if id not in entry[1]]


def _told(chosen: Sequence[Keyed]) -> tuple[tuple[Result, ...]]:
    """The results, the first that was looked into before the others of its check."""
    results = [result for result, _, _ in chosen]
    first = next((result for result in results if result.diagnosis), results[0])
    return ((first, *(result for result in results if result is not first)),)


def _sentence(id: str, chosen: Sequence[Keyed]) -> str:
    """The shortest that a mutant is told with: some say more of gradients. A pattern's first."""
    if id.startswith(STRUCTURE):
        return chosen[0][1][id]
    return min((keys[id] for _, keys, _ in chosen), key=len)


def _others(id: str, chosen: Sequence[Keyed]) -> tuple[Diagnosis, ...]:
    """Other mutants that explain every one of these results, and are no part of this one."""
    common: Mapping[str, Diagnosis] = {d.id: d for d in chosen[0][2]}
    return tuple(
        each
        for other, each in common.items()
        if other != id
        and other not in id.split(AND)
        and not other.startswith(STRUCTURE)
        and not id.startswith(STRUCTURE)
        and all(other in keys for _, keys, _ in chosen)
    )


def cause_lines(found: Sequence[Cause]) -> Iterator[str]:
    """The probable cause in sentences: what, how sure, where, and the command that shows it."""
    cause, *more = found
    first = cause.first
    if cause.is_mutant:
        yield f"PROBABLE CAUSE  {cause.id}: {cause.sentence}"
    else:
        yield f"PROBABLE CAUSE  {cause.sentence or 'not known.'}"
    yield f"HOW SURE  {cause.sureness()}."
    tells = 0 < len(first.only) <= MAX_ONLY
    where = only_words(first.only) if tells else first.title.rstrip(".")
    where += f"; only in checks of {', '.join(cause.only)}" if cause.only else ""
    count = f", in {first.deviating_cases} of {first.cases} cases" if first.deviating_cases else ""
    yield f"WHERE  first in {first.check} ({where}) in {first.dtype}{count}"
    yield f"REPRODUCE  {first.reproduce}"
    for other in more:
        checks = f"{len(other.checks)} check{'s' * (len(other.checks) > 1)}"
        words = f"{other.id}: {other.sentence}" if other.is_mutant else other.sentence
        yield f"ALSO  {words or 'not known:'} {checks}, first {other.first.check}"
