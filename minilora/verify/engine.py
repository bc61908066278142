"""The run of a verification: each case asked and judged, one verdict per check and dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

from minilora.verify.commands import reproduce
from minilora.verify.core.errors import Fault
from minilora.verify.core.types import Case, Check, Comparison
from minilora.verify.diagnosis.investigation import Investigation
from minilora.verify.implementation.contract import TIME_LIMIT
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.judging import judged
from minilora.verify.known import Declarations, declared, seen_of
from minilora.verify.plan import CheckPlan, plan
from minilora.verify.record import Recorder
from minilora.verify.report.report import Report
from minilora.verify.report.result import Result
from minilora.verify.seen import Asked, Seen, explained
from minilora.verify.tally import Tally
from minilora.verify.work import Work

Progress = Callable[[str, int, int], None]
"""Called before each case with its id, the number of cases behind it and the number of all."""


class Helping(Protocol):
    """Other processes that ask a part of a run."""

    def at(self, work: Work, plans: Sequence[CheckPlan]) -> AbstractContextManager[None]:
        """Lets them ask what they may, until the context is left."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; ``report`` holds what was checked so far."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


def run(
    checks: Sequence[Check],
    implementation: object,
    *,
    levels: Sequence[str] | None = None,
    profile: str = "ci",
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
    case: str | None = None,
    known: Mapping[str, Any] | None = None,
    time_limit: float = TIME_LIMIT,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
    part: tuple[int, int] = (0, 1),
    recorder: Recorder | None = None,
    helpers: Helping | None = None,
) -> Report:
    """Puts the checks to an implementation.

    ``known`` maps ``check`` or ``check:dtype`` to a dict with what was seen, or a `Known`; a * in
    the check's name stands for anything within a level. The implementation's own ``known`` is read
    too. ``command`` is what a reader types to verify this target; a report without it shows the
    call in Python. ``part`` is that of `plan`. ``recorder`` keeps what is wrong and not
    known. ``helpers`` are other processes that ask a part of it. Raises UsageError, LoadError where
    the implementation's declarations cannot be read, and Interrupted.
    """
    started = perf_counter()
    plans = plan(
        checks, levels=levels, profile=profile, dtypes=dtypes, seed=seed, case=case, part=part
    )
    asker = Asker.of(checks, implementation, known or {}, time_limit, command, recorder)
    subject, declarations = asker.subject, asker.declarations
    if case is None and not dtypes:
        plans = [p for p in plans if p.dtype in subject.dtypes]
    plans = [replace(p, fixed=subject.fixed) for p in plans]
    investigation = Investigation(subject, profile, command, plans)
    work = Work([len(p.numbers) for p in plans])

    def report(interrupted: bool = False) -> Report:
        return Report(
            name=subject.name,
            version=subject.version,
            dtypes=subject.dtypes,
            conventions=subject.conventions,
            fixed=subject.declared_fixed,
            profile=profile,
            seed=seed,
            results=_with_known(work.results, declarations),
            seconds=round(perf_counter() - started, 3),  # as its JSON says it
            notes=(*declarations.notes, *work.remarks),
            interrupted=interrupted,
        )

    def ask(p: CheckPlan) -> Result:
        done, total = work.done, sum(work.sizes)
        tell = progress or (lambda *_: None)
        subject.remarks.clear()
        result = asker.result(p, lambda case, before: tell(case, done + before, total))
        if result.status in ("fail", "error"):
            tell(f"why {p.check.id}:", done, total)
            result = investigation.explain(result, p)
        return result

    try:
        with contextlib.nullcontext() if helpers is None else helpers.at(work, plans):
            for number in work.here():
                work.add(number, ask(plans[number]), subject.remarks)
    except KeyboardInterrupt:
        raise Interrupted(report(interrupted=True)) from None
    return report()


def _with_known(results: Sequence[Result], declarations: Declarations) -> tuple[Result, ...]:
    """The results with what is known of each, but for what fails no longer here and does elsewhere.

    One for several checks or dtypes still holds where one of them deviates.
    """
    results = [replace(r, known=declarations.of(r.check, r.dtype)) for r in results]
    holding = {id(r.known) for r in results if r.status == "known"}
    return tuple(
        replace(r, known=None) if r.no_longer_fails and id(r.known) in holding else r
        for r in results
    )


@dataclass
class Asker:
    """What puts plans to a target: the guarded target, what is known of it, what a report repeats.

    ``recorder`` keeps what is wrong and not known.
    """

    subject: GuardedImplementation
    declarations: Declarations
    command: Sequence[str] | None
    recorder: Recorder | None

    @classmethod
    def of(
        cls,
        checks: Sequence[Check],
        implementation: object,
        known: Mapping[str, Any],
        time_limit: float,
        command: Sequence[str] | None = None,
        recorder: Recorder | None = None,
    ) -> Asker:
        """One for an implementation. Raises LoadError and UsageError."""
        subject = GuardedImplementation(implementation, time_limit=time_limit)
        return cls(subject, declared(checks, subject, known), command, recorder)

    def result(self, p: CheckPlan, tell: Callable[[str, int], None] = lambda *_: None) -> Result:
        """The result of a plan; ``tell`` is told each case, and how many there were before it."""
        started, spent = perf_counter(), self.subject.spent
        check, subject = p.check, self.subject
        subject.announce(check.id)
        reason = _unsupported(check, p.dtype, subject)
        known = self.declarations.of(check.id, p.dtype)
        tally, seen = Tally(), seen_of(known)
        for before, number in enumerate(() if reason else p.numbers):
            case = p.case(number)
            tell(case.id, before)
            self._ask(check, case, tally, seen)
            if tally.is_over:
                break
        status = tally.status
        first, arrays = tally.first.get(status, ("", ()))
        case_id = first or tally.worst_case or p.case(p.numbers[0]).id
        return Result(
            check=check.id,
            level=check.level,
            title=check.title,
            dtype=p.dtype,
            is_relation=check.is_relation,
            precision=subject.precision(p.dtype),
            status=status,
            cases=tally.cases,
            skipped_cases=len(tally.skip_reasons),
            deviating_cases=tally.known if status == "known" else tally.deviating,
            known_cases=tally.known,
            only=tally.only,
            worst=tally.worst,
            worst_case=tally.worst_case,
            case=first,
            arrays=arrays,
            faults=tuple((tally.known_faults if status == "known" else tally.faults).values()),
            reason=reason or next(iter(tally.skip_reasons), ""),
            known=known,
            reproduce=reproduce(self.command, case_id, p.seed),
            seconds=perf_counter() - started,
            in_target=subject.spent - spent,
        )

    def _ask(self, check: Check, case: Case, tally: Tally, seen: Sequence[Seen]) -> None:
        """Puts a case to the target, judges it and counts it."""
        subject = self.subject
        subject.traits, subject.sizes = set(), {}
        comparisons: list[Comparison] = []
        found, end = judged(check, subject, case, comparisons)
        is_wrong = isinstance(end, Fault) or any(each.verdict != "pass" for each in found)
        asked = Asked(check, case, comparisons, end)
        is_known = is_wrong and explained(seen, asked)
        if self.recorder is not None and is_wrong and not is_known:
            self.recorder.add(asked)
        tally.add(case, found, end, subject.traits, subject.sizes, is_known)


def _unsupported(check: Check, dtype: str, subject: GuardedImplementation) -> str:
    """Why the implementation cannot be asked at all, or nothing."""
    if absent := [method for method in check.needs if not subject.has(method)]:
        return f"not supported: no method {', '.join(absent)}"
    if dtype not in subject.dtypes:
        return f"not supported: {subject.name} takes {', '.join(subject.dtypes) or 'no dtype'}"
    return ""
