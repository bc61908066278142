"""``minilora audit merged``: is this model the base with these adapters?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minilora.cli.commands.audits import add_audit
from minilora.cli.progress import BytesRead

if TYPE_CHECKING:
    from minilora.audit.result import Report


def add(audits: Any) -> None:
    """Add the audit."""
    parser = add_audit(
        audits,
        "merged",
        "is this model the base with these adapters?",
        "Compare a merged model with its base and adapters: a verdict on every tensor, and the "
        "cause of what deviates. Models are Hugging Face folders, .safetensors or .gguf files, "
        "mlx-lm's folders, reference:NAME or package:NAME.",
        _run,
    )
    add = parser.add_argument
    add("--base", required=True, metavar="B", help="the model before the merge")
    add(
        "--adapter",
        action="append",
        metavar="A",
        help="the folder or the file of an adapter; once for each that was merged, in their order",
    )
    add(
        "--weight",
        action="append",
        type=float,
        metavar="X",
        help="weight of an adapter, once for each --adapter (default: 1)",
    )
    add("--merged", required=True, metavar="M", help="the merged model")
    add(
        "--find",
        nargs="?",
        const=(),
        metavar="FOLDER",
        help="instead of --adapter: find out what was merged, the rank of what differs in each "
        "tensor, and which of the adapters in FOLDER it is",
    )


def _run(arguments: argparse.Namespace, progress: BytesRead | None) -> Report:
    from minilora.audit.find import find
    from minilora.audit.merged import merged

    base, model, searched = arguments.base, arguments.merged, arguments.find
    if (searched is None) == (arguments.adapter is None):
        raise ValueError("expected --adapter, or --find, and not both")
    if searched is not None and arguments.weight:
        raise ValueError("--weight is of --adapter: expected none with --find")
    if searched is not None:
        return find(base, model, searched, progress)
    return merged(base, arguments.adapter, model, arguments.weight, progress)
