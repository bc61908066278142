"""``minilora init-adapter``: the files that put a library under verification."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import OK, say
from minilora.cli.options import add_command

KINDS = ("torch", "jax", "cmd")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "init-adapter",
        "write the files that put a library under verification",
        "Write an adapter for minilora verify, a test for pytest, a file of known deviations and a "
        "workflow for GitHub. For PyTorch the adapter is filled in, as far as the layer's "
        "constructor and the shapes of its parameters tell.",
        _run,
        "0 written, 2 wrong usage or files that are there, 3 the layer cannot be imported",
    )
    option = parser.add_argument
    option("name", metavar="NAME", help="the library's name, for the head of the report")
    option("--kind", default="torch", choices=KINDS, metavar="KIND", help="torch, jax or cmd")
    layer = "the library's LoRA layer, of PyTorch; needed for --kind torch"
    option("--layer", metavar="MODULE:CLASS", help=layer)
    option("--output", default="tests", metavar="FOLDER", help="the folder to write to")


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from minilora.io.atomic import write_files
    from minilora.verify.skeletons import skeleton

    if arguments.kind != "torch" and arguments.layer:
        raise ValueError(f"--layer and --kind {arguments.kind}: expected --kind torch")
    if arguments.kind == "torch" and not arguments.layer:
        raise ValueError("--layer is missing: give the library's layer as module:Class")
    folder = Path(arguments.output)
    found = _guessed(arguments.layer) if arguments.layer else None
    made = skeleton(arguments.kind, arguments.name, folder.as_posix(), arguments.layer or "", found)
    if there := sorted(name for name in made if (folder / name).exists()):
        raise ValueError(f"{folder}: found {', '.join(there)}, expected none of them; move them")
    write_files(folder, {name: text.encode for name, text in made.items()})
    for name in made:
        say(f"wrote {folder / name}\n")
    for what in found.missing if found else ():
        say(f"complete it: {what} was not found out\n")
    source = folder / next(iter(made))
    command = f"--cmd 'python {source}'" if arguments.kind == "cmd" else f"{source}:Adapter"
    say(f"next: minilora verify {command} --profile quick\n")
    return OK


def _guessed(layer: str) -> Any:
    """What can be found out about the class. Errors: LoadError."""
    import os
    import sys
    from importlib import import_module

    from minilora.verify.core.errors import LoadError
    from minilora.verify.skeletons.guess import guess

    module, _, name = layer.partition(":")
    if not (module and name):
        raise ValueError(f"--layer {layer}: expected module:Class")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LoadError(f"--layer {layer}: {error}") from error
    return guess(found)
