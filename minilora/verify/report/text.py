"""A report as the text of a terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from minilora.forms.words import WIDTH, wrapped
from minilora.verify.core.errors import tidy
from minilora.verify.report.causes import cause_lines
from minilora.verify.report.result import NOT_DIAGNOSED, Result
from minilora.verify.report.words import (
    CELL,
    Fold,
    cell,
    check_names,
    columns,
    deviation_lines,
    fault_words,
    grouped_rows,
    known_and_skipped,
    level_names,
    levels,
    nothing_checked,
    place_words,
    rows,
    summary,
)

if TYPE_CHECKING:
    from minilora.verify.report.report import Report

FAILING = ("fail", "error", "loose")

FEW = 6
"""So many checks, or reasons, are named one by one."""


def text_lines(report: Report, verbose: bool, width: int = WIDTH) -> Iterator[str]:
    """The probable cause; the score; the table; each cause in full; what is known or skipped."""
    fold = partial(wrapped, width=width)
    yield from fold(
        f"{report.name} {report.version}".strip()
        + f"  (profile {report.profile}, seed {report.seed})"
    )
    if report.interrupted:
        yield "INTERRUPTED: the results so far."
    yield from _causes(report, fold)
    yield from fold(summary(report))
    yield from fold(levels(report))
    if not report.ran:
        yield from fold(nothing_checked(report))
    yield ""
    yield from _table(report, verbose, width)
    yield from _deviations(report, verbose, width)
    yield from _known_skipped_and_notes(report, verbose, fold)


PAINTS = {
    "FAIL": "1;31",
    "ERROR": "1;31",
    "LOOSE": "33",
    "loose": "33",
    "known": "33",
    "pass": "32",
    "skip": "2",
}
"""The colours of a terminal by verdict."""

_CELL = rf"(?:{'|'.join(PAINTS)}|-)(?: [\d.]\S*)?"
_ROW = re.compile(rf"^ \S.*?(?P<cells>(?: +{_CELL})+)$")
_HEAD = re.compile("^ *[A-Z]{2,}(?: [A-Z]+)?(?=  )")
"""PROBABLE CAUSE, REPRODUCE and the like."""


def painted(line: str) -> str:
    """A line with the colours of a terminal: verdicts, and the words that say what follows."""

    def paint(found: re.Match[str]) -> str:
        return f"\x1b[{PAINTS[found[0]]}m{found[0]}\x1b[0m"

    words = re.compile(rf"\b({'|'.join(PAINTS)})\b")
    if row := _ROW.match(line):
        at = row.start("cells")
        return line[:at] + words.sub(paint, line[at:])
    if line.startswith(("FAIL ", "ERROR ", "LOOSE ")):
        return words.sub(paint, line, count=1)
    return _HEAD.sub(lambda found: f"\x1b[1m{found[0]}\x1b[0m", line)


def _causes(report: Report, fold: Fold) -> Iterator[str]:
    """The probable cause, how sure it is, where it shows, and the command that shows it."""
    if found := report.causes:
        yield ""
        for line in cause_lines(found):
            if line.startswith("REPRODUCE"):
                yield f"  {line}"
            else:
                yield from fold(line, 0 if line.startswith("PROBABLE") else 2, 4)
        yield ""


def _table(report: Report, verbose: bool, room: int) -> Iterator[str]:
    """A line for each check that deviates; one for all checks of a level with the same results."""
    dtypes = columns(report)
    lines = [
        (name, [cell(by_dtype.get(dtype)) for dtype in dtypes])
        for name, by_dtype in (rows(report) if verbose else _asked_rows(report))
    ]
    longest = max((len(name) for name, _ in lines), default=0)
    width = min(longest + 1, room - CELL * len(dtypes) - 1)
    if dtypes:
        yield _row("", dtypes, width)
    for name, cells in lines:
        yield _row(name, cells, width)


def _asked_rows(report: Report) -> list[tuple[str, dict[str, Result]]]:
    """What is skipped comes last; levels of which nothing was asked are named above the table."""
    asked = {result.level for result in report.results if result.status != "skip"}

    def is_skipped(row: tuple[str, dict[str, Result]]) -> bool:
        return all(result.status == "skip" for result in row[1].values())

    found = grouped_rows(report)
    kept = [row for row in found if {result.level for result in row[1].values()} & asked]
    return sorted(kept or found, key=is_skipped)


def _row(name: str, cells: list[str], width: int) -> str:
    overlong = f" {name}\n" if len(name) > width else ""
    name = "" if overlong else name
    return (overlong + f" {name:<{width}}" + "".join(f" {c:<{CELL - 1}}" for c in cells)).rstrip()


def _deviations(report: Report, verbose: bool, width: int) -> Iterator[str]:
    """Of each cause the first deviation in full, and the names of the checks that follow."""
    fold = partial(wrapped, width=width)
    if verbose:
        for _, by_dtype in rows(report):
            if failing := _worst_first(by_dtype):
                yield from _whole(report, failing, width)
        return
    by_check = dict(rows(report))
    for cause in report.causes:
        if cause.id:
            yield from _whole(report, _worst_first(by_check[cause.first.check]), width)
            if others := [check for check in cause.checks if check != cause.first.check]:
                more = f"{len(others)} more check{'s' * (len(others) > 1)}"
                listed = _shortened(report, cause.results, others)
                yield from fold(f"The same cause in {more}: {listed}", 2)
        else:
            yield from _not_explained(report, cause.checks, width)
    for _, by_dtype in rows(report):
        if (failing := _worst_first(by_dtype)) and failing[0].status == "loose":
            yield from _whole(report, failing, width)


def _whole(report: Report, failing: list[Result], width: int) -> Iterator[str]:
    """A check's deviation in full, and a line for each further dtype."""
    yield ""
    yield from deviation_lines(report, failing[0], width)
    yield from _other_dtypes(failing, width)


def _not_explained(report: Report, checks: list[str], width: int) -> Iterator[str]:
    """Each check that nothing explains, those that were not looked into by name."""
    by_check = dict(rows(report))
    named: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        failing = _worst_first(by_check[check])
        if failing[0].note == NOT_DIAGNOSED:
            named.setdefault((failing[0].level, failing[0].status), []).append(check)
        else:
            yield from _whole(report, failing, width)
    for (level, status), some in named.items():
        yield ""
        listed = f"{len(some)} more, not diagnosed: {', '.join(some)}"
        said = f"{status.upper():<5} {level}   {listed} (--verbose shows each)"
        yield from wrapped(said, width=width)


def _shortened(report: Report, results: Sequence[Result], checks: list[str]) -> str:
    """The checks by name; of many, how many of each level."""
    chosen = {result.check: result for result in results if result.check in checks}
    if len(chosen) <= FEW:
        return ", ".join(chosen)
    counts = Counter(result.level for result in chosen.values())
    return ", ".join(f"{level} {count}" for level, count in counts.items())


def _worst_first(by_dtype: dict[str, Result]) -> list[Result]:
    """The results that fail: the worst first, or the one that was shrunk."""
    failing = [result for result in by_dtype.values() if result.status in FAILING]
    return sorted(failing, key=lambda r: (r.severity[0], not (r.smallest or r.note), r.severity[1]))


def _other_dtypes(failing: list[Result], width: int) -> Iterator[str]:
    """A line for each further dtype."""
    before = _worst_place(failing[0])
    for result in failing[1:]:
        place = _worst_place(result)
        shown = "the same" if place == before else place
        before = place
        said = f"also {result.dtype} {result.status}, case {result.case}: {shown}"
        yield from wrapped(said, 2, width=width)


def _worst_place(result: Result) -> str:
    """The worst element, or the fault."""
    worst = max(result.arrays, key=lambda judged: judged.excess, default=None)
    if worst is not None and worst.verdict != "pass":
        return f"{worst.array} {place_words(worst, result)}"
    return tidy("; ".join(map(fault_words, result.faults)), 200)


def _known_skipped_and_notes(report: Report, verbose: bool, fold: Fold) -> Iterator[str]:
    """Known deviations, what was skipped and why, and the notes."""
    for (before, after), results in known_and_skipped(report).items():
        yield ""
        yield from fold(f"{before}{check_names(report, results)}{after}")
    yield from _skipped(report, verbose, fold)
    for note in report.notes:
        yield ""
        yield from fold(f"note: {note}")


def _skipped(report: Report, verbose: bool, fold: Fold) -> Iterator[str]:
    """What was skipped, by its reason: in short, unless all is asked for."""
    skipped: dict[str, list[Result]] = {}
    for result in report.results:
        if result.status == "skip":
            reason = result.reason if verbose else _kind(result.reason)
            skipped.setdefault(reason, []).append(result)
    if not skipped:
        return
    yield ""
    if verbose:
        for reason, results in skipped.items():
            listed = ", ".join(level_names(report, results))
            yield from fold(f"skipped {len(results)}, {reason}: {listed}")
        return
    told = [
        f"{len(results)}, {reason}: {tidy(', '.join(level_names(report, results)), 80)}"
        for reason, results in skipped.items()
    ]
    if len(told) > FEW:
        told = [
            f"{reason.removeprefix('not supported: ')} ({len(results)})"
            for reason, results in skipped.items()
        ]
        told[0] = f"{report.count('skip')}: {told[0]}"
    yield from fold(f"skipped {'; '.join(told)}")


def _kind(reason: str) -> str:
    """A reason without the values in it."""
    return tidy(re.split(r"[\[{(\d]", reason)[0].rstrip(" :,'\""), 60)
