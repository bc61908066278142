"""``minilora inspect``: what an adapter contains, and what each library computes with it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minilora.cli.commands import adapted_model
from minilora.cli.console import OK, say
from minilora.cli.options import add_command, add_model

if TYPE_CHECKING:
    from minilora.io.loading import AdaptedModel


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        "show an adapter's modules, ranks, scales and norms",
        "Print the modules that an adapter changes, its ranks and scales, the norm of its change "
        "relative to that of each weight, and what PEFT, MLX and llama.cpp compute with it.",
        _run,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="the folder or the file of an adapter")
    add_model(parser.add_argument, adapter=False)


def _run(arguments: argparse.Namespace) -> int:
    model = adapted_model(arguments)
    say("\n".join([*described(model), "", *runtimes(model)]) + "\n")
    return OK


def described(model: AdaptedModel) -> list[str]:
    """A line for each adapted module, then a summary."""
    head = ["module", "variant", "r", "scale", "‖ΔW‖", "of ‖W‖"]
    rows = _rows(model)
    lines = [*table([head, *rows]), ""]
    tuning, linears = model.tuning, model.base.config.linears()
    adapted = len([row for row in rows if row[0] in linears])
    size = sum(w.size for name, w in model.changed.items() if name in tuning.trained)
    lines += [f"{adapted} of {len(linears)} projections adapted, {size} parameters trained"]
    if len(rows) > adapted:
        lines.append(f"and {len(rows) - adapted} tables or tied heads")
    whole = sorted(name for name in tuning.trained if name.endswith((".weight", ".bias")))
    if whole:
        lines.append(f"trained in full: {', '.join(whole)}")
    if model.config is not None and model.config.alora_invocation_tokens:
        tokens = " ".join(map(str, model.config.alora_invocation_tokens))
        lines.append(f"aLoRA: acts only from the last invocation on, the tokens {tokens}")
    if unchanged := [row[0] for row in rows if row[4] == "0"]:
        lines.append(f"no change, B is 0: {', '.join(unchanged)}")
    return lines


def _rows(model: AdaptedModel) -> list[list[str]]:
    """For each adapted module its name, variant, rank, scale, and the norm of its change."""
    import numpy as np

    from minilora.io.formats.factors import variant_name
    from minilora.spec.lora import LORA, TABLES, adapted_in, weight_of
    from minilora.spec.multi_adapter import Adapter
    from minilora.spec.variants import REGISTRY

    W, tuning, parameters = model.weights, model.tuning, model.changed
    rows = []
    for at in adapted_in(parameters):
        variant, s = tuning.variant.get(at, LORA), tuning.scale[at]
        weight = W[weight_of(at, W)]
        M = weight.T if at in TABLES else weight
        parts = tuple(parameters[f"{at}.{part}"] for part in variant.parts)
        name = variant_name(variant)
        equation = REGISTRY[name].variant  # of aLoRA, on the tokens on which it acts
        change, _ = Adapter(parts, s, equation).change(M, W.get(f"{at}.bias"))
        norm = np.linalg.norm(change)
        ratio, r = norm / np.linalg.norm(M), len(parameters[f"{at}.A"])
        rows.append([at, name, str(r), f"{s:g}", f"{norm:.4g}", f"{ratio:.2%}"])
    return rows


def table(rows: list[list[str]]) -> list[str]:
    """The rows in columns, the first two aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def runtimes(model: AdaptedModel) -> list[str]:
    """What each library computes with the adapter, or why it cannot.

    To find out, the adapter is written in its format, to a temporary folder.
    """
    import tempfile
    from pathlib import Path

    from minilora.io.conversion import write_adapter
    from minilora.io.errors import FormatError
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
                text = f"not possible: {where}: found {found}, expected {expected}; {remedy}"
            except (ImportError, ValueError) as error:
                text = f"not tried: {error}"
        lines.append(f"{f.name:5} {text}")
    return lines
