"""A report as SARIF 2.1.0, which code scanning shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from minilora import __version__
from minilora.audit.report.groups import Group, groups
from minilora.audit.result import VERDICTS, Entry, Report
from minilora.forms.words import json_text, plain, printable

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"

KINDS = {
    "deviation": {"kind": "fail", "level": "error"},
    "undecided": {"kind": "open", "level": "none"},
    "warning": {"kind": "fail", "level": "warning"},
    "note": {"kind": "informational", "level": "none"},
}
"""SARIF's kind and level by severity; a level other than none goes with `fail` alone."""

JUDGED = {"merged": "merged", "find": "merged", "converted": "to"}
"""The option that names what an audit judges; of the others it is the first of all."""


def sarif(report: Report) -> str:
    """A rule for each verdict and mistake, and a result for each entry that is not right."""
    found = [group for group in groups(report.entries) if group.severity in KINDS]
    rules = list(dict.fromkeys(_rule_id(report, group) for group in found))
    described = {_rule_id(report, group): _rule(report, group) for group in found}
    driver = {
        "name": "minilora",
        "version": __version__,
        "rules": [described[rule] for rule in rules],
    }
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True, "exitCode": report.exit_status}],
        "results": [
            _result(report, entry, rule := _rule_id(report, group), rules.index(rule))
            for group in found
            for entry in group.entries
        ],
        "properties": {
            "audit": report.audit,
            "inputs": plain(report.inputs),
            "entries": len(report.entries),
            "cause": report.cause,
            "remedy": report.remedy,
        },
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json_text(log)


def _rule_id(report: Report, group: Group) -> str:
    return f"{report.audit}/{group.id}"


def _rule(report: Report, group: Group) -> dict[str, Any]:
    level = KINDS[VERDICTS[group.verdict][0]]["level"] if group.verdict in VERDICTS else "none"
    return {
        "id": _rule_id(report, group),
        "shortDescription": {"text": VERDICTS[group.verdict][1]},
        "defaultConfiguration": {"level": level},
    }


def _result(report: Report, entry: Entry, rule: str, index: int) -> dict[str, Any]:
    where = report.inputs.get(JUDGED.get(report.audit, "")) or next(iter(report.inputs.values()))
    path = where if isinstance(where, str) else where[0]
    return {
        "ruleId": rule,
        "ruleIndex": index,
        **KINDS[entry.severity],
        "message": {"text": printable(f"{entry.subject}: {entry.text}")},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": _uri(path)}},
                "logicalLocations": [{"fullyQualifiedName": printable(entry.subject)}],
            }
        ],
        "partialFingerprints": {"subject/v1": f"{rule}:{printable(entry.subject)}"},
        "properties": plain(entry.figures),
    }


def _uri(path: str) -> str:
    """A path or an address as a reference of a URI."""
    return printable(path) if "://" in path else quote(Path(path).as_posix(), errors="replace")
