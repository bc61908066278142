"""``minilora audit adapter``: is an adapter whole, and does it mean the same everywhere?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minilora.cli.commands.audits import add_audit
from minilora.cli.options import split
from minilora.cli.progress import BytesRead

if TYPE_CHECKING:
    from minilora.audit.result import Report


def add(audits: Any) -> None:
    """Add the audit."""
    parser = add_audit(
        audits,
        "adapter",
        "is this adapter complete, and do all libraries read it alike?",
        "Look at an adapter of any model: its settings against its tensors, each module's norm and "
        "rank, and what each library and server computes of exactly these files, by the findings. "
        "PEFT's and mlx-lm's folders, GGUF files, and files of kohya's and loralib's.",
        _run,
    )
    add = parser.add_argument
    add("adapter", metavar="A", help="the folder or the file of the adapter, or reference:NAME")
    add("--base", metavar="B", help="the model that it is for: names, shapes, shares of the norm")
    add(
        "--for",
        dest="libraries",
        action="append",
        metavar="NAME",
        help="a library or server, or NAME==RELEASE, that is to compute what is meant, else it is "
        "a deviation; repeat, or separate by commas (default: all are told of)",
    )


def _run(arguments: argparse.Namespace, progress: BytesRead | None) -> Report:
    from minilora.audit.adapter import adapter

    libraries = split(arguments.libraries) or []
    return adapter(arguments.adapter, arguments.base, libraries, progress)
