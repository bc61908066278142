"""A report as the text of a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from minilora.verify.core.errors import tidy
from minilora.verify.report.result import NOT_DIAGNOSED, Result
from minilora.verify.report.words import (
    CELL,
    WIDTH,
    cell,
    check_names,
    columns,
    deviation_lines,
    fault_words,
    grouped_rows,
    known_and_skipped,
    level_names,
    place_words,
    rows,
    summary,
    wrapped,
)

if TYPE_CHECKING:
    from minilora.verify.report.report import Report

FAILING = ("fail", "error", "loose")


def text_lines(report: Report, verbose: bool) -> Iterator[str]:
    """The table, each deviation, what is known or was skipped, and the score."""
    yield from wrapped(
        f"{report.name} {report.version}".strip()
        + f"  (profile {report.profile}, seed {report.seed})"
    )
    yield ""
    yield from _table(report, verbose)
    yield from _deviations(report, verbose)
    yield from _known_skipped_and_notes(report)
    yield ""
    if report.interrupted:
        yield "INTERRUPTED: the results so far."
    yield from wrapped(summary(report))
    if not report.ran:
        yield "Nothing was checked: every check was skipped."


def _table(report: Report, verbose: bool) -> Iterator[str]:
    """A line for each check that deviates; one for all checks of a level with the same results."""
    dtypes = columns(report)
    lines = [
        (name, [cell(by_dtype.get(dtype)) for dtype in dtypes])
        for name, by_dtype in (rows(report) if verbose else grouped_rows(report))
    ]
    longest = max((len(name) for name, _ in lines), default=0)
    width = min(longest + 1, WIDTH - CELL * len(dtypes) - 1)
    if dtypes:
        yield _row("", dtypes, width)
    for name, cells in lines:
        yield _row(name, cells, width)


def _row(name: str, cells: list[str], width: int) -> str:
    overlong = f" {name}\n" if len(name) > width else ""
    name = "" if overlong else name
    return (overlong + f" {name:<{width}}" + "".join(f" {c:<{CELL - 1}}" for c in cells)).rstrip()


def _deviations(report: Report, verbose: bool) -> Iterator[str]:
    """Each deviation in full; of those with the same diagnosis or fault, the others by name."""
    told: dict[tuple[str, ...], str] = {}
    not_diagnosed: dict[tuple[str, str], list[str]] = {}
    for check, by_dtype in rows(report):
        failing = _worst_first(by_dtype)
        if not failing:
            continue
        first = failing[0]
        cause = _cause(first)
        if first.note == NOT_DIAGNOSED and not verbose:
            not_diagnosed.setdefault((first.level, first.status), []).append(check)
        elif cause in told and not verbose:
            yield ""
            yield from _as_before(check, failing, told[cause])
        else:
            if cause:
                told[cause] = check
            yield ""
            yield from deviation_lines(report, first)
            yield from _other_dtypes(failing)
    for (level, status), checks in not_diagnosed.items():
        yield ""
        listed = f"{len(checks)} more, not diagnosed: {', '.join(checks)}"
        yield from wrapped(f"{status.upper():<5} {level}   {listed} (--verbose shows each)")


def _worst_first(by_dtype: dict[str, Result]) -> list[Result]:
    """The results that fail: the worst first, or the one that was shrunk."""
    failing = [result for result in by_dtype.values() if result.status in FAILING]
    return sorted(failing, key=lambda r: (r.severity[0], not (r.smallest or r.note), r.severity[1]))


def _cause(result: Result) -> tuple[str, ...]:
    """The diagnoses, or else the faults, by which two results are the same."""
    return tuple(d.id for d in result.diagnosis) or tuple(map(fault_words, result.faults))


def _as_before(check: str, failing: list[Result], other: str) -> Iterator[str]:
    first = failing[0]
    name = first.diagnosis[0].id if first.diagnosis else first.faults[0].kind
    cases = ", ".join(result.case.removeprefix(f"{check}:") for result in failing)
    yield from wrapped(f"{first.status.upper():<5} {check}   {name}, as in {other}: {cases}")


def _other_dtypes(failing: list[Result]) -> Iterator[str]:
    """A line for each further dtype."""
    before = _worst_place(failing[0])
    for result in failing[1:]:
        place = _worst_place(result)
        shown = "the same" if place == before else place
        before = place
        yield from wrapped(f"also {result.dtype} {result.status}, case {result.case}: {shown}", 2)


def _worst_place(result: Result) -> str:
    """The worst element, or the fault."""
    worst = max(result.arrays, key=lambda judged: judged.excess, default=None)
    if worst is not None and worst.verdict != "pass":
        return f"{worst.array} {place_words(worst, result)}"
    return tidy("; ".join(map(fault_words, result.faults)), 200)


def _known_skipped_and_notes(report: Report) -> Iterator[str]:
    """Known deviations, and what was skipped and why: each reason once; then the notes."""
    for (before, after), results in known_and_skipped(report).items():
        yield ""
        yield from wrapped(f"{before}{check_names(report, results)}{after}")
    skipped: dict[str, list[Result]] = {}
    for result in report.results:
        if result.status == "skip":
            skipped.setdefault(result.reason, []).append(result)
    for reason, results in skipped.items():
        yield ""
        names = tidy(", ".join(level_names(report, results)), 400)
        yield from wrapped(f"skipped {len(results)}, {reason}: {names}")
    for note in report.notes:
        yield ""
        yield from wrapped(f"note: {note}")
