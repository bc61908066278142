"""A report as Markdown, for a job's summary."""

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
)
from minilora.audit.result import Report
from minilora.forms.markdown import escaped, fenced, fitted


def markdown(report: Report, limit: int) -> str:
    """The cause and a table of what was found, then the names, while there is room.

    ``limit`` is in bytes; what is left out is counted.
    """
    found = [group for group in groups(report.entries) if group.severity != "ok"]
    head = "\n".join(_head(report, found)) + "\n"
    return fitted(head, [_details(group) for group in found if len(group.entries) > 1], limit)


def _head(report: Report, found: list[Group]) -> Iterator[str]:
    yield f"## minilora audit {report.audit}: {escaped(headline(report))}"
    yield ""
    for name, words in causes(report):
        yield f"- **{name}** {escaped(words)}"
    for name, value in inputs(report):
        yield f"- {name}: <code>{escaped(value)}</code>"
    if right := right_line(report):
        yield f"- ok: {escaped(right)}"
    yield f"- {escaped(facts(report))}"
    yield ""
    if found:
        yield "| severity | verdict | number | where | what |"
        yield "| --- | --- | --- | --- | --- |"
        for group in found:
            severity = group.severity
            shown = f"**{severity}**" if severity == "deviation" else severity
            where = "<br>".join(f"<code>{escaped(place)}</code>" for place in group.places[:FEW])
            more = "<br>…" if len(group.places) > FEW else ""
            what = escaped("; ".join([group.text, *group.figures]))
            yield (
                f"| {shown} | {escaped(group.id)} | {len(group.entries)} | {where}{more} | {what} |"
            )
        yield ""


def _details(group: Group) -> str:
    lines = "\n".join(f"{entry.subject}: {entry.text}" for entry in group.entries)
    title = f"{group.severity} {escaped(group.id)}: all {len(group.entries)}"
    return f"<details><summary>{title}</summary>\n\n{fenced(lines)}\n</details>\n"
