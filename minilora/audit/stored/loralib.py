"""Files of loralib's state dicts by names alone."""

from __future__ import annotations

from pathlib import Path

from minilora.audit.stored.module import Held, OpenAdapter, OpenModule
from minilora.audit.stored.places import held_in

_PART_OF = {"lora_A": "A", "lora_B": "B", "weight": "weight", "bias": "bias"}


def open_loralib(file: Path) -> OpenAdapter:
    """The adapter in a state dict of loralib's, which has no alpha: the scale is not known.

    Errors: FormatError for a damaged file.
    """
    grouped: dict[str, dict[str, Held]] = {}
    others = {}
    tensors = held_in(file)
    for name, held in tensors.items():
        module, _, last = name.rpartition(".")
        if part := _PART_OF.get(last, ""):
            grouped.setdefault(module, {})[part] = held
        else:
            others[name] = "no parameter of loralib's layers"
    modules = [
        OpenModule(name, parts, "linear" if {"A", "B"} & parts.keys() else "saved", None)
        for name, parts in grouped.items()
    ]
    return OpenAdapter(file, "loralib", {}, modules, others, tensors=tensors)
