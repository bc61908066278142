"""The settings of ``adapter_config.json``: which are read, and which others may stand there."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.io.errors import FormatError
from minilora.io.files import check_settings, read_json
from minilora.io.formats.values import (
    Fits,
    is_either,
    is_flag,
    is_integer,
    is_list,
    is_number,
    is_object,
    is_text,
)
from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.variants import REGISTRY, extended

_STARTS = ("eva", *(name for name, init in INITIALIZATIONS.items() if init.in_peft))

Setting = tuple[Any, Fits, str]
"""The default, whether a value fits, and what fits, in words."""


def _is_start(value: Any) -> bool:
    return is_flag(value) or (isinstance(value, str) and value in _STARTS)


_is_layer, _is_token = is_integer(-math.inf, math.inf), is_integer(0)
_are_tokens = is_list(_is_token)


def _is_range(value: Any) -> bool:
    return _are_tokens(value) and len(value) == 2


_FLAG: Setting = (False, is_flag, "true or false")
_RANK: Setting = (None, is_integer(1), "a whole number from 1")
_PROBABILITY: Setting = (0.0, lambda v: is_number(v) and 0 <= v < 1, "a number from 0 and below 1")
_NAMES = (is_either(is_text, is_list(is_text)), "text or a list")

_SHARED: Mapping[str, Setting] = {
    "target_modules": (None, *_NAMES),
    "modules_to_save": ([], is_list(is_text), "a list of names"),
    "layers_to_transform": (
        [], is_either(_is_layer, is_list(_is_layer)), "a whole number or a list"
    ),
    "layers_pattern": ([], *_NAMES),
    "task_type": ("", is_text, "text"),
}  # fmt: skip
_OF_LORA: Mapping[str, Setting] = {
    "lora_alpha": (None, is_number, "a number"),
    "exclude_modules": ([], *_NAMES),
    "lora_dropout": _PROBABILITY,
    "bias": ("none", ("none", "all", "lora_only").__contains__, "none, all or lora_only"),
    "trainable_token_indices": (
        [], is_either(_are_tokens, is_object(_are_tokens)),
        "whole numbers from 0, or lists of them by names",
    ),
    "layer_replication": ([], is_list(_is_range), "pairs of whole numbers from 0"),
    "ensure_weight_tying": _FLAG,
}  # fmt: skip
_OFF: Mapping[str, tuple[Any, ...]] = {
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
_BOOKKEEPING = """
auto_mapping base_model_name_or_path revision inference_mode peft_version fan_in_fan_out
"""


@dataclass(frozen=True)
class Kind:
    """What the settings of one ``peft_type`` mean.

    ``read``: the settings that are read, each with its default, whether a value fits and what fits
    in words; ``fixed``: those with the values under which the function is the one here; ``inert``:
    those that change no function: bookkeeping, what acts in training only or through a setting of
    ``fixed``, and ``fan_in_fan_out``, which PEFT corrects by the kind of layer, with A (r, n) and
    B (m, r) in both.
    """

    read: Mapping[str, Setting]
    fixed: Mapping[str, tuple[Any, ...]]
    inert: str


def variant_settings() -> dict[str, str]:
    """The settings that make LoRA another variant, and its name in `variants.REGISTRY`."""
    of = {name: extended(entry.equation).peft.setting for name, entry in REGISTRY.items()}
    return {setting: name for name, setting in of.items() if setting}


def variant_types() -> dict[str, str]:
    """The other values of ``peft_type``, and the variant's name."""
    of = {name: extended(entry.equation).peft.peft_type for name, entry in REGISTRY.items()}
    return {peft_type: name for name, peft_type in of.items() if peft_type != "LORA"}


def variant_flags() -> list[str]:
    """Those of the settings that are true or false: all but an invocation's tokens."""
    return [key for key, name in variant_settings().items() if REGISTRY[name].injected is None]


def _flags() -> dict[str, Setting]:
    return dict.fromkeys(variant_flags(), _FLAG)


KINDS: Mapping[str, Kind] = {
    "LORA": Kind(
        read={
            **_SHARED,
            **_OF_LORA,
            "r": _RANK,
            "rank_pattern": ({}, is_object(is_integer(1)), "patterns with whole numbers from 1"),
            "alpha_pattern": ({}, is_object(is_number), "patterns with numbers"),
            "use_rslora": _FLAG,
            **_flags(),
            "alora_invocation_tokens": ([], _are_tokens, "whole numbers from 0"),
            "init_lora_weights": (
                True, _is_start, "true, false, gaussian, orthogonal, eva, pissa or olora"
            ),
        },
        fixed={"peft_type": ("LORA",), **_OFF},
        inert=_BOOKKEEPING + "runtime_config megatron_core qalora_group_size loftq_config "
        "eva_config corda_config lora_ga_config",
    ),
    "ADALORA": Kind(
        read={
            **_SHARED,
            **_OF_LORA,
            "init_r": _RANK,
            "rank_pattern": (
                {}, is_object(is_list(is_flag)), "names with lists of true and false"
            ),
        },
        fixed={
            "peft_type": ("ADALORA",),
            **_OFF,
            # PEFT takes these without a word and computes nothing else by them.
            "use_rslora": (False, None),
            "use_dora": (False, None),
            "lora_bias": (False, None),
            "alpha_pattern": (None, {}),
            "alora_invocation_tokens": (None,),
            "loftq_config": (None, {}),
        },
        inert=_BOOKKEEPING + "runtime_config megatron_core qalora_group_size eva_config "
        "corda_config lora_ga_config init_lora_weights r target_r tinit tfinal deltaT beta1 beta2 "
        "orth_reg_weight total_step",
    ),
    "VERA": Kind(
        read={
            **_SHARED,
            "r": _RANK,
            "vera_dropout": _PROBABILITY,
            "bias": ("none", ("none", "all", "vera_only").__contains__, "none, all or vera_only"),
            "save_projection": (True, is_flag, "true or false"),
            "projection_prng_key": (0, is_integer(0, 2**63 - 1), "from 0"),
        },
        fixed={"peft_type": ("VERA",)},
        inert=_BOOKKEEPING + "d_initial init_weights",
    ),
}  # fmt: skip
"""The settings of LoRA, AdaLoRA and VeRA, by ``peft_type``."""

READ, FIXED, INERT = KINDS["LORA"].read, KINDS["LORA"].fixed, KINDS["LORA"].inert

NEWER = (
    *("lora_bias", "alora_invocation_tokens", "trainable_token_indices"),
    "ensure_weight_tying",
)
"""Settings that are written only if they say something: an older PEFT refuses an unknown name."""

NOT_REPRODUCIBLE = {
    "pissa_niter": "PEFT takes another random approximation out of the base each time it loads it: "
    "convert it with path_initial_model_for_weight_conversion where it was trained",
    "loftq": "PEFT quantizes the base anew when it loads it: write the base that it was trained on "
    "beside it, and true here",
    "lora_ga": "it belongs to a base that PEFT does not make again: convert it with "
    "path_initial_model_for_weight_conversion where it was trained",
    "corda": "it belongs to a base that PEFT makes from data: convert it with "
    "path_initial_model_for_weight_conversion where it was trained",
    "mica": "its B is frozen, which nothing here keeps: set true to train both",
}
"""Initializations that cannot be read, and what to do."""


def read_settings(path: Path) -> dict[str, Any]:
    """The settings, checked one by one, with defaults where there are none.

    Errors: FormatError for a damaged file, an unknown setting or value, and for two that exclude
    each other.
    """
    return checked_settings(path, read_json(path))


def checked_settings(path: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the settings that stand in a file; ``path`` is for messages."""
    kind = _kind(path, stored)
    read = {**kind.read, **(_flags() if stored["peft_type"] == "LORA" else {})}
    check_settings(path, stored, read, kind.fixed, kind.inert)
    settings: dict[str, Any] = {
        "peft_type": stored["peft_type"], "exclude_modules": [], "layer_replication": [],
        "ensure_weight_tying": False, "trainable_token_indices": [],
    }  # fmt: skip
    for key, (default, fits, expected) in read.items():
        value = default if stored.get(key) is None else stored[key]
        if not fits(value):
            raise FormatError(path, key, json.dumps(value), expected, "write it as PEFT does")
        settings[key] = value
    _check_combinations(path, settings)
    if isinstance(settings["layers_to_transform"], int):
        settings["layers_to_transform"] = [settings["layers_to_transform"]]
    return settings


def _kind(path: Path, stored: Mapping[str, Any]) -> Kind:
    name = stored.get("peft_type")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        expected = " or ".join(KINDS if name is None else map(json.dumps, KINDS))
        found = "none" if name is None else json.dumps(name)
        raise FormatError(path, "peft_type", found, expected, "is it an adapter of these?")
    init = stored.get("init_lora_weights")
    for prefix, remedy in NOT_REPRODUCIBLE.items() if "init_lora_weights" in kind.read else ():
        if isinstance(init, str) and init.startswith(prefix):
            expected = "an initialization that is known when the adapter is loaded"
            raise FormatError(path, "init_lora_weights", json.dumps(init), expected, remedy)
    return kind


def _check_combinations(path: Path, settings: Mapping[str, Any]) -> None:
    expression = isinstance(settings["target_modules"], str) and settings["peft_type"] != "VERA"
    if expression and settings["layers_to_transform"] != []:
        remedy = "PEFT refuses it too: list the modules"
        raise FormatError(path, "layers_to_transform", "it beside an expression", "none", remedy)
    if settings["layers_pattern"] and (expression or settings["layers_to_transform"] == []):
        beside = "an expression" if expression else "no layers_to_transform"
        remedy = "PEFT refuses it too: name the layers, or leave it out"
        raise FormatError(path, "layers_pattern", f"it beside {beside}", "none", remedy)
    variants = [name for name in variant_settings() if settings.get(name)]
    if len(variants) > 1:
        remedy = "PEFT has no layer for the two"
        found = f"it beside {variants[0]}"
        raise FormatError(path, variants[1], found, "one of the two", remedy)
