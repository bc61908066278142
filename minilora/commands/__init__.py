"""The commands of fine-tuning, a module each: ``add`` says its options, and its ``run`` runs it.

A module imports at its top no more than the parser needs; the rest when the command is asked for.
"""

from importlib import import_module
from typing import Any

NAMES: tuple[str, ...] = (
    *("train", "generate", "evaluate", "merge", "inspect", "convert"),
    *("sweep", "claims", "bench", "example"),
)
"""The commands in the order of the help."""


def add_all(commands: Any) -> None:
    """Adds every command to the parser's ``commands``."""
    for name in NAMES:
        import_module(f"minilora.commands.{name}").add(commands)
