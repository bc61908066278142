"""Recorded results as one page: libraries by levels, releases over time, each run in short.

It needs no network. A script sorts the table of libraries; without it all is there, unsorted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html import escape

from minilora.findings import FINDINGS
from minilora.findings.reproduce import printed
from minilora.forms.html import open_page, open_table, table_head
from minilora.forms.words import printable
from minilora.studies.results.changes import (
    KINDS,
    Change,
    changes,
    common,
    deviating,
    latest,
    releases,
)
from minilora.studies.results.style import SCRIPT, STYLE
from minilora.studies.results.summary import DEVIATES, Deviation, Summary
from minilora.studies.results.text import WORDS, counted
from minilora.verify.report.result import STATUSES

Link = Callable[[str], str]
"""The address of a finding's page, by its id; "" where there is none."""

SIGNS = {"fail": "✗", "error": "!", "loose": "≈", "known": "k", "skip": "–", "pass": "✓"}
MOST = 24
"""So many checks of a change are named; of more the rest is folded."""


def page(summaries: Sequence[Summary], link: Link = lambda name: "") -> str:
    """A page of its own."""
    lines = [*open_page("LoRA in real libraries", STYLE), "<main>"]
    lines += [f"<h1>{TITLE}</h1>", fragment(summaries, link), "</main></body></html>"]
    return printable("\n".join(lines) + "\n")


TITLE = "LoRA in real libraries, checked"


def fragment(summaries: Sequence[Summary], link: Link) -> str:
    """What a page has below its title: in the documentation, too."""
    return printable("\n".join(_parts(summaries, link)))


def _parts(summaries: Sequence[Summary], link: Link) -> Iterator[str]:
    newest = latest(summaries)
    yield '<div class="results">'
    yield from _lead(newest)
    yield '<h2 id="libraries">Every library by every level</h2>'
    yield from _libraries(newest)
    for target, runs in releases(summaries).items():
        yield f'<h2 id="{_id(target)}-over-time">{escape(target)} over time</h2>'
        yield from _over_time(target, runs)
    yield '<h2 id="runs">The runs</h2>'
    yield from _runs(summaries, link)
    yield f"</div><script>{SCRIPT}</script>"


def _id(name: str) -> str:
    return escape(name.replace(" ", "-"))


def _lead(newest: Sequence[Summary]) -> Iterator[str]:
    """What was recorded, and how to read a cell."""
    checks = {check for run in newest for level in run.checks.values() for check in level}
    by = ", ".join(sorted({run.minilora for run in newest}))
    yield (
        f"<p>{len(newest)} libraries, or ways to use one, under up to {len(checks)} checks of "
        "<code>minilora verify</code>: each answer is compared with the equations of low-rank "
        "adaptation, and holds within what rounding explains. Recorded by minilora "
        f"{escape(by)}; the profile says how much was asked. Press a column to sort by it, a cell "
        "to see what is behind it.</p>"
    )
    keys = [
        ("pass", "hold"),
        ("known", "deviate as declared: each is a finding"),
        ("fail", "deviate, and nobody declared it"),
        ("error", "give no answer: often a setting that an old release lacks"),
        ("skip", "not asked: the library has no such thing"),
    ]
    signs = [
        f'<li><span class="key {status}" aria-hidden="true">{SIGNS[status]}</span> {words}</li>'
        for status, words in keys
    ]
    yield f'<ul class="keys">{"".join(signs)}</ul>'


def _levels(runs: Sequence[Summary]) -> list[str]:
    """All levels, in the order of the checks."""
    longest = sorted(runs, key=lambda run: -len(run.checks))
    return list(dict.fromkeys(level for run in longest for level in run.checks))


def _libraries(newest: Sequence[Summary]) -> Iterator[str]:
    """The newest release of each library: a row with a cell for each level."""
    levels = _levels(newest)
    yield open_table("Checks that hold, of those that were asked, by library and level", "grid")
    heads = ["library", "in all", *levels]
    yield table_head(heads) + "<tbody>"
    for run in newest:
        name = f'<a href="#{_id(run.name)}">{escape(run.target)}</a>'
        version = f'<span class="soft">{escape(run.version)}, {escape(run.profile)}</span>'
        yield (
            f'<tr><th scope="row" data-v="{escape(run.target)}">{name} {version}</th>'
            f"{_cell(run, run.total, 'in all')}"
        )
        yield "".join(_cell(run, run.count(level), level) for level in levels) + "</tr>"
    yield "</tbody></table></div>"


def _cell(run: Summary, counts: Counter[str], level: str) -> str:
    """How many hold of how many, what else there is, and a bar of it all; a link to the run."""
    asked = sum(counts.values()) - counts["skip"]
    name = escape(level)
    if not asked:
        words = "not asked" if counts else "no such level"
        return (
            f'<td class="skip" data-level="{name}" data-v="-1"><span aria-hidden="true">–</span>'
            f'<span class="hidden">{words}</span></td>'
        )
    off = [(status, f"{counts[status]} {WORDS[status]}") for status in DEVIATES if counts[status]]
    worst = min((s for s in counts if counts[s] and s != "skip"), key=STATUSES.index)
    at = f"{run.name}-{level}" if level in run.checks else run.name
    skipped = f"{counts['skip']} not asked" if counts["skip"] else ""
    more = "".join(f'<span class="off {status}">{words}</span>' for status, words in off)
    said = [f"{counts['pass']} of {asked} hold", *(words for _, words in off), skipped]
    title = ", ".join(filter(None, said))
    return (
        f'<td class="{worst}" data-level="{name}" data-v="{counts["pass"] / asked:.4f}">'
        f'<a href="#{_id(at)}" title="{escape(title)}">{counts["pass"]}'
        f'<span class="of"> of {asked}</span></a>{_bar(counts)}{more}</td>'
    )


def _bar(counts: Counter[str]) -> str:
    """The shares of all checks of a cell, drawn."""
    parts = [
        f'<i class="{status}" style="flex-grow:{counts[status]}"></i>'
        for status in ("pass", "known", "loose", "fail", "error", "skip")
        if counts[status]
    ]
    return f'<span class="bar" aria-hidden="true">{"".join(parts)}</span>'


def _over_time(target: str, runs: Sequence[Summary]) -> Iterator[str]:
    """The releases of one library: levels, what changed, and each check that deviates in one."""
    runs = common(runs)
    last, asked = runs[::-1], runs[0].total.total()
    yield (
        f"<p>{len(runs)} releases, the newest first: the {asked} checks that all were asked in the "
        f"profile {escape(runs[0].profile)}, each release with what was installed beside it. What "
        "a release does not have yet is not asked.</p>"
    )
    yield open_table(f"Checks that hold in each release of {target}, by level", "time")
    yield table_head(["level", *(run.version for run in last)]) + "<tbody>"
    rows = [("in all", [run.total for run in last])]
    rows += [(level, [run.count(level) for run in last]) for level in _levels(runs)]
    for level, counts in rows:
        cells = "".join(_cell(run, c, level) for run, c in zip(last, counts, strict=True))
        yield f'<tr><th scope="row">{escape(level)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
    yield f'<h3 id="{_id(target)}-changes">What changed</h3>'
    for change in reversed(changes(runs)):
        yield from _change(change)
    yield f'<h3 id="{_id(target)}-deviations">What deviates, and where</h3>'
    yield from _deviating(target, runs)


def _change(change: Change) -> Iterator[str]:
    before, after = escape(change.before.version), escape(change.after.version)
    yield f"<h4>{before} to {after}</h4>"
    said = False
    for kind, words in KINDS.items():
        checks: tuple[str, ...] = getattr(change, kind)
        if not checks:
            continue
        said = True
        # What deviates has its place in the run that shows it.
        run = change.before if kind == "mended" else change.after
        links = [_check_link(run, check) for check in checks]
        whole = len(checks) <= MOST and kind in ("new", "mended", "found")
        yield f'<details class="change"{" open" if whole else ""}>'
        yield f"<summary>{len(checks)} {words}</summary><p>{', '.join(links)}</p></details>"
    if not said:
        yield '<p class="soft">Nothing that the checks see.</p>'


def _check_link(run: Summary, check: str) -> str:
    name = f"<code>{escape(check)}</code>"
    if any(each.check == check for each in run.deviations):
        return f'<a href="#{_id(run.name)}-{escape(check)}">{name}</a>'
    return name


def _deviating(target: str, runs: Sequence[Summary]) -> Iterator[str]:
    yield open_table(f"Checks that deviate in some release of {target}", "marks-table")
    yield table_head(["check", *(run.version for run in reversed(runs))]) + "<tbody>"
    for level, check in deviating(runs):
        yield f'<tr><th scope="row">{escape(check).replace(".", ".<wbr>")}</th>'
        yield "".join(_mark(run, level, check) for run in reversed(runs)) + "</tr>"
    yield "</tbody></table></div>"


def _mark(run: Summary, level: str, check: str) -> str:
    status = run.status(level, check)
    sign = f'<span aria-hidden="true">{SIGNS[status]}</span>'
    sign += f'<span class="hidden">{WORDS[status]}</span>'
    if status in DEVIATES:
        sign = f'<a href="#{_id(run.name)}-{escape(check)}">{sign}</a>'
    return f'<td class="{status}">{sign}</td>'


def _runs(summaries: Sequence[Summary], link: Link) -> Iterator[str]:
    newest = {run.target: run for run in latest(summaries)}
    for run in sorted(summaries, key=lambda each: (each.target, [-n for n in each.release])):
        beside = f" with {run.beside}" if run.beside else ""
        yield f'<details class="run-of" id="{_id(run.name)}"><summary><h3>{escape(run.target)} '
        yield f"{escape(run.version)}, {escape(run.profile)}</h3> "
        yield f'<span class="soft">{escape(counted(run.total))}</span></summary>'
        yield (
            f"<p>{escape(run.target)} {escape(run.version)}{escape(beside)}: profile "
            f"{escape(run.profile)}, seed {run.seed}, {run.seconds:.0f} s, minilora "
            f"{escape(run.minilora)}. The same again:</p>"
        )
        again = f"minilora verify {run.target} --profile {run.profile} --seed {run.seed}"
        yield f'<code class="run">{escape(again)}</code>'
        if run.causes:
            yield f"<p>Probable causes: {escape(', '.join(run.causes))}.</p>"
        for level in run.checks:
            yield from _level(run, newest[run.target], level, link)
        yield "</details>"


def _level(run: Summary, newest: Summary, level: str, link: Link) -> Iterator[str]:
    yield f'<section id="{_id(run.name)}-{escape(level)}"><h4>{escape(level)}</h4>'
    yield f'<p class="soft">{escape(counted(run.count(level)))}</p>'
    checks = run.checks[level]
    for each in run.deviations:
        if each.check in checks:
            yield from _deviation(run, each, newest, link)
    for status in ("pass", "skip"):
        if names := [check for check in checks if run.status(level, check) == status]:
            listed = escape(", ".join(names))
            words = "Hold" if status == "pass" else "Not asked"
            yield f"<details><summary>{words}: {len(names)}</summary><p>{listed}</p></details>"
    yield "</section>"


def _deviation(run: Summary, each: Deviation, newest: Summary, link: Link) -> Iterator[str]:
    """One check that deviates: how, why, the smallest case, the command.

    What deviates in the newest release too, for the same finding, is told in full there.
    """
    same = any((d.check, d.findings) == (each.check, each.findings) for d in newest.deviations)
    told = run is not newest and same and each.status == "known"
    yield f'<div class="found {each.status}" id="{_id(run.name)}-{escape(each.check)}">'
    yield (
        f'<p><span class="{each.status}">{SIGNS[each.status]} {each.status}</span> '
        f"<code>{escape(each.check)}</code> <span class='soft'>{escape(each.dtype)}, in "
        f"{each.deviating} of {each.cases} cases</span></p>"
    )
    if told:
        at = f"#{_id(newest.name)}-{escape(each.check)}"
        yield f'<p>{escape(each.says)}; as <a href="{at}">in {escape(newest.version)}</a></p></div>'
        return
    yield f"<p>{escape(each.title)}</p>"
    yield f"<p>{escape('; '.join(filter(None, [each.says, each.place])))}</p>"
    for name in each.findings:
        yield f"<p>{_finding(name, link)}</p>"
    if each.reason and not each.findings:
        yield f"<p>Declared: {escape(each.reason)}</p>"
    if each.diagnosis:
        yield f"<p>Explained by {escape(', '.join(each.diagnosis))}.</p>"
    if each.smallest:
        yield f"<p>Smallest case: <code>{escape(each.smallest)}</code></p>"
    if each.reproduce:
        yield f'<code class="run">{escape(each.reproduce)}</code>'
    yield "</div>"


def _finding(name: str, link: Link) -> str:
    title = FINDINGS[name].title if name in FINDINGS else name
    at = link(name)
    shown = f'<a href="{escape(at)}">{escape(title)}</a>' if at else escape(title)
    said = printed().get(name)
    case = ""
    if said:
        case = f"; its script gets <code>{escape(said.got)}</code>"
        case += f" for <code>{escape(said.expected)}</code>"
    return f"Finding: {shown} <span class='soft'>({escape(name)})</span>{case}"
