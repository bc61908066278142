"""Names of modules in one format -> the same modules' paths in Hugging Face's models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from minilora.audit.stored.module import OpenAdapter
from minilora.io.formats.gguf.contents import library

Matches = Mapping[str, str | None]
"""The names of an adapter's modules, and the paths that they mean; None where there is none."""


def matches(adapter: OpenAdapter, paths: Iterable[str]) -> Matches:
    """The path that each of the adapter's modules means, of these."""
    known = list(dict.fromkeys(paths))
    names = [module.name for module in adapter.modules if module.kind != "shared"]
    if adapter.format == "gguf":
        return _gguf(names, known, str(adapter.settings.get("general.architecture")))
    if adapter.format == "kohya":
        return _underscored(names, known)
    return _dotted(names, known)


def _dotted(names: Iterable[str], known: list[str]) -> Matches:
    """The same path, or the only one that ends like it, or that it ends like."""
    paths, ends = {*known}, _by_ends(known)
    return {name: _one(name.replace(".base_layer", ""), paths, ends) for name in names}


def _one(name: str, paths: set[str], ends: Mapping[str, list[str]]) -> str | None:
    if name in paths:
        return name
    parts = name.split(".")
    for start in range(1, len(parts)):
        if (shorter := ".".join(parts[start:])) in paths and "." in shorter:
            return shorter
    longer = ends.get(name, [])
    return longer[0] if len(longer) == 1 else None


def _by_ends(known: Iterable[str]) -> dict[str, list[str]]:
    ends: dict[str, list[str]] = {}
    for path in known:
        parts = path.split(".")
        for start in range(1, len(parts)):
            ends.setdefault(".".join(parts[start:]), []).append(path)
    return ends


def _underscored(names: Iterable[str], known: Iterable[str]) -> Matches:
    """The path with underscores for its dots, after any prefix."""
    places: dict[str, list[str]] = {}
    for path in known:
        places.setdefault(path.replace(".", "_"), []).append(path)
    found: dict[str, str | None] = {}
    for name in names:
        starts = [0, *(at.end() for at in re.finditer("_", name))]
        fits = [places[name[i:]] for i in starts if name[i:] in places]
        found[name] = fits[0][0] if fits and len(fits[0]) == 1 else None
    return found


def _gguf(names: Iterable[str], known: Iterable[str], architecture: str) -> Matches:
    """By the table of llama.cpp's names that the library gguf has."""
    gguf = library()
    number = next((n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    blocks = [int(at[1]) for name in names if (at := re.match(r"blk\.(\d+)\.", name))]
    table = {}
    if number is not None:
        of = gguf.get_tensor_name_map(number, max(blocks, default=0) + 1)
        table = {named: path for path in known if (named := of.get_name(path)) is not None}
    return {name: table.get(name) for name in names}
