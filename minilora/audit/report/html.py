"""A report as one HTML page that needs nothing else: no script, no other file."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from minilora.audit.report.groups import (
    FEW,
    Group,
    causes,
    facts,
    groups,
    headline,
    inputs,
    severity_of,
)
from minilora.audit.report.picture import PICTURE_STYLE, picture
from minilora.audit.report.signs import CLASSES, SIGNS
from minilora.audit.result import Entry, Report
from minilora.forms.html import open_page, open_table, table_head
from minilora.forms.words import printable

_OWN_STYLE = """
dl { display: grid; gap: .1rem 1rem; grid-template-columns: max-content minmax(0, 1fr) }
dt { color: var(--soft) } dd { margin: 0 } .result { font-size: 1.15rem; margin: .3rem 0 }
.groups thead th { min-width: 2rem; overflow-wrap: normal } .groups td { overflow-wrap: anywhere }
.groups code { display: block }
"""


def html(report: Report) -> str:
    """The cause, what was found, a picture of modules by layers, and every entry."""
    return printable("\n".join(_page(report)) + "\n")


def _page(report: Report) -> Iterator[str]:
    title = f"minilora audit {report.audit}"
    worst = severity_of(report)
    yield from open_page(title, PICTURE_STYLE + _OWN_STYLE)
    yield f"<header><h1>{escape(title)}</h1>"
    yield f'<p class="result {CLASSES[worst]}">{SIGNS[worst]} {escape(headline(report))}</p>'
    if told := causes(report):
        yield f'<section class="found {CLASSES[worst]}">'
        for name, words in told:
            yield f"<p><strong>{name}</strong> {escape(words)}</p>"
        yield "</section>"
    yield "<dl>"
    for name, value in inputs(report):
        yield f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>"
    yield f'</dl><p class="soft">{escape(facts(report))}</p></header><main>'
    found = groups(report.entries)
    yield '<h2 id="found">What was found</h2>'
    yield from _table(found)
    yield from picture(report.entries)
    yield '<h2 id="all">Every entry</h2>'
    for number, group in enumerate(found):
        yield from _entries(group, number)
    yield "</main></body></html>"


def _table(found: list[Group]) -> Iterator[str]:
    yield open_table("Verdicts, worst first", "groups")
    yield table_head(["verdict", "number", "what and where"]) + "<tbody>"
    for number, group in enumerate(found):
        sign = f"{SIGNS[group.severity]} {escape(group.id)}"
        what = escape("; ".join([group.text, *group.figures]))
        places = "".join(f"<code>{escape(place)}</code>" for place in group.places[:FEW])
        more = f"and {len(group.places) - FEW} more" if len(group.places) > FEW else ""
        yield f'<tr><th scope="row" class="{CLASSES[group.severity]}">'
        yield f'<a href="#group-{number}">{sign}</a></th><td>{len(group.entries)}</td>'
        yield f"<td>{what}{places}{more}</td></tr>"
    yield "</tbody></table></div>"


def _entries(group: Group, number: int) -> Iterator[str]:
    """A group's entries, folded."""
    sign = (
        f'<span class="{CLASSES[group.severity]}">{SIGNS[group.severity]} {group.severity}</span>'
    )
    yield f'<details id="group-{number}"><summary>{sign} <h3>{escape(group.id)}</h3> '
    yield f'<span class="soft">{len(group.entries)}</span></summary>'
    yield open_table(f"All of {group.id}")
    yield table_head(["subject", "what", "figures"]) + "<tbody>"
    yield from map(_row, group.entries)
    yield "</tbody></table></div></details>"


def _row(entry: Entry) -> str:
    figures = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in entry.figures.items()
    )
    return (
        f'<tr><th scope="row">{escape(entry.subject)}</th><td>{escape(entry.text)}</td>'
        f'<td class="soft">{escape(figures)}</td></tr>'
    )
