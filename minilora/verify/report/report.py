"""What a verification found: results, exit status, the JSON document, the terminal's text."""

from __future__ import annotations

import contextlib
import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from math import isfinite
from numbers import Integral
from typing import Any, TypeVar

import numpy as np

from minilora import __version__
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.errors import tidy
from minilora.verify.core.types import STRUCTURE, Diagnosis, Judgement, Picture

T = TypeVar("T")

NOT_DIAGNOSED = "Not diagnosed (limit reached). Run the command below to diagnose it."
NOT_SHRUNK = (
    "No smallest counterexample (limit reached). Run the command below to look for one as well."
)

STATUSES = ("fail", "error", "loose", "known", "skip", "pass")
"""Worst first."""

WIDTH = 80
CELL = 11
"""The columns of a dtype: the longest word with a z, and a blank."""

MARKDOWN_BYTES = 2**20
"""GitHub takes so much of a step's summary."""

_ARRAYS_SHOWN = 4
# Digits that tell two neighbours of a dtype apart: 1 + ⌈bits of the significand · log10 2⌉.
_DIGITS = {"float32": 9, "bfloat16": 4, "float16": 5}


@dataclass(frozen=True)
class FaultSeen:
    """One kind of fault, as it was first met, and in how many cases."""

    kind: str
    message: str
    case: str
    cases: int


@dataclass(frozen=True)
class Known:
    """A deviation that was declared: why, where it is discussed, and in which versions.

    ``versions`` are patterns like ``0.18.*``; none means all.
    """

    reason: str
    link: str = ""
    versions: tuple[str, ...] = ()

    def holds_for(self, version: str) -> bool:
        """Whether it was declared for this version, of which the first word counts."""
        number = version.split()[0] if version else ""
        return not self.versions or any(fnmatchcase(number, pattern) for pattern in self.versions)


@dataclass(frozen=True)
class Result:
    """What one check found in one dtype.

    ``status`` is pass, loose, fail, error, known (it deviates, and that was declared) or skip.
    ``cases`` were tried, ``skipped_cases`` of them not supported and ``deviating_cases`` failed.
    ``worst`` is the worst array of all cases and ``worst_case`` its case; ``arrays`` are all those
    of ``case``, the first one that deviates. ``only`` is what all cases that deviate have in
    common and no case that holds has. ``reason`` says why cases were skipped, all or some,
    and ``known`` what was declared about this check beforehand. Of its ``seconds`` the target's own
    calls took ``in_target``.
    """

    check: str
    level: str
    title: str
    dtype: str
    precision: Precision
    status: str
    cases: int = 0
    skipped_cases: int = 0
    deviating_cases: int = 0
    is_relation: bool = False
    worst: Judgement | None = None
    worst_case: str = ""
    case: str = ""
    only: tuple[str, ...] = ()
    arrays: tuple[Judgement, ...] = ()
    faults: tuple[FaultSeen, ...] = ()
    smallest: Mapping[str, Any] | None = None
    diagnosis: tuple[Diagnosis, ...] = ()
    reason: str = ""
    known: Known | None = None
    note: str = ""
    reproduce: str = ""
    seconds: float = 0.0
    in_target: float = 0.0

    @property
    def no_longer_fails(self) -> bool:
        """Whether a deviation was declared here and none was found."""
        return self.known is not None and self.status == "pass"

    @property
    def severity(self) -> tuple[int, float]:
        """Sorts results worst first, and leaves those that hold in the order of the checks."""
        deviates = self.status in ("fail", "loose", "known") and self.worst is not None
        return STATUSES.index(self.status), -self.worst.excess if self.worst and deviates else 0.0


@dataclass(frozen=True)
class Report:
    """The results of one run against one target."""

    name: str
    version: str
    dtypes: tuple[str, ...]
    conventions: Mapping[str, Any]
    profile: str
    seed: int
    results: tuple[Result, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    minilora: str = __version__

    def timing(self) -> str:
        """Where the time went: by level, in the target's calls and in minilora, and per case."""
        rows = [("level", "cases", "seconds", "in the target", "minilora, ms a case")]
        for level in dict.fromkeys(result.level for result in self.results):
            own = [result for result in self.results if result.level == level]
            cases, total, inside = (
                sum(getattr(result, name) for result in own)
                for name in ("cases", "seconds", "in_target")
            )
            each = f"{1000 * (total - inside) / cases:.2f}" if cases else "-"
            rows.append((level, str(cases), f"{total:.2f}", f"{inside:.2f}", each))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = (zip(row, widths, strict=True) for row in rows)
        return "\n".join("  ".join(f"{v:>{w}}" for v, w in row) for row in padded) + "\n"

    def count(self, status: str) -> int:
        """How many results have this status."""
        return sum(result.status == status for result in self.results)

    @property
    def ran(self) -> int:
        """How many results are not skipped: the others say nothing about the target."""
        return len(self.results) - self.count("skip")

    @property
    def exit_status(self) -> int:
        """0 all hold, 1 a deviation or an error, 3 nothing ran, 130 interrupted."""
        if self.interrupted:
            return 130
        if self.count("fail") or self.count("error"):
            return 1
        return 0 if self.ran else 3

    def to_json(self) -> dict[str, Any]:
        """The report as one document of strict JSON: no NaN, no infinity, no NumPy.

        A z without bound (a difference where none is allowed) is null.
        """
        document: dict[str, Any] = plain(
            {
                "schema": 1,
                "minilora": self.minilora,
                "target": {
                    "name": self.name,
                    "version": self.version,
                    "dtypes": self.dtypes,
                    "conventions": self.conventions,
                },
                "profile": self.profile,
                "seed": self.seed,
                "summary": {
                    "passed": self.count("pass"),
                    "failed": self.count("fail"),
                    "loose": self.count("loose"),
                    "known": self.count("known"),
                    "skipped": self.count("skip"),
                    "errors": self.count("error"),
                    "ran": self.ran,
                    "total": len(self.results),
                    "interrupted": self.interrupted,
                    "exit_status": self.exit_status,
                    "seconds": round(self.seconds, 3),
                },
                "notes": self.notes,
                "results": [_result_json(result, self.seed) for result in self.results],
            }
        )
        return document

    def json(self) -> str:
        """:meth:`to_json` as text."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        # A list of numbers in one line. No string holds a line break, so none is touched.
        numbers = re.compile(r"\[\n\s+((?:null|[-+.\deE]+)(?:,\n\s+(?:null|[-+.\deE]+))*)\n\s+\]")
        return numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"

    def text(self, verbose: bool = False) -> str:
        """The report for a terminal of 80 columns, worst first.

        ``verbose`` gives each check its own line, and says all of each deviation.
        """
        return "\n".join(_text(self, verbose)) + "\n"

    def junit(self) -> str:
        """The report as JUnit XML."""
        from minilora.verify.report.pages import junit

        return junit(self)

    def html(self) -> str:
        """The report as one self-contained page."""
        from minilora.verify.report.html import html

        return html([self])

    def markdown(self, limit: int = MARKDOWN_BYTES) -> str:
        """The report for a page that renders Markdown, of so many bytes at most."""
        from minilora.verify.report.pages import markdown

        return markdown([self], limit)


def plain(value: Any) -> Any:
    """The value in the types of JSON; what is not finite becomes a string."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, float | np.generic):
        number = float(value)
        names = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
        return number if isfinite(number) else names[str(number)]
    return str(value)


def _judgement_json(judgement: Judgement) -> dict[str, Any]:
    entry = asdict(replace(judgement, picture=None))
    del entry["picture"]
    for name in ("z", "rms"):
        if not isfinite(entry[name]):
            entry[name] = None
    return entry


def _picture_json(picture: Picture | None) -> dict[str, Any] | None:
    if picture is None:
        return None
    rows = [[float(f"{z:.3g}") if isfinite(z) else None for z in row] for row in picture.z]
    return {"shape": picture.shape, "z": rows}


def _result_json(result: Result, seed: int) -> dict[str, Any]:
    counterexample = None
    if result.case:
        counterexample = {
            "case": result.case,
            "seed": seed,
            "arrays": [_judgement_json(judgement) for judgement in result.arrays],
            "smallest": result.smallest,
        }
    worst = None
    if result.worst is not None:
        worst = _judgement_json(result.worst) | {"case": result.worst_case}
        worst["picture"] = _picture_json(result.worst.picture)
    return {
        "check": result.check,
        "level": result.level,
        "title": result.title,
        "dtype": result.dtype,
        "relation": result.is_relation,
        "precision": asdict(result.precision),
        "status": result.status,
        "cases": result.cases,
        "skipped_cases": result.skipped_cases,
        "deviating_cases": result.deviating_cases,
        "only": result.only,
        "worst": worst,
        "faults": [asdict(fault) for fault in result.faults],
        "diagnosis": [asdict(each) for each in result.diagnosis],
        "counterexample": counterexample,
        "reason": result.reason,
        "known": None if result.known is None else asdict(result.known),
        "no_longer_fails": result.no_longer_fails,
        "note": result.note,
        "reproduce": result.reproduce,
        "seconds": round(result.seconds, 3),
    }


def rows(report: Report) -> list[tuple[str, dict[str, Result]]]:
    """The results of each check by dtype, the worst check first."""
    table: dict[str, dict[str, Result]] = {}
    for result in report.results:
        table.setdefault(result.check, {})[result.dtype] = result
    return sorted(table.items(), key=lambda row: min(r.severity for r in row[1].values()))


def columns(report: Report) -> list[str]:
    """The dtypes that occur, widest first."""
    seen = {result.dtype for result in report.results}
    return [dtype for dtype in DTYPES if dtype in seen]


def cell(result: Result | None) -> str:
    """A result in one word, with its worst z where that lies beyond the limit."""
    if result is None:
        return "-"
    word = result.status.upper() if result.status in ("fail", "error") else result.status
    worst = result.worst
    beyond = worst is not None and worst.excess > 1 and result.status in ("fail", "loose", "known")
    return f"{word} {_short(worst.z)}" if worst and beyond and isfinite(worst.z) else word


def _short(z: float) -> str:
    """Four characters, five from 10^10 on."""
    if z < 999.5:
        return f"{z:.3g}"
    figure, _, power = f"{z:.0e}".partition("e")
    return f"{figure}e{int(power)}" if abs(int(power)) < 100 else "huge"


def summary(report: Report) -> str:
    """The score in one sentence; what was skipped never counts as passed."""
    words = {"pass": "passed", "fail": "failed", "error": "in error", "skip": "skipped"}
    counts = [f"{n} {words.get(s, s)}" for s in reversed(STATUSES) if (n := report.count(s))]
    total = len(report.results)
    return f"{report.ran} of {total} checks ran (check × dtype): " + (
        f"{', '.join(counts) or 'nothing to check'}; {report.seconds:.1f} s"
    )


def _text(report: Report, verbose: bool) -> Iterator[str]:
    yield from wrapped(
        f"{report.name} {report.version}".strip()
        + f"  (profile {report.profile}, seed {report.seed})"
    )
    yield ""
    yield from _table(report, verbose)
    yield from _deviations(report, verbose)
    yield from _asides(report)
    yield ""
    if report.interrupted:
        yield "INTERRUPTED: this is what was checked so far."
    yield from wrapped(summary(report))
    if not report.ran:
        yield "Nothing was checked: every check was skipped."


def _table(report: Report, verbose: bool) -> Iterator[str]:
    """A line for each check that deviates, and one for those of a level that do alike."""
    dtypes = columns(report)
    lines = [
        (name, [cell(by_dtype.get(dtype)) for dtype in dtypes])
        for name, by_dtype in (rows(report) if verbose else grouped(report))
    ]
    longest = max((len(name) for name, _ in lines), default=0)
    width = min(longest + 1, WIDTH - CELL * len(dtypes) - 1)
    if dtypes:
        yield _row("", dtypes, width)
    for name, cells in lines:
        yield _row(name, cells, width)


def alike(checks: Sequence[tuple[str, str, T]], quiet: Callable[[T], Any]) -> list[tuple[str, T]]:
    """(id, level, what was found) of each check, those of a level that do alike taken together.

    ``quiet`` gives what they must have in common, or None of a check that stands for itself.
    """
    groups: dict[Any, list[tuple[str, T]]] = {}
    for check, level, found in checks:
        shared = quiet(found)
        key = check if shared is None else (level, shared)
        groups.setdefault(key, []).append((check, found))
    return [
        (f"{key[0]}: {len(group)} checks" if len(group) > 1 else group[0][0], group[0][1])
        for key, group in groups.items()
    ]


def grouped(report: Report) -> list[tuple[str, dict[str, Result]]]:
    """:func:`rows`, those of a level that pass or are skipped alike taken together."""

    def quiet(by_dtype: dict[str, Result]) -> Any:
        statuses = {dtype: result.status for dtype, result in by_dtype.items()}
        return tuple(statuses.items()) if {*statuses.values()} <= {"pass", "skip"} else None

    level = {result.check: result.level for result in report.results}
    return alike([(check, level[check], found) for check, found in rows(report)], quiet)


def _deviations(report: Report, verbose: bool) -> Iterator[str]:
    """Each deviation in full; of those of one diagnosis or fault the first, the others by name."""
    told: dict[tuple[str, ...], str] = {}
    unseen: dict[tuple[str, str], list[str]] = {}
    for check, by_dtype in rows(report):
        deviating = [r for r in by_dtype.values() if r.status in ("fail", "error", "loose")]
        # In full the worst one, or the one that a smallest counterexample was looked for.
        deviating.sort(key=lambda r: (r.severity[0], not (r.smallest or r.note), r.severity[1]))
        if not deviating:
            continue
        first, *others = deviating
        names = tuple(each.id for each in first.diagnosis)
        key = names or tuple(fault_words(fault) for fault in first.faults)
        if first.note == NOT_DIAGNOSED and not verbose:
            unseen.setdefault((first.level, first.status), []).append(check)
            continue
        yield ""
        if key in told and not verbose:
            says = f"{names[0] if names else first.faults[0].kind}, as in {told[key]}: "
            says += ", ".join(result.case.removeprefix(f"{check}:") for result in deviating)
            yield from wrapped(f"{first.status.upper():<5} {check}   {says}")
            continue
        if key:
            told[key] = check
        yield from block(report, first)
        before = _what(first)
        for result in others:
            what = _what(result)
            says = "the same" if what == before else what
            before = what
            yield from wrapped(
                f"also {result.dtype} {result.status}, case {result.case}: {says}", 2
            )
    for (level, status), checks in unseen.items():
        yield ""
        says = f"{len(checks)} more, as others come first: {', '.join(checks)}"
        yield from wrapped(f"{status.upper():<5} {level}   {says} (--verbose shows each)")


def _row(name: str, cells: list[str], width: int) -> str:
    overlong = f" {name}\n" if len(name) > width else ""
    name = "" if overlong else name
    return (overlong + f" {name:<{width}}" + "".join(f" {c:<{CELL - 1}}" for c in cells)).rstrip()


Fold = Callable[..., list[str]]


def wrapped(text: str, indent: int = 0, hang: int = 2, width: int = WIDTH) -> list[str]:
    """The text in lines of this width, those after the first further in."""
    before, after = " " * indent, " " * (indent + hang)
    return textwrap.wrap(
        text, width, initial_indent=before, subsequent_indent=after, break_on_hyphens=False
    )


def block(report: Report, result: Result, width: int = WIDTH) -> Iterator[str]:
    """All that is known of one deviation, in lines of 80 columns (but for the command)."""
    fold = partial(wrapped, width=width)
    how = result.precision
    precision = result.dtype
    if how.storage != result.dtype:
        precision += f" stored as {how.storage}"
    if how.accumulation != result.dtype:
        precision += f" ({how.accumulation} accumulation)"
    yield f"{result.status.upper():<5} {result.check}   {precision}"
    yield from fold(result.title, 2, 0)
    if result.deviating_cases:
        of = f"in {result.deviating_cases} of {result.cases} cases, first in {result.case}"
        yield from fold(of, 2)
    if result.only:
        yield from fold(f"only where {' and '.join(result.only)}", 2)
    yield from _array_lines(result, fold)
    for fault in result.faults:
        yield from fold(f"{fault_words(fault)}", 2)
        yield from fold(f"in {fault.cases} of {result.cases} cases, first in {fault.case}", 4)
    yield from _diagnosis_lines(result.diagnosis, fold)
    if result.smallest is not None:
        yield from fold(f"SMALLEST   {example(result.smallest)}", 2, 11)
    if result.note:
        yield from fold(result.note, 2)
    yield f"  REPRODUCE  {result.reproduce}"


def _diagnosis_lines(found: Sequence[Diagnosis], fold: Fold) -> Iterator[str]:
    if not found:
        return
    first, *others = found
    if first.id.startswith(STRUCTURE):
        for each in found:
            yield from fold(f"STRUCTURE  {each.sentence}", 2, 11)
        return
    says = f"{first.id}: {first.sentence} With that change every array of this check agrees"
    yield from fold(f"DIAGNOSIS  {says} (rms z {first.residual_z:.2g}).", 2, 11)
    if first.separating and not others:
        yield from fold(
            f"Case {first.separating} tells it from others that answer alike here.", 13, 0
        )
    if others:
        names = ", ".join(f"{each.id} ({each.sentence.rstrip('.')})" for each in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        if first.separating:
            by = f"by what was answered; {first.separating} would separate them"
        else:
            by = "by any case of this level"
        yield from fold(f"Not to be told apart from it {by}: {names}{more}.", 13, 0)


def _array_lines(result: Result, fold: Fold) -> Iterator[str]:
    off = [judged for judged in result.arrays if judged.verdict != "pass"]
    off.sort(key=lambda judged: -judged.excess)
    for judged in off[:_ARRAYS_SHOWN]:
        yield from fold(f"{judged.array}  {judgement_words(judged)}", 2)
        yield from fold(place_words(judged, result), 4)
    if rest := [judged.array for judged in off[_ARRAYS_SHOWN:]]:
        yield from fold(f"and in {len(rest)} more arrays: {tidy(', '.join(rest))}", 2)
    if ok := [judged.array for judged in result.arrays if judged.verdict == "pass"]:
        yield from fold(f"ok  {tidy(', '.join(ok), 200)}", 2)


def judgement_words(judged: Judgement) -> str:
    """How many elements of an array deviate, and by how much."""
    many = f"{judged.beyond} of {judged.elements} elements"
    if judged.sigma is None:
        return f"{many} differ, where not one may"
    z = f"{judged.z:.3g}" if isfinite(judged.z) else "unbounded"
    rms = f"{judged.rms:.3g}" if isfinite(judged.rms) else "unbounded"
    return (
        f"{many} beyond the limit: max z {z} (limit {judged.limit:g}), "
        f"rms {rms} (limit {judged.rms_limit:.3g})"
    )


def place_words(judged: Judgement, result: Result) -> str:
    """The worst element: where it is, what was got and wanted.

    Of two answers of the implementation either may be wrong: an array "one against another" has
    both names; of other arrays the check says it.
    """
    got, want = (
        f"{value:.{_DIGITS[result.dtype]}g}" if result.dtype in _DIGITS else repr(value)
        for value in (judged.got, judged.want)
    )
    sigma = "" if judged.sigma is None else f", sigma {judged.sigma:.3g}"
    where = f"at {list(judged.index)}: " if judged.index else ""
    one, against, other = judged.array.partition(" against ")
    if against:
        return f"{where}they disagree: {one} is {got}, {other} is {want}{sigma}"
    if result.is_relation:
        return f"{where}one of its answers is {got}, the other {want}{sigma}"
    return f"{where}got {got}, want {want}{sigma}"


def fault_words(fault: FaultSeen) -> str:
    """What the target did, in plain words."""
    kinds = {
        "raises": "it raises",
        "hangs": "it hangs",
        "changes its inputs": "it changes its inputs",
        "shape": "a wrong shape",
        "dtype": "a wrong dtype",
        "nan": "not finite",
        "missing": "incomplete",
        "crashes": "it ends in the middle",
        "protocol": "it breaks the protocol",
        "internal": "a fault of minilora, not of the target; please report it",
    }
    return f"{kinds.get(fault.kind, fault.kind)}: {fault.message}"


def example(smallest: Mapping[str, Any]) -> str:
    """The smallest counterexample in one line: the givens, then got and want."""
    values = plain(smallest)
    given = [f"{key}={value}" for key, value in values.items() if key not in ("got", "want")]
    answer = [f"{key} {values[key]}" for key in ("got", "want") if key in values]
    text = "  ->  ".join(part for part in (" ".join(given), ", ".join(answer)) if part)
    return re.sub(r"(?<=\d)\.0(?![\d.e])", "", text)  # 1 for 1.0: the exact lane has integers


def _what(result: Result) -> str:
    """The worst element, or the fault."""
    off = max(result.arrays, key=lambda judged: judged.excess, default=None)
    if off is not None and off.verdict != "pass":
        return f"{off.array} {place_words(off, result)}"
    return tidy("; ".join(fault_words(fault) for fault in result.faults), 200)


def named(report: Report, results: Sequence[Result]) -> str:
    """The checks of these results, and the dtypes where they are not all of a check's."""
    every = Counter(result.check for result in report.results)
    dtypes: dict[str, list[str]] = {}
    for result in results:
        dtypes.setdefault(result.check, []).append(result.dtype)
    return ", ".join(
        check if 1 < len(some) == every[check] else " ".join([check, *some])
        for check, some in dtypes.items()
    )


def declared(report: Report) -> dict[tuple[str, str], list[Result]]:
    """Of what is known, and of cases that were skipped: the words before and after the checks."""
    reasons: dict[tuple[str, str], list[Result]] = {}
    for result in report.results:
        known = result.known
        if known and result.status in ("known", "pass"):
            found = "known" if result.status == "known" else "no longer fails, though known:"
            says = f": {known.reason} {known.link}".rstrip()
            reasons.setdefault((f"{found} ", says), []).append(result)
        if result.skipped_cases and result.status != "skip":
            many = f" skipped {result.skipped_cases} of {result.cases} cases, {result.reason}"
            reasons.setdefault(("", many), []).append(result)
    return reasons


def _whole_levels(report: Report, results: Sequence[Result]) -> list[str]:
    """The checks of these results, and a level where they are all that it has."""
    every: dict[str, set[str]] = {}
    some: dict[str, dict[str, None]] = {}
    for result in report.results:
        every.setdefault(result.level, set()).add(result.check)
    for result in results:
        some.setdefault(result.level, {})[result.check] = None
    return [
        name
        for level, checks in some.items()
        for name in (
            [f"{level}: {len(checks)} checks"] if 1 < len(checks) == len(every[level]) else checks
        )
    ]


def _asides(report: Report) -> Iterator[str]:
    """Known deviations, and what was skipped and why: each reason once."""
    for (before, after), results in declared(report).items():
        yield ""
        yield from wrapped(f"{before}{named(report, results)}{after}")
    skipped: dict[str, list[Result]] = {}
    for result in report.results:
        if result.status == "skip":
            skipped.setdefault(result.reason, []).append(result)
    for reason, results in skipped.items():
        yield ""
        checks = tidy(", ".join(_whole_levels(report, results)), 400)
        yield from wrapped(f"skipped {len(results)}, {reason}: {checks}")
    for note in report.notes:
        yield ""
        yield from wrapped(f"note: {note}")


def write(path: str, text: str) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe takes it as it comes
        with open(path, "w", encoding="utf-8") as out:
            out.write(text)
        return
    path = os.path.realpath(path)  # a link goes on pointing at the file
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "x", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(beside)
        raise


def writable(path: str) -> str:
    """Why a file cannot be written at this path, or nothing."""
    if os.path.isdir(path):
        return f"{path} is a folder"
    if os.path.exists(path) and not os.path.isfile(path):
        return ""
    beside = f"{os.path.realpath(path)}.{os.getpid()}.tmp"
    try:
        with open(beside, "x", encoding="utf-8"):
            pass
        os.remove(beside)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""
