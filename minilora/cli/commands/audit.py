"""``minilora audit``: is a file, or a server, really the base with the adapter?"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from minilora.cli.commands.audits import NAMES
from minilora.cli.console import OK, USAGE, say


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "audit",
        help="check files and servers: are they the base with the adapter?",
        description="Check merged models, adapters, converted files and servers against the "
        "equations. Each audit has a --help of its own.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of the reports, and exit"
    )
    parser.set_defaults(run=_run, parser=parser)
    audits = parser.add_subparsers(title="audits", metavar="AUDIT")
    for name in NAMES:
        import_module(f"minilora.cli.commands.audits.{name}").add(audits)


def _run(arguments: argparse.Namespace) -> int:
    """What is printed where no audit is named."""
    if not arguments.schema:
        arguments.parser.print_help()
        return USAGE
    from minilora.audit.report.document import schema
    from minilora.forms.words import json_text

    say(json_text(schema()))
    return OK
