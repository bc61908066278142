"""A report as the text of a terminal: the worst first, with one line of cause on top."""

from __future__ import annotations

from collections.abc import Iterator

from minilora.audit.report.groups import (
    FEW,
    Group,
    causes,
    facts,
    groups,
    headline,
    inputs,
    right_line,
    severity_of,
)
from minilora.audit.result import Report
from minilora.forms.words import WIDTH, printable, wrapped

COLOURS = {"deviation": 31, "undecided": 35, "warning": 33, "note": 36, "ok": 32}
"""The colours of a terminal by severity."""

NARROW = 40
"""A terminal is taken to have so many columns at least."""


def text(report: Report, verbose: bool = False, width: int = WIDTH, colours: bool = False) -> str:
    """The report; ``verbose`` lists every entry, ``colours`` uses those of a terminal."""
    lines = []
    for severity, line in _lines(report, verbose, max(width, NARROW)):
        line = printable(line)
        lines.append(f"\x1b[{COLOURS[severity]}m{line}\x1b[0m" if severity and colours else line)
    return "\n".join(lines) + "\n"


def _lines(report: Report, verbose: bool, width: int) -> Iterator[tuple[str, str]]:
    """Each line with the severity that colours it, or ""."""

    def told(words: str, indent: int = 0, severity: str = "") -> Iterator[tuple[str, str]]:
        yield from ((severity, line) for line in wrapped(words, indent, width=width))

    yield from told(f"{report.audit}  {headline(report)}", 0, severity_of(report))
    for name, words in causes(report):
        yield from told(f"{name}  {words}")
    yield "", ""
    names = inputs(report)
    longest = max((len(name) for name, _ in names), default=0)
    for name, value in names:
        yield from told(f"{name:<{longest}}  {value}", 2)
    for group in groups(report.entries):
        if group.severity == "ok" and not verbose:
            continue
        yield "", ""
        for indent, words in _group(group, verbose):
            yield from told(words, indent, group.severity if indent == 0 else "")
    if right := right_line(report):
        yield "", ""
        yield from told(f"ok  {right}", 0, "ok")
    yield from told(facts(report))


def _group(group: Group, verbose: bool) -> Iterator[tuple[int, str]]:
    """A group's lines, each with its indent."""
    many = f"  ({len(group.entries)})" if len(group.entries) > 1 else ""
    yield 0, f"{group.severity}  {group.id}{many}".replace("undecided  undecided", "undecided")
    if verbose or len(group.entries) == 1:
        for entry in group.entries:
            yield 2, f"{entry.subject}: {entry.text}"
        return
    yield 2, "; ".join([group.text, *group.figures])
    places = group.places
    for place in places[:FEW]:
        yield 4, place
    if len(places) > FEW:
        yield 4, f"and {len(places) - FEW} more (--verbose lists all)"
    if group.example:
        yield 2, f"for example {group.example.subject}: {group.example.text}"
