"""The cases of one check in one dtype, counted, and what those that deviate have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import comb, inf

from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.types import Case, Judgement
from minilora.verify.report.result import FaultSeen

CASES_AFTER_A_DEVIATION = 20
"""So many cases are still tried after the first that deviates, to find the worst one."""

MAX_FAULTS = 3
"""A check ends with its third fault of one kind, and at once with one of `COSTLY`."""

COSTLY = ("hangs", "crashes")
"""The kinds of faults that cost a time limit, or a start of the target's process."""

ONE_IN = 1000
"""That all cases that deviate are larger than all that pass is told where it would be rarer than
this, if which ones deviate were chance: of n cases any k deviate in n! / (k! (n - k)!) ways."""


@dataclass
class Tally:
    """The results so far of one check in one dtype.

    ``skip_reasons`` are those of the cases that were skipped; ``first`` has, for each status, the
    first case that has it, with its judgements. ``deviating`` cases failed or were loose; those
    that show a known deviation count apart. ``worsts``: the worst array and its case, of known
    deviations and of all others. ``not_passing`` counts faults, too. ``common_traits`` are
    those of all cases that do not pass, ``passing_traits`` those of any that passes; ``least`` and
    ``most`` are the sizes likewise.
    """

    cases: int = 0
    passing: int = 0
    skip_reasons: list[str] = field(default_factory=list)
    first: dict[str, tuple[str, tuple[Judgement, ...]]] = field(default_factory=dict)
    deviating: int = 0
    known: int = 0
    not_passing: int = 0
    since_first: int = 0
    faults: dict[str, FaultSeen] = field(default_factory=dict)
    known_faults: dict[str, FaultSeen] = field(default_factory=dict)
    worsts: dict[bool, tuple[Judgement, str]] = field(default_factory=dict)
    common_traits: set[str] | None = None
    passing_traits: set[str] = field(default_factory=set)
    least: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    @property
    def only(self) -> tuple[str, ...]:
        """What all cases that deviate have in common, and no case that passes has."""
        traits = sorted((self.common_traits or set()) - self.passing_traits) if self.passing else []
        rare = comb(self.passing + self.not_passing, self.passing) > ONE_IN
        traits += [
            f"there are {least} or more {name} (it passes up to {self.most[name]})"
            for name, least in self.least.items()
            if rare and least > self.most.get(name, least)
        ]
        return tuple(traits)

    @property
    def is_over(self) -> bool:
        """Whether further cases would tell nothing new."""
        too_many = any(fault.cases >= MAX_FAULTS for fault in self.faults.values())
        is_costly = any(kind in self.faults for kind in COSTLY)
        return too_many or is_costly or self.since_first > CASES_AFTER_A_DEVIATION

    @property
    def status(self) -> str:
        """A wrong value outranks a fault, either a loose value, and this what is known."""
        for status in ("fail", "error", "loose", "known"):
            if status in self.first:
                return status
        return "skip" if self.cases == len(self.skip_reasons) else "pass"

    @property
    def worst(self) -> Judgement | None:
        """The worst array of all cases; where only what is known deviates, of that."""
        return self._worst[0]

    @property
    def worst_case(self) -> str:
        """The case of the worst array."""
        return self._worst[1]

    @property
    def _worst(self) -> tuple[Judgement | None, str]:
        known = self.status == "known"
        return self.worsts.get(known) or self.worsts.get(not known) or (None, "")

    def add(
        self,
        case: Case,
        judged: Sequence[Judgement],
        end: Skip | Fault | None,
        traits: set[str],
        sizes: Mapping[str, int],
        is_known: bool = False,
    ) -> None:
        """Takes in the judgements of a case, how it ended, and its traits and sizes.

        ``is_known``: what deviates in it was declared.
        """
        self.cases += 1
        for judgement in judged:
            self._add_worst(judgement, case, is_known)
        if is_known:
            self._add_known(case, judged, end)
            return
        verdicts = {judgement.verdict for judgement in judged}
        if isinstance(end, Skip):
            self.skip_reasons.append(end.reason)
        if isinstance(end, Fault):
            self._add_fault(end, case, self.faults)
        statuses = {"fail", "loose"} & verdicts | ({"error"} if isinstance(end, Fault) else set())
        for status in statuses:
            self.first.setdefault(status, (case.id, tuple(judged)))
        if statuses:
            self.not_passing += 1
            self.common_traits = (
                set(traits) if self.common_traits is None else self.common_traits & traits
            )
            _take_in(self.least, sizes, min)
        elif not isinstance(end, Skip):
            self.passing += 1
            self.passing_traits |= traits
            _take_in(self.most, sizes, max)
        self.deviating += bool(verdicts & {"fail", "loose"})
        self.since_first += "fail" in self.first

    def _add_worst(self, judgement: Judgement, case: Case, is_known: bool) -> None:
        if is_known not in self.worsts or is_worse(judgement, self.worsts[is_known][0]):
            self.worsts[is_known] = judgement, case.id

    def _add_known(self, case: Case, judged: Sequence[Judgement], end: Skip | Fault | None) -> None:
        self.first.setdefault("known", (case.id, tuple(judged)))
        self.known += 1
        if isinstance(end, Fault):
            self._add_fault(end, case, self.known_faults)

    def _add_fault(self, fault: Fault, case: Case, among: dict[str, FaultSeen]) -> None:
        seen = among.get(fault.kind, FaultSeen(fault.kind, fault.message, case.id, 0))
        among[fault.kind] = replace(seen, cases=seen.cases + 1)


def _take_in(known: dict[str, int], sizes: Mapping[str, int], which: Callable[..., int]) -> None:
    """The least or the greatest of each size."""
    for name, size in sizes.items():
        known[name] = which(size, known.get(name, size))


def is_worse(a: Judgement, b: Judgement) -> bool:
    """By how many times its limit; where no difference is allowed, by the difference."""
    if a.excess == b.excess == inf:
        return abs(a.got - a.want) > abs(b.got - b.want)
    return a.excess > b.excess
