"""A report in each form that a file may have."""

from __future__ import annotations

from minilora.audit.report.document import as_json
from minilora.audit.report.html import html
from minilora.audit.report.junit import junit
from minilora.audit.report.markdown import markdown
from minilora.audit.report.sarif import sarif
from minilora.audit.result import Report
from minilora.forms.markdown import MARKDOWN_BYTES


def rendered(report: Report, form: str, limit: int = MARKDOWN_BYTES) -> str:
    """The report as json, sarif, junit, html or markdown; ``limit`` is that of Markdown."""
    if form == "markdown":
        return markdown(report, limit)
    return {"json": as_json, "sarif": sarif, "junit": junit, "html": html}[form](report)
