"""``minilora audit merged``: is this model the base with these adapters?"""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.commands.audits import STATUSES
from minilora.cli.console import say
from minilora.cli.options import add_command


def add(commands: Any) -> None:
    """Add the audit."""
    parser = add_command(
        commands,
        "merged",
        "is this model the base with these adapters?",
        "Compare a merged model with its base and adapters: a verdict on every tensor, and the "
        "cause of what deviates. Models are Hugging Face folders, .safetensors or .gguf files, "
        "mlx-lm's folders, reference:NAME or package:NAME.",
        _run,
        STATUSES,
    )
    parser.add_argument("--base", required=True, metavar="B", help="the model before the merge")
    parser.add_argument(
        "--adapter",
        required=True,
        action="append",
        metavar="A",
        help="the folder or the file of an adapter; again for each that was merged, in their order",
    )
    parser.add_argument(
        "--weight",
        action="append",
        type=float,
        metavar="X",
        help="what the adapter is multiplied with, once for each (default: 1)",
    )
    parser.add_argument("--merged", required=True, metavar="M", help="the merged model")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.audit.merged import merged

    report = merged(arguments.base, arguments.adapter, arguments.merged, weights=arguments.weight)
    for entry in report.worst_first:
        say(f"{entry.severity:9} {entry.verdict:12} {entry.subject}: {entry.text}\n")
    if report.cause:
        say(f"\n{report.cause}\n")
    return report.exit_status
