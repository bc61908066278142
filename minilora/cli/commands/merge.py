"""``minilora merge``: an adapter stored in its model's weights, as a model of its own."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.commands import adapted_model
from minilora.cli.console import OK, add_command, add_model, say


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "merge",
        "store an adapter in its model's weights",
        "Writes the model with the adapter merged into it, as a Hugging Face folder or a .gguf "
        "file, which needs no adapter and no minilora.",
        _run,
    )
    add_model(parser.add_argument)
    parser.add_argument("--output", required=True, metavar="OUT", help="a folder, or a .gguf file")


def _run(arguments: argparse.Namespace) -> int:

    from pathlib import Path

    from minilora.io.files import FormatError, listed
    from minilora.io.formats.huggingface import write_model
    from minilora.io.loading import check_output, class_names, copy_tokenizer, door
    from minilora.spec.lora import merge

    if arguments.adapter is None:
        raise ValueError("--adapter: none given; expected the adapter to merge")
    model = adapted_model(arguments)
    base = model.base
    check_output(arguments.output, base, arguments.adapter)
    out = Path(arguments.output)
    if out.is_dir() and (there := sorted(path.name for path in out.iterdir())):
        # Another model's files would be lost, or be read as a part of this one.
        found, expected = listed(there), "a folder without files, or none"
        raise ValueError(f"--output {out}: found {found}, expected {expected}; choose another")
    whole = {name: model.weights[name] for name in (*base.config.shapes(), *model.own)}
    merged = merge(whole, model.tuning)
    c = merged_config(base.config, merged)
    if arguments.output.endswith(".gguf"):
        from minilora.io.formats import gguf

        like = base.path if door(base.path) is gguf else None
        length = base.kept.get("max_position_embeddings", gguf.CONTEXT)
        gguf.write_model(arguments.output, c, merged, like=like, context=length)
        if arguments.dtype == "float64":
            say(f"{arguments.output}: in float32, the widest that llama.cpp computes with\n")
        if like is None:
            say(f"{arguments.output}: no tokenizer in it: {base.name} has none of a GGUF file's\n")
    else:
        labels = class_names(arguments.adapter) or base.classes
        write_model(arguments.output, c, merged, labels=labels, kept=base.kept)
        try:
            copy_tokenizer(base, arguments.output)
        except (FormatError, ImportError) as error:  # a model can do without
            say(f"{arguments.output}: no tokenizer beside the model: {error}\n")
    say(f"{arguments.output}: {base.name} with {arguments.adapter} merged\n")
    return OK


def merged_config(c: Any, merged: Any) -> Any:
    """The configuration of merged weights: a head that was tied may have a weight of its own now.

    Errors: ValueError for an architecture that has no place for what the merge has made.
    """
    from dataclasses import replace

    from minilora.io.files import listed
    from minilora.spec.models import Llama, ties_head

    if isinstance(c, Llama) and ties_head(c) and "head.weight" in merged:
        c = replace(c, tied=False)
    if over := merged.keys() - c.shapes().keys():
        expected = "none, as no model file has a place for them: keep the adapter beside the model"
        raise ValueError(f"merging gives a {type(c).__name__} {listed(over)}: expected {expected}")
    return c
