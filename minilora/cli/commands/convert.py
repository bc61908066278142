"""``minilora convert``: an adapter in the format of another library."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from minilora.cli.commands import adapted_model
from minilora.cli.console import OK, say
from minilora.cli.options import add_command, add_model


class _Names:
    """The formats' names, from the registry when they are asked for."""

    def __iter__(self) -> Iterator[str]:
        from minilora.io.formats.registry import adapter_formats

        return iter([f.name for f in adapter_formats()])

    def __contains__(self, name: object) -> bool:
        return name in list(self)


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "convert",
        "write an adapter for another library",
        "Read an adapter in one format and write it in another. An adapter that the other format "
        "cannot represent is refused. Print where B was multiplied by a scale.",
        _run,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="the folder or the file of an adapter")
    add_model(parser.add_argument, adapter=False)
    parser.add_argument(
        "--to",
        required=True,
        choices=_Names(),
        metavar="FORMAT",
        help="the format to write: %(choices)s",
    )
    parser.add_argument(
        "--output", required=True, metavar="OUT", help="a folder, or a file such as a.gguf"
    )


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from minilora.io.conversion import write_adapter
    from minilora.io.formats.registry import FORMATS, adapter_formats
    from minilora.io.loading import adapter_format, adapter_path, check_output

    to = FORMATS[arguments.to]
    suffix = Path(arguments.output).suffix
    if to.suffix != (suffix if any(suffix == f.suffix for f in adapter_formats()) else ""):
        expected = f"a {to.suffix} file" if to.suffix else "a folder"
        raise ValueError(f"--output {arguments.output}: expected {expected} for {to.name}")
    model = adapted_model(arguments)
    base = model.base
    check_output(arguments.output, base, arguments.adapter)
    notes = write_adapter(arguments.output, to, model)
    source = adapter_format(adapter_path(arguments.adapter)).name
    say(
        f"{arguments.output}: the adapter {arguments.adapter} of {source} for {to.name}, "
        f"on {base.name}\n" + "".join(f"{note}\n" for note in notes)
    )
    return OK
