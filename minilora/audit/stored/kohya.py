"""Files of sd-scripts and LyCORIS by names alone."""

from __future__ import annotations

from pathlib import Path

from minilora.audit.stored.module import Held, OpenAdapter, OpenModule
from minilora.audit.stored.places import held_in
from minilora.io.errors import FormatError
from minilora.io.formats.kohya import PARTS

_PART_OF = {name: part for part, name in PARTS.items()}


def open_kohya(file: Path) -> OpenAdapter:
    """The adapter in a file of kohya's; an alpha that is absent or 0 counts as the rank.

    Errors: FormatError for a damaged file, and an alpha that is not a number.
    """
    grouped: dict[str, dict[str, Held]] = {}
    others = {}
    tensors = held_in(file)
    for name, held in tensors.items():
        module, _, last = name.partition(".")
        if part := "alpha" if last == "alpha" else _PART_OF.get(last, ""):
            grouped.setdefault(module, {})[part] = held
        else:
            others[name] = "a part of another method than LoRA (LoHa, LoKr, Tucker, …)"
    modules = [_module(file, name, parts) for name, parts in grouped.items()]
    return OpenAdapter(file, "kohya", {}, modules, others, tensors=tensors)


def _module(file: Path, name: str, parts: dict[str, Held]) -> OpenModule:
    if not {"A", "B"} & parts.keys():
        return OpenModule(name, parts, "saved", None)
    down = parts.get("A")
    r = down.shape[0] if down is not None and down.shape else 1
    alpha = float(r)
    if "alpha" in parts:
        if parts["alpha"].shape not in ((), (1,)):
            found = f"shape {parts['alpha'].shape}"
            raise FormatError(file, f"{name}.alpha", found, "one number", "write it again")
        alpha = float(parts["alpha"].read().reshape(-1)[0]) or float(r)
    kind = "conv" if down is not None and len(down.shape) > 2 else "linear"
    return OpenModule(name, parts, kind, alpha / max(r, 1), config={"r": r, "lora_alpha": alpha})
