"""The command line. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from minilora import __version__
from minilora.cli.commands import add_all
from minilora.cli.console import INTERRUPTED, USAGE


class _Parser(argparse.ArgumentParser):
    """A parser that suggests a similar option or command for an unknown one."""

    def error(self, message: str) -> NoReturn:
        known = re.findall(r"(?<![\w-])--[a-z][a-z-]*", self.format_help())
        if invalid := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            asked, known = invalid[1], re.findall(r"[\w-]+", invalid[2])
        else:
            asked = message.rpartition("unrecognized arguments: ")[2].split("=")[0].split(" ")[0]
        initials = [name for name in known if _initials(name) == asked.lstrip("-")]
        close = initials or difflib.get_close_matches(asked, known, n=1, cutoff=0.7)
        super().error(message + (f"; did you mean {close[0]}?" if close else ""))


def _initials(option: str) -> str:
    """``lr`` of ``--learning-rate``, as it is called for short."""
    return "".join(word[0] for word in option.strip("-").split("-"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. Wrong usage raises SystemExit(2)."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if "run" not in arguments:
        parser.print_help(sys.stderr)
        return USAGE
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    given = sys.argv[1:] if argv is None else argv
    arguments.argv = list(given[1:])  # of the command itself
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> _Parser:
    parser = _Parser(
        prog="minilora",
        description="The executable specification of low-rank adaptation.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    add_all(parser.add_subparsers(title="commands", metavar="COMMAND"))
    return parser
