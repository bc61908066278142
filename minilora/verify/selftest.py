"""Who checks the checks: every mutant is to be caught and nearly each named; what is right
passes.

The catalogue of mutants is put to the checks as other implementations are. A wrong one that
passes, or a right one that does not, is a defect of this package.
"""

from __future__ import annotations

import json
import signal
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
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
from minilora.verify.diagnosis.diagnose import Direct
from minilora.verify.implementation.contract import METHODS
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.mutants import MUTANTS, Mutant
from minilora.verify.plan import levels_of, plan
from minilora.verify.report.words import WIDTH

WIDE = ("float64", "float32")
"""Where each mutant must be caught: in the other dtypes, some are less than rounding."""

NAMED_IN = "float32"
NAMED = 0.9
"""The share of the catalogue that the diagnosis must name, in that dtype."""

CASES, FEW_CASES = 10_000, 1_000
"""How many cases the right implementations are put to in each dtype, and how many in a hurry."""

FAULTS = {"changes its inputs", "nan", "shape"}
"""The faults that a mutant may be caught by. An exception would only show that it is broken."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Alarm:
    """A case in which an implementation that is right did not pass."""

    right: str
    case: str
    seed: int
    says: str


@dataclass(frozen=True)
class Selftest:
    """What a self-test found.

    ``caught`` has for each dtype and mutant the check that caught it, or ""; where a level has
    no cases in a dtype, its mutants are absent there. ``named`` has the names that the
    diagnosis gave, the nearest first. ``broken`` are mutants that raise.
    """

    mutants: tuple[Mutant, ...]
    caught: dict[str, dict[str, str]]
    broken: dict[str, str]
    named: dict[str, tuple[str, ...]]
    cases: dict[str, dict[str, int]]
    alarms: dict[str, tuple[Alarm, ...]]
    rights: dict[str, tuple[str, ...]]
    seed: int
    quick: bool
    seconds: float = 0.0

    @property
    def missed(self) -> dict[str, list[str]]:
        """The mutants that no check catches, by the dtype."""
        return {
            dtype: [id for id, check in found.items() if not check]
            for dtype, found in self.caught.items()
        }

    @property
    def misnamed(self) -> dict[str, tuple[str, ...]]:
        """Those that are given names, but not their own."""
        return {id: names for id, names in self.named.items() if names and id not in names}

    @property
    def unnamed(self) -> list[str]:
        """Those that are given no name."""
        return [id for id, names in self.named.items() if not names]

    @property
    def shortfalls(self) -> list[str]:
        """What is not as it has to be; nothing where all is well."""
        missed = self.missed
        short = [f"not caught in {d}: {', '.join(missed[d])}" for d in WIDE if missed.get(d)]
        short += [f"{id} is broken: {why}" for id, why in self.broken.items()]
        named = len(self.named) - len(self.misnamed) - len(self.unnamed)
        if self.named and not self.quick and named < NAMED * len(self.named):
            short.append(f"{named} of {len(self.named)} named, fewer than {_percent(NAMED, 1)}")
        for dtype, alarms in self.alarms.items():
            short += [f"{len(alarms)} false alarms in {dtype}"] * bool(alarms)
        return short

    @property
    def exit_status(self) -> int:
        """0 all is well, 1 something falls short."""
        return 1 if self.shortfalls else 0

    def rows(self) -> list[tuple[str, ...]]:
        """Level, class, number, rate of each dtype, rate of names: the worst class first."""
        groups: dict[tuple[str, str], list[str]] = {}
        for m in self.mutants:
            groups.setdefault((m.level, m.family), []).append(m.id)
        ordered = sorted(groups.items(), key=lambda group: self._worst(group[1]))
        everything = [m.id for m in self.mutants]
        return [
            (level, family, str(len(ids)), *self._rates(ids))
            for (level, family), ids in [*ordered, (("all", ""), everything)]
        ]

    def _shares(self, ids: Sequence[str]) -> Iterator[tuple[int, int]]:
        for found in self.caught.values():
            tried = [found[id] for id in ids if id in found]
            yield sum(map(bool, tried)), len(tried)
        if self.named:
            given = [(id, self.named[id]) for id in ids if id in self.named]
            yield sum(id in names for id, names in given), len(given)

    def _rates(self, ids: Sequence[str]) -> list[str]:
        return [_percent(some, all) for some, all in self._shares(ids)]

    def _worst(self, ids: Sequence[str]) -> float:
        return min((some / all for some, all in self._shares(ids) if all), default=1.0)

    def header(self) -> tuple[str, ...]:
        """What stands above the rows."""
        return ("level", "class", "no.", *self.caught, *(["named"] if self.named else []))

    def notes(self) -> Iterator[tuple[str, str]]:
        """(what, which) of everything that the table only counts."""
        for dtype, ids in self.missed.items():
            if ids:
                yield f"not caught in {dtype}", ", ".join(ids)
        if self.misnamed:
            each = (f"{id} as {', '.join(names)}" for id, names in self.misnamed.items())
            yield f"named wrongly in {NAMED_IN}", "; ".join(each)
        if self.unnamed:
            yield f"not named in {NAMED_IN}", ", ".join(self.unnamed)
        for dtype, cases in self.cases.items():
            alarms = self.alarms[dtype]
            levels = ", ".join(f"{level} {number}" for level, number in cases.items())
            total = sum(cases.values())
            yield dtype, f"{len(alarms)} false alarms in {total} cases of what is right ({levels})"
            for alarm in alarms[:5]:
                yield f"{alarm.right}", f"{alarm.case}, seed {alarm.seed}: {alarm.says}"
        rights = ", ".join(f"{level} {len(names)}" for level, names in self.rights.items())
        yield "implementations that are right", rights

    def summary(self) -> str:
        """The rates in a sentence, and what falls short."""
        every = len(self.mutants)
        parts = [f"{'a share, ' if self.quick else ''}{every} mutants"]
        for dtype, found in self.caught.items():
            rate = _percent(sum(map(bool, found.values())), len(found))
            parts.append(f"{rate} caught in {dtype}")
        if self.named:
            own = sum(id in names for id, names in self.named.items())
            alone = sum(names == (id,) for id, names in self.named.items())
            rates = [_percent(some, len(self.named)) for some in (own, alone)]
            parts.append(f"{rates[0]} named, {rates[1]} with no other")
        cases = sum(sum(each.values()) for each in self.cases.values())
        parts.append(f"{sum(map(len, self.alarms.values()))} false alarms in {cases} cases")
        return f"{', '.join(parts)}; seed {self.seed}; {self.seconds:.0f} s"

    def text(self) -> str:
        """The report for a terminal of 80 columns, worst first."""
        out = []
        for level, family, *figures in (self.header(), *self.rows()):
            out.append(f"{level:<9} {family:<9}" + "".join(f"{text:>9}" for text in figures))
        out.append("")
        for what, which in self.notes():
            out += textwrap.wrap(
                f"{what}: {which}", WIDTH, subsequent_indent="  ", break_on_hyphens=False
            )
        out += ["", *textwrap.wrap(self.summary(), WIDTH)]
        for short in self.shortfalls:
            out += textwrap.wrap(f"FALLS SHORT  {short}", WIDTH, subsequent_indent=" " * 13)
        return "\n".join(out) + "\n"

    def markdown(self) -> str:
        """The report as Markdown, for a page or the summary of a build."""
        header = self.header()
        lines = [header, tuple("---" if i < 2 else "---:" for i in range(len(header)))]
        out = ["| " + " | ".join(line) + " |" for line in [*lines, *self.rows()]]
        out += ["", *(f"- {what}: {which}" for what, which in self.notes()), "", self.summary()]
        out += ["", *(f"**FALLS SHORT** {short}" for short in self.shortfalls)]
        return "\n".join(out).rstrip() + "\n"

    def json(self) -> str:
        """The report as one document of JSON."""
        document: dict[str, Any] = {
            "schema": 1,
            "seed": self.seed,
            "quick": self.quick,
            "mutants": [
                {"id": m.id, "level": m.level, "class": m.family, "formula": m.formula}
                | {
                    "caught_by": {
                        d: found[m.id] for d, found in self.caught.items() if m.id in found
                    }
                }
                | ({"named": self.named[m.id]} if m.id in self.named else {})
                for m in self.mutants
            ],
            "rights": self.rights,
            "cases": self.cases,
            "alarms": {dtype: list(map(asdict, each)) for dtype, each in self.alarms.items()},
            "shortfalls": self.shortfalls,
            "exit_status": self.exit_status,
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _percent(some: float, all: float) -> str:
    """Rounded down, so that 100 % are all."""
    return f"{100 * some // all:.0f} %" if all else "-"


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


def _has_cases(level: str, dtype: str) -> bool:
    return any(check.cases("ci", dtype) for check in of_level(level))


def deviation(check: Check, subject: GuardedImplementation, case: Case) -> tuple[str, str]:
    """How a case does not pass, ("", "") where it does: pass, loose or fail, or a fault's kind."""
    found, end = engine.judged(check, subject, case)
    worst = max(found, key=lambda each: each.excess, default=None)
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
                kind, says = deviation(check, subject, Case(check.id, dtype, number, seed))
                if kind == "fail" or kind in FAULTS:
                    return check.id, ""
                if kind not in ("", "loose", "skip"):
                    return "", f"{kind}: {says}"
    return "", ""


def names(m: Mutant, dtype: str = NAMED_IN, seed: int = 0) -> tuple[str, ...]:
    """What the first check of its level that has a diagnosis calls a mutant, nearest first."""
    for check in (check for check in of_level(m.level) if check.diagnose):
        report = engine.run([check], m.make(), profile="ci", dtypes=[dtype], seed=seed)
        found = [each.id for each in report.results[0].diagnosis]
        if names := tuple(name for name in found if not name.startswith(STRUCTURE)):
            return names
    return ()


@cache
def rights(level: str) -> dict[str, Callable[[], object]]:
    """Implementations of a level that are right, however they are written."""
    from minilora.verify.implementation.minilora_impl import Own

    same = {m.id: m.make for m in MUTANTS if m.equivalent and m.level == level}
    return {"minilora": Own, **same}


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
        if kind:
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


def _done(job: Job) -> Any:
    """A job by its name and plain arguments, so that any process can do it."""
    kind, arguments = job
    if kind == "alarms":
        return alarms(*arguments)
    m = _catalogue()[arguments[0]]
    return catch(m, *arguments[1:]) if kind == "catch" else names(m, *arguments[1:])


def _alone() -> None:
    """A process of a pool: one thread of BLAS, and an interrupt is the parent's."""
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _all_done(jobs: list[Job], processes: int, progress: Progress | None) -> Iterable[Any]:
    def announced(results: Iterable[Any]) -> Iterator[Any]:
        for number, result in enumerate(results, 1):
            if progress:
                progress(f"{jobs[number - 1][0]}:", number, len(jobs))
            yield result

    if processes < 2:
        with threadpool_limits(1):
            yield from announced(map(_done, jobs))
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _alone)
    try:
        # Several at once, for neighbours share the answers that are wanted of them.
        yield from announced(pool.map(_done, jobs, chunksize=4))
    finally:
        pool.shutdown(cancel_futures=True)


def share(mutants: Sequence[Mutant], seed: int) -> list[Mutant]:
    """One of each class; another seed takes another."""
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
) -> Selftest:
    """Puts the whole catalogue to the checks, in the profile ci.

    ``cases`` counts the cases of right implementations in each dtype. With ``quick``, one
    mutant of each class and fewer cases. ``jobs`` processes share the work; what is found is
    the same for any number of them. Raises UsageError.
    """
    started = perf_counter()
    every = list(_checks().values())
    plan(every, levels=levels, dtypes=dtypes, seed=seed)  # refuses what does not exist
    levels = [level for level in levels_of(every) if not levels or level in levels]
    dtypes = [dtype for dtype in DTYPES if not dtypes or dtype in dtypes]
    cases = (FEW_CASES if quick else CASES) if cases is None else cases
    if cases < 0 or jobs < 1:
        raise UsageError(f"{cases} cases by {jobs} processes; expected 0 and 1 at least")
    wrong = [m for m in MUTANTS if m.level in levels and not m.equivalent]
    wrong = share(wrong, seed) if quick else wrong
    rounds = {dtype: list(_rounds(levels, dtype, cases)) for dtype in dtypes}
    tried = [(m, dtype) for dtype in dtypes for m in wrong if _has_cases(m.level, dtype)]
    work: list[Job] = [("catch", (m.id, dtype, seed)) for m, dtype in tried]
    work += [("names", (m.id, dtype, seed)) for m, dtype in tried if dtype == NAMED_IN]
    work += [
        ("alarms", (level, dtype, number, seed, many))
        for dtype in dtypes
        for level, number, many in rounds[dtype]
    ]
    found = list(zip(work, _all_done(work, jobs, progress), strict=True))
    caught: dict[str, dict[str, str]] = {dtype: {} for dtype in dtypes}
    broken: dict[str, str] = {}
    named: dict[str, tuple[str, ...]] = {}
    met: dict[str, list[Alarm]] = {dtype: [] for dtype in dtypes}
    for (kind, arguments), result in found:
        if kind == "catch":
            id, dtype, _ = arguments
            caught[dtype][id], why = result
            broken |= {id: why} if why else {}
        elif kind == "names":
            named[arguments[0]] = result
        else:
            met[arguments[1]] += result
    counted = {
        dtype: {
            level: sum(many for one, _, many in rounds[dtype] if one == level) for level in levels
        }
        for dtype in dtypes
    }
    return Selftest(
        mutants=tuple(wrong),
        caught=caught,
        broken=broken,
        named=named,
        cases=counted,
        alarms={dtype: tuple(each) for dtype, each in met.items()},
        rights={level: tuple(rights(level)) for level in levels},
        seed=seed,
        quick=quick,
        seconds=perf_counter() - started,
    )
