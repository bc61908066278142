"""The commands, a module each: ``add`` says its options, and its ``_run`` runs it.

A module imports at its top no more than the parser needs; the rest when the command is asked for.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.io.loading import AdaptedModel

NAMES: tuple[str, ...] = (
    *("verify", "report", "variants", "selftest", "vectors"),
    *("train", "generate", "evaluate", "merge", "inspect", "convert"),
    *("sweep", "claims", "bench", "example"),
)
"""The commands in the order of the help."""


def add_all(commands: Any) -> None:
    """Adds every command to the parser's ``commands``."""
    for name in NAMES:
        import_module(f"minilora.cli.commands.{name}").add(commands)


def computing_model(arguments: argparse.Namespace) -> AdaptedModel:
    """The model of the options, for a command that lets it compute.

    Errors: ValueError for an adapter that acts on some tokens only, which no command looks for.
    """
    model = adapted_model(arguments)
    if model.config is not None and model.config.alora_invocation_tokens:
        says = "an aLoRA, which acts from the tokens of its invocation on"
        raise ValueError(
            f"{arguments.adapter}: found {says}; expected an adapter that acts on every token: "
            "compute with it in PEFT, or see what it is with minilora inspect"
        )
    return model


def adapted_model(arguments: argparse.Namespace) -> AdaptedModel:
    """The model of the options with the adapter over it.

    Shapes do not tell two models apart: where the adapter's run had other files, that is said.
    """
    import numpy as np

    from minilora.io.loading import open_adapted, open_base_of, run_of

    dtype = np.dtype(arguments.dtype)
    base = open_base_of(arguments.model, arguments.adapter, dtype)
    model = open_adapted(base, arguments.adapter, dtype)
    run = run_of(arguments.adapter)
    trained_on = {} if run.get("base") else run.get("model", {})  # or on a base of its own
    if trained_on.get("digest", base.digest) != base.digest:
        says = f"was trained on {trained_on.get('name')}, whose files were others than those of"
        print(f"note: {arguments.adapter} {says} {base.name}", file=sys.stderr)
    return model
