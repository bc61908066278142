"""The picture of modules by layers: how much of the change survived, and by which factor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import takewhile

from minilora.audit.report.groups import figure
from minilora.audit.report.places import place
from minilora.audit.report.signs import CLASSES, SIGNS
from minilora.audit.result import SEVERITIES, Entry
from minilora.forms.html import open_table, table_head

PICTURE_STYLE = """
:root { --b-fail: #f8c9d2; --b-error: #e0d2f5; --b-loose: #f3ddb3; --b-pass: #c6e6cf;
  --b-soft: #e4e8ec }
@media (prefers-color-scheme: dark) { :root { --b-fail: #6b2033; --b-error: #45306c;
  --b-loose: #5b4010; --b-pass: #1d4d2e; --b-soft: #2c333b } }
.picture { border-collapse: separate; border-spacing: 2px; width: auto }
.picture td, .picture tbody th { border: 0; line-height: 1.2; padding: .1rem .3rem }
.picture thead th { min-width: 3.6rem; overflow-wrap: anywhere; vertical-align: bottom }
.picture tbody th, .picture thead th:first-child { min-width: 0; overflow-wrap: normal;
  text-align: right; white-space: nowrap }
.picture td { border: 1px solid var(--line); color: var(--ink); font-weight: 400;
  white-space: nowrap;
  background: linear-gradient(to right, var(--bar) calc(var(--s, 0) * 100%), transparent 0) }
.picture td.none { border-color: transparent } .picture .fail { --bar: var(--b-fail) }
.picture .error { --bar: var(--b-error) } .picture .loose { --bar: var(--b-loose) }
.picture .pass { --bar: var(--b-pass) } .picture .soft { --bar: var(--b-soft) }
.picture td.fail { border: 2px solid var(--fail) } .picture td.error { border-style: dashed }
"""


def picture(entries: Iterable[Entry]) -> Iterator[str]:
    """A row for each layer, a column for each kind of module that something is said of.

    The bar of a cell is the share of the change's norm that survived; its words are the factor
    where that is not 1, else the share, else the rank.
    """
    cells: dict[tuple[int | None, str], list[Entry]] = {}
    for entry in entries:
        kind, layer = place(entry)
        cells.setdefault((layer, kind), []).append(entry)
    told = {kind for (_, kind), found in cells.items() if any(map(_says, found))}
    every = dict.fromkeys(kind for layer, kind in cells if layer is not None)
    kinds = [kind for kind in every if kind in told]
    layers = sorted({layer for layer, _ in cells if layer is not None})
    if not kinds or not layers:
        return
    yield '<h2 id="layers">Modules by layers</h2>'
    present = {_worst(found).severity for found in cells.values()}
    signs = [
        f'<span class="{CLASSES[severity]}">{SIGNS[severity]} {severity}</span>'
        for severity in SEVERITIES
        if severity in present
    ]
    yield f'<p class="soft">{", ".join(signs)}. The bar is the share of the change that survived '
    yield "the rounding of the stored numbers; the words are that share, or the factor by which "
    yield "the adapter is applied where that is not 1, or where neither is known its rank r. Kinds "
    yield "that no adapter changes, and that are right, are left out.</p>"
    yield open_table("Share of the change that survived, and factor", "picture")
    yield table_head(["layer", *_short(kinds)]).replace(".", ".<wbr>") + "<tbody>"
    for layer in layers:
        row = "".join(_cell(cells.get((layer, kind), [])) for kind in kinds)
        yield f'<tr><th scope="row">{layer}</th>{row}</tr>'
    yield "</tbody></table></div>"


def _says(entry: Entry) -> bool:
    """Whether an entry is of a change, or is not right."""
    return entry.severity != "ok" or "survived" in entry.figures or "factor" in entry.figures


def _worst(entries: Sequence[Entry]) -> Entry:
    return min(entries, key=lambda entry: SEVERITIES.index(entry.severity))


def _short(kinds: Sequence[str]) -> list[str]:
    """The kinds without the parts of the name that all of them begin and end with."""
    parts = [kind.split(".") for kind in kinds]

    def common(columns: Iterable[tuple[str, ...]]) -> int:
        return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))

    before = common(zip(*parts, strict=False)) if len(parts) > 1 else 0
    after = common(zip(*(part[:before:-1] for part in parts), strict=False))
    return [".".join(part[before : len(part) - after]) for part in parts]


def _cell(entries: Sequence[Entry]) -> str:
    """A cell: of several entries, such as experts, the worst."""
    if not entries:
        return '<td class="none"></td>'
    worst = _worst(entries)
    survived, factor = _numbers(entries, "survived"), _numbers(entries, "factor")
    ranks = _numbers(entries, "rank")
    off = max(factor, key=lambda f: abs(f - 1), default=1.0)
    shown = SIGNS[worst.severity]
    if worst.severity == "deviation" and off != 1:
        shown += f" ×{off:.3g}"
    elif survived:
        shown += f" {figure('survived', min(survived))}"
    elif ranks:
        shown += f" r {max(ranks):.0f}"
    share = min(max(min(survived, default=0.0), 0.0), 1.0)
    title = "; ".join(f"{entry.subject}: {entry.text}" for entry in [worst])
    return (
        f'<td class="{CLASSES[worst.severity]}" style="--s:{share:.3g}" title="{escape(title)}">'
        f"{escape(shown)}</td>"
    )


def _numbers(entries: Sequence[Entry], name: str) -> list[float]:
    found = (entry.figures.get(name) for entry in entries)
    return [float(x) for x in found if isinstance(x, int | float) and not isinstance(x, bool)]
