"""A report as JUnit XML, which every CI reads."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from minilora.audit.report.groups import causes, headline
from minilora.audit.result import Report
from minilora.forms.words import printable

TAGS = {"deviation": "failure", "undecided": "error"}
"""What cannot be decided is an error, for the command fails by it."""


def junit(report: Report) -> str:
    """One test case for each entry, in their order; a warning and a note are output of theirs."""
    severities = [entry.severity for entry in report.entries]
    suite = ET.Element(
        "testsuite",
        name=f"minilora audit {report.audit}",
        tests=str(len(severities)),
        failures=str(severities.count("deviation")),
        errors=str(severities.count("undecided")),
        skipped="0",
        time=f"{report.seconds:.3f}",
    )
    properties = ET.SubElement(suite, "properties")
    for name, value in [("result", headline(report)), *causes(report)]:
        ET.SubElement(properties, "property", name=name.lower(), value=printable(value))
    for entry in report.entries:
        name, text = printable(entry.subject), printable(entry.text)
        case = ET.SubElement(
            suite, "testcase", classname=f"audit.{report.audit}", name=name, time="0"
        )
        if tag := TAGS.get(entry.severity):
            kind = printable(entry.mistake or entry.verdict)
            ET.SubElement(case, tag, message=text, type=kind).text = f"{name}: {text}"
        elif entry.severity != "ok":
            ET.SubElement(case, "system-out").text = f"{entry.severity}: {text}"
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
