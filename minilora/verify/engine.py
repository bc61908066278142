"""The run of a verification: each case asked and judged, one verdict per check and dtype."""

from __future__ import annotations

import shlex
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from minilora.verify.core.errors import Fault, Skip, describe
from minilora.verify.core.types import STRUCTURE, Case, Check, Comparison, Diagnosis, Judgement
from minilora.verify.diagnosis.diagnose import agree, answers
from minilora.verify.implementation.contract import TIME_LIMIT
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.known import declared, known_for
from minilora.verify.plan import CheckPlan, plan
from minilora.verify.report.report import Report
from minilora.verify.report.result import NOT_DIAGNOSED, NOT_SHRUNK, Known, Result
from minilora.verify.tally import Tally, is_worse

MAX_SHRINKS = 4
"""The smallest counterexample is looked for in so many checks, each in the first dtype that fails.

One search asks hundreds of times, and a target that is wrong at the lowest level fails nearly
everywhere.
"""

MAX_DIAGNOSED = 4
"""Of the failing checks of a level that call the same methods, so many are diagnosed. They mostly
have the same cause, and each diagnosis takes as long as the first."""

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
) -> Report:
    """Puts the checks to an implementation.

    ``known`` maps ``check`` or ``check:dtype`` to a reason, a dict or a `Known`; a * in the check's
    name stands for anything. The implementation's own ``known`` is read too. ``command`` is what a
    reader types to verify this target; a report without it shows the call in Python. ``part`` is
    that of `plan`. Raises UsageError, LoadError where the implementation's declarations cannot be
    read, and Interrupted.
    """
    started = perf_counter()
    plans = plan(
        checks, levels=levels, profile=profile, dtypes=dtypes, seed=seed, case=case, part=part
    )
    subject = GuardedImplementation(implementation, time_limit=time_limit)
    if case is None and not dtypes:
        plans = [p for p in plans if p.dtype in subject.dtypes]
    declarations, notes = declared(checks, subject, known or {})
    investigation = Investigation(subject, profile, command)
    results: list[Result] = []

    def report(interrupted: bool = False) -> Report:
        return Report(
            name=subject.name,
            version=subject.version,
            dtypes=subject.dtypes,
            conventions=subject.conventions,
            profile=profile,
            seed=seed,
            results=tuple(_still_known(result, results) for result in results),
            seconds=perf_counter() - started,
            notes=(*notes, *subject.remarks),
            interrupted=interrupted,
        )

    done, total = 0, sum(len(p.numbers) for p in plans)
    try:
        for p in plans:
            cases = _announced(p, progress, done, total)
            known_here = known_for(declarations, p.check.id, p.dtype)
            results.append(_result(p, subject, cases, known_here, command))
            if results[-1].status in ("fail", "error"):
                results[-1] = investigation.explain(results[-1], p)
            done += len(p.numbers)
    except KeyboardInterrupt:
        raise Interrupted(report(interrupted=True)) from None
    return report()


def _still_known(result: Result, results: Sequence[Result]) -> Result:
    """One declaration for several checks or dtypes still holds where one of them deviates."""
    holds = any(r.known is result.known and r.status == "known" for r in results)
    return replace(result, known=None) if result.no_longer_fails and holds else result


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
) -> Result:
    started, spent = perf_counter(), subject.spent
    check = p.check
    subject.announce(check.id)
    reason = _unsupported(check, p.dtype, subject)
    tally = Tally()
    for case in () if reason else cases:
        subject.traits, subject.sizes = set(), {}
        tally.add(case, *judged(check, subject, case), subject.traits, subject.sizes)
        if tally.is_over:
            break
    status = tally.status
    # A fault of this package is nobody's known deviation.
    if known is not None and status not in ("pass", "skip") and "internal" not in tally.faults:
        status = "known"
    first, arrays = tally.first.get(tally.status, ("", ()))
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
        deviating_cases=tally.deviating,
        only=tally.only,
        worst=tally.worst,
        worst_case=tally.worst_case,
        case=first,
        arrays=arrays,
        faults=tuple(tally.faults.values()),
        reason=reason or next(iter(tally.skip_reasons), ""),
        known=known,
        reproduce=_reproduce(command, first or tally.worst_case or p.case(p.numbers[0]).id, p.seed),
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


def judged(
    check: Check, subject: GuardedImplementation, case: Case
) -> tuple[list[Judgement], Skip | Fault | None]:
    """The judgements of a case, and what ended it early: those made before that count too."""
    judgements: list[Judgement] = []
    worst: tuple[int, Comparison] | None = None
    end: Skip | Fault | None = None
    try:
        for comparison in check.run(subject, case):
            judgements.append(comparison.judge())  # kept when a later step raises
            if worst is None or is_worse(judgements[-1], judgements[worst[0]]):
                worst = len(judgements) - 1, comparison
    except (Skip, Fault) as stopped:
        end = stopped
    except Exception as error:
        end = Fault("internal", _our_error(error))
    if worst is None:
        return judgements, end or Fault("internal", f"{check.id} compared nothing")
    i, comparison = worst
    if judgements[i].verdict != "pass":
        judgements[i] = replace(judgements[i], picture=comparison.picture())
    return judgements, end


def _our_error(error: Exception) -> str:
    places = traceback.extract_tb(error.__traceback__)[1:]
    chain = " < ".join(f"{place.name}:{place.lineno}" for place in reversed(places))
    return f"{describe(error)}; called from {chain}" if chain else describe(error)


@dataclass
class Investigation:
    """Diagnose failing checks and shrink their inputs, as far as the limits allow.

    A check is diagnosed in the first dtype that fails; of a level, `MAX_DIAGNOSED` checks that call
    the same methods; of all, `MAX_SHRINKS` are shrunk.
    """

    subject: GuardedImplementation
    profile: str
    command: Sequence[str] | None
    seen: set[tuple[str, str]] = field(default_factory=set)
    diagnosed: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    shrinks: int = 0

    def explain(self, result: Result, p: CheckPlan) -> Result:
        """The result with a diagnosis and a smallest counterexample, or with the limit's note."""
        if (p.check.id, result.status) in self.seen:
            return result
        self.seen.add((p.check.id, result.status))
        alike = p.check.level, p.check.needs, result.status
        self.diagnosed[alike] += 1
        if self.diagnosed[alike] > MAX_DIAGNOSED:
            return replace(result, note=NOT_DIAGNOSED)
        may_shrink = result.status == "fail" or p.check.smallest_fault
        self.shrinks += may_shrink
        if earlier := _depends_on_earlier_calls(result, p, self.subject):
            # No case shows it alone, and it shrinks to nothing: the command repeats all cases.
            again = _reproduce_all(self.command, p, self.profile)
            return replace(result, diagnosis=earlier, reproduce=again)
        return self._shrunk(_diagnosed(result, p, self.subject), p) if may_shrink else result

    def _shrunk(self, result: Result, p: CheckPlan) -> Result:
        if p.check.smallest is None or _hung(result):
            return result
        if self.shrinks > MAX_SHRINKS:
            return replace(result, note=NOT_SHRUNK)
        started, smallest, note = perf_counter(), None, ""
        try:
            smallest = p.check.smallest(self.subject, p.dtype)
        except (Skip, Fault):  # it answers in no smaller case
            pass
        except Exception as error:
            note = f"No smallest counterexample, by a fault of minilora: {_our_error(error)}"
        seconds = result.seconds + perf_counter() - started
        return replace(result, smallest=smallest, note=note or result.note, seconds=seconds)


def _hung(result: Result) -> bool:
    return any(fault.kind == "hangs" for fault in result.faults)


def _diagnosed(result: Result, p: CheckPlan, subject: GuardedImplementation) -> Result:
    if p.check.diagnose is None or result.status != "fail" or _hung(result):
        return result
    started = perf_counter()
    try:
        diagnosis = p.check.diagnose(subject, p.dtype, p.seed)
    except Exception as error:
        return replace(result, note=f"No diagnosis, by a fault of minilora: {_our_error(error)}")
    return replace(result, diagnosis=diagnosis, seconds=result.seconds + perf_counter() - started)


def _depends_on_earlier_calls(
    result: Result, p: CheckPlan, subject: GuardedImplementation
) -> tuple[Diagnosis, ...]:
    """Whether a case fails by what calls before it left behind: the diagnosis, or nothing."""
    if any(fault.kind in ("hangs", "crashes", "internal") for fault in result.faults):
        return ()
    case = p.case(int(result.case.rpartition(":")[2]))
    fresh = subject.anew()
    if fresh is not None and _passes(p.check, fresh, case):
        sentence = "It depends on earlier calls: the same case passes when it is asked first."
    elif result.status == "error" and not isinstance(judged(p.check, subject, case)[1], Fault):
        sentence = "It depends on earlier calls, or on chance: asked again, it answers."
    elif result.status != "error" and not _repeats(p.check, subject, case):
        sentence = "It depends on earlier calls, or on chance: asked twice, it gives two answers."
    else:
        return ()
    return (Diagnosis(f"{STRUCTURE}earlier-calls", sentence, 0.0),)


def _passes(check: Check, subject: GuardedImplementation, case: Case) -> bool:
    judgements, end = judged(check, subject, case)
    return end is None and all(judgement.verdict == "pass" for judgement in judgements)


def _repeats(check: Check, subject: GuardedImplementation, case: Case) -> bool:
    """Whether an implementation gives the same answers when it is asked twice."""
    once, twice = (answers(check, subject, case) for _ in range(2))
    return all(agree(once[name], twice[name]) is not None for name in once.keys() & twice.keys())


def _reproduce(command: Sequence[str] | None, case: str, seed: int) -> str:
    if command is None:
        return f'minilora.verify.check(implementation, case="{case}", seed={seed})'
    return shlex.join([*command, "--case", case, "--seed", str(seed)])


def _reproduce_all(command: Sequence[str] | None, p: CheckPlan, profile: str) -> str:
    """The same of all cases of a level in a dtype, for what no case shows alone."""
    level, dtype = p.check.level, p.dtype
    if command is None:
        chosen = f"levels=[{level!r}], dtypes=[{dtype!r}], profile={profile!r}, seed={p.seed}"
        return f"minilora.verify.check(implementation, {chosen})".replace("'", '"')
    options = ["--level", level, "--dtype", dtype, "--profile", profile, "--seed", str(p.seed)]
    return shlex.join([*command, *options])
