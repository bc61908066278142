"""Several reports as one table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from minilora.forms.words import wrapped
from minilora.verify.report.runs import Runs, headline
from minilora.verify.report.words import group_alike, summary

LETTERS = {"fail": "F", "error": "E", "loose": "L", "known": "K", "skip": "s", "pass": "."}


def matrix(runs: Runs, verbose: bool = False) -> str:
    """Several reports as one table for a terminal, worst first, with a letter for each dtype.

    ``verbose`` gives each check its own line.
    """
    lines = [*_heads(runs), "", *_table(runs, verbose), "", *_legend(runs), *_failures(runs)]
    return "\n".join(lines) + "\n"


def _heads(runs: Runs) -> Iterator[str]:
    """Each run with its number, its options and its score."""
    for i, (label, report) in enumerate(zip(runs.labels, runs.reports, strict=True)):
        yield from wrapped(f"{i + 1}  {label}: profile {report.profile}, seed {report.seed}", 0, 3)
        source = f"{runs.sources[i]}: " if runs.sources else ""
        interrupted = "INTERRUPTED: " if report.interrupted else ""
        yield from wrapped(f"{source}{interrupted}{summary(report)}", 3, 2)
    if runs.differ:
        yield from wrapped(f"The runs differ in {runs.differ}.", 0, 2)


def _table(runs: Runs, verbose: bool) -> Iterator[str]:
    """A row for each check, or for those of a level that all pass alike."""
    reports = range(len(runs.reports))
    level = {check: name for name, checks in runs.levels.items() for check in checks}
    rows = [
        (check, level[check], tuple(_letters(runs, check, i) for i in reports))
        for check in runs.checks
    ]

    def shared(row: tuple[str, ...]) -> tuple[str, ...] | None:
        return row if not verbose and {*"".join(row)} <= {*".s-"} else None

    table = group_alike(rows, shared)
    width = max((len(name) for name, _ in table), default=0)
    yield f" {'':<{width}}  " + "  ".join(f"{i + 1:<4}" for i in reports).rstrip()
    for name, row in table:
        yield f" {name:<{width}}  " + "  ".join(f"{letters:<4}" for letters in row).rstrip()


def _letters(runs: Runs, check: str, i: int) -> str:
    """A letter for each dtype of a check in the i-th report."""
    found = runs.found(check, i)
    return "".join(
        LETTERS[result.status] if (result := found.get(dtype)) else "-" for dtype in runs.dtypes
    )


def _legend(runs: Runs) -> Iterator[str]:
    letters = ", ".join(f"{letter} {status}" for status, letter in LETTERS.items())
    yield from wrapped(f"For each of {', '.join(runs.dtypes)}: {letters}, - not run.", 0, 2)


def _failures(runs: Runs) -> Iterator[str]:
    """The worst failure of each check in each report."""
    for i in range(len(runs.reports)):
        for check in runs.checks:
            failing = [r for r in runs.found(check, i).values() if r.status in ("fail", "error")]
            if not failing:
                continue
            worst = min(failing, key=lambda result: result.severity)
            yield ""
            yield from wrapped(f"{i + 1}  {worst.status.upper()} {worst.case}", 0, 3)
            yield from wrapped(headline(worst), 3, 2)
            if names := ", ".join(diagnosis.id for diagnosis in worst.diagnosis[:3]):
                yield from wrapped(f"DIAGNOSIS  {names}", 3, 11)
            yield f"   REPRODUCE  {worst.reproduce}"
