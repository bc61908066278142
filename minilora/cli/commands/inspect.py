"""``minilora inspect``: what an adapter is, and what each library will do with it."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.commands import adapted_model
from minilora.cli.console import OK, add_command, add_model, say


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "inspect",
        "show an adapter's scale, targets and norms",
        "Prints where an adapter acts, its ranks and scales, how large its change is beside each "
        "weight, and what PEFT, MLX and llama.cpp will do with it.",
        _run,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder of PEFT or MLX, or a .gguf")
    add_model(parser.add_argument, adapter=False)


def _run(arguments: argparse.Namespace) -> int:

    model = adapted_model(arguments)
    say("\n".join([*described(model), "", *runtimes(model)]) + "\n")
    return OK


def described(model: Any) -> list[str]:
    """A line for each adapted module, then what they are together."""
    import numpy as np

    from minilora.io.formats.factors import variant_name
    from minilora.spec.lora import LORA, TABLES, adapted_in, weight_of
    from minilora.spec.multi_adapter import Adapter
    from minilora.spec.variants import ALORA

    W, tuning, own = model.weights, model.tuning, model.changed
    rows = []
    for at in adapted_in(own):
        variant = tuning.variant.get(at, LORA)
        weight = W[weight_of(at, W)]
        M = weight.T if at in TABLES else weight
        parts = tuple(own[f"{at}.{part}"] for part in variant.parts)
        acting = LORA if variant == ALORA else variant  # on the tokens on which it acts
        change, _ = Adapter(parts, tuning.scale[at], acting).change(M, W.get(f"{at}.bias"))
        ratio = np.linalg.norm(change) / np.linalg.norm(M)
        rows.append(
            [at, variant_name(variant), str(len(own[f"{at}.A"])), f"{tuning.scale[at]:g}",
             f"{np.linalg.norm(change):.4g}", f"{ratio:.2%}"]
        )  # fmt: skip
    head = ["module", "variant", "r", "scale", "‖ΔW‖", "of ‖W‖"]
    lines = table([head, *rows])
    beside = sorted(name for name in tuning.trained if name.endswith((".weight", ".bias")))
    size = sum(array.size for name, array in own.items() if name in tuning.trained)
    linears = model.base.config.linears()
    hit = len([row for row in rows if row[0] in linears])
    lines += ["", f"{hit} of {len(linears)} projections adapted, {size} parameters trained"]
    if len(rows) > hit:
        lines.append(f"and {len(rows) - hit} tables or tied heads")
    if beside:
        lines.append(f"trained in full beside them: {', '.join(beside)}")
    if model.config is not None and model.config.alora_invocation_tokens:
        tokens = " ".join(map(str, model.config.alora_invocation_tokens))
        lines.append(
            f"alora acts from the last invocation on, the tokens {tokens}, and on no other"
        )
    idle = [row[0] for row in rows if row[4] == "0"]
    if idle:
        lines.append(f"no change yet, B is 0: {', '.join(idle)}")
    return lines


def table(rows: list[list[str]]) -> list[str]:
    """The rows in columns: the first two to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def runtimes(model: Any) -> list[str]:
    """What each library computes with the adapter, or why it cannot have it.

    Whether it can is not guessed: the adapter is written for it, to a folder that goes again.
    """
    import tempfile
    from pathlib import Path

    from minilora.io.conversion import write_adapter
    from minilora.io.files import FormatError
    from minilora.io.formats.registry import adapter_formats

    scales = ", ".join(sorted({f"{s:g}" for s in model.tuning.scale.values()}))
    lines = []
    for f in adapter_formats():
        text = f.scaling.format(scales=scales)
        with tempfile.TemporaryDirectory() as folder:
            try:
                write_adapter(Path(folder) / f"adapter{f.suffix}", f, model)
            except FormatError as error:
                _, where, found, expected, remedy = error.args
                text = f"cannot have it: {where}: found {found}, expected {expected}; {remedy}"
            except (ImportError, ValueError) as error:
                text = f"not tried: {error}"
        lines.append(f"{f.name:5} {text}")
    return lines
