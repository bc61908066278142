"""The audits, one module each: ``add`` adds its options to the parser by `add_audit`.

An audit's ``run(arguments, progress)`` returns its report; writing, printing and the exit status
are the same for all.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minilora.cli.console import (
    NOT_LOADED,
    files_of,
    has_colours,
    markdown_room,
    tell,
    write_file,
)
from minilora.cli.options import add_command, add_files
from minilora.cli.progress import BytesRead, bytes_bar

if TYPE_CHECKING:
    from minilora.audit.result import Report

NAMES: tuple[str, ...] = ("merged", "adapter", "converted", "served")
"""The audits in the order of the help; each is a module here."""

FORMS = ("json", "sarif", "junit", "markdown", "html")

STATUSES = (
    "0 all is right, 1 a deviation, 2 wrong usage, 3 something cannot be read, 4 it cannot be "
    "decided"
)

Run = Callable[[argparse.Namespace, BytesRead | None], "Report"]


def add_audit(
    audits: Any, name: str, help: str, description: str, run: Run, unit: str = "B"
) -> Any:
    """Add an audit with the options that all have; its parser, for options of its own.

    ``unit``: what its progress bar counts.
    """
    command = _reported(run, unit)
    parser = add_command(audits, name, help, description, command, STATUSES, failed=NOT_LOADED)
    add_files(parser.add_argument, "the report", *FORMS)
    parser.add_argument("--verbose", action="store_true", help="print a line for each entry")
    return parser


def _reported(run: Run, unit: str) -> Callable[[argparse.Namespace], int]:
    """``run`` with its report written to the files of the options, and printed."""

    def command(arguments: argparse.Namespace) -> int:
        from minilora.audit.report.forms import rendered
        from minilora.audit.report.text import text

        files = files_of(arguments, *FORMS)
        with bytes_bar(unit) as progress:
            report = run(arguments, progress)
        for form, path in files.items():  # before the text, whose reader may close the pipe
            write_file(path, rendered(report, form, markdown_room(path)))
        width = shutil.get_terminal_size().columns
        tell(text(report, arguments.verbose, width, has_colours()), files)
        return report.exit_status

    return command
