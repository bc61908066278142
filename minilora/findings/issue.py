"""A finding as an issue for the library's own tracker, in plain Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from minilora.findings.finding import SEVERITIES, Finding, Library
from minilora.findings.reproduce import algebra, printed, script


def issue(finding: Finding, library: Library) -> str:
    """One finding, ready to be sent: what is seen, the script, what is right, the cause, a fix."""
    return "\n\n".join(_parts(finding, library)) + "\n"


def issues(library: Library) -> str:
    """All findings of a library, one below another."""
    open_ones = [each for each in library.findings if not each.fixed_in]
    head = (
        f"# {library.title}: {len(library.findings)} findings, {len(open_ones)} open\n\n"
        "Each section can be sent as an issue of its own.\n"
    )
    return "\n---\n\n".join([head, *(issue(each, library) for each in library.findings)])


def _parts(finding: Finding, library: Library) -> Iterator[str]:
    name = library.distribution or library.title
    yield f"## {finding.title}"
    yield (
        f"Seen in {name} {finding.versions.removeprefix('==') or finding.seen}; {finding.status}. "
        f"{SEVERITIES[finding.severity].capitalize()}."
    )
    if finding.does:
        yield plain(finding.does)
    text = script(finding.id)
    if text:
        yield f"```python\n{text}```"
        if said := printed().get(finding.id):
            yield f"It prints{_with(said.releases)}:\n\n```\n{said.text}```"
    else:
        yield f"Read, not run. Source: {finding.source}."
    yield f"**Right.** {algebra(text) or plain(finding.right)}"
    yield f"**Cause.** {finding.cause}.{place(finding, library)}"
    if finding.fix:
        yield f"**Proposed fix.** {finding.fix}."
    if finding.consequence:
        yield f"**For users.** {plain(finding.consequence)}"
    yield f"Found by minilora, as `{finding.id}`."


def place(finding: Finding, library: Library) -> str:
    """Where the cause is, with a link to the line of the release; "" where it is not known."""
    at, _, function = finding.code.partition(" ")
    if not at:
        return ""
    link = library.link(finding)
    where = f"[`{at}`]({link})" if link else f"`{at}`"
    return f" See {where}{f', `{function}`' if function else ''}, in {finding.seen}."


def _with(releases: Mapping[str, str]) -> str:
    listed = ", ".join(f"{name} {number}" for name, number in releases.items())
    return f" with {listed}" if listed else ""


def plain(text: str) -> str:
    """A finding's text as any tracker shows it, a line a paragraph.

    It has no links within these pages, and no macro of their mathematics.
    """
    text = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    text = re.sub(r"\\d\s+", r"\\mathrm{d}", text)
    return "\n\n".join(" ".join(part.split("\n")) for part in re.split(r"\n\n+", text))
