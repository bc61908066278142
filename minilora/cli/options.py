"""The options that commands share, their checks, and the exit status of an error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import partial
from typing import Any

from minilora.cli.console import FAILED, NOT_LOADED, open_streams, usage_error


def split(values: list[str] | None) -> list[str] | None:
    """The values of a repeatable option, each of which may be a comma-separated list."""
    return values and [part.strip() for value in values for part in value.split(",")]


def processors() -> int:
    """How many processors there are for this process, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def guarded(command: str, run: Callable[[argparse.Namespace], int], failed: int = FAILED) -> Any:
    """Wrap ``run``: an exception becomes a message and an exit status.

    `NOT_LOADED` for a file or a target that cannot be read, or a missing library; `USAGE` for an
    invalid setting; ``failed`` for a full disk, too little memory, or numbers that are not finite.
    """

    def command_with_errors(arguments: argparse.Namespace) -> int:
        import numpy as np

        try:
            open_streams()
            _check_texts(arguments)
            # Overflow shows in the results, and is reported there.
            with np.errstate(all="ignore"):
                return run(arguments)
        except _not_loaded() as error:
            print(f"minilora {command}: {error}", file=sys.stderr)
            return NOT_LOADED
        except ValueError as error:
            return usage_error(str(error), command)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"minilora {command}: {where}{error.strerror or error}", file=sys.stderr)
            return failed
        except ArithmeticError as error:
            print(f"minilora {command}: {error}", file=sys.stderr)
            return failed
        except MemoryError as error:
            text = f"not enough memory: {error}".removesuffix(": ")
            remedy = "use a smaller model or rank, or shorter texts"
            print(f"minilora {command}: {text}; {remedy}", file=sys.stderr)
            return failed

    return command_with_errors


def _not_loaded() -> tuple[type[Exception], ...]:
    """The errors of `NOT_LOADED`; imported only after an error, as these modules load slowly."""
    from minilora.io.errors import FormatError
    from minilora.verify.core.errors import LoadError

    return FormatError, ImportError, LoadError


TEXTS = ("prompt", "chat", "system")
"""The options whose values are texts for a model, and may be empty."""


def _check_texts(arguments: argparse.Namespace) -> None:
    """Errors: ValueError for an empty value, or for a text that is not valid Unicode."""
    for name, value in vars(arguments).items():
        option = f"--{name.replace('_', '-')}"
        if value == "" and name not in TEXTS:
            raise ValueError(f"{option} '': expected a value")
        if name in TEXTS and isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{option} {value!r}: expected a text in UTF-8") from None


def add_choices(option: Any, **metavars: str) -> None:
    """Add options that choose some names, which `split` or `names_of` read."""
    for name, metavar in metavars.items():
        help = f"only this {name}; repeatable, or separated by commas"
        option(f"--{name}", action="append", metavar=metavar, help=help)


def names_of(arguments: argparse.Namespace, name: str, known: Collection[str]) -> list[str]:
    """The names that a repeatable option gives, or an empty list.

    Errors: ValueError for a name that is not known.
    """
    names = split(getattr(arguments, name)) or []
    if unknown := [name for name in names if name not in known]:
        close = get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"--{name} {', '.join(unknown)}: expected one or more of {', '.join(known)}{hint}"
        )
    return names


def at_least(arguments: argparse.Namespace, **least: int) -> None:
    """Check that options are not below these numbers, and fit into 64 bits.

    Errors: ValueError that names the option.
    """
    for name, low in least.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value < 2**63:
            expected = f"{low} or more" if value < low else "less than 2**63"
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {expected}")


class _Help(argparse.HelpFormatter):
    """Shows the default of each option, unless its help text mentions the default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        if action.nargs == 0 or value in (None, "", []) or "default" in text:
            return text
        return f"{text} (default: %(default){'g' if isinstance(value, float) else 's'})"


TUNING = (
    "0 done, 1 a full disk or numbers that are not finite, 2 wrong usage, 3 a file cannot be read "
    "or a library is missing"
)
"""The exit statuses of the commands for fine-tuning."""


def add_command(
    commands: Any,
    name: str,
    help: str,
    description: str,
    run: Any,
    statuses: str = TUNING,
    failed: int = FAILED,
) -> Any:
    """Add a command; its help shows the defaults of options and the exit statuses.

    ``failed`` is the status after a full disk or too little memory.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{description} Exit status: {statuses}.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    command = parser.prog.removeprefix("minilora ")  # of an audit both words
    parser.set_defaults(run=guarded(command, run, failed), parser=parser)
    return parser


def kinds_of(option: Any) -> tuple[Any, Any, Any]:
    """``option`` for whole numbers, for real numbers, and for flags."""
    whole, real = partial(option, type=int, metavar="N"), partial(option, type=float, metavar="X")
    return whole, real, partial(option, action="store_true")


FORMS = {
    "json": "JSON",
    "sarif": "SARIF 2.1.0",
    "junit": "JUnit XML",
    "html": "one HTML page",
    "markdown": "Markdown; append to $GITHUB_STEP_SUMMARY",
    "annotations": "annotations of a GitHub workflow",
    "badge": "the JSON of a badge",
}


def add_files(option: Any, what: str, *forms: str) -> None:
    """Add an option for each of these `FORMS`, which writes the result to a file."""
    for form in forms:
        option(
            f"--{form}", metavar="FILE", help=f"write {what} as {FORMS[form]}; - is standard output"
        )


def add_model(add: Any, adapter: bool = True, trained: bool = True) -> None:
    """Add the options that name a model and, if ``adapter``, an adapter.

    ``trained``: whether the command has an adapter, which may name its model.
    """
    default = "the model that the adapter was trained on, or reference:llama"
    default = default if trained else "reference:llama"
    add(
        "--model",
        metavar="M",
        help="a Hugging Face folder, a .gguf file, package:NAME or reference:NAME (default: "
        f"{default})",
    )
    if adapter:
        add("--adapter", metavar="A", help="the folder or the file of an adapter")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "float64"],
        metavar="DTYPE",
        help="float32 or float64",
    )
