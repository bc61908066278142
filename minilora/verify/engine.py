"""The run of a verification: each case asked and judged, one verdict per check and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from minilora.verify.commands import reproduce
from minilora.verify.core.errors import Fault
from minilora.verify.core.types import Case, Check, Comparison
from minilora.verify.diagnosis.investigation import Investigation
from minilora.verify.implementation.contract import TIME_LIMIT
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.judging import judged
from minilora.verify.known import declared, seen_of
from minilora.verify.plan import CheckPlan, plan
from minilora.verify.record import Recorder
from minilora.verify.report.report import Report
from minilora.verify.report.result import Known, Result
from minilora.verify.seen import Asked, explained
from minilora.verify.tally import Tally

Progress = Callable[[str, int, int], None]
"""Called before each case with its id, the number of cases behind it and the number of all."""


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
) -> Report:
    """Puts the checks to an implementation.

    ``known`` maps ``check`` or ``check:dtype`` to a dict with what was seen, or a `Known`; a * in
    the check's name stands for anything within a level. The implementation's own ``known`` is read
    too. ``command`` is what a reader types to verify this target; a report without it shows the
    call in Python. ``part`` is that of `plan`. ``recorder`` keeps what is wrong and not
    known. Raises UsageError, LoadError where the implementation's declarations cannot be read, and
    Interrupted.
    """
    started = perf_counter()
    plans = plan(
        checks, levels=levels, profile=profile, dtypes=dtypes, seed=seed, case=case, part=part
    )
    subject = GuardedImplementation(implementation, time_limit=time_limit)
    if case is None and not dtypes:
        plans = [p for p in plans if p.dtype in subject.dtypes]
    plans = [replace(p, fixed=subject.fixed) for p in plans]
    declarations = declared(checks, subject, known or {})
    investigation = Investigation(subject, profile, command, plans)
    results: list[Result] = []

    def report(interrupted: bool = False) -> Report:
        return Report(
            name=subject.name,
            version=subject.version,
            dtypes=subject.dtypes,
            conventions=subject.conventions,
            fixed=subject.declared_fixed,
            profile=profile,
            seed=seed,
            results=_with_known(results),
            seconds=round(perf_counter() - started, 3),  # as its JSON says it
            notes=(*declarations.notes, *subject.remarks),
            interrupted=interrupted,
        )

    done, total = 0, sum(len(p.numbers) for p in plans)
    try:
        for p in plans:
            cases = _announced(p, progress, done, total)
            known_here = declarations.of(p.check.id, p.dtype)
            results.append(_result(p, subject, cases, known_here, command, recorder))
            if results[-1].status in ("fail", "error"):
                if progress:
                    progress(f"why {p.check.id}:", done, total)
                results[-1] = investigation.explain(results[-1], p)
            done += len(p.numbers)
    except KeyboardInterrupt:
        raise Interrupted(report(interrupted=True)) from None
    return report()


def _with_known(results: Sequence[Result]) -> tuple[Result, ...]:
    """The results, without a declaration that no longer fails here and holds elsewhere.

    One for several checks or dtypes still holds where one of them deviates.
    """
    holding = {id(r.known) for r in results if r.status == "known"}
    return tuple(
        replace(r, known=None) if r.no_longer_fails and id(r.known) in holding else r
        for r in results
    )


def _announced(p: CheckPlan, progress: Progress | None, done: int, total: int) -> Iterator[Case]:
    for i, number in enumerate(p.numbers):
        case = p.case(number)
        if progress:
            progress(case.id, done + i, total)
        yield case


def _result(
    p: CheckPlan,
    subject: GuardedImplementation,
    cases: Iterator[Case],
    known: Known | None,
    command: Sequence[str] | None,
    recorder: Recorder | None,
) -> Result:
    started, spent = perf_counter(), subject.spent
    check = p.check
    subject.announce(check.id)
    reason = _unsupported(check, p.dtype, subject)
    tally, seen = Tally(), seen_of(known)
    for case in () if reason else cases:
        subject.traits, subject.sizes = set(), {}
        comparisons: list[Comparison] = []
        found, end = judged(check, subject, case, comparisons)
        is_wrong = isinstance(end, Fault) or any(each.verdict != "pass" for each in found)
        asked = Asked(check, case, comparisons, end)
        is_known = is_wrong and explained(seen, asked)
        if recorder is not None and is_wrong and not is_known:
            recorder.add(asked)
        tally.add(case, found, end, subject.traits, subject.sizes, is_known)
        if tally.is_over:
            break
    status = tally.status
    first, arrays = tally.first.get(status, ("", ()))
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
        reproduce=reproduce(command, first or tally.worst_case or p.case(p.numbers[0]).id, p.seed),
        seconds=perf_counter() - started,
        in_target=subject.spent - spent,
    )


def _unsupported(check: Check, dtype: str, subject: GuardedImplementation) -> str:
    """Why the implementation cannot be asked at all, or nothing."""
    if absent := [method for method in check.needs if not subject.has(method)]:
        return f"not supported: no method {', '.join(absent)}"
    if dtype not in subject.dtypes:
        return f"not supported: {subject.name} takes {', '.join(subject.dtypes) or 'no dtype'}"
    return ""
