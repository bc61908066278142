"""PEFT's folders: what the tensors are, by their names, and which scale the settings give them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minilora.audit.adapters.factors import Factors
from minilora.audit.change import Change
from minilora.audit.result import Entry
from minilora.audit.tensors import TensorStore
from minilora.io.errors import FormatError
from minilora.io.files import NOT_FINITE, check_finite, read_json
from minilora.io.formats.peft.names import CONFIG, PREFIX, WEIGHTS
from minilora.io.formats.peft.settings import KINDS, Kind
from minilora.io.formats.peft.targets import variant_of
from minilora.io.header import Place, places
from minilora.spec.lora import LORA, Variant
from minilora.spec.ops import Array
from minilora.spec.target_modules import pattern_value
from minilora.spec.variants import REGISTRY, extended

_ENDS = {
    end: part
    for entry in REGISTRY.values()
    for part, end in extended(entry.equation).peft.tensors.items()
} | {
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector.weight": "magnitude",
}
"""The ends of tensors' names after a module's path, and the parameters that they hold."""

_COPIES = re.compile(r"\.(modules_to_save|original_module)(\.[^.]+)?(?=\.[^.]+$)")


@dataclass
class Found:
    """What a file holds: factors, whole tensors and rows, and what is to be said of it."""

    settings: Mapping[str, Any]
    factors: list[Factors] = field(default_factory=list)
    whole: list[Change] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def read(folder: Path, base: TensorStore) -> Found:
    """The adapter in a folder of PEFT's.

    Errors: FormatError for damaged files, another ``peft_type``, settings of another kind.
    """
    file = folder / WEIGHTS
    if not file.exists() and file.with_suffix(".bin").exists():
        remedy = "a pickle can run code: let PEFT load it and save it as safetensors"
        raise FormatError(file, "file", "none, but a .bin", "a safetensors file", remedy)
    settings, kind = read_settings(folder / CONFIG)
    stored, _ = places(file)
    found = Found(settings)
    found.entries += _open_settings(settings, kind)
    modules: dict[str, dict[str, Place]] = {}
    for name, place in stored.items():
        module, part = split_name(name)
        if part:
            modules.setdefault(module, {})[part] = place
        else:
            _beside(found, module, place, base)
    for module, parts in modules.items():
        factors = _factors(module, parts, settings, found)
        if factors is not None:
            found.factors.append(factors)
    return found


def read_settings(path: Path) -> tuple[dict[str, Any], Kind]:
    """The settings with their defaults, each of the kind that PEFT writes."""
    stored = read_json(path)
    name = stored.get("peft_type")
    if not isinstance(name, str) or name not in KINDS:
        expected = f"one of {', '.join(KINDS)}"
        remedy = "no other is known here: is it an adapter of LoRA's family?"
        raise FormatError(path, "peft_type", json.dumps(name), expected, remedy)
    kind = KINDS[name]
    settings = dict(stored)
    for key, (default, fits, expected) in kind.read.items():
        value = stored.get(key)
        if key == "init_lora_weights":
            continue
        if value is not None and not fits(value):
            raise FormatError(path, key, json.dumps(value), expected, "write it as PEFT does")
        settings[key] = default if value is None else value
    rank = "init_r" if name == "ADALORA" else "r"
    if settings[rank] is None:
        raise FormatError(path, rank, "none", "a whole number from 1", "write it as PEFT does")
    if settings.get("lora_alpha", 1) is None:
        raise FormatError(path, "lora_alpha", "none", "a number", "write it as PEFT does")
    return settings, kind


def _open_settings(settings: Mapping[str, Any], kind: Kind) -> list[Entry]:
    """What the settings leave open: those that change the function to another one."""
    entries = []
    for key, allowed in kind.fixed.items():
        if key in settings and settings[key] not in allowed and key != "target_parameters":
            text = f"{key} is {json.dumps(settings[key])}: it changes the function to one that is"
            entries.append(Entry(key, "undecided", f"{text} not known here"))
    known = {*kind.read, *kind.fixed, *kind.inert.split()}
    for key, value in settings.items():
        if key not in known and value not in (None, False, [], {}):
            text = f"{key} is {json.dumps(value)}, a setting that is not known: it may change more"
            entries.append(Entry(key, "doubtful", text))
    if settings.get("alora_invocation_tokens"):
        text = "the adapter is to act after its invocation alone; merged, it acts on every token"
        entries.append(Entry("alora_invocation_tokens", "wrong", text))
    return entries


def split_name(name: str) -> tuple[str, str]:
    """A tensor's module and the parameter that it holds; "" for none of an adapter's."""
    path = name.removeprefix(PREFIX)
    for end, part in _ENDS.items():
        stem, _, last = end.partition(".")
        match = re.fullmatch(
            rf"(.+)\.{stem}(\.[^.]+)??{re.escape('.' + last) if last else ''}", path
        )
        if match:
            return match[1], part
    return path, ""


def _factors(
    module: str, parts: Mapping[str, Place], settings: Mapping[str, Any], found: Found
) -> Factors | None:
    """The module's parameters with the scale that the settings give them."""
    shapes = {part: place.shape for part, place in parts.items()}
    if "A" not in parts or "B" not in parts:
        text = f"found {sorted(parts)} alone, expected A and B"
        found.entries.append(Entry(module, "wrong", text))
        return None
    table = parts["A"].name.partition("lora_embedding_")[1] != ""
    r = shapes["A"][0] if shapes["A"] else 0
    if 0 in shapes["A"] or not r:
        return None  # AdaLoRA has pruned all of it
    default_r = settings["init_r"] if settings["peft_type"] == "ADALORA" else settings["r"]
    name = variant_of(settings)
    entry = REGISTRY[name]
    ranks = settings.get("rank_pattern") if settings["peft_type"] == "LORA" else {}
    own_r = pattern_value(ranks or {}, module, default_r)
    alphas = settings.get("alpha_pattern") if settings["peft_type"] == "LORA" else {}
    alpha = pattern_value(alphas or {}, module, settings.get("lora_alpha", 1))
    rslora = bool(settings.get("use_rslora"))
    config = {
        "r": r, "lora_alpha": alpha, "use_rslora": rslora, "default_r": default_r,
        "default_alpha": settings.get("lora_alpha", 1), "use_dora": settings.get("use_dora", False),
        "fan_in_fan_out": settings.get("fan_in_fan_out", False), "peft_type": settings["peft_type"],
        "init_lora_weights": settings.get("init_lora_weights", True),
    }  # fmt: skip
    scale = float(entry.scale(alpha, r, default_r, rslora))
    factors = Factors(
        module, {part: reader(place) for part, place in parts.items()}, shapes, scale,
        _variant(shapes), table, config,
    )  # fmt: skip
    if settings["peft_type"] == "LORA" and r != own_r and len(shapes["A"]) == 2:
        found.entries += _wrong_rank(factors, own_r)
    return factors


def _wrong_rank(factors: Factors, r: int) -> list[Entry]:
    if factors.rank % r == 0:
        return []  # several experts' factors, side by side
    text = f"A has rank {factors.rank}, and the settings say {r}: PEFT refuses to load it"
    return [Entry(factors.module, "wrong", text)]


def _variant(shapes: Mapping[str, Any]) -> Variant:
    """The equation with these parameters."""
    for entry in REGISTRY.values():
        if set(entry.equation.parts) == shapes.keys():
            return entry.variant if set(entry.variant.parts) == shapes.keys() else entry.equation
    return LORA


def reader(place: Place) -> Any:
    """What reads a small tensor whole.

    Errors, when it is called: FormatError if an entry is not finite.
    """

    def read_whole() -> Array:
        array = place.rows(0, place.shape[0] if place.shape else 1).reshape(place.shape)
        return check_finite(place.path, place.name, array, NOT_FINITE)

    return read_whole


def _beside(found: Found, path: str, place: Place, base: TensorStore) -> None:
    """A tensor that is no adapter's parameter: saved in full, rows of a table, or a copy."""
    if ".original_module." in path:
        return
    name = _COPIES.sub("", path)
    if name.endswith(".token_adapter.trainable_tokens_delta"):
        _tokens(found, name.removesuffix(".token_adapter.trainable_tokens_delta"), place, base)
        return
    adapted = ".base_layer." in name
    name = name.replace(".base_layer.", ".")
    tensor = base.find(name)
    if tensor is None:
        text = "the base has no such tensor, and it is no parameter of an adapter's that is known"
        found.entries.append(Entry(place.name, "wrong", text))
        return
    if adapted and name.endswith(".weight"):
        return  # PEFT's copy of an adapted embedding
    parts = _lazy({"weight": reader(place)})
    found.whole.append(Change(tensor, name.rpartition(".")[0], parts, "saved"))


def _lazy(entries: Mapping[str, Any]) -> Any:
    from minilora.io.lazy_weights import Expanded

    return Expanded(entries)


def _tokens(found: Found, module: str, place: Place, base: TensorStore) -> None:
    """Rows of a table that are trained alone."""
    import numpy as np

    tokens = found.settings.get("trainable_token_indices") or []
    lists = tokens.items() if isinstance(tokens, dict) else [("", tokens)]
    ids = next((ids for end, ids in lists if module.endswith(end)), [])
    tensor = base.weight_of(module)
    if tensor is None or len(ids) != place.shape[0] or max(ids, default=0) >= base[tensor].shape[0]:
        text = f"{place.shape[0]} rows for the tokens {ids}: they do not fit the base's table"
        found.entries.append(Entry(place.name, "wrong", text))
        return
    parts = _lazy({"ids": np.asarray(ids), "rows": reader(place)})
    found.whole.append(Change(tensor, module, parts, "tokens", transposed=False))


__all__ = ["Found", "read", "replace"]
