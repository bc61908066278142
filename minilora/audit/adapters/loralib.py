"""State dicts of loralib in a safetensors file, which say no scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minilora.audit.adapters.factors import Factors, Found, checked
from minilora.audit.change import Change
from minilora.audit.result import Entry
from minilora.audit.stored.loralib import open_loralib
from minilora.audit.stored.module import Held
from minilora.audit.tensors import TensorStore
from minilora.io.formats.loralib import merged_linear_factors
from minilora.io.lazy_weights import Expanded
from minilora.spec.ops import Array


def read(file: Path, base: TensorStore) -> Found:
    """The adapter in a state dict of loralib's, with the scale 1.

    The file says no scale: it is the ``weight`` of the audit.

    Errors: FormatError for damaged files.
    """
    opened = open_loralib(file)
    found = Found({})
    text = "a file of loralib's says no scale: it is judged with --weight, lora_alpha / r"
    found.entries.append(Entry("scale", "told", text))
    parameters = {held.name for m in opened.modules for p, held in m.parts.items() if p in "AB"}
    for name, held in opened.tensors.items():
        if name in parameters:
            continue
        if (tensor := base.find(name)) is not None:
            parts = Expanded({"weight": checked(file, held)})
            found.whole.append(Change(tensor, name.rpartition(".")[0], parts, "saved"))
        else:
            found.entries.append(Entry(name, "wrong", "the base has no such tensor"))
    for module in opened.modules:
        if own := {part: held for part, held in module.parts.items() if part in "AB"}:
            _add(found, file, module.name, own, base)
    return found


def _add(
    found: Found, file: Path, module: str, parts: Mapping[str, Held], base: TensorStore
) -> None:
    shapes = {part: place.shape for part, place in parts.items()}
    if len(parts) != 2 or any(len(shape) != 2 for shape in shapes.values()):
        text = f"found {shapes}, expected lora_A and lora_B, matrices"
        found.entries.append(Entry(module, "wrong", text, {"module": module}))
        return
    tensor = base.weight_of(module)
    m = shapes["B"][0] if tensor is None else base[tensor].shape[0]
    r = shapes["B"][1]
    readers = {part: checked(file, held) for part, held in parts.items()}
    config = {"r": r, "peft_type": "loralib"}
    if r and shapes["A"][0] != r and shapes["A"][0] % r == 0 and m == shapes["B"][0]:
        # A MergedLinear, of which all parts have factors: one adapter with block-diagonal factors.
        k = shapes["A"][0] // r

        def whole() -> tuple[Array, Array]:
            return merged_linear_factors(readers["A"](), readers["B"](), m, [True] * k)

        shapes = {"A": shapes["A"], "B": (m, r * k)}
        found.factors.append(
            Factors(module, {"A": lambda: whole()[0], "B": lambda: whole()[1]}, shapes, 1.0,
                    config=config)
        )  # fmt: skip
        return
    found.factors.append(Factors(module, readers, shapes, 1.0, config=config))
