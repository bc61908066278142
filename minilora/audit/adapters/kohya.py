"""Files of sd-scripts and LyCORIS: a module's path with underscores for its dots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from minilora.audit.adapters.factors import Factors, Found, checked
from minilora.audit.result import Entry
from minilora.audit.stored.kohya import open_kohya
from minilora.audit.stored.module import OpenModule
from minilora.audit.tensors import TensorStore
from minilora.io.errors import FormatError
from minilora.io.formats.kohya import PARTS, underscored
from minilora.spec.lora import LORA
from minilora.spec.variants import DORA_FULL

_OTHER = ("hada_", "lokr_", "diff", "lora_mid", "oft_", "on_input", "dora_scale_in")
"""Parameters of other methods than LoRA."""


def read(file: Path, base: TensorStore) -> Found:
    """The adapter in a file of sd-scripts or LyCORIS.

    Names are resolved by the base's modules, whatever the prefix. An alpha that is absent or 0
    counts as the rank.

    Errors: FormatError for damaged files.
    """
    opened = open_kohya(file)
    found = Found(opened.settings)
    paths = {n: n.removesuffix(".weight") for n in base if n.endswith(".weight")}
    known, rest = underscored(paths), dict[str, list[str]]()
    for name in opened.others:
        key, _, end = name.partition(".")
        rest.setdefault(key, []).append(end)
    for key in dict.fromkeys([*opened.by_name, *rest]):
        ends = rest.get(key, [])
        if other := [end for end in ends if end.startswith(_OTHER)]:
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
        module = opened.by_name.get(key, OpenModule(key, {}))
        _add(found, file, paths[matches[0]], module, ends)
    return found


def _matching(key: str, known: Mapping[str, list[str]]) -> list[str]:
    """The tensors that the key stands for: the longest end of it that is a module's."""
    parts = key.split("_")
    for start in range(len(parts)):
        if matches := known.get("_".join(parts[start:])):
            return matches
    return []


def _add(found: Found, file: Path, path: str, module: OpenModule, others: list[str]) -> None:
    parts = {part: held for part, held in module.parts.items() if part != "alpha"}
    shapes = {part: held.shape for part, held in parts.items()}
    if others or not {"A", "B"} <= parts.keys() or not shapes["A"]:
        ends = [held.name.partition(".")[2] for held in module.parts.values()] + others
        text = f"found {', '.join(ends)}, expected {', '.join(PARTS.values())} and alpha"
        found.entries.append(Entry(module.name, "wrong", text, {"module": path}))
        return
    if module.scale is None or not math.isfinite(module.scale):
        name = f"{module.name}.alpha"
        raise FormatError(file, name, module.scale, "a number", "write it as sd-scripts do")
    variant = DORA_FULL if "magnitude" in parts else LORA
    readers = {part: checked(file, held) for part, held in parts.items()}
    config = {**module.config, "peft_type": "kohya"}
    found.factors.append(Factors(path, readers, shapes, module.scale, variant, config=config))
