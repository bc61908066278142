"""A report as JSON, and the schema of that document."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from minilora import __version__
from minilora.audit.result import SEVERITIES, VERDICTS, Report
from minilora.forms.words import json_text, plain


def schema() -> dict[str, Any]:
    """The JSON Schema of `document`, with the names of all verdicts and severities."""
    beside = Path(__file__).with_name("schema.json")
    found: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
    found["$defs"]["verdict"] = {"enum": list(VERDICTS)}
    found["$defs"]["severity"] = {"enum": list(SEVERITIES)}
    return found


def document(report: Report) -> dict[str, Any]:
    """The report in the types of JSON, the entries worst first."""
    counts = Counter(entry.severity for entry in report.entries)
    verdicts = Counter(entry.verdict for entry in report.worst_first)
    return {
        "schema": 1,
        "minilora": __version__,
        "audit": report.audit,
        "inputs": plain(report.inputs),
        "exit_status": report.exit_status,
        "summary": {severity: counts[severity] for severity in SEVERITIES},
        "verdicts": dict(verdicts),
        "cause": report.cause,
        "remedy": report.remedy,
        "seconds": round(report.seconds, 3),
        "bytes_read": int(report.bytes_read),
        "entries": [
            {
                "subject": entry.subject,
                "verdict": entry.verdict,
                "severity": entry.severity,
                "mistake": entry.mistake,
                "text": entry.text,
                "figures": plain(entry.figures),
            }
            for entry in report.worst_first
        ],
    }


def as_json(report: Report) -> str:
    """The document as text."""
    return json_text(document(report))
