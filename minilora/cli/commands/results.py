"""``minilora results``: recorded reports of many libraries and releases."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import OK, files_of, say, write_file
from minilora.cli.options import add_command, add_files


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "results",
        "record reports of verify, and show them side by side",
        "Keep reports of `minilora verify --json` as short files in a folder, and show all of the "
        "folder: every library by every level, and its releases over time.",
        _run,
        "0 shown, 2 wrong usage or a file that is not a report, 3 a short file that cannot be read",
    )
    option = parser.add_argument
    option("folder", metavar="FOLDER", help="where the short files lie, such as docs/results")
    option(
        "--add",
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="reports of verify --json to record first, levels of one release together",
    )
    add_files(option, "the page", "html")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.studies.results.page import page
    from minilora.studies.results.summary import add_summary, read_summaries, summary_of
    from minilora.studies.results.text import table
    from minilora.verify.report.load_report import read_report

    files = files_of(arguments, "html")
    for path in arguments.add:
        add_summary(arguments.folder, summary_of(read_report(path)))
    summaries = read_summaries(arguments.folder)
    if not summaries:
        raise ValueError(
            f"{arguments.folder}: found no recorded report; record one by minilora verify TARGET "
            "--json FILE, then minilora results FOLDER --add FILE"
        )
    if "html" in files:
        write_file(files["html"], page(summaries))
    else:
        say(table(summaries))
    return OK
