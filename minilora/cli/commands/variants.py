"""``minilora variants``: every variant on every kind of layer, proven as it is printed."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import FAILED, OK, files_of, say, stdout_on_stderr, write_file
from minilora.cli.options import add_choices, add_command, add_files, names_of
from minilora.cli.progress import progress_bar


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "variants",
        "check each variant of LoRA on each kind of layer, and print the table",
        "Run each variant of LoRA on each kind of layer. Print which laws hold, the deviation of "
        "the gradients from a complex step and from the library that defines the variant (with the "
        "extra peers), and its file format.",
        _run,
        "0 all is as documented, 1 something is not, 2 wrong usage",
    )
    option = parser.add_argument
    add_choices(option, variant="NAME")
    kind = "only this kind of layer; repeatable, or separated by commas"
    option("--layer", action="append", metavar="KIND", help=kind)
    option("--seed", type=int, default=0, metavar="N", help="seed of the cases")
    option("--no-library", action="store_true", help="do not compare with the libraries")
    add_files(option, "the table", "json", "markdown")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.spec.variants import REGISTRY
    from minilora.verify.properties.layer_kinds import KINDS
    from minilora.verify.properties.variant_matrix import as_json, as_markdown, as_text, cells

    variants = names_of(arguments, "variant", REGISTRY) or list(REGISTRY)
    layers = names_of(arguments, "layer", KINDS) or list(KINDS)
    formats = {"json": as_json, "markdown": as_markdown}
    files = files_of(arguments, *formats)
    with stdout_on_stderr(), progress_bar() as progress:

        def step(done: int, total: int) -> None:
            if progress:
                progress("cells:", done, total)

        table = list(cells(variants, layers, arguments.seed, not arguments.no_library, step))
    for name, path in files.items():
        write_file(path, formats[name](table))
    say(as_text(table))
    return OK if all(cell.good for cell in table) else FAILED
