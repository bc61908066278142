"""``minilora init-adapter``: the files that put a library under verification."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
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
        "workflow for GitHub. With --layer the adapter is filled in for a class or function of "
        "PyTorch, or a function of JAX, as far as the names of arguments and the shapes of "
        "parameters tell; it is built of small sizes to find out.",
        _run,
        "0 written, 2 wrong usage or files that are there, 3 the layer cannot be imported",
    )
    option = parser.add_argument
    option("name", metavar="NAME", help="the library's name, for the head of the report")
    option("--kind", default="torch", choices=KINDS, metavar="KIND", help="torch, jax or cmd")
    option(
        "--layer",
        metavar="MODULE:NAME",
        help="the library's LoRA layer: a class, or a function that makes, changes or computes one",
    )
    option("--output", default="tests", metavar="FOLDER", help="the folder to write to")


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from minilora.io.atomic import write_files
    from minilora.verify.skeletons import skeleton

    if arguments.kind == "cmd" and arguments.layer:
        raise ValueError(f"--layer and --kind {arguments.kind}: expected --kind torch or jax")
    if arguments.kind == "torch" and not arguments.layer:
        raise ValueError("--layer is missing: give the library's layer as module:Name")
    folder = Path(arguments.output)
    found = _looked_at(arguments.layer, arguments.kind) if arguments.layer else None
    made = skeleton(arguments.kind, arguments.name, folder.as_posix(), arguments.layer or "", found)
    if there := sorted(name for name in made if (folder / name).exists()):
        raise ValueError(f"{folder}: found {', '.join(there)}, expected none of them; move them")
    write_files(folder, {name: text.encode for name, text in made.items()})
    for name in made:
        say(f"wrote {folder / name}\n")
    for line in _told(found, arguments.kind, made) if found else ():
        say(f"{line}\n")
    source = folder / next(iter(made))
    command = f"--cmd 'python {source}'" if arguments.kind == "cmd" else f"{source}:Adapter"
    say(f"next: minilora verify {command} --profile quick\n")
    return OK


def _looked_at(layer: str, kind: str) -> Any:
    """What can be found out about the class or function. Errors: LoadError."""
    from minilora.verify.loading import named
    from minilora.verify.skeletons import look_at

    module, _, name = layer.partition(":")
    if not (module and name):
        raise ValueError(f"--layer {layer}: expected module:Name")
    return look_at(named(module, name), module, name, kind)


def _told(found: Any, kind: str, made: Mapping[str, str]) -> Iterator[str]:
    """What was found out, and what the adapter does when it is tried."""
    from minilora.verify.skeletons import tried

    yield f"built by: {found.build[-1].removeprefix('layer = ')}"
    yield from (f"found: {what}" for what in found.said)
    if found.missing:
        yield from (f"complete it: {what} was not found out" for what in found.missing)
        return
    answer, raised = tried(made["lora_adapter.py"], found)
    yield f"tried, and they answer: {', '.join(answer) or 'none'}"
    yield from (f"complete it: {what}" for what in raised)
