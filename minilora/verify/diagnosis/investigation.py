"""What is looked into of the checks that failed: their cause, and their smallest inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.types import STRUCTURE, Case, Check, Diagnose, Diagnosis
from minilora.verify.diagnosis.answers import agree, answers
from minilora.verify.diagnosis.faults import NAMED
from minilora.verify.diagnosis.reproducing import shown_by
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.judging import judged, our_error, passes
from minilora.verify.plan import CheckPlan
from minilora.verify.report.result import NOT_DIAGNOSED, NOT_SHRUNK, Result
from minilora.verify.tally import COSTLY

MAX_SHRINKS = 4
"""The smallest counterexample is looked for in so many checks, each in the first dtype that fails.

One search asks hundreds of times, and a target that is wrong at the lowest level fails nearly
everywhere.
"""

MAX_DIAGNOSED = 4
"""Of the failing checks of a level that call the same methods, and that no known cause explains,
so many are looked up in the whole catalogue. Each look-up takes as long as the first."""


@dataclass
class Investigation:
    """Diagnose failing checks and shrink their inputs, as far as the limits allow.

    A check is diagnosed in the first dtype that fails. A cause that one check has shown is tried on
    each later one before the catalogue is: most checks of a wrong target follow from one cause.
    ``plans`` are those of the whole run.
    """

    subject: GuardedImplementation
    profile: str
    command: Sequence[str] | None
    plans: Sequence[CheckPlan] = ()
    seen: set[tuple[str, str]] = field(default_factory=set)
    diagnosed: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    """How many checks each cause explains so far."""
    shrinks: int = 0

    def explain(self, result: Result, p: CheckPlan) -> Result:
        """The result with a diagnosis and a smallest counterexample, or with the limit's note."""
        if (p.check.id, result.status) in self.seen:
            return result
        self.seen.add((p.check.id, result.status))
        if self.causes and (followed := self._diagnosed(result, p, p.check.follows)).diagnosis:
            return followed
        alike = p.check.level, p.check.needs, result.status
        self.diagnosed[alike] += 1
        if self.diagnosed[alike] > MAX_DIAGNOSED:
            return replace(result, note=NOT_DIAGNOSED)
        if earlier := _depends_on_earlier_calls(result, p, self.subject):
            # No case shows it alone, and it shrinks to nothing: the command repeats more of them.
            again = shown_by(self.subject, p, self.plans, self.command, self.profile)
            return replace(result, diagnosis=earlier, reproduce=again)
        may_shrink = result.status == "fail" or p.check.smallest_fault
        self.shrinks += may_shrink
        found = self._diagnosed(result, p, p.check.diagnose)
        return self._shrunk(found, p) if may_shrink else found

    def _diagnosed(self, result: Result, p: CheckPlan, diagnose: Diagnose | None) -> Result:
        """The result with what is diagnosed, which is a cause from now on."""
        if diagnose is None or not _is_diagnosed(result):
            return result
        started = perf_counter()
        known = [id for id, _ in self.causes.most_common()]
        try:
            diagnosis = diagnose(self.subject, p.dtype, p.seed, known)
        except Exception as error:
            return replace(result, note=f"No diagnosis, by a fault of minilora: {our_error(error)}")
        self.causes.update({each.id for each in diagnosis})
        seconds = result.seconds + perf_counter() - started
        return replace(result, diagnosis=diagnosis, seconds=seconds)

    def _shrunk(self, result: Result, p: CheckPlan) -> Result:
        if p.check.smallest is None or _is_costly(result):
            return result
        if self.shrinks > MAX_SHRINKS:
            return replace(result, note=NOT_SHRUNK)
        started, smallest, note = perf_counter(), None, ""
        try:
            smallest = p.check.smallest(self.subject, p.dtype)
        except (Skip, Fault):  # it answers in no smaller case
            pass
        except Exception as error:
            note = f"No smallest counterexample, by a fault of minilora: {our_error(error)}"
        seconds = result.seconds + perf_counter() - started
        return replace(result, smallest=smallest, note=note or result.note, seconds=seconds)


def _is_diagnosed(result: Result) -> bool:
    """Whether it has what a mutant may give: wrong numbers, or only faults that mutants show."""
    shown = {fault.kind for fault in result.faults} <= {*NAMED}
    return not _is_costly(result) and (result.status == "fail" or shown)


def _is_costly(result: Result) -> bool:
    return any(fault.kind in COSTLY for fault in result.faults)


def _depends_on_earlier_calls(
    result: Result, p: CheckPlan, subject: GuardedImplementation
) -> tuple[Diagnosis, ...]:
    """Whether a case fails by what calls before it left behind: the diagnosis, or nothing."""
    if any(fault.kind in (*COSTLY, "internal") for fault in result.faults):
        return ()
    case = p.case(int(result.case.rpartition(":")[2]))
    fresh = subject.anew()
    if fresh is not None and passes(p.check, fresh, case):
        sentence = "It depends on earlier calls: the same case passes when it is asked first."
    elif result.status == "error" and not isinstance(judged(p.check, subject, case)[1], Fault):
        sentence = "It depends on earlier calls, or on chance: asked again, it answers."
    elif (
        result.status != "error"
        and not p.check.is_chance
        and not _repeats(p.check, subject, case)
        and _repeats(p.check, GuardedImplementation(Minilora()), case)  # else chance is right
    ):
        sentence = "It depends on earlier calls, or on chance: asked twice, it gives two answers."
    else:
        return ()
    return (Diagnosis(f"{STRUCTURE}earlier-calls", sentence, 0.0),)


def _repeats(check: Check, subject: GuardedImplementation, case: Case) -> bool:
    """Whether an implementation gives the same answers when it is asked twice."""
    once, twice = (answers(check, subject, case) for _ in range(2))
    return all(agree(once[name], twice[name]) is not None for name in once.keys() & twice.keys())
