"""``minilora variants``: every variant on every kind of layer, proven as it is printed."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import (
    FAILED,
    OK,
    add_command,
    add_files,
    files_of,
    progress_bar,
    say,
    split,
    stdout_on_stderr,
    write_file,
)


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "variants",
        "the table of LoRA's variants on every kind of layer, proven as it is printed",
        "Runs each variant of LoRA on each kind of layer and prints which laws it keeps, its "
        "gradients' deviation from a complex step and from the real library that defines it (where "
        "the extra peers is installed), and its file.",
        _run,
        "0 all is as the registry says, 1 something is not, 2 wrong usage",
    )
    option = parser.add_argument
    option(
        "--variant", action="append", metavar="NAME", help="only this variant; repeatable, or a,b"
    )
    option("--kind", action="append", metavar="KIND", help="only this kind of layer; the same")
    option("--seed", type=int, default=0, metavar="N", help="draws other cases")
    option("--no-library", action="store_true", help="do not ask the real libraries")
    add_files(option, "the table", "json", "markdown")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.spec.variants import REGISTRY
    from minilora.verify.properties.layer_kinds import KINDS
    from minilora.verify.properties.variant_matrix import as_json, as_markdown, as_text, cells

    chosen = []
    for option, known in (("variant", REGISTRY), ("kind", KINDS)):
        asked = split(getattr(arguments, option)) or list(known)
        if unknown := [name for name in asked if name not in known]:
            expected = f"expected some of {', '.join(known)}"
            raise ValueError(f"--{option} {', '.join(unknown)}: {expected}")
        chosen.append(asked)
    forms = {"json": as_json, "markdown": as_markdown}
    files = files_of(arguments, *forms)
    with stdout_on_stderr(), progress_bar() as progress:

        def step(number: int, total: int) -> None:
            if progress:
                progress("cells:", number, total)

        entries, kinds = chosen
        table = list(cells(entries, kinds, arguments.seed, not arguments.no_library, step))
    for form, path in files.items():
        write_file(path, forms[form](table))
    say(as_text(table))
    return OK if all(cell.good for cell in table) else FAILED
