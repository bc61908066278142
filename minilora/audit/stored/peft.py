"""PEFT's folders by names alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.audit.expressions import is_endless
from minilora.audit.stored.module import Held, OpenAdapter, OpenModule
from minilora.audit.stored.places import held_in
from minilora.io.errors import FormatError
from minilora.io.files import read_json
from minilora.io.formats.peft.names import CONFIG, PREFIX, PROJECTIONS, WEIGHTS
from minilora.io.formats.peft.settings import KINDS
from minilora.io.formats.peft.targets import variant_of
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

TOKENS = re.compile(r"\.token_adapter\.trainable_tokens_delta(\.[^.]+)?$")
SAVED = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)")
COPY = ".base_layer."
_EXPRESSIONS = (
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"),
    "layers_pattern",
)
PARTS = {"c": "lora_bias"}
"""The names of parameters that findings call otherwise than the specification."""


def open_peft(folder: Path) -> OpenAdapter:
    """The adapter in a folder of PEFT's.

    Errors: FormatError for damaged files, a pickle, and without a configuration or a rank.
    """
    file = folder / WEIGHTS
    if not file.exists() and file.with_suffix(".bin").exists():
        remedy = "a pickle can run code: let PEFT load it and save it as safetensors"
        raise FormatError(file, "file", "none, but a .bin", "a safetensors file", remedy)
    settings = _of_their_kinds(folder / CONFIG)
    grouped: dict[str, dict[str, Held]] = {}
    others: dict[str, str] = {}
    tensors = held_in(file)
    for name, held in tensors.items():
        if name in PROJECTIONS.values():
            continue
        module, part = place_of(name)
        if part:
            grouped.setdefault(module, {})[PARTS.get(part, part)] = held
        else:
            others[name] = "no parameter of an adapter that is known"
    shared = {part: tensors[name] for part, name in PROJECTIONS.items() if name in tensors}
    modules = [_module(folder, module, parts, settings) for module, parts in grouped.items()]
    if shared:
        modules.append(OpenModule("base_model", shared, "shared", None))
    names = frozenset(path.name for path in folder.iterdir())
    return OpenAdapter(folder, "peft", settings, modules, others, names)


def _of_their_kinds(path: Path) -> dict[str, Any]:
    """The settings, each of the kind that PEFT writes; a ``peft_type`` may be any.

    Errors: FormatError for another kind.
    """
    settings = read_json(path)
    name = settings.get("peft_type")
    if name is not None and not isinstance(name, str):
        raise FormatError(path, "peft_type", json.dumps(name), "text", "write it as PEFT does")
    kind = KINDS.get(str(name or "LORA").upper(), KINDS["LORA"])
    for key, (_, fits, expected) in kind.read.items():
        value = settings.get(key)
        if value is not None and key != "init_lora_weights" and not fits(value):
            raise FormatError(path, key, json.dumps(value), expected, "write it as PEFT does")
    for key in _EXPRESSIONS:
        value = settings.get(key) or ()
        for pattern in filter(is_endless, [value] if isinstance(value, str) else value):
            expected = "an expression that is matched in bounded time"
            raise FormatError(path, key, json.dumps(pattern), expected, "name the modules")
    return settings


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


def place_of(name: str) -> tuple[str, str]:
    """The module and the parameter of a tensor: weight or bias if saved, tokens of rows."""
    path, part = split_name(name)
    if part:
        return path, part
    if match := TOKENS.search(path):
        return path[: match.start()], "tokens"
    path = SAVED.sub("", path)
    module, _, last = path.rpartition(".")
    if COPY in path:
        return module.replace(".base_layer", ""), f"base {last}"
    return (module, last) if last in ("weight", "bias") else (path, "")


def _module(
    folder: Path, name: str, parts: Mapping[str, Held], settings: Mapping[str, Any]
) -> OpenModule:
    if not {"A", "B"} & parts.keys():
        beside = {"weight", "bias", "tokens"} & parts.keys()
        kind = "tokens" if "tokens" in parts else "saved" if beside else "linear"
        return OpenModule(name, parts, kind, scale_of(folder, name, 1, settings)[0])
    table = any("lora_embedding_" in held.name for held in parts.values())
    r = next(parts[p].shape[0 if p == "A" else -1] for p in "AB" if p in parts and parts[p].shape)
    _, config = scale_of(folder, name, max(r, 1), settings)
    own = config["r"]
    side_by_side = settings.get("target_parameters") and r > own and r % own == 0
    experts = r // own if side_by_side else 1
    scale, config = scale_of(folder, name, max(r // experts, 1), settings)
    dimensions = len(parts["A"].shape) if "A" in parts else 2
    kinds = {"embedding": table, "conv": dimensions > 2, "expert": experts > 1}
    kind = next((kind for kind, is_it in kinds.items() if is_it), "linear")
    return OpenModule(name, parts, kind, scale, experts=experts, config=config)


def scale_of(
    folder: Path, name: str, r: int, settings: Mapping[str, Any]
) -> tuple[float, dict[str, Any]]:
    """The module's scale as PEFT has it, and the settings that led to it.

    Errors: FormatError without a rank, and for a pattern that is no regular expression.
    """
    kind = str(settings.get("peft_type") or "LORA").upper()
    default_r = settings.get("init_r" if kind == "ADALORA" else "r")
    alpha = settings.get("lora_alpha", 8)
    path = folder / CONFIG
    if not isinstance(default_r, int) or isinstance(default_r, bool) or default_r < 1:
        found, expected = json.dumps(default_r), "a whole number from 1"
        raise FormatError(path, "r", found, expected, "write it as PEFT does")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(
            path, "lora_alpha", json.dumps(alpha), "a number", "write it as PEFT does"
        )
    plain = name.replace(".base_layer", "")
    own_r = default_r
    if kind == "LORA":
        own_r = pattern_of(path, settings, "rank_pattern", plain, default_r)
        alpha = pattern_of(path, settings, "alpha_pattern", plain, alpha)
    variant = variant_of({**settings, "peft_type": kind}) if kind in _KNOWN else "lora"
    rslora = bool(settings.get("use_rslora"))
    config = {
        "r": own_r, "lora_alpha": alpha, "use_rslora": rslora, "peft_type": kind,
        "default_r": default_r, "default_alpha": settings.get("lora_alpha", 8),
    }  # fmt: skip
    return float(REGISTRY[variant].scale(alpha, r, default_r, rslora)), config


_KNOWN = ("LORA", "ADALORA", "VERA")


def pattern_of(path: Path, settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The module's value of a pattern.

    Errors: FormatError for what is no mapping, no number or no regular expression.
    """
    patterns = settings.get(key) or {}
    try:
        value = pattern_value(patterns, module, default)
    except (re.error, OverflowError, RecursionError, AttributeError) as error:
        expected = "names or regular expressions with numbers"
        raise FormatError(path, key, error, expected, "correct it") from None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise FormatError(path, key, value, "numbers", "write it as PEFT does")
    return value
