"""A report as JUnit XML."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from minilora.forms.words import printable
from minilora.verify.report.causes import Cause, cause_lines
from minilora.verify.report.report import Report
from minilora.verify.report.result import Result
from minilora.verify.report.runs import headline
from minilora.verify.report.words import deviation_lines


def junit(report: Report) -> str:
    """One test case per check and dtype; what is known or skipped counts as skipped."""
    suite = ET.Element(
        "testsuite",
        name=printable(f"minilora verify {report.name} {report.version}".strip()),
        tests=str(len(report.results)),
        failures=str(report.count("fail")),
        errors=str(report.count("error")),
        skipped=str(report.count("skip") + report.count("known")),
        time=f"{report.seconds:.3f}",
    )
    properties, found = ET.SubElement(suite, "properties"), report.causes
    for line in cause_lines(found) if found else ():
        what, _, says = line.partition("  ")
        ET.SubElement(properties, "property", name=what.lower(), value=printable(says))
    for name in ("profile", "seed", "minilora"):
        value = str(getattr(report, name))
        ET.SubElement(properties, "property", name=name, value=printable(value))
    cause_of = {id(result): cause for cause in found for result in cause.results}
    for result in report.results:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=result.level,
            name=f"{result.check}[{result.dtype}]",
            time=f"{result.seconds:.3f}",
        )
        details = printable("\n".join(deviation_lines(report, result)))
        if result.status in ("fail", "error"):
            tag = "failure" if result.status == "fail" else "error"
            message = printable(_message(result, cause_of[id(result)]))
            ET.SubElement(case, tag, message=message).text = details
        elif result.status == "skip":
            ET.SubElement(case, "skipped", message=printable(result.reason))
        elif result.status == "known" and result.known:
            ET.SubElement(case, "skipped", message=printable(f"known: {result.known.reason}"))
        elif result.status == "loose":
            ET.SubElement(case, "system-out").text = details
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _message(result: Result, cause: Cause) -> str:
    """The probable cause of a failure, and what it is in one line."""
    if not cause.id:
        return f"probable cause not known: {headline(result)}"
    told = f"{cause.id}: {cause.sentence}" if cause.is_mutant else cause.sentence
    return f"probable cause {told.rstrip('.')}. {headline(result)}"
