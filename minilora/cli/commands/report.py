"""``minilora report``: reports of verify in one table."""

from __future__ import annotations

import argparse
import os
from typing import Any

from minilora.cli.console import (
    OK,
    columns,
    files_of,
    has_colours,
    markdown_room,
    say,
    write_file,
)
from minilora.cli.options import add_command, add_files


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        "combine JSON reports of verify into one table",
        "Show the reports that `minilora verify --json` wrote as one table: checks × "
        "implementations.",
        _run,
        "0 shown, whatever the results are, 2 wrong usage or a file that is not a report",
    )
    option = parser.add_argument
    option("reports", nargs="+", metavar="FILE.json", help="a report of verify --json")
    add_files(option, "the table", "html", "markdown")
    option("--text", action="store_true", help="print the table even if it is written to a file")
    option("--verbose", action="store_true", help="print a line for each check")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.verify.report.html import html
    from minilora.verify.report.load_report import read_report
    from minilora.verify.report.markdown import markdown
    from minilora.verify.report.matrix import matrix
    from minilora.verify.report.runs import Runs

    sources = arguments.reports
    files = files_of(arguments, "html", "markdown")
    existing = [path for path in sources if os.path.exists(path)]
    for path in filter(os.path.exists, files.values()):
        if any(os.path.samefile(path, report) for report in existing):
            raise ValueError(f"{path} is one of the reports: choose another file")
    reports = [read_report(path) for path in sources]
    if "html" in files:
        write_file(files["html"], html(reports, sources))
    if "markdown" in files:
        path = files["markdown"]
        write_file(path, markdown(reports, markdown_room(path), sources))
    if arguments.text or not files:
        verbose = arguments.verbose
        runs = Runs(reports, sources)
        one = reports[0]
        alone = len(reports) == 1
        say(one.text(verbose, columns(), has_colours()) if alone else matrix(runs, verbose))
    return OK
