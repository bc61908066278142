"""Reports as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from minilora.forms.markdown import escaped, fenced, fitted
from minilora.verify.report.causes import cause_lines
from minilora.verify.report.report import Report
from minilora.verify.report.result import Result
from minilora.verify.report.runs import Runs
from minilora.verify.report.words import (
    cell,
    check_names,
    deviation_lines,
    group_alike,
    known_and_skipped,
    levels,
    summary,
)


def markdown(reports: Sequence[Report], limit: int, sources: Sequence[str] = ()) -> str:
    """A table of what deviates and what holds, then each deviation, while there is room.

    ``limit`` is in bytes; what is left out is counted.
    """
    runs = Runs(reports, sources)
    return fitted("\n".join(_markdown_table(runs)), [*_markdown_details(runs)], limit)


def _markdown_table(runs: Runs) -> Iterator[str]:
    yield f"## minilora verify: {escaped(', '.join(runs.labels))}"
    yield ""
    for label, report in zip(runs.labels, runs.reports, strict=True):
        if found := report.causes:
            whose = f"{escaped(label)}: " if len(runs.reports) > 1 else ""
            for line in cause_lines(found):
                what, _, says = line.partition("  ")
                words = f"<code>{escaped(says)}</code>" if what == "REPRODUCE" else escaped(says)
                yield f"- {whose}**{what}** {words}"
            yield ""
    for i, (label, report) in enumerate(zip(runs.labels, runs.reports, strict=True)):
        source = f", from {escaped(runs.sources[i])}" if runs.sources else ""
        how = f"profile {escaped(report.profile)}, seed {report.seed}, minilora "
        interrupted = " **Interrupted: the results so far.**" if report.interrupted else ""
        yield (
            f"- **{escaped(label)}** ({how}{escaped(report.minilora)}{source}): "
            f"{escaped(summary(report))}. {escaped(levels(report))}{interrupted}"
        )
    if runs.differ:
        yield f"- The runs differ in {escaped(runs.differ)}."
    yield ""
    heads = runs.labels if len(runs.reports) > 1 else runs.dtypes
    yield f"| check | {' | '.join(map(escaped, heads))} |"
    yield "| --- |" + " --- |" * len(heads)
    level = {check: name for name, checks in runs.levels.items() for check in checks}
    lines = [(check, level[check], tuple(_markdown_cells(runs, check))) for check in runs.checks]
    quiet = {"pass", "skip", "\N{EN DASH}"}
    for name, cells in group_alike(lines, lambda row: row if {*row} <= quiet else None):
        yield f"| {escaped(name)} | {' | '.join(cells)} |"
    yield ""
    yield ""


def _markdown_cells(runs: Runs, check: str) -> Iterator[str]:
    def shown(result: Result | None) -> str:
        says = "\N{EN DASH}" if result is None else cell(result)
        return f"**{says}**" if says[:1].isupper() else says

    if len(runs.reports) == 1:
        yield from (shown(runs.found(check, 0).get(dtype)) for dtype in runs.dtypes)
        return
    for i in range(len(runs.reports)):
        found = runs.found(check, i)
        words = {dtype: shown(result).split(" ")[0].strip("*") for dtype, result in found.items()}
        if len({*words.values()}) <= 1:
            yield next(iter(words.values()), "\N{EN DASH}")
        else:
            yield ", ".join(f"{dtype} {word}" for dtype, word in words.items())


def _markdown_details(runs: Runs) -> Iterator[str]:
    for check in runs.checks:
        for i, report in enumerate(runs.reports):
            found = sorted(runs.found(check, i).values(), key=lambda result: result.severity)
            off = [r for r in found if r.status in ("fail", "error", "loose")]
            whose = f"{escape(runs.labels[i])}: " if len(runs.reports) > 1 else ""
            for result in off:
                title = f"{whose}{result.status} <code>{escape(check)}</code> {result.dtype}"
                body = fenced("\n".join(deviation_lines(report, result)))
                yield f"<details><summary>{title}</summary>\n\n{body}\n</details>\n"
    for i, report in enumerate(runs.reports):
        whose = f"{escaped(runs.labels[i])}: " if len(runs.reports) > 1 else ""
        for (before, after), results in known_and_skipped(report).items():
            yield f"\n{whose}{escaped(f'{before}{check_names(report, results)}{after}')}\n"
