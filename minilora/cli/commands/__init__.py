"""The commands, one module each: ``add`` adds its options to the parser, ``_run`` runs it.

A module imports at its top only what the parser needs, and the rest when the command runs.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.io.loading import AdaptedModel

NAMES: tuple[str, ...] = (
    *("verify", "audit", "init-adapter", "report", "explain", "variants", "selftest", "vectors"),
    *("train", "generate", "evaluate", "merge", "inspect", "convert"),
    *("sweep", "claims", "bench", "example", "results", "doctor"),
)
"""The commands in the order of the help."""


def add_all(commands: Any) -> None:
    """Add all commands to the parser's ``commands``."""
    for name in NAMES:
        import_module(f"minilora.cli.commands.{name.replace('-', '_')}").add(commands)


def computing_model(arguments: argparse.Namespace) -> AdaptedModel:
    """The model of the options, for a command that computes with it.

    Errors: ValueError for an aLoRA adapter, which acts only on some tokens.
    """
    model = adapted_model(arguments)
    if model.config is not None and model.config.alora_invocation_tokens:
        raise ValueError(
            f"{arguments.adapter}: found an aLoRA, which acts only after its invocation tokens; "
            "expected an adapter that acts on every token: use PEFT, or minilora inspect"
        )
    return model


def adapted_model(arguments: argparse.Namespace) -> AdaptedModel:
    """The model of the options with the adapter.

    A note is printed if the adapter was trained on other files than the model's.
    """
    import numpy as np

    from minilora.io.loading import open_adapted, open_base_of, run_of

    dtype = np.dtype(arguments.dtype)
    base = open_base_of(arguments.model, arguments.adapter, dtype)
    model = open_adapted(base, arguments.adapter, dtype)
    run = run_of(arguments.adapter)
    trained_on = {} if run.get("base") else run.get("model", {})  # or on a base of its own
    if trained_on.get("digest", base.digest) != base.digest:
        name = trained_on.get("name")
        print(
            f"note: {arguments.adapter} was trained on {name}, whose files differ from those of "
            f"{base.name}",
            file=sys.stderr,
        )
    return model
