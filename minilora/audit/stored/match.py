"""Names of modules in one format -> the same modules' paths in Hugging Face's models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from minilora.audit.containers.gguf import Names
from minilora.audit.stored.module import OpenAdapter
from minilora.io.formats.gguf.contents import Contents, library

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
    return _dotted(names, known, adapter.format == "mlx")


def paired(one: OpenAdapter, other: OpenAdapter) -> Matches:
    """The name in the second adapter's file of each of the modules in the first one's."""
    names, others = list(one.by_name), list(other.by_name)
    if one.format == other.format or {one.format, other.format}.isdisjoint(("gguf", "kohya")):
        return _dotted(names, others, one.format != other.format)
    if one.format == "kohya" or other.format in ("peft", "mlx", "loralib"):
        paths = _paths(other)
        return {n: paths.get(p) if p else None for n, p in matches(one, list(paths)).items()}
    paths = _paths(one)
    return {paths[p]: name for name, p in matches(other, list(paths)).items() if p is not None}


def _paths(adapter: OpenAdapter) -> dict[str, str]:
    """The paths in Hugging Face's models of an adapter's modules, and their names in its file."""
    if adapter.format != "gguf":
        return {name: name for name in adapter.by_name}
    names = Names(Contents(adapter.path), _blocks(adapter.by_name) + 1)
    return {names.huggingface(f"{n}.weight").removesuffix(".weight"): n for n in adapter.by_name}


def _blocks(names: Iterable[str]) -> int:
    """The greatest number of a block in GGUF's names."""
    return max((int(at[1]) for n in names if (at := re.match(r"blk\.(\d+)\.", n))), default=0)


def _dotted(names: Iterable[str], known: list[str], renamed: bool) -> Matches:
    """The same path, or the only one that ends like it, or that it ends like.

    ``renamed``: the outermost module may have another name, as mlx-lm's GPT-2 has.
    """
    paths, ends = {*known}, _by_ends(known)
    return {name: _one(name.replace(".base_layer", ""), paths, ends, renamed) for name in names}


def _one(name: str, paths: set[str], ends: Mapping[str, list[str]], renamed: bool) -> str | None:
    if name in paths:
        return name
    parts = name.split(".")
    for start in range(1, len(parts)):
        if (shorter := ".".join(parts[start:])) in paths and "." in shorter:
            return shorter
    longer = ends.get(name, [])
    if not longer and renamed and len(parts) > 1:
        longer = ends.get(".".join(parts[1:]), [])
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


def _gguf(names: Iterable[str], known: list[str], architecture: str) -> Matches:
    """By the table of llama.cpp's names that the library gguf has."""
    gguf, names = library(), list(names)
    number = next((n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        return dict.fromkeys(names)
    of = gguf.get_tensor_name_map(number, _blocks(names) + 1)
    table = {named: path for path in known if (named := of.get_name(path)) is not None}
    if not table:  # mlx-lm's names of the outermost module
        paths, ends = {*known}, _by_ends(known)
        for path, (_, named) in of.mapping.items():
            if found := _one(path, paths, ends, True):
                table.setdefault(named, found)
    return {name: table.get(name) for name in names}
