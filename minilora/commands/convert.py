"""``minilora convert``: an adapter in another library's format."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.console import HOLDS, add_command, add_model, say


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "convert",
        "write an adapter for PEFT, MLX or llama.cpp",
        "Reads an adapter in one format and writes it in another; what the other format cannot "
        "say is refused, and told where a scale had to be put into B.",
        _run,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder of PEFT or MLX, or a .gguf")
    add_model(parser.add_argument, adapter=False)
    parser.add_argument("--to", required=True, choices=["peft", "mlx", "gguf"], help="the format")
    parser.add_argument("--output", required=True, metavar="OUT", help="a folder, or a .gguf file")


def _run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from minilora.bases import adapter_path, base_of, kind_of, open_adapted

    if (arguments.to == "gguf") != arguments.output.endswith(".gguf"):
        expected = "a .gguf file" if arguments.to == "gguf" else "a folder"
        raise ValueError(f"--output {arguments.output}: expected {expected} for {arguments.to}")
    dtype = np.dtype(arguments.dtype)
    base = base_of(arguments.model, arguments.adapter, dtype)
    model = open_adapted(base, arguments.adapter, dtype)
    told = write(arguments.output, arguments.to, model)
    said = kind_of(adapter_path(arguments.adapter))
    say(f"{arguments.output}: the adapter {arguments.adapter} of {said} for {arguments.to}\n{told}")
    return HOLDS


def write(path: str, kind: str, model: Any) -> str:
    """Write an adapter, as :func:`minilora.bases.open_adapted` gives it; what there is to tell.

    Errors: those of the format's writer, for what it cannot say.
    """
    from minilora.formats import mlx, peft
    from minilora.formats.factors import choice_of

    c, own, tuning = model.base.config, model.own, model.tuning
    dropout = 0.0 if model.lora is None else model.lora.dropout
    if kind == "peft":
        lora = model.lora or choice_of(path, c, own, tuning, dropout)
        peft.write_adapter(path, c, own, tuning, lora)
    elif kind == "mlx":
        mlx.write_adapter(path, c, own, tuning, dropout=dropout)
    else:
        from minilora.formats import gguf

        folded = gguf.write_adapter(path, c, own, tuning)
        lines = [f"B of {at} was multiplied by {factor:g}\n" for at, factor in folded.items()]
        return "".join(lines)
    return ""
