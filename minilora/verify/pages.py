"""A report as JUnit XML, for continuous integration, and as one self-contained HTML page."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from html import escape

from minilora.verify.report import (
    Report,
    Result,
    block,
    cell,
    columns,
    fault_words,
    judgement_words,
    rows,
    summary,
)


def _printable(text: str) -> str:
    """Without the characters that XML forbids."""
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
        name=_printable(f"minilora verify {report.name} {report.version}".strip()),
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
        details = _printable("\n".join(block(report, result)))
        if result.status in ("fail", "error"):
            tag = "failure" if result.status == "fail" else "error"
            ET.SubElement(case, tag, message=_printable(_headline(result))).text = details
        elif result.status == "skip":
            ET.SubElement(case, "skipped", message=_printable(result.reason))
        elif result.status == "known" and result.known:
            ET.SubElement(case, "skipped", message=_printable(f"known: {result.known.reason}"))
        elif result.status == "loose":
            ET.SubElement(case, "system-out").text = details
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c62828; --odd: #a15c00; --good: #2e7d32 }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; --odd: #ffcc80; --good: #a5d6a7 } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: left;
  white-space: nowrap }
@media (max-width: 40rem) { table { font-size: .8rem } h1 { font-size: 1.4rem } }
td:first-child { font-family: ui-monospace, monospace }
.fail, .error { color: var(--bad); font-weight: bold } .loose, .known { color: var(--odd) }
.pass { color: var(--good) } .skip { opacity: .7 }
details { border-bottom: 1px solid var(--line); padding: .4rem 0 }
pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
"""


def html(report: Report) -> str:
    """The table of checks by dtype, then each check with its law and what was found."""
    dtypes = columns(report)
    table, details = [], []
    for check, by_dtype in rows(report):
        cells = [by_dtype.get(dtype) for dtype in dtypes]
        marked = "".join(
            f'<td class="{result.status if result else ""}">{escape(cell(result))}</td>'
            for result in cells
        )
        table.append(f'<tr><td><a href="#{escape(check)}">{escape(check)}</a></td>{marked}</tr>')
        details.append(_details(report, check, list(by_dtype.values())))
    title = escape(f"{report.name} {report.version}".strip())
    interrupted = "<p><strong>Interrupted: what was checked so far.</strong></p>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>minilora verify {title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>Profile {escape(report.profile)}, seed {report.seed}. {escape(summary(report))}</p>
{interrupted if report.interrupted else ""}
{"".join(f"<p>{escape(note)}</p>" for note in report.notes)}
<div class="wide"><table>
<thead><tr><th>check</th>{"".join(f"<th>{dtype}</th>" for dtype in dtypes)}</tr></thead>
<tbody>
{chr(10).join(table)}
</tbody>
</table></div>
<h2>Details</h2>
{chr(10).join(details)}
</body>
</html>
"""


def _details(report: Report, check: str, results: list[Result]) -> str:
    results = sorted(results, key=lambda result: result.severity)
    opened = " open" if results[0].status in ("fail", "error") else ""
    body = []
    for result in results:
        if result.status in ("fail", "error", "loose", "known"):
            body.append(f"<pre>{escape(chr(10).join(block(report, result)))}</pre>")
        if result.known:
            no_more = ", but no longer fails" if result.no_longer_fails else ""
            body.append(f"<p>{result.dtype}: known{no_more}. {escape(result.known.reason)}</p>")
        if result.reason:
            many = f"{result.skipped_cases} of {result.cases} cases " if result.cases else ""
            body.append(f"<p>{result.dtype}: {many}skipped, {escape(result.reason)}</p>")
        if result.status == "pass":
            z = f", largest z {result.worst.z:.3g}" if result.worst and result.worst.sigma else ""
            body.append(f"<p>{result.dtype}: {result.cases} cases pass{z}.</p>")
    status = results[0].status
    return (
        f'<details id="{escape(check)}"{opened}><summary><span class="{status}">{status}</span> '
        f"<code>{escape(check)}</code> {escape(results[0].title)}</summary>\n"
        f"{''.join(body)}</details>"
    )
