"""``minilora audit``: is a file, or a server, really the base with the adapter?"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from minilora.cli.commands.audits import NAMES
from minilora.cli.console import USAGE


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "audit",
        help="check files and servers: are they the base with the adapter?",
        description="Check merged models, adapters, converted files and servers against the "
        "equations. Each audit has a --help of its own.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=lambda arguments: _help(parser), parser=parser)
    audits = parser.add_subparsers(title="audits", metavar="AUDIT")
    for name in NAMES:
        import_module(f"minilora.cli.commands.audits.{name}").add(audits)


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return USAGE
