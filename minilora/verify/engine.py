"""The run of a verification: which cases, what becomes of each, one verdict per check and dtype."""

from __future__ import annotations

import json
import re
import shlex
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import filter as filter_names
from fnmatch import fnmatchcase
from math import comb, inf
from time import perf_counter
from typing import Any

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault, Skip, UsageError, describe, near, tidy
from minilora.verify.core.types import STRUCTURE, Case, Check, Comparison, Diagnosis, Judgement
from minilora.verify.diagnosis.diagnose import agree, answers
from minilora.verify.implementation.contract import TIME_LIMIT
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.report.report import UNSEEN, FaultSeen, Known, Report, Result

PROFILES = ("quick", "ci", "nightly")

CASES_AFTER_A_DEVIATION = 20
"""So many cases are still tried after the first that deviates, to find the worst one."""

FAULTS_ALLOWED = 3
"""A check ends with its third fault of one kind; a call that hangs ends it at once."""

SEARCHES = 4
"""The smallest counterexample is looked for in so many checks, each in the first dtype that fails.

One search takes seconds, and a target that is wrong at the lowest level fails nearly everywhere.
"""

LOOKED = 4
"""Of the failing checks of a level that call the same methods, so many are looked into. What is
wrong in the first is mostly wrong in the others, and to say it again would take as long again."""

Progress = Callable[[str, int, int], None]
"""Called before each case with its id, the number of cases behind it and the number of all."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; ``report`` holds what was checked so far."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


@dataclass(frozen=True)
class Plan:
    """The cases of one check in one dtype."""

    check: Check
    dtype: str
    numbers: range
    seed: int

    def case(self, number: int) -> Case:
        """The case of this number."""
        return Case(self.check.id, self.dtype, number, self.seed)


def levels_of(checks: Sequence[Check]) -> list[str]:
    """The levels, in the order of the checks."""
    return list(dict.fromkeys(check.level for check in checks))


def plan(
    checks: Sequence[Check],
    *,
    levels: Sequence[str] | None = None,
    profile: str = "ci",
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
    case: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[Plan]:
    """What is to be tried, in the order of the checks and of DTYPES. Raises UsageError.

    Without ``dtypes``, all are planned; a run keeps those that the implementation takes. A case is
    tried alone, whatever the levels, dtypes and profile. ``part`` (i, n) keeps the i-th of n parts
    of the cases of each check.
    """
    _one_of("profile", profile, PROFILES)
    if seed < 0:
        raise UsageError(f"the seed is {seed}; expected 0 or more")
    levels, dtypes = (((v,) if isinstance(v, str) else v) for v in (levels, dtypes))
    for level in levels or ():
        _one_of("level", level, levels_of(checks))
    for dtype in dtypes or ():
        _one_of("dtype", dtype, list(DTYPES))
    if case is not None:
        return [_plan_of_case(checks, case, seed)]
    plans = []
    for check in checks:
        for dtype in DTYPES:
            numbers = _part(range(check.cases(profile, dtype)), *part)
            if (
                numbers
                and (not levels or check.level in levels)
                and (not dtypes or dtype in dtypes)
            ):
                plans.append(Plan(check, dtype, numbers, seed))
    return plans


def _part(numbers: range, i: int, n: int) -> range:
    """The i-th of n parts of equal length, but for one."""
    return numbers[len(numbers) * i // n : len(numbers) * (i + 1) // n]


def _plan_of_case(checks: Sequence[Check], case: str, seed: int) -> Plan:
    parts = case.split(":")
    if len(parts) != 3 or not re.fullmatch("[0-9]{1,9}", parts[2]):
        raise UsageError(f"no case {case!r}; a case is CHECK:DTYPE:NUMBER, as in a report")
    by_id = {check.id: check for check in checks}
    _one_of("check", parts[0], list(by_id))
    _one_of("dtype", parts[1], list(DTYPES))
    number = int(parts[2])
    return Plan(by_id[parts[0]], parts[1], range(number, number + 1), seed)


def _one_of(kind: str, asked: str, known: Sequence[str]) -> None:
    if asked not in known:
        there = ", ".join(known) if len(known) < 16 else "`minilora verify --list` shows them all"
        raise UsageError(f"no {kind} {asked!r}{near(asked, list(known))}; there are: {there}")


def read_known(path: str) -> dict[str, Known]:
    """Known deviations from a JSON file: a list of {check, dtype?, reason, link?, versions?}.

    Raises UsageError.
    """
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {tidy(error)}") from None
    known = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        if not isinstance(entry, dict):
            raise UsageError(f'{path}: expected a list of {{"check": …, "reason": …}}')
        name = _known_name(entry, f"{path}, entry {number}")
        known[name] = _known(entry, path)
    return known


def _known_name(entry: Mapping[str, Any], where: str) -> str:
    fields = {"check", "dtype", "reason", "link", "versions"}
    if unknown := sorted(entry.keys() - fields):
        raise UsageError(f"{where}: unknown {', '.join(unknown)}; known are {sorted(fields)}")
    if not isinstance(entry.get("check"), str) or not entry.get("reason"):
        raise UsageError(f"{where}: 'check' and 'reason' are needed")
    return f"{entry['check']}:{entry['dtype']}" if "dtype" in entry else str(entry["check"])


def _known(entry: Any, where: str) -> Known:
    if isinstance(entry, Known):
        return entry
    if isinstance(entry, str):
        return Known(tidy(entry, 600))
    if not isinstance(entry, Mapping) or "reason" not in entry:
        raise UsageError(f"{where}: a known deviation is its reason, or a dict with 'reason'")
    versions = entry.get("versions", ())
    versions = (versions,) if isinstance(versions, str) else tuple(map(str, versions))
    return Known(tidy(entry["reason"], 600), tidy(entry.get("link", "")), versions)


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
    results: list[Result] = []
    asked: set[tuple[str, str]] = set()
    looked: Counter[tuple[Any, ...]] = Counter()
    searched = 0

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

    behind, total = 0, sum(len(p.numbers) for p in plans)
    try:
        for p in plans:
            cases = _announced(p, progress, behind, total)
            known_here = excuse(declarations, p.check.id, p.dtype)
            result = _result(p, subject, cases, known_here, command)
            results.append(result)
            if result.status in ("fail", "error") and (p.check.id, result.status) not in asked:
                asked.add((p.check.id, result.status))
                alike = p.check.level, p.check.needs, result.status
                looked[alike] += 1
                if looked[alike] > LOOKED:
                    results[-1] = replace(result, note=UNSEEN)
                else:
                    shrinks = result.status == "fail" or p.check.smallest_fault
                    searched += shrinks
                    again = _reproduce_all(command, p, profile)
                    results[-1] = _looked_into(
                        result, p, subject, again, shrinks, searched <= SEARCHES
                    )
            behind += len(p.numbers)
    except KeyboardInterrupt:
        raise Interrupted(report(interrupted=True)) from None
    return report()


def excuse(declarations: Mapping[str, Known], check: str, dtype: str) -> Known | None:
    """What was declared of this check in this dtype: the most particular of what matches."""
    for name in (f"{check}:{dtype}", check):
        if name in declarations:
            return declarations[name]
    for name, known in declarations.items():
        if fnmatchcase(f"{check}:{dtype}", name if ":" in name else f"{name}:*"):
            return known
    return None


def _still_known(result: Result, results: Sequence[Result]) -> Result:
    """One declaration for several checks or dtypes still holds where one of them deviates."""
    holds = any(r.known is result.known and r.status == "known" for r in results)
    return replace(result, known=None) if result.no_longer_fails and holds else result


def _announced(p: Plan, progress: Progress | None, behind: int, total: int) -> Iterator[Case]:
    for i, number in enumerate(p.numbers):
        case = p.case(number)
        if progress:
            progress(case.id, behind + i, total)
        yield case


def declared(
    checks: Sequence[Check], subject: GuardedImplementation, known: Mapping[str, Any]
) -> tuple[dict[str, Known], tuple[str, ...]]:
    """The known deviations that apply to the subject's version, and remarks on the others.

    Raises UsageError where ``known`` names a check or a dtype that does not exist.
    """
    names = [check.id for check in checks]
    for name in known:
        check, _, dtype = name.partition(":")
        if not filter_names(names, check):
            _one_of("check", check, names)
        if dtype:
            _one_of("dtype", dtype, list(DTYPES))
    strange = [n for n in subject.known if not filter_names(names, n.partition(":")[0])]
    notes = tuple(
        f"{subject.name} declares {n!r} as known; there is no such check" for n in strange
    )
    entries = {name: _known(entry, name) for name, entry in {**subject.known, **known}.items()}
    return {n: entry for n, entry in entries.items() if entry.holds_for(subject.version)}, notes


ONE_IN = 1000
"""That all cases that deviate are larger than all that hold is told where it would be rarer than
this, if which ones deviate were chance: of n cases any k deviate in n! / (k! (n - k)!) ways."""


@dataclass
class _Tally:
    """What is known so far of one check in one dtype."""

    cases: int = 0
    held: int = 0
    reasons: list[str] = field(default_factory=list)
    first: dict[str, tuple[str, tuple[Judgement, ...]]] = field(default_factory=dict)
    deviating: int = 0
    troubled: int = 0
    since: int = 0
    faults: dict[str, FaultSeen] = field(default_factory=dict)
    worst: Judgement | None = None
    worst_case: str = ""
    shared: set[str] | None = None
    elsewhere: set[str] = field(default_factory=set)
    least: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    @property
    def only(self) -> tuple[str, ...]:
        """What all cases that deviate have in common, and no case that holds has."""
        words = sorted((self.shared or set()) - self.elsewhere) if self.held else []
        rare = comb(self.held + self.troubled, self.held) > ONE_IN
        words += [
            f"there are {least} or more {name} (it holds up to {self.most[name]})"
            for name, least in self.least.items()
            if rare and least > self.most.get(name, least)
        ]
        return tuple(words)

    @property
    def over(self) -> bool:
        """Whether further cases would tell nothing new."""
        too_many = any(fault.cases >= FAULTS_ALLOWED for fault in self.faults.values())
        return too_many or "hangs" in self.faults or self.since > CASES_AFTER_A_DEVIATION

    @property
    def status(self) -> str:
        """A wrong value says more than a fault, and either more than a loose value."""
        for status in ("fail", "error", "loose"):
            if status in self.first:
                return status
        return "skip" if self.cases == len(self.reasons) else "pass"

    def add(
        self,
        case: Case,
        judged: Sequence[Judgement],
        end: Skip | Fault | None,
        traits: set[str],
        sizes: Mapping[str, int],
    ) -> None:
        """Takes in the comparisons of a case, how it ended, and what is particular about it."""
        self.cases += 1
        verdicts = {judgement.verdict for judgement in judged}
        if isinstance(end, Skip):
            self.reasons.append(end.reason)
        if isinstance(end, Fault):
            seen = self.faults.get(end.kind, FaultSeen(end.kind, end.message, case.id, 0))
            self.faults[end.kind] = FaultSeen(seen.kind, seen.message, seen.case, seen.cases + 1)
        for status, met in (
            ("fail", "fail" in verdicts),
            ("error", isinstance(end, Fault)),
            ("loose", "loose" in verdicts),
        ):
            if met:
                self.first.setdefault(status, (case.id, tuple(judged)))
        if verdicts & {"fail", "loose"} or isinstance(end, Fault):
            self.troubled += 1
            self.shared = set(traits) if self.shared is None else self.shared & traits
            _take_in(self.least, sizes, min)
        elif not isinstance(end, Skip):
            self.held += 1
            self.elsewhere |= traits
            _take_in(self.most, sizes, max)
        self.deviating += bool(verdicts & {"fail", "loose"})
        self.since += bool("fail" in self.first)
        for judgement in judged:
            if self.worst is None or _worse(judgement, self.worst):
                self.worst, self.worst_case = judgement, case.id


def _take_in(known: dict[str, int], sizes: Mapping[str, int], which: Callable[..., int]) -> None:
    """The least or the greatest of each size."""
    for name, size in sizes.items():
        known[name] = which(size, known.get(name, size))


def _worse(a: Judgement, b: Judgement) -> bool:
    """By how many times its limit; where no difference is allowed, by the difference."""
    if a.excess == b.excess == inf:
        return abs(a.got - a.want) > abs(b.got - b.want)
    return a.excess > b.excess


def _result(
    p: Plan,
    subject: GuardedImplementation,
    cases: Iterator[Case],
    known: Known | None,
    command: Sequence[str] | None,
) -> Result:
    started, spent = perf_counter(), subject.spent
    check = p.check
    subject.announce(check.id)
    reason = _unsupported(check, p.dtype, subject)
    tally = _Tally()
    if not reason:
        for case in cases:
            subject.traits, subject.sizes = set(), {}
            tally.add(case, *judged(check, subject, case), subject.traits, subject.sizes)
            if tally.over:
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
        precision=subject.precision(p.dtype),
        status=status,
        cases=tally.cases,
        skipped_cases=len(tally.reasons),
        deviating_cases=tally.deviating,
        only=tally.only,
        worst=tally.worst,
        worst_case=tally.worst_case,
        case=first,
        arrays=arrays,
        faults=tuple(tally.faults.values()),
        reason=reason or next(iter(tally.reasons), ""),
        known=known,
        reproduce=_reproduce(command, first or tally.worst_case or p.case(p.numbers[0]).id, p.seed),
        seconds=perf_counter() - started,
        in_target=subject.spent - spent,
    )


def _unsupported(check: Check, dtype: str, subject: GuardedImplementation) -> str:
    if absent := [method for method in check.needs if not subject.has(method)]:
        return f"not supported: no method {', '.join(absent)}"
    if dtype not in subject.dtypes:
        return f"not supported: {subject.name} takes {', '.join(subject.dtypes) or 'no dtype'}"
    return ""


def judged(
    check: Check, subject: GuardedImplementation, case: Case
) -> tuple[list[Judgement], Skip | Fault | None]:
    """The judgements of a case, and what ended it early: those made before that count too."""
    found: list[Judgement] = []
    worst: tuple[int, Comparison] | None = None
    end: Skip | Fault | None = None
    try:
        for comparison in check.run(subject, case):
            found.append(comparison.judge())  # kept when a later step raises
            if worst is None or _worse(found[-1], found[worst[0]]):
                worst = len(found) - 1, comparison
    except (Skip, Fault) as stopped:
        end = stopped
    except Exception as error:
        end = Fault("internal", _ours(error))
    if worst is None:
        return found, end or Fault("internal", f"{check.id} compared nothing")
    i, comparison = worst
    if found[i].verdict != "pass":
        found[i] = replace(found[i], picture=comparison.picture())
    return found, end


def _ours(error: Exception) -> str:
    places = traceback.extract_tb(error.__traceback__)[1:]
    chain = " < ".join(f"{place.name}:{place.lineno}" for place in reversed(places))
    return f"{describe(error)}; called from {chain}" if chain else describe(error)


def _looked_into(
    result: Result, p: Plan, subject: GuardedImplementation, again: str, shrinks: bool, within: bool
) -> Result:
    """With what can be said of a deviation: that it depends on earlier calls, or its name.

    What another call left behind has no name, and shrinks to nothing: ``again`` repeats them all.
    """
    if found := _remembers(result, p, subject):
        return replace(result, diagnosis=found, reproduce=again)
    if not shrinks:
        return result
    return _with_smallest(_diagnosed(result, p, subject), p, subject, within)


def _diagnosed(result: Result, p: Plan, subject: GuardedImplementation) -> Result:
    hung = any(fault.kind == "hangs" for fault in result.faults)
    if p.check.diagnose is None or result.status != "fail" or hung:
        return result
    started = perf_counter()
    try:
        found = p.check.diagnose(subject, p.dtype, p.seed)
    except Exception as error:
        return replace(result, note=f"No diagnosis, by a fault of minilora: {_ours(error)}")
    return replace(result, diagnosis=found, seconds=result.seconds + perf_counter() - started)


def _remembers(result: Result, p: Plan, subject: GuardedImplementation) -> tuple[Diagnosis, ...]:
    """Whether a case fails by what calls before it left behind: what to say, or nothing."""
    if any(fault.kind in ("hangs", "crashes", "internal") for fault in result.faults):
        return ()

    def said(sentence: str) -> tuple[Diagnosis, ...]:
        return (Diagnosis(f"{STRUCTURE}earlier-calls", sentence, 0.0),)

    case = p.case(int(result.case.rpartition(":")[2]))
    anew = subject.anew()
    if anew is not None:
        found, end = judged(p.check, anew, case)
        if end is None and all(judgement.verdict == "pass" for judgement in found):
            return said("It depends on earlier calls: the same case passes when it is asked first.")
    if result.status == "error":
        found, end = judged(p.check, subject, case)
        if not isinstance(end, Fault):
            return said("It depends on earlier calls, or on chance: asked again, it answers.")
        return ()
    once, twice = (answers(p.check, subject, case) for _ in range(2))
    if any(agree(once[name], twice[name]) is None for name in once.keys() & twice.keys()):
        return said(
            "It depends on earlier calls, or on chance: asked twice, it answers in two ways."
        )
    return ()


def _with_smallest(result: Result, p: Plan, subject: GuardedImplementation, within: bool) -> Result:
    if p.check.smallest is None or any(fault.kind == "hangs" for fault in result.faults):
        return result
    if not within:
        return replace(result, note="The command below looks for the smallest counterexample too.")
    started, smallest, note = perf_counter(), None, ""
    try:
        smallest = p.check.smallest(subject, p.dtype)
    except (Skip, Fault):  # it answers in no smaller case
        pass
    except Exception as error:
        note = f"No smallest counterexample, by a fault of minilora: {_ours(error)}"
    seconds = result.seconds + perf_counter() - started
    return replace(result, smallest=smallest, note=note or result.note, seconds=seconds)


def _reproduce(command: Sequence[str] | None, case: str, seed: int) -> str:
    if command is None:
        return f'minilora.verify.check(implementation, case="{case}", seed={seed})'
    return shlex.join([*command, "--case", case, "--seed", str(seed)])


def _reproduce_all(command: Sequence[str] | None, p: Plan, profile: str) -> str:
    """The same of all cases of a level in a dtype, for what no case shows alone."""
    level, dtype = p.check.level, p.dtype
    if command is None:
        chosen = f"levels=[{level!r}], dtypes=[{dtype!r}], profile={profile!r}, seed={p.seed}"
        return f"minilora.verify.check(implementation, {chosen})".replace("'", '"')
    options = ["--level", level, "--dtype", dtype, "--profile", profile, "--seed", str(p.seed)]
    return shlex.join([*command, *options])
