"""PEFT's folders: what the tensors are, by their names, and which scale the settings give them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora.audit.adapters import vera
from minilora.audit.adapters.factors import Factors, Found, reader
from minilora.audit.change import Change
from minilora.audit.expressions import is_endless
from minilora.audit.result import Entry
from minilora.audit.stored.peft import SAVED, TOKENS, scale_of, split_name
from minilora.audit.tensors import StoredTensor, TensorStore
from minilora.io.errors import FormatError
from minilora.io.files import read_json
from minilora.io.formats.peft.names import CONFIG, PROJECTIONS, WEIGHTS
from minilora.io.formats.peft.settings import KINDS, Kind
from minilora.io.formats.peft.starts import INIT_FROM_BASE
from minilora.io.formats.peft.targets import variant_of
from minilora.io.header import Place, places
from minilora.io.lazy_weights import Expanded
from minilora.spec.lora import Variant
from minilora.spec.variants import REGISTRY


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
        if name in PROJECTIONS.values():
            continue
        if part:
            modules.setdefault(module, {})[part] = place
        else:
            _beside(found, module, place, base)
    pruned = _pruned(settings)
    for module, parts in modules.items():
        if module in pruned:
            continue
        read_parts = {part: reader(place) for part, place in parts.items()}
        shapes = {part: place.shape for part, place in parts.items()}
        table = any("lora_embedding_" in place.name for place in parts.values())
        factors = Factors(module, read_parts, shapes, 1.0, table=table)
        found.factors.append(factors)
    if settings["peft_type"] == "VERA":
        found.factors = vera.with_projections(file, found, stored, base)
    scaled = map(partial(_scaled, folder, found), found.factors)
    found.factors = [factors for factors in scaled if factors is not None]
    return found


def _pruned(settings: Mapping[str, Any]) -> set[str]:
    """The modules of which AdaLoRA has left nothing."""
    pattern = settings.get("rank_pattern") if settings["peft_type"] == "ADALORA" else {}
    return {name.removesuffix(".lora_E") for name, row in (pattern or {}).items() if not any(row)}


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
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in filter(is_endless, settings.get(key) or {}):
            expected = "an expression that is matched in bounded time"
            raise FormatError(path, key, json.dumps(pattern), expected, "name the modules")
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


def _scaled(folder: Path, found: Found, factors: Factors) -> Factors | None:
    """The module's parameters with the scale and the start that the settings give them."""
    settings, module, shapes = found.settings, factors.module, factors.shapes
    if not {"A", "B"} <= shapes.keys() or not all(len(shapes[part]) > 1 for part in "AB"):
        text = f"found {', '.join(shapes)}, expected A and B, matrices"
        found.entries.append(Entry(module, "wrong", text, {"module": module}))
        return None
    r, name = factors.rank, variant_of(settings)
    if r < 1:
        text = "A has no rows: a sharded training saved it without gathering it"
        found.entries.append(Entry(module, "wrong", text, {"module": module}))
        return None
    is_lora = settings["peft_type"] == "LORA"
    own_r = scale_of(folder, module, r, settings)[1]["r"]
    if is_lora and r % own_r:
        text = f"A has rank {r}, and the settings say {own_r}: PEFT refuses to load it"
        found.entries.append(Entry(module, "wrong", text, {"module": module}))
    if not (is_lora and r != own_r and r % own_r == 0):  # else experts, side by side
        own_r = r
    scale, config = scale_of(folder, module, own_r, settings)
    config |= {
        "r": own_r, "use_dora": bool(settings.get("use_dora")),
        "init": settings.get("init_lora_weights", True),
        "lora_dropout": settings.get("lora_dropout", 0.0),
    }  # fmt: skip
    init = settings.get("init_lora_weights")
    start = init if isinstance(init, str) and init in INIT_FROM_BASE else ""
    variant = _variant(found, module, name, shapes)
    return replace(factors, scale=scale, config=config, variant=variant, start=start)


def _variant(found: Found, module: str, name: str, shapes: Mapping[str, Any]) -> Variant:
    """The equation with these parameters, which are to be those of the settings."""
    wanted = REGISTRY[name].variant
    if set(wanted.parts) == shapes.keys():
        return wanted
    others = [e.variant for e in REGISTRY.values() if set(e.variant.parts) == shapes.keys()]
    text = f"found {', '.join(shapes)}, and the settings say {', '.join(wanted.parts)} ({name})"
    found.entries.append(Entry(module, "wrong", text, {"module": module}))
    return others[0] if others else wanted


def _beside(found: Found, path: str, place: Place, base: TensorStore) -> None:
    """A tensor that is no adapter's parameter: saved in full, rows of a table, or a copy."""
    if ".original_module." in path:
        return
    if match := TOKENS.search(path):
        _tokens(found, path[: match.start()], place, base)
        return
    name = SAVED.sub("", path).replace(".base_layer.", ".")
    tensor = base.find(name)
    if tensor is None and _IS_PARAMETER.search(name):
        # A head that PEFT put on the base, to train it: a classifier's.
        found.replaced.append(
            StoredTensor(name, place.dtype, place.shape, place.nbytes, place.rows)
        )
    elif tensor is None:
        text = "the base has no such tensor, and it is no parameter of an adapter's that is known"
        found.entries.append(Entry(place.name, "wrong", text))
    elif place.shape != base[tensor].shape or (".base_layer." in path and ".bias" not in path):
        _table_beside(found, base[tensor], place)
    else:
        parts = Expanded({"weight": reader(place)})
        found.whole.append(Change(tensor, name.rpartition(".")[0], parts, "saved"))


_IS_PARAMETER = re.compile(r"^(?!.*(lora|vera|lokr|hada|oft|ia3)_).*\.(weight|bias)$")


def _table_beside(found: Found, tensor: StoredTensor, place: Place) -> None:
    """A tensor in place of the base's: of an adapted table, which PEFT writes too, or resized."""
    own = StoredTensor(tensor.name, place.dtype, place.shape, place.nbytes, place.rows)
    if own.shape == tensor.shape and all(
        np.array_equal(own.rows(*at).astype(tensor.dtype), tensor.rows(*at))
        for at in tensor.blocks()
    ):
        return
    text = f"the adapter brings its own, of shape {own.shape} (the base's: {tensor.shape})"
    found.entries.append(Entry(tensor.name, "told", f"{text}: it stands in the base's place"))
    found.replaced.append(own)


def _tokens(found: Found, module: str, place: Place, base: TensorStore) -> None:
    """Rows of a table that are trained alone."""
    tokens = found.settings.get("trainable_token_indices") or []
    lists = tokens.items() if isinstance(tokens, dict) else [("", tokens)]
    ids = next((ids for end, ids in lists if module.endswith(end)), [])
    tensor = base.weight_of(module)
    shape = () if tensor is None else base[tensor].shape
    fits = len(shape) == 2 and place.shape == (len(ids), shape[1])
    if tensor is None or not fits or max(ids, default=0) >= shape[0] or len({*ids}) < len(ids):
        text = f"rows {place.shape} for {len(ids)} tokens do not fit a table {shape}"
        found.entries.append(Entry(place.name, "wrong", text))
        return
    parts = Expanded({"ids": np.asarray(ids, np.int64), "rows": reader(place)})
    found.whole.append(Change(tensor, module, parts, "tokens"))
