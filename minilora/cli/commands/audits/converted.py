"""``minilora audit converted``: do two files hold one adapter, or one model?"""

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
        "converted",
        "do two files hold the same adapter, or the same model?",
        "Compare two files of one adapter (PEFT's and mlx-lm's folders, GGUF, kohya's and "
        "loralib's files), or of one model (Hugging Face folders, safetensors, GGUF, mlx-lm's "
        "folders): the same function, module by module, with the factor where it is not.",
        _run,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="A", help="the original")
    add("--to", dest="target", required=True, metavar="A2", help="the converted file or folder")


def _run(arguments: argparse.Namespace, progress: BytesRead | None) -> Report:
    from minilora.audit.converted import converted

    return converted(arguments.source, arguments.target, progress)
