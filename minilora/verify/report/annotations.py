"""A report as annotations of GitHub's workflows, and as the JSON of a badge."""

from __future__ import annotations

import json
from collections.abc import Callable

from minilora.forms.words import printable
from minilora.verify.report.causes import Cause
from minilora.verify.report.report import Report

SHOWN = 10
"""So many annotations of one kind GitHub shows for a step."""


Place = Callable[[str], tuple[str, int]]
"""For the id of a check the file, and the line in it, where its method stands."""


def workflow_annotations(report: Report, place: Place | None = None) -> str:
    """A line for each probable cause, and one for the score.

    ``place`` says where a cause is shown, if that is known.
    Source of the form: GitHub's "Workflow commands".
    """
    lines = [_of_cause(report, cause, place) for cause in report.causes[:SHOWN]]
    level = "notice" if report.exit_status == 0 else "error"
    return "\n".join([*lines, _command(level, score(report), title=_title(report))]) + "\n"


def _title(report: Report) -> str:
    return f"minilora verify {report.name}"


def _of_cause(report: Report, cause: Cause, place: Place | None) -> str:
    first = cause.first
    told = cause.sentence.rstrip(".") or "no known mistake explains it"
    says = f"{told}. {cause.sureness()}."
    checks = f"Checks: {', '.join(cause.checks[:SHOWN])}."
    shown = f"Show it: {first.reproduce}" if first.reproduce else ""
    name = cause.id or first.check
    file, line = place(first.check) if place else ("", 0)
    where = {"file": file, "line": str(line)} if file else {}
    return _command("error", " ".join([says, checks, shown]), title=f"LoRA: {name}", **where)


def score(report: Report) -> str:
    """How many checks hold, of how many that were asked, and what was not."""
    wrong = report.count("fail") + report.count("error")
    held = report.ran - wrong
    words = [f"{held} of {report.ran} checks hold"]
    for status, text in (("known", "known to deviate"), ("skip", "skipped")):
        if count := report.count(status):
            words.append(f"{count} {text}")
    return ", ".join(words)


def badge(report: Report) -> str:
    """The JSON of a badge's endpoint, as shields.io reads it.

    It is green only where more is asked than skipped, and nothing deviates, declared or not.
    """
    wrong = report.count("fail") + report.count("error")
    doubtful = report.count("known") or report.count("skip") >= report.ran or report.interrupted
    colour = "red" if wrong else "yellow" if doubtful else "brightgreen"
    if not report.ran:
        colour = "lightgrey"
    document = {"schemaVersion": 1, "label": "LoRA", "message": score(report), "color": colour}
    return json.dumps(document) + "\n"


def _command(name: str, message: str, **properties: str) -> str:
    """A workflow command; what would end it is escaped, as GitHub's own tools do."""
    listed = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in properties.items())
    return f"::{name} {listed}::{_escaped(printable(message))}"


def _escaped(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
