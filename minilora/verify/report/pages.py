"""A report as JUnit XML, and one or several as a table of text or as a page of Markdown."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.report.report import (
    STATUSES,
    Report,
    Result,
    alike,
    block,
    cell,
    declared,
    fault_words,
    judgement_words,
    named,
    summary,
    wrapped,
)

LETTERS = {"fail": "F", "error": "E", "loose": "L", "known": "K", "skip": "s", "pass": "."}


class Runs:
    """Reports beside each other: their labels, and their results by level, check and report."""

    def __init__(self, reports: Sequence[Report], sources: Sequence[str] = ()) -> None:
        self.reports, self.sources = tuple(reports), tuple(sources)
        labels = [f"{report.name} {report.version.partition(' ')[0]}".strip() for report in reports]
        often = Counter(labels)
        self.labels = [
            f"{label} #{i + 1}" if often[label] > 1 else label for i, label in enumerate(labels)
        ]
        self._found: dict[str, list[dict[str, Result]]] = {}
        for i, report in enumerate(reports):
            for result in report.results:
                row = self._found.setdefault(result.check, [{} for _ in reports])
                row[i][result.dtype] = result
        seen = {dtype for row in self._found.values() for found in row for dtype in found}
        self.dtypes = [dtype for dtype in DTYPES if dtype in seen]

    @property
    def differ(self) -> str:
        """In what the runs differ but for their targets."""
        names = ("profile", "seed", "minilora")
        values = [(n, list(dict.fromkeys(getattr(r, n) for r in self.reports))) for n in names]
        return "; ".join(f"{n} ({', '.join(map(str, v))})" for n, v in values if len(v) > 1)

    def found(self, check: str, i: int) -> dict[str, Result]:
        """What the i-th report says of a check, by dtype."""
        return self._found[check][i]

    def results(self, check: str) -> list[Result]:
        """What all reports say of a check."""
        return [result for found in self._found[check] for result in found.values()]

    @property
    def checks(self) -> list[str]:
        """All checks, worst first."""
        return sorted(self._found, key=lambda check: min(r.severity for r in self.results(check)))

    @property
    def levels(self) -> dict[str, list[str]]:
        """The checks of each level, the level of the worst check first."""
        levels: dict[str, list[str]] = {}
        for check in self.checks:
            levels.setdefault(self.results(check)[0].level, []).append(check)
        return levels

    def score(self, checks: Sequence[str], i: int) -> tuple[str, str]:
        """The worst that the i-th report has among these checks, and how many of them hold."""
        worst = [
            min(found.values(), key=lambda result: result.severity).status
            for check in checks
            if (found := self.found(check, i))
        ]
        if not worst:
            return "absent", "not made"
        counts = Counter(worst)
        others = [f"{counts[s]} {s}" for s in STATUSES if counts[s] and s != "pass"]
        holds = f"{counts['pass']} of {len(worst)} hold" if others else f"all {len(worst)} hold"
        deviates = [status for status in worst if status not in ("skip", "pass")]
        sign = (
            min(deviates, key=STATUSES.index) if deviates else "pass" if counts["pass"] else "skip"
        )
        return sign, ", ".join([holds, *others])


def printable(text: str) -> str:
    """Without the characters that XML forbids, or that no file can hold."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _headline(result: Result) -> str:
    """A deviation in one line."""
    off = max(result.arrays, key=lambda judged: judged.excess, default=None)
    if off is not None and off.verdict != "pass":
        return f"{off.array}: {judgement_words(off)}"
    return "; ".join(fault_words(fault) for fault in result.faults)


def junit(report: Report) -> str:
    """One test case per check and dtype; what is known or skipped counts as skipped."""
    suite = ET.Element(
        "testsuite",
        name=printable(f"minilora verify {report.name} {report.version}".strip()),
        tests=str(len(report.results)),
        failures=str(report.count("fail")),
        errors=str(report.count("error")),
        skipped=str(report.count("skip") + report.count("known")),
        time=f"{report.seconds:.3f}",
    )
    for result in report.results:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=result.level,
            name=f"{result.check}[{result.dtype}]",
            time=f"{result.seconds:.3f}",
        )
        details = printable("\n".join(block(report, result)))
        if result.status in ("fail", "error"):
            tag = "failure" if result.status == "fail" else "error"
            ET.SubElement(case, tag, message=printable(_headline(result))).text = details
        elif result.status == "skip":
            ET.SubElement(case, "skipped", message=printable(result.reason))
        elif result.status == "known" and result.known:
            ET.SubElement(case, "skipped", message=printable(f"known: {result.known.reason}"))
        elif result.status == "loose":
            ET.SubElement(case, "system-out").text = details
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def text(runs: Runs, verbose: bool = False) -> str:
    """Several reports as one table for a terminal, worst first, with a letter for each dtype.

    ``verbose`` gives each check its own line.
    """
    return "\n".join(_text(runs, verbose)) + "\n"


def _text(runs: Runs, verbose: bool) -> Iterator[str]:
    for i, (label, report) in enumerate(zip(runs.labels, runs.reports, strict=True)):
        yield from wrapped(f"{i + 1}  {label}: profile {report.profile}, seed {report.seed}", 0, 3)
        source = f"{runs.sources[i]}: " if runs.sources else ""
        interrupted = "INTERRUPTED: " if report.interrupted else ""
        yield from wrapped(f"{source}{interrupted}{summary(report)}", 3, 2)
    if runs.differ:
        yield from wrapped(f"The runs differ in {runs.differ}.", 0, 2)
    yield ""
    reports = range(len(runs.reports))
    cells = {
        check: [
            "".join(
                LETTERS[found.status] if (found := runs.found(check, i).get(dtype)) else "-"
                for dtype in runs.dtypes
            )
            for i in reports
        ]
        for check in runs.checks
    }
    level = {check: name for name, checks in runs.levels.items() for check in checks}
    lines = [(check, level[check], tuple(cells[check])) for check in runs.checks]
    table = alike(lines, lambda row: row if not verbose and {*"".join(row)} <= {*".s-"} else None)
    width = max(map(len, (name for name, _ in table)), default=0)
    yield f" {'':<{width}}  " + "  ".join(f"{i + 1:<4}" for i in reports).rstrip()
    for name, row in table:
        yield f" {name:<{width}}  " + "  ".join(f"{marks:<4}" for marks in row).rstrip()
    yield ""
    means = ", ".join(f"{letter} {status}" for status, letter in LETTERS.items())
    yield from wrapped(f"For each of {', '.join(runs.dtypes)}: {means}, - not made.", 0, 2)
    for i in reports:
        for check in runs.checks:
            bad = [r for r in runs.found(check, i).values() if r.status in ("fail", "error")]
            if bad:
                worst = min(bad, key=lambda result: result.severity)
                yield ""
                yield from wrapped(f"{i + 1}  {worst.status.upper()} {worst.case}", 0, 3)
                yield from wrapped(_headline(worst), 3, 2)
                if names := ", ".join(each.id for each in worst.diagnosis[:3]):
                    yield from wrapped(f"DIAGNOSIS  {names}", 3, 11)
                yield f"   REPRODUCE  {worst.reproduce}"


def markdown(reports: Sequence[Report], limit: int, sources: Sequence[str] = ()) -> str:
    """A table of what deviates and what holds, then each deviation, while there is room.

    ``limit`` is in bytes; what is left out is counted.
    """
    runs = Runs(reports, sources)
    head = printable("\n".join(_markdown_table(runs)))
    parts = [printable(part) for part in _markdown_details(runs)]
    room = limit - len(head.encode()) - 200  # the last line's
    kept: list[str] = []
    for part in parts:
        room -= len(part.encode())
        if room < 0:
            break
        kept.append(part)
    left = len(parts) - len(kept)
    last = f"\n{left} of {len(parts)} deviations are left out here; the other formats have them.\n"
    whole = head + "".join(kept) + (last if left else "")
    return whole if len(whole.encode()) <= limit else last.lstrip() if limit >= 200 else ""


def _plain(words: object) -> str:
    """Text that Markdown takes as it is, in a cell of a table too."""
    line = " ".join(str(words).split())
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", escape(line, quote=False))


def _fenced(lines: str) -> str:
    """Code, between more backticks than it has in a row."""
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", lines)), 3)
    return f"{ticks}text\n{lines}\n{ticks}\n"


def _markdown_table(runs: Runs) -> Iterator[str]:
    yield f"## minilora verify: {_plain(', '.join(runs.labels))}"
    yield ""
    for i, (label, report) in enumerate(zip(runs.labels, runs.reports, strict=True)):
        source = f", from {_plain(runs.sources[i])}" if runs.sources else ""
        how = f"profile {_plain(report.profile)}, seed {report.seed}, minilora "
        interrupted = " **Interrupted: what was checked so far.**" if report.interrupted else ""
        yield (
            f"- **{_plain(label)}** ({how}{_plain(report.minilora)}{source}): "
            f"{_plain(summary(report))}{interrupted}"
        )
    if runs.differ:
        yield f"- The runs differ in {_plain(runs.differ)}."
    yield ""
    heads = runs.labels if len(runs.reports) > 1 else runs.dtypes
    yield f"| check | {' | '.join(map(_plain, heads))} |"
    yield "| --- |" + " --- |" * len(heads)
    level = {check: name for name, checks in runs.levels.items() for check in checks}
    lines = [(check, level[check], tuple(_markdown_cells(runs, check))) for check in runs.checks]
    quiet = {"pass", "skip", "\N{EN DASH}"}
    for name, cells in alike(lines, lambda row: row if {*row} <= quiet else None):
        yield f"| {_plain(name)} | {' | '.join(cells)} |"
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
                body = _fenced("\n".join(block(report, result)))
                yield f"<details><summary>{title}</summary>\n\n{body}\n</details>\n"
    for i, report in enumerate(runs.reports):
        whose = f"{_plain(runs.labels[i])}: " if len(runs.reports) > 1 else ""
        for (before, after), results in declared(report).items():
            yield f"\n{whose}{_plain(f'{before}{named(report, results)}{after}')}\n"
