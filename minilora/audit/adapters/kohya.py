"""Files of sd-scripts and LyCORIS: a module's path with underscores for its dots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minilora.audit.adapters.factors import Factors, Found, reader
from minilora.audit.result import Entry
from minilora.audit.tensors import TensorStore
from minilora.io.errors import FormatError
from minilora.io.formats.kohya import PARTS, underscored
from minilora.io.header import Place, places
from minilora.spec.lora import LORA, scale
from minilora.spec.variants import DORA_FULL

_OTHER = ("hada_", "lokr_", "diff", "lora_mid", "oft_", "on_input", "dora_scale_in")
"""Parameters of other methods than LoRA."""


def read(file: Path, base: TensorStore) -> Found:
    """The adapter in a file of sd-scripts or LyCORIS.

    Names are resolved by the base's modules, whatever the prefix. An alpha that is absent or 0
    counts as the rank.

    Errors: FormatError for damaged files.
    """
    stored, metadata = places(file)
    found = Found(dict(metadata))
    weights = [name for name in base if name.endswith(".weight")]
    paths = {name: name.removesuffix(".weight") for name in weights}
    known = underscored(paths)
    modules: dict[str, dict[str, Place]] = {}
    for name, place in stored.items():
        module, _, end = name.partition(".")
        modules.setdefault(module, {})[end] = place
    for key, parts in modules.items():
        if other := [end for end in parts if end.startswith(_OTHER)]:
            text = f"{other[0]}: it computes another function than LoRA, which is not known here"
            found.entries.append(Entry(key, "undecided", text))
            continue
        matches = _matching(key, known)
        if len(matches) != 1:
            text = (
                f"a name of {' and '.join(matches)}" if matches else "the base has no such module"
            )
            text = f"{text}: this part of the adapter is applied nowhere"
            found.entries.append(Entry(key, "wrong", text))
            continue
        _add(found, file, key, paths[matches[0]], parts)
    return found


def _matching(key: str, known: Mapping[str, list[str]]) -> list[str]:
    """The tensors that the key stands for: the longest end of it that is a module's."""
    parts = key.split("_")
    for start in range(len(parts)):
        if matches := known.get("_".join(parts[start:])):
            return matches
    return []


def _add(found: Found, file: Path, key: str, module: str, parts: Mapping[str, Place]) -> None:
    named = {part: parts[end] for part, end in PARTS.items() if end in parts}
    left = parts.keys() - {place.name.partition(".")[2] for place in named.values()} - {"alpha"}
    shapes = {part: place.shape for part, place in named.items()}
    if left or not {"A", "B"} <= named.keys() or not shapes["A"]:
        text = f"found {', '.join(parts)}, expected {', '.join(PARTS.values())} and alpha"
        found.entries.append(Entry(key, "wrong", text, {"module": module}))
        return
    r = shapes["A"][0]
    alpha = 0.0
    if "alpha" in parts:
        value = reader(parts["alpha"])()
        if value.size != 1:
            raise FormatError(file, f"{key}.alpha", f"shape {value.shape}", "one number",
                              "write it as sd-scripts do")  # fmt: skip
        alpha = float(value.reshape(()))
    config = {"r": r, "lora_alpha": alpha or r, "peft_type": "kohya"}
    variant = DORA_FULL if "magnitude" in named else LORA
    readers = {part: reader(place) for part, place in named.items()}
    s = float(scale(alpha or float(r), max(r, 1)))
    found.factors.append(Factors(module, readers, shapes, s, variant, config=config))
