"""The self-test of the checks: every mutant must be caught, nearly each named, and right ones pass.

The catalogue of mutants is put to the checks as any implementation is. A mutant that passes, or a
right implementation that does not, is a defect of this package.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from multiprocessing import get_context
from time import perf_counter
from typing import Any

from threadpoolctl import threadpool_limits

from minilora.verify import engine
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault, Skip, UsageError
from minilora.verify.core.types import STRUCTURE, Case, Check
from minilora.verify.diagnosis.answers import Direct
from minilora.verify.implementation.contract import METHODS
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.judging import judged
from minilora.verify.mutants import MUTANTS, Mutant
from minilora.verify.plan import levels_of, plan
from minilora.verify.report.selftest import NAMED_IN, Alarm, Selftest

CASES, FEW_CASES = 10_000, 1_000
"""The number of cases of right implementations in each dtype, and with ``quick``."""

FAULTS = {"changes its inputs", "changes its answers", "nan", "shape", "dtype"}
"""The faults that a mutant may be caught by. An exception would only show that it is broken."""

CHUNK = 4
"""So many jobs go to a process at once: neighbours share the answers that are wanted of them."""

MOST_LOST = 3
"""After so many lost processes the jobs themselves are taken for the cause."""

Progress = Callable[[str, int, int], None]


@cache
def _checks() -> dict[str, Check]:
    """By their ids, without the search for a smallest counterexample, which takes seconds each."""
    from minilora.verify.checks.registry import CHECKS

    return {check.id: replace(check, smallest=None) for check in CHECKS}


@cache
def _catalogue() -> dict[str, Mutant]:
    return {m.id: m for m in MUTANTS}


def of_level(level: str) -> list[Check]:
    """The checks of a level."""
    return [check for check in _checks().values() if check.level == level]


def _is_tried(m: Mutant, dtype: str) -> bool:
    """Whether the check that shows a mutant best is asked in this dtype."""
    best = (check for check in of_level(m.level) if check.id == m.caught_by)
    return any(check.cases("ci", dtype) for check in best)


def deviation(check: Check, subject: GuardedImplementation, case: Case) -> tuple[str, str]:
    """How a case does not pass, ("", "") where it does: pass, loose or fail, or a fault's kind."""
    judgements, end = judged(check, subject, case)
    worst = max(judgements, key=lambda judged: judged.excess, default=None)
    if worst is not None and worst.verdict != "pass":
        return worst.verdict, f"{worst.array} z {worst.z:.3g} rms {worst.rms:.3g}"
    if isinstance(end, Fault):
        return end.kind, end.message
    return ("skip", end.reason) if isinstance(end, Skip) else ("", "")


def catch(m: Mutant, dtype: str, seed: int = 0, profile: str = "ci") -> tuple[str, str]:
    """The check that catches a mutant, or "", and why it is broken, or "".

    It is put to the check that it names first, and then to all others of its level, until one of
    them fails: to be loose is not to be caught.
    """
    first = _checks()[m.caught_by]
    for checks in ([first], [check for check in of_level(m.level) if check is not first]):
        subject = Direct(m.make())
        for check in checks:
            for number in range(check.cases(profile, dtype)):
                case = Case(check.id, dtype, number, seed, subject.fixed)
                kind, says = deviation(check, subject, case)
                if kind == "fail" or kind in FAULTS:
                    return check.id, ""
                if kind not in ("", "loose", "skip"):
                    return "", f"{kind}: {says}"
    return "", ""


def names(m: Mutant, dtype: str = NAMED_IN, seed: int = 0) -> tuple[str, ...]:
    """The names that the first check with a diagnosis gives a mutant, nearest first."""
    for check in (c for c in of_level(m.level) if c.diagnose and c.cases("ci", dtype)):
        report = engine.run([check], m.make(), profile="ci", dtypes=[dtype], seed=seed)
        ids = [diagnosis.id for diagnosis in report.results[0].diagnosis]
        if names := tuple(id for id in ids if not id.startswith(STRUCTURE)):
            return names
    return ()


@cache
def rights(level: str) -> dict[str, Callable[[], object]]:
    """Implementations of a level that are right, however they are written."""
    from minilora.verify.implementation.minilora_impl import Minilora

    same = {m.id: m.make for m in MUTANTS if m.equivalent and m.level == level}
    return {"minilora": Minilora, **same}


@cache
def _methods(level: str) -> dict[str, frozenset[str]]:
    """Which of the contract's methods each of them has."""
    made = {name: Direct(make()) for name, make in rights(level).items()}
    return {name: frozenset(filter(subject.has, METHODS)) for name, subject in made.items()}


def _pairs(level: str, dtype: str, number: int) -> list[tuple[Check, str]]:
    """The checks that have a case of this number, each with each right implementation."""
    pairs: list[tuple[Check, str]] = []
    for check in of_level(level):
        least, most = (check.cases(profile, dtype) for profile in ("ci", "nightly"))
        # More of a kind may be drawn, but a stored vector stays the same.
        if least and (number < least or most > least):
            pairs += [
                (check, right)
                for right, methods in _methods(level).items()
                if methods.issuperset(check.needs)
            ]
    return pairs


def alarms(
    level: str, dtype: str, number: int, seed: int = 0, most: int | None = None
) -> list[Alarm]:
    """The false alarms among the first ``most`` pairs of a check and a right implementation."""
    subjects = {name: Direct(make()) for name, make in rights(level).items()}
    found = []
    for check, right in _pairs(level, dtype, number)[:most]:
        case = Case(check.id, dtype, number, seed)
        kind, says = deviation(check, subjects[right], case)
        if kind not in ("", "skip"):  # what one declares not to have is not asked of it
            found.append(Alarm(right, case.id, seed, f"{kind}: {says}"))
    return found


def _rounds(levels: Sequence[str], dtype: str, cases: int) -> Iterator[tuple[str, int, int]]:
    """(level, number, how many cases): each check and right implementation in turn."""
    for number in count():
        before = cases
        for level in levels:
            if many := min(cases, len(_pairs(level, dtype, number))):
                cases -= many
                yield level, number, many
        if cases in (0, before):
            return


Job = tuple[str, tuple[Any, ...]]
"""The kind of a job (catch, names or alarms) and the plain arguments of its function."""


def _done(job: Job) -> Any:
    """The result of a job, in any process."""
    kind, arguments = job
    if kind == "alarms":
        return alarms(*arguments)
    m = _catalogue()[arguments[0]]
    return catch(m, *arguments[1:]) if kind == "catch" else names(m, *arguments[1:])


def _start_process() -> None:
    """A process of a pool: one thread of BLAS, and an interrupt is the parent's."""
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _alone(job: Job) -> Any:
    """The result of a job, by a worker that others may use, too."""
    with threadpool_limits(1):
        return _done(job)


def _all_done(
    jobs: Sequence[Job], processes: int, progress: Progress | None, executor: Executor | None
) -> Iterator[tuple[Job, Any]]:
    """Each job with its result, in their order."""

    def announced(results: Iterable[Any]) -> Iterator[tuple[Job, Any]]:
        for number, (job, result) in enumerate(zip(jobs, results, strict=True), 1):
            if progress:
                progress(f"{job[0]}:", number, len(jobs))
            yield job, result

    if executor is not None:
        yield from announced(executor.map(_alone, jobs, chunksize=CHUNK))
    elif processes < 2:
        with threadpool_limits(1):
            yield from announced(map(_done, jobs))
    else:
        yield from announced(_in_pools(jobs, processes))


def _in_pools(jobs: Sequence[Job], processes: int) -> Iterator[Any]:
    """The results by a pool of processes; what is missing by a new one, where a process is lost."""
    done = 0
    for _ in range(MOST_LOST):
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_process)
        try:
            for result in pool.map(_done, jobs[done:], chunksize=CHUNK):
                done += 1
                yield result
            return
        except BrokenProcessPool:
            continue
        finally:
            pool.shutdown(cancel_futures=True)
    raise MemoryError(f"{MOST_LOST} processes were killed, as systems do for want of memory")


def share(mutants: Sequence[Mutant], seed: int) -> list[Mutant]:
    """One of each family; another seed takes another."""
    groups: dict[tuple[str, str], list[Mutant]] = {}
    for m in mutants:
        groups.setdefault((m.level, m.family), []).append(m)
    return [group[seed % len(group)] for group in groups.values()]


def selftest(
    *,
    levels: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
    cases: int | None = None,
    quick: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Selftest:
    """Puts the whole catalogue to the checks, in the profile ci.

    ``cases`` counts the cases of right implementations in each dtype. With ``quick``, one mutant of
    each family and fewer cases. ``jobs`` processes share the work, or the workers of ``executor``;
    the result is the same for any number of them. Raises UsageError.
    """
    started = perf_counter()
    levels, dtypes = _known(levels, dtypes, seed)
    cases = (FEW_CASES if quick else CASES) if cases is None else cases
    if cases < 0 or jobs < 1:
        raise UsageError(f"{cases} cases by {jobs} processes; expected at least 0 and 1")
    mutants = [m for m in MUTANTS if m.level in levels and not m.equivalent]
    mutants = share(mutants, seed) if quick else mutants
    rounds = {dtype: list(_rounds(levels, dtype, cases)) for dtype in dtypes}
    work = [*_mutant_jobs(mutants, dtypes, seed), *_alarm_jobs(rounds, seed)]
    results = _collected(dtypes, _all_done(work, jobs, progress, executor))
    return Selftest(
        mutants=tuple(mutants),
        caught=results.caught,
        broken=results.broken,
        named=results.named,
        cases={dtype: _cases_by_level(levels, rounds[dtype]) for dtype in dtypes},
        alarms={dtype: tuple(alarms) for dtype, alarms in results.alarms.items()},
        rights={level: tuple(rights(level)) for level in levels},
        seed=seed,
        quick=quick,
        seconds=perf_counter() - started,
    )


def _known(
    levels: Sequence[str] | None, dtypes: Sequence[str] | None, seed: int
) -> tuple[list[str], list[str]]:
    """These levels and dtypes, or all, in their order. Raises UsageError."""
    checks = list(_checks().values())
    plan(checks, levels=levels, dtypes=dtypes, seed=seed)  # refuses what does not exist
    chosen = [level for level in levels_of(checks) if not levels or level in levels]
    return chosen, [dtype for dtype in DTYPES if not dtypes or dtype in dtypes]


def _mutant_jobs(mutants: Sequence[Mutant], dtypes: Sequence[str], seed: int) -> list[Job]:
    """Each mutant to be caught in each dtype, then to be named in one."""
    tried = [(m, dtype) for dtype in dtypes for m in mutants if _is_tried(m, dtype)]
    jobs: list[Job] = [("catch", (m.id, dtype, seed)) for m, dtype in tried]
    return jobs + [("names", (m.id, dtype, seed)) for m, dtype in tried if dtype == NAMED_IN]


def _alarm_jobs(rounds: Mapping[str, Sequence[tuple[str, int, int]]], seed: int) -> list[Job]:
    """The rounds of right implementations in each dtype."""
    return [
        ("alarms", (level, dtype, number, seed, count))
        for dtype, of_dtype in rounds.items()
        for level, number, count in of_dtype
    ]


def _cases_by_level(
    levels: Sequence[str], rounds: Sequence[tuple[str, int, int]]
) -> dict[str, int]:
    return {
        level: sum(count for of_level, _, count in rounds if of_level == level) for level in levels
    }


@dataclass
class _Results:
    """The results of the jobs, by dtype and mutant."""

    caught: dict[str, dict[str, str]]
    alarms: dict[str, list[Alarm]]
    broken: dict[str, str] = field(default_factory=dict)
    named: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _collected(dtypes: Sequence[str], done: Iterable[tuple[Job, Any]]) -> _Results:
    results = _Results({dtype: {} for dtype in dtypes}, {dtype: [] for dtype in dtypes})
    for (kind, arguments), result in done:
        if kind == "catch":
            id, dtype, _ = arguments
            results.caught[dtype][id], why = result
            results.broken |= {id: why} if why else {}
        elif kind == "names":
            results.named[arguments[0]] = result
        else:
            results.alarms[arguments[1]] += result
    return results
