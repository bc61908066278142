"""A report in each form that a file may have."""

from __future__ import annotations

from minilora.forms.markdown import MARKDOWN_BYTES
from minilora.verify.report.annotations import Place, badge, workflow_annotations
from minilora.verify.report.html import html
from minilora.verify.report.junit import junit
from minilora.verify.report.markdown import markdown
from minilora.verify.report.report import Report


def rendered(
    report: Report, form: str, limit: int = MARKDOWN_BYTES, place: Place | None = None
) -> str:
    """The report as json, junit, html, markdown, annotations or badge.

    ``limit`` is that of Markdown, in bytes; ``place`` says where an annotation stands, if that is
    known.
    """
    if form == "annotations":
        return workflow_annotations(report, place)
    if form == "badge":
        return badge(report)
    if form == "markdown":
        return markdown([report], limit)
    if form == "html":
        return html([report])
    return junit(report) if form == "junit" else report.json()
