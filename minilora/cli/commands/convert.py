"""``minilora convert``: an adapter in another library's format."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.commands import adapted_model
from minilora.cli.console import OK, add_command, add_model, say


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

    from minilora.io.loading import adapter_format, adapter_path, check_output

    if (arguments.to == "gguf") != arguments.output.endswith(".gguf"):
        expected = "a .gguf file" if arguments.to == "gguf" else "a folder"
        raise ValueError(f"--output {arguments.output}: expected {expected} for {arguments.to}")
    model = adapted_model(arguments)
    base = model.base
    check_output(arguments.output, base, arguments.adapter)
    told = write(arguments.output, arguments.to, model)
    said = adapter_format(adapter_path(arguments.adapter))
    of = f"{arguments.adapter} of {said} for {arguments.to}, on {base.name}"
    say(f"{arguments.output}: the adapter {of}\n{told}")
    return OK


def write(path: str, kind: str, model: Any) -> str:
    """Write an adapter, as `loading.open_adapted` gives it; what there is to tell.

    It acts on the base as it is, whatever its start has taken out of that.

    Errors: those of the format's writer, for what it cannot say.
    """
    from minilora.io.formats import mlx, peft
    from minilora.io.formats.factors import config_from_factors

    c, told = model.base.config, ""
    if kind != "peft" and model.lora is not None:
        model, told = on_base(model)
    own, tuning, lora = model.own, model.tuning, model.lora
    dropout = 0.0 if lora is None else lora.lora_dropout
    if kind == "peft":
        lora = lora or config_from_factors(path, c, own, tuning, dropout)
        base = model.base
        peft.write_adapter(path, c, own, tuning, lora, base=base.weights, of=base.of_transformers)
    elif kind == "mlx":
        mlx.write_adapter(path, c, own, tuning, dropout=dropout)
    else:
        from minilora.io.formats import gguf

        folded = gguf.write_adapter(path, c, own, tuning)
        told += "".join(f"B of {at} was multiplied by {by:g}\n" for at, by in folded.items())
    return told


def on_base(model: Any) -> tuple[Any, str]:
    """PEFT's adapter as factors on the base's own weights, and what there is to tell.

    A start that PEFT takes out of the base is written with those factors beside it, at the doubled
    rank; copies of the base's weights, which PEFT saves with an adapted table, are left out.
    """
    import tempfile
    from dataclasses import replace

    import numpy as np

    from minilora.io.formats import peft
    from minilora.io.loading import open_adapted
    from minilora.spec.lora import is_base

    base, told = model.base, ""
    if model.lora.init_lora_weights in peft.INIT_FROM_BASE:
        with tempfile.TemporaryDirectory() as folder:
            own, tuning, lora = model.own, model.tuning, model.lora
            peft.write_adapter(folder, base.config, own, tuning, lora, base=base.weights)
            model = open_adapted(base, folder, next(iter(own.values())).dtype)
        told = (
            f"what {lora.init_lora_weights} took out of the base is put back, at twice the rank\n"
        )
    own = {
        name: array
        for name, array in model.own.items()
        if not is_base(name)
        or name in model.tuning.trained
        or not np.array_equal(array, base.weights[name])
    }
    return replace(model, own=own), told
