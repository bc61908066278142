"""One or several reports as one HTML page that needs nothing else: no script, no other file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from minilora.forms.html import open_page, open_table, table_head
from minilora.forms.words import printable
from minilora.verify.core.types import Judgement, Picture
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.report.causes import cause_lines
from minilora.verify.report.mistakes import issue_of, linked, named, of_result
from minilora.verify.report.report import Report
from minilora.verify.report.result import STATUSES, Result
from minilora.verify.report.runs import Runs
from minilora.verify.report.words import (
    cell,
    deviation_lines,
    judgement_words,
    place_words,
    summary,
)

SIGNS = {"fail": "✗", "error": "!", "loose": "≈", "known": "k", "skip": "–", "pass": "✓"}
ABSENT = "·"
MEANS = {
    "fail": "deviates by more than rounding",
    "error": "no answer to compare",
    "loose": "within twice the unit roundoff",
    "known": "a declared deviation",
    "skip": "not supported",
    "pass": "within rounding",
}
DEVIATES = ("fail", "error", "loose", "known")


def html(reports: Sequence[Report], sources: Sequence[str] = ()) -> str:
    """The levels and checks of each implementation, worst first, each with its results.

    ``sources`` are the files that the reports were read from.
    """
    runs = Runs(reports, sources)
    return printable("\n".join(_page(runs)) + "\n")


def _page(runs: Runs) -> Iterator[str]:
    title = ", ".join(runs.labels)
    yield from open_page(f"minilora verify {title}")
    yield f"<header><h1>{escape(title)}</h1></header><main>"
    mutants = named(runs.reports)
    yield from _causes(runs, mutants)
    if len(runs.reports) == 1:
        (report,) = runs.reports
        if more := report.version.partition(" ")[2]:
            yield f"<p>{escape(more)}</p>"
        yield f"<p>Profile {escape(report.profile)}, seed {report.seed}, checked by minilora "
        yield f"{escape(report.minilora)}. {escape(summary(report))}</p>"
    yield from _runs(runs)
    yield '<h2 id="levels">Levels</h2>'
    yield from _overview(runs)
    yield '<h2 id="checks">Checks</h2>'
    yield from _legend(runs)
    for i, (level, checks) in enumerate(runs.levels.items()):
        yield from _level(runs, level, checks, first=i == 0)
    yield from _mistakes(mutants)
    yield "</main></body></html>"


def _mistakes(mutants: Sequence[Mutant]) -> Iterator[str]:
    """What each known mistake is that the page names, and where it was reported."""
    if mutants:
        yield '<h2 id="mistakes">Known mistakes</h2>'
    for mutant in mutants:
        yield f'<section id="mistake-{escape(mutant.id)}"><h3><code>{escape(mutant.id)}</code></h3>'
        yield f"<p>Computed instead: {escape(mutant.formula)}</p>"
        for right, wrong in mutant.edits.items():
            yield f"<p>In the place of <code>{escape(' '.join(right.split()))}</code> stands "
            yield f"<code>{escape(' '.join(wrong.split()))}</code>.</p>"
        if mutant.seen:
            yield f"<p>Seen in {', '.join(map(_seen, mutant.seen))}.</p>"
        yield f"<p>More: <code>minilora explain {escape(mutant.id)}</code></p></section>"


def _seen(name: str) -> str:
    """A public report of a mistake, with a link where it is an issue."""
    at = issue_of(name)
    return f'<a href="{escape(at)}">{escape(name)}</a>' if at else escape(name)


def _causes(runs: Runs, mutants: Sequence[Mutant]) -> Iterator[str]:
    """The probable cause of what fails in each report."""
    for label, report in zip(runs.labels, runs.reports, strict=True):
        if not (found := report.causes):
            continue
        yield f'<section class="found {found[0].first.status}">'
        if len(runs.reports) > 1:
            yield f"<p><strong>{escape(label)}</strong></p>"
        for line in cause_lines(found):
            what, _, says = line.partition("  ")
            words = linked(escape(says), mutants) if what != "REPRODUCE" else escape(says)
            words = f'<span class="run">{words}</span>' if what == "REPRODUCE" else words
            yield f"<p><strong>{what}</strong> {words}</p>"
        yield "</section>"


def _runs(runs: Runs) -> Iterator[str]:
    if len(runs.reports) > 1:
        yield "<h2>Runs</h2><ul>"
        for i, report in enumerate(runs.reports):
            more = report.version.partition(" ")[2]
            how = f"{more} profile {report.profile}, seed {report.seed}, minilora {report.minilora}"
            source = f", from {runs.sources[i]}" if runs.sources else ""
            yield f"<li><strong>{escape(runs.labels[i])}</strong> {escape(how.strip() + source)}. "
            yield f"{escape(summary(report))}</li>"
        yield "</ul>"
    if runs.differ:
        yield f"<p><strong>The runs differ in {escape(runs.differ)}.</strong></p>"
    for label, report in zip(runs.labels, runs.reports, strict=True):
        prefix = f"{escape(label)}: " if len(runs.reports) > 1 else ""
        if report.interrupted:
            yield f"<p><strong>{prefix}Interrupted: the results so far.</strong></p>"
        if report.conventions:
            choices = ", ".join(f"{key} = {value}" for key, value in report.conventions.items())
            yield f"<p>{prefix}conventions: {escape(choices)}</p>"
        if report.fixed:
            values = ", ".join(f"{key} = {value}" for key, value in report.fixed.items())
            yield f"<p>{prefix}fixed: {escape(values)}</p>"
        yield from (f"<p>{prefix}{escape(note)}</p>" for note in report.notes)


def _overview(runs: Runs) -> Iterator[str]:
    yield open_table("Checks that pass, of those of each level")
    yield table_head(["level", *runs.labels]) + "<tbody>"
    for level, checks in runs.levels.items():
        name = escape(level)
        yield f'<tr><th scope="row"><a href="#level-{name}">{name}</a></th>'
        for i in range(len(runs.reports)):
            worst, words = runs.score(checks, i)
            yield f'<td class="{worst}">{SIGNS.get(worst, ABSENT)} {escape(words)}</td>'
        yield "</tr>"
    yield "</tbody></table></div>"


def _legend(runs: Runs) -> Iterator[str]:
    present = [status for status in STATUSES if any(r.count(status) for r in runs.reports)]
    signs = [
        f'<span class="no"><span class="{status}">{SIGNS[status]} {status}</span> '
        f"{MEANS[status]}</span>"
        for status in present
    ]
    yield f'<p class="soft">{", ".join(signs)}, {ABSENT} not run.'
    if len(runs.reports) > 1:
        yield f"A cell has a sign for each of {', '.join(runs.dtypes)}."
    yield "</p>"


def _level(runs: Runs, level: str, checks: Sequence[str], first: bool) -> Iterator[str]:
    name = escape(level)
    found = [result for check in checks for result in runs.results(check)]
    worst = min(found, key=lambda result: result.severity).status
    opened = " open" if worst in DEVIATES else ""
    yield f'<details class="level"{opened}><summary><h3>{name}</h3> '
    yield f'<span class="{worst}">{SIGNS[worst]} {worst}</span> '
    yield f'<span class="soft">{len(checks)} check{"s" * (len(checks) > 1)}</span></summary>'
    yield f'<div id="level-{name}">'
    yield open_table(f"Checks of {level}, worst first")
    many = len(runs.reports) > 1
    yield table_head(["check", *(runs.labels if many else runs.dtypes)]) + "<tbody>"
    for check in checks:
        link = f'<a href="#{escape(check)}">{escape(check).replace(".", ".<wbr>")}</a>'
        yield f'<tr><th scope="row">{link}</th>'
        if many:
            yield "".join(_marks(runs, check, i) for i in range(len(runs.reports)))
        else:
            yield "".join(_cell(runs.found(check, 0).get(dtype)) for dtype in runs.dtypes)
        yield "</tr>"
    yield "</tbody></table></div>"
    for i, check in enumerate(checks):
        yield from _details(runs, check, opened=first and i == 0)
    yield "</div></details>"


def _cell(result: Result | None) -> str:
    if result is None:
        return f'<td class="absent">{ABSENT}<span class="hidden"> not run</span></td>'
    word, _, z = cell(result).partition(" ")
    z = f' <span class="no">{z}</span>' if z else ""
    return (
        f'<td class="{result.status}"><span class="no"><span aria-hidden="true">'
        f"{SIGNS[result.status]}</span> {word}</span>{z}</td>"
    )


def _marks(runs: Runs, check: str, i: int) -> str:
    """One cell of the matrix: a sign for each dtype, with a link where something deviates."""
    found = runs.found(check, i)
    signs, words = [], []
    for dtype in runs.dtypes:
        result = found.get(dtype)
        status = result.status if result else "absent"
        signs.append(f'<span class="{status}">{SIGNS.get(status, ABSENT)}</span>')
        words += [f"{dtype} {cell(result)}"] if result else []
    text = f'<span class="hidden">{escape(", ".join(words) or "not run")}</span>'
    shown = f'<span class="marks" aria-hidden="true">{"".join(signs)}</span>{text}'
    if any(result.status in DEVIATES for result in found.values()):
        worst = min(found.values(), key=lambda result: result.severity)
        z = cell(worst).partition(" ")[2]
        z = f' <span class="no {worst.status}" aria-hidden="true">{z}</span>' if z else ""
        shown = f'<a href="#{escape(check)}@{i + 1}">{shown}</a>{z}'
    return f"<td>{shown}</td>"


def _details(runs: Runs, check: str, opened: bool) -> Iterator[str]:
    """The results of a check; the worst check of all is open if it fails."""
    results = runs.results(check)
    worst = min(results, key=lambda result: result.severity)
    shown = " open" if opened and worst.status in ("fail", "error") else ""
    yield f'<details{shown}><summary><span class="{worst.status}">{SIGNS[worst.status]} '
    yield f"{worst.status}</span> <h4><code>{escape(check)}</code></h4> "
    yield f'<span class="soft">{escape(worst.title)}</span></summary><div id="{escape(check)}">'
    for i, (label, report) in enumerate(zip(runs.labels, runs.reports, strict=True)):
        found = sorted(runs.found(check, i).values(), key=lambda result: result.severity)
        if not found:
            continue
        yield f'<section id="{escape(check)}@{i + 1}">'
        if len(runs.reports) > 1:
            yield f"<h5>{escape(label)}</h5>"
        for j, result in enumerate(found):
            yield from _result(report, result, whole=j == 0)
        if passing := [_passes(result) for result in found if result.status == "pass"]:
            yield f"<p>{'; '.join(passing)}.</p>"
        yield "</section>"
    yield "</div></details>"


def _result(report: Report, result: Result, whole: bool) -> Iterator[str]:
    """A deviation, folded unless it is the worst of its check; or why it was skipped."""
    if result.status in DEVIATES:
        if not whole:
            yield f'<details><summary><span class="{result.status}">{SIGNS[result.status]} '
            yield f"{escape(cell(result))}</span> {result.dtype}</summary>"
        yield f'<div class="found {result.status}">'
        if result.worst and result.worst.picture and result.worst.elements > 1:
            yield from _figure(result, result.worst, result.worst.picture)
        yield from _lines(report, result)
        yield "</div>" + ("" if whole else "</details>")
    if result.known:
        no_more = ", but no longer fails" if result.no_longer_fails else ""
        text = f"{result.known.reason} {result.known.link}".rstrip()
        yield f"<p>{result.dtype}: known{no_more}. {escape(text)}</p>"
    if result.reason:
        many = f"{result.skipped_cases} of {result.cases} cases " if result.cases else ""
        yield f"<p>{result.dtype}: {many}skipped, {escape(result.reason)}</p>"


def _passes(result: Result) -> str:
    z = f", largest z {result.worst.z:.3g}" if result.worst and result.worst.sigma else ""
    return f"{result.dtype}: {result.cases} case{'s' * (result.cases != 1)} within rounding{z}"


def _lines(report: Report, result: Result) -> Iterator[str]:
    """The lines of the text report, not wrapped."""
    for line in deviation_lines(report, result, width=10**6):
        text = line.strip()
        if text == result.title:  # which the summary has said
            continue
        if text.startswith("REPRODUCE"):
            yield f'<p>REPRODUCE <span class="run">{escape(result.reproduce)}</span></p>'
        else:
            shown = linked(escape(text), of_result(result))
            yield f'<p style="--in:{len(line) - len(line.lstrip())}">{shown}</p>'


STEP = 10
"""The side of a cell."""

SIZES = (0, 3, 5, 8, 10)
"""The side of the square in a cell, by its `grade`."""

WORDS = (
    "",
    "within the limit",
    "beyond it, by less than a thousandth of the worst",
    "by less than a tenth of the worst",
    "by a tenth of the worst or more",
)


def grade(z: float, limit: float, worst: float) -> int:
    """How far off a cell is: 0 equal, 1 within the limit, 2 to 4 by powers of the worst."""
    if z == 0:
        return 0
    if z <= limit:
        return 1
    return 4 if z == worst else 2 + sum(z * part >= worst for part in (1000, 10))


def _figure(result: Result, worst: Judgement, picture: Picture) -> Iterator[str]:
    greatest = max(map(max, picture.z))
    grades = [[grade(z, worst.limit, greatest) for z in row] for row in picture.z]
    rows, columns = len(grades), len(grades[0])
    squares: dict[int, list[str]] = {}
    for i, row in enumerate(grades):
        for j, level in enumerate(row):
            if size := SIZES[level]:
                x, y = (STEP * k + (STEP - size) // 2 for k in (j, i))
                squares.setdefault(level, []).append(f"M{x} {y}h{size}v{size}h-{size}z")
    i, j = picture.cell(worst.index)
    wide, high = STEP * columns, STEP * rows
    side = min(16, 320 // columns)
    box = f"-8 -8 {wide + 16} {high + 16}"
    words = (
        f"{worst.array}, {shape_words(picture)}: {where_words(picture, grades)}; "
        f"the worst element at {list(worst.index)}"
    )
    yield f'<figure><svg role="img" aria-label="{escape(words)}" viewBox="{box}" '
    yield f'width="{(wide + 16) * side // STEP}" height="{(high + 16) * side // STEP}">'
    yield f'<rect class="frame" x="-1" y="-1" width="{wide + 2}" height="{high + 2}"/>'
    for level in sorted(squares):
        yield f'<path class="z{level}" d="{"".join(squares[level])}"/>'
    ring = STEP // 2
    yield f'<circle class="mark" cx="{STEP * j + ring}" cy="{STEP * i + ring}" r="{ring + 2}"/>'
    yield "</svg><figcaption>"
    means = {**dict(enumerate(WORDS)), **({4: "differs"} if worst.sigma is None else {})}
    keys = [f"{_swatch(level)} {means[level]}" for level in sorted(squares)]
    yield f"|z| of {escape(words)} (the ring), in {escape(result.worst_case)}. "
    if result.worst_case != result.case:  # whose figures stand below
        yield escape(f"{judgement_words(worst)}; {place_words(worst, result)}. ")
    yield f'<span class="soft">{", ".join(keys)}</span></figcaption></figure>'


def _swatch(level: int) -> str:
    size = SIZES[level]
    at = (STEP - size) // 2
    square = f'<path class="z{level}" d="M{at} {at}h{size}v{size}h-{size}z"/>'
    style = "display:inline;vertical-align:middle"
    return (
        f'<svg aria-hidden="true" style="{style}" width="14" height="14" viewBox="-1 -1 12 12">'
        f'<rect class="frame" width="10" height="10"/>{square}</svg>'
    )


def shape_words(picture: Picture) -> str:
    """The array's shape, and the picture's where it is coarser."""
    shape = " × ".join(map(str, picture.shape)) or "one number"
    coarse = picture.sides != (len(picture.z), len(picture.z[0]))
    drawn = f" drawn as {len(picture.z)} × {len(picture.z[0])}" if coarse else ""
    return shape + drawn


def where_words(picture: Picture, grades: Sequence[Sequence[int]]) -> str:
    """The rows and columns of the elements beyond the limit."""
    off = [(i, j) for i, row in enumerate(grades) for j, level in enumerate(row) if level > 1]
    many, wide = len(picture.z), len(picture.z[0])
    if not off:
        return "no single element is beyond the limit; the rms is"
    if len(off) == many * wide:
        return "beyond the limit everywhere"
    rows, columns = sorted({i for i, _ in off}), sorted({j for _, j in off})
    said = [
        f"in {name} {', '.join(map(str, chosen))} alone"
        for name, chosen, all_of_them in (("row", rows, many), ("column", columns, wide))
        if len(chosen) <= 3 and len(chosen) < all_of_them
    ]
    spread = f"in {len(rows)} of {many} rows and {len(columns)} of {wide} columns"
    return "beyond the limit " + (" and ".join(said) or spread)
