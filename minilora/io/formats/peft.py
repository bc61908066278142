"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

Which modules an adapter has, its variant, its ranks and its scales follow from the settings as PEFT
0.21 resolves them when it loads the folder; the tensors must agree with that, and none is ignored.
"""

import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from minilora.io.architectures import architecture_of, module_paths, tensor_names, to_file_layout
from minilora.io.files import (
    FormatError,
    check_settings,
    listed,
    pack,
    pack_json,
    read_json,
    read_tensors,
    to_dtype,
    write_files,
)
from minilora.io.formats.factors import config_from_factors
from minilora.io.formats.format import AdapterWeights, Base, Format
from minilora.io.formats.tensors import to_internal
from minilora.spec.initialization import INITIALIZATIONS, as_plain, draw_vera, plain_alpha
from minilora.spec.lora import (
    LORA,
    TABLES,
    Params,
    TrainableSpec,
    Weights,
    is_base,
    twin,
    weight_of,
)
from minilora.spec.models import Config, ties_head
from minilora.spec.ops import Array, with_tokens
from minilora.spec.target_modules import (
    LoraConfig,
    ResolvedTargets,
    matches,
    outers,
    pattern_value,
    replicated,
    resolve_targets,
    saved_in_full,
    scales,
    targeted,
)
from minilora.spec.variants import ADALORA, ALORA, DORA_FULL, LORA_BIAS, VERA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

Setting = tuple[Any, Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= sys.maxsize


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _are_layers(value: Any) -> bool:
    return all(type(v) is int for v in value) if isinstance(value, list) else type(value) is int


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= sys.maxsize for v in value)


def _are_tokens_of_tables(value: Any) -> bool:
    named = isinstance(value, dict) and all(map(_are_tokens, value.values()))
    return named or _are_tokens(value)


def _are_ranges(value: Any) -> bool:
    return isinstance(value, list) and all(_are_tokens(v) and len(v) == 2 for v in value)


def _is_start(value: Any) -> bool:
    known = ("gaussian", "orthogonal", "eva", "pissa", "olora")
    return _is_flag(value) or (isinstance(value, str) and value in known)


_PROBABILITY: Setting = (
    0.0,
    lambda v: _is_number(v) and 0 <= v < 1,
    "a number from 0 and below 1",
)

# Each setting that is read: its default, whether a value fits, and what fits, in words.
_SHARED: Mapping[str, Setting] = {
    "target_modules": (None, lambda v: isinstance(v, str) or _are_strings(v), "text or a list"),
    "modules_to_save": ([], _are_strings, "a list of names"),
    "layers_to_transform": ([], _are_layers, "a whole number or a list"),
    "layers_pattern": ([], lambda v: isinstance(v, str) or _are_strings(v), "text or a list"),
    "task_type": ("", lambda v: isinstance(v, str), "text"),
}
_OF_LORA: Mapping[str, Setting] = {
    "lora_alpha": (None, _is_number, "a number"),
    "exclude_modules": ([], lambda v: isinstance(v, str) or _are_strings(v), "text or a list"),
    "lora_dropout": _PROBABILITY,
    "bias": ("none", ("none", "all", "lora_only").__contains__, "none, all or lora_only"),
    "trainable_token_indices": (
        [],
        _are_tokens_of_tables,
        "whole numbers from 0, or lists of them by names",
    ),
    "layer_replication": ([], _are_ranges, "pairs of whole numbers from 0"),
    "ensure_weight_tying": (False, _is_flag, "true or false"),
}
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
    """What the settings of one ``peft_type`` mean, and how its tensors are called.

    ``read``: the settings that are read, each with its default, whether a value fits and what fits
    in words; ``fixed``: those with the values under which the function is the one here; ``inert``:
    those that change no function: bookkeeping, what acts in training only or through a setting of
    ``fixed``, and ``fan_in_fan_out``, which PEFT corrects by the kind of layer, with A (r, n) and
    B (m, r) in both. ``places``: the end of each part's name.
    """

    read: Mapping[str, Setting]
    fixed: Mapping[str, tuple[Any, ...]]
    inert: str
    places: Mapping[str, str]


KINDS: Mapping[str, Kind] = {
    "LORA": Kind(
        read={
            **_SHARED,
            **_OF_LORA,
            "r": (None, _is_count, "a whole number from 1"),
            "rank_pattern": (
                {},
                lambda v: isinstance(v, dict) and all(map(_is_count, v.values())),
                "patterns with whole numbers from 1",
            ),
            "alpha_pattern": (
                {},
                lambda v: isinstance(v, dict) and all(map(_is_number, v.values())),
                "patterns with numbers",
            ),
            "use_rslora": (False, _is_flag, "true or false"),
            "use_dora": (False, _is_flag, "true or false"),
            "lora_bias": (False, _is_flag, "true or false"),
            "alora_invocation_tokens": ([], _are_tokens, "whole numbers from 0"),
            "init_lora_weights": (
                True,
                _is_start,
                "true, false, gaussian, orthogonal, eva, pissa or olora",
            ),
        },
        fixed={"peft_type": ("LORA",), **_OFF},
        inert=_BOOKKEEPING + "runtime_config megatron_core qalora_group_size loftq_config "
        "eva_config corda_config lora_ga_config",
        places={
            "A": "lora_A.weight",
            "B": "lora_B.weight",
            "c": "lora_B.bias",
            "magnitude": "lora_magnitude_vector",
        },
    ),
    "ADALORA": Kind(
        read={
            **_SHARED,
            **_OF_LORA,
            "init_r": (None, _is_count, "a whole number from 1"),
            "rank_pattern": (
                {},
                lambda v: (
                    isinstance(v, dict)
                    and all(isinstance(row, list) and all(map(_is_flag, row)) for row in v.values())
                ),
                "names with lists of true and false",
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
        places={"A": "lora_A", "B": "lora_B", "E": "lora_E"},
    ),
    "VERA": Kind(
        read={
            **_SHARED,
            "r": (None, _is_count, "a whole number from 1"),
            "vera_dropout": _PROBABILITY,
            "bias": ("none", ("none", "all", "vera_only").__contains__, "none, all or vera_only"),
            "save_projection": (True, _is_flag, "true or false"),
            "projection_prng_key": (0, lambda v: type(v) is int and 0 <= v < 2**63, "from 0"),
        },
        fixed={"peft_type": ("VERA",)},
        inert=_BOOKKEEPING + "d_initial init_weights",
        places={"lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b"},
    ),
}
"""The settings and names of LoRA, AdaLoRA and VeRA."""

READ, FIXED, INERT = KINDS["LORA"].read, KINDS["LORA"].fixed, KINDS["LORA"].inert

_TABLES = {
    "A": "lora_embedding_A",
    "B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
}
_VECTORS = (".c", ".magnitude", ".lambda_d", ".lambda_b")
_BASE = {"weight", "bias", "tokens"}
_NEWER = (
    *("lora_bias", "alora_invocation_tokens", "trainable_token_indices"),
    "ensure_weight_tying",
)
_NOT_VERAS = ("trainable_token_indices", "layer_replication")
_PROJECTIONS = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
_TIED = ("embed_tokens", "lm_head")  # the bare names by which alone PEFT knows what may be tied
INIT_FROM_BASE = (
    "pissa",
    "olora",
)  # the starts that PEFT takes out of the base whenever it loads it
_VARIANTS = {"use_dora": "dora", "lora_bias": "lora-bias", "alora_invocation_tokens": "alora"}

_NOT_READ = {
    "pissa_niter": "PEFT takes another random approximation out of the base each time it loads it: "
    "convert it with path_initial_model_for_weight_conversion where it was trained",
    "loftq": "PEFT quantises the base anew when it loads it: write the base that it was trained on "
    "beside it, and true here",
    "lora_ga": "it belongs to a base that PEFT does not make again: convert it with "
    "path_initial_model_for_weight_conversion where it was trained",
    "corda": "it belongs to a base that PEFT makes from data: convert it with "
    "path_initial_model_for_weight_conversion where it was trained",
    "mica": "its B is frozen, which nothing here keeps: set true to train both",
}


def _paths(c: Config) -> dict[str, str]:
    """The modules' paths, a tied head's among them."""
    return architecture_of(c).paths(c)


def adapter_names(c: Config, names: Iterable[str]) -> dict[str, str]:
    """Internal parameter name -> the tensor's name in ``adapter_model.safetensors``.

    LoRA's factors are ``<path>.lora_A.weight`` and ``<path>.lora_B.weight``, of a table
    ``<path>.lora_embedding_A`` and ``_B``; what other parts are called says :data:`KINDS`. What
    else there is of an adapted module lies under ``<path>.base_layer``; every other parameter at
    the module's path; ``tokens``, its rows that are trained alone, under ``<path>.token_adapter``.
    VeRA's A and B have no place of their own: all modules share them.

    Errors: ValueError for a name that belongs to no module of the model.
    """
    asked, paths = list(names), _paths(c)
    parts: dict[str, set[str]] = {}
    for name in asked:
        at, _, part = name.rpartition(".")
        if at not in paths:
            raise ValueError(f"{name!r}: found no module {at!r} in {c}; check the names")
        parts.setdefault(at, set()).add(part)
    places = {}
    for name in asked:
        at, _, part = name.rpartition(".")
        kind = "ADALORA" if "E" in parts[at] else "VERA" if "lambda_b" in parts[at] else "LORA"
        if part == "tokens":
            end = "token_adapter.trainable_tokens_delta"
        elif is_base(name):
            end = f"base_layer.{part}" if parts[at] - _BASE else part
        elif kind == "VERA" and part in _PROJECTIONS:
            continue
        else:
            own = _TABLES if at in TABLES else KINDS[kind].places
            if part not in own:
                raise ValueError(f"{name!r}: found no such part, expected {', '.join(own)}")
            end = own[part]
        places[name] = f"{PREFIX}{paths[at]}.{end}"
    return places


def read_lora_config(path: Path | str, c: Config) -> LoraConfig:
    """The choice of adapters that ``adapter_config.json`` makes, in internal names.

    Where the adapter is for a deeper model of the base's layers (``layer_replication``), c is the
    configuration of either. Patterns come resolved: ``target_modules``, ``rank_pattern`` and
    ``alpha_pattern`` name modules, ``modules_to_save`` names parameters. Where several
    patterns fit a module, the first in the file counts; PEFT sorts them when it writes.

    Errors: FormatError for a damaged file; for an unknown setting, or one that changes the function
    to one that is not implemented; for a choice that hits nothing, or what has no such adapter.
    """
    return _read_lora(Path(path) / CONFIG, c)[1]


def _read_lora(path: Path, c: Config) -> tuple[dict[str, Any], LoraConfig, Config, ResolvedTargets]:
    """The settings, the choice they make, the configuration it is for, and what it comes to."""
    settings = _settings(path)
    c = _deeper(path, c, settings)
    kind = settings["peft_type"]
    _complete(path, c, settings)
    paths = _paths(c)
    try:
        hit = [
            at
            for at, key in paths.items()
            if targeted(
                key,
                settings["target_modules"],
                exclude=settings["exclude_modules"],
                saved=settings["modules_to_save"],
                layers=settings["layers_to_transform"],
                layers_pattern=settings["layers_pattern"],
            )
        ]
        tie = _ties(c, settings)
        hit += [at for at in ("embed", "head") if tie and at not in hit]
        own: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
        if kind == "LORA":
            own = {
                name: {at: pattern_value(settings[name], paths[at]) for at in hit} for name in own
            }
    except (re.error, OverflowError, RecursionError) as error:
        remedy = "mend the regular expression"
        raise FormatError(path, "expressions", error, "what Python reads", remedy) from None
    if not hit:
        found = f"{json.dumps(settings['target_modules'])}, which hits nothing"
        expected = f"some of {listed(paths[at] for at in c.linears())}"
        raise FormatError(path, "target_modules", found, expected, "is it another model's?")
    if kind == "ADALORA":
        own["rank_pattern"] = _left(path, settings, {at: paths[at] for at in hit})
        hit = [at for at in hit if own["rank_pattern"][at]]
    _check_hit(path, c, settings, hit)
    variant = {"ADALORA": "adalora", "VERA": "vera"}.get(kind, "lora")
    for setting, name in _VARIANTS.items():
        variant = name if settings.get(setting) else variant
    init = settings.get("init_lora_weights")
    try:
        lora = LoraConfig(
            r=settings["init_r"] if kind == "ADALORA" else settings["r"],
            lora_alpha=settings.get("lora_alpha", 1),
            use_rslora=settings.get("use_rslora", False),
            lora_dropout=float(settings.get("lora_dropout", settings.get("vera_dropout", 0))),
            target_modules=hit,
            rank_pattern={at: r for at, r in own["rank_pattern"].items() if r},
            alpha_pattern={at: v for at, v in own["alpha_pattern"].items() if v is not None},
            bias=settings["bias"].replace("vera", "lora"),
            modules_to_save=_also(path, c, settings, hit),
            init_lora_weights=init if isinstance(init, str) and init in INITIALIZATIONS else "",
            variant=variant,
            alora_invocation_tokens=settings.get("alora_invocation_tokens", ()),
            ensure_weight_tying=tie,
            trainable_token_indices=_tokens(path, c, settings, hit),
            layer_replication=[(begin, end) for begin, end in settings["layer_replication"]],
        )
        choice = resolve_targets(lora, c.matrices())
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(path, "settings", error, "a choice", "write them as PEFT does") from None
    return settings, lora, c, choice


def _settings(path: Path) -> dict[str, Any]:
    """The settings, checked one by one, with defaults where there are none."""
    given = read_json(path)
    found = given.get("peft_type")
    kind = KINDS.get(found) if isinstance(found, str) else None
    if kind is None:
        expected = " or ".join(KINDS if found is None else map(json.dumps, KINDS))
        text = "none" if found is None else json.dumps(found)
        raise FormatError(path, "peft_type", text, expected, "is it an adapter of these?")
    init = given.get("init_lora_weights")
    for name, remedy in _NOT_READ.items() if "init_lora_weights" in kind.read else ():
        if isinstance(init, str) and init.startswith(name):
            expected = "a start that is known when the adapter is loaded"
            raise FormatError(path, "init_lora_weights", json.dumps(init), expected, remedy)
    check_settings(path, given, kind.read, kind.fixed, kind.inert)
    settings: dict[str, Any] = {
        "peft_type": found, "exclude_modules": [], "layer_replication": [],
        "ensure_weight_tying": False, "trainable_token_indices": [],
    }  # fmt: skip
    for key, (default, fits, expected) in kind.read.items():
        value = default if given.get(key) is None else given[key]
        if not fits(value):
            raise FormatError(path, key, json.dumps(value), expected, "write it as PEFT does")
        settings[key] = value
    if (
        found != "VERA"
        and isinstance(settings["target_modules"], str)
        and settings["layers_to_transform"] != []
    ):
        remedy = "PEFT refuses it too: list the modules"
        raise FormatError(path, "layers_to_transform", "it beside an expression", "none", remedy)
    if isinstance(settings["layers_to_transform"], int):
        settings["layers_to_transform"] = [settings["layers_to_transform"]]
    both = [name for name in _VARIANTS if settings.get(name)]
    if len(both) > 1:
        remedy = "PEFT has no layer for the two"
        raise FormatError(path, both[1], f"it beside {both[0]}", "one of the two", remedy)
    return settings


def _complete(path: Path, c: Config, settings: dict[str, Any]) -> None:
    """Put in what PEFT adds to the settings by the task and for "all-linear"."""
    task = settings["task_type"]
    known = ("", "CAUSAL_LM" if c.causal else "SEQ_CLS")
    if task not in known:
        expected = f"null or {json.dumps(known[1])}"
        remedy = "other values compute a function that is not implemented here"
        raise FormatError(path, "task_type", json.dumps(task), expected, remedy)
    if settings.get("alora_invocation_tokens") and task != "CAUSAL_LM":
        remedy = "PEFT looks for the invocation in causal language models only, told so here"
        raise FormatError(path, "task_type", json.dumps(task), '"CAUSAL_LM" for aLoRA', remedy)
    if task == "SEQ_CLS":  # PEFT trains the classification head unasked
        settings["modules_to_save"] = [*settings["modules_to_save"], "classifier", "score"]
    if str(settings["target_modules"]).lower() == "all-linear":
        left_out = {"head"} if c.causal or task == "SEQ_CLS" else set()
        paths = module_paths(c)
        settings["target_modules"] = [paths[at] for at in c.linears() if at not in left_out]


def _deeper(path: Path, c: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration of the model that the adapter is for: c, or c with its layers repeated."""
    ranges = settings["layer_replication"]
    if not ranges:
        return c
    deeper = sum(end - begin for begin, end in ranges) == c.layers  # c is the deeper one's already
    depth = max(c.layers, *(end for _, end in ranges)) if deeper else c.layers
    try:
        layers = len(replicated(depth, ranges))
    except ValueError as error:
        remedy = "is it another model's?"
        raise FormatError(path, "layer_replication", error, "ranges of layers", remedy) from None
    found = "it"
    if not architecture_of(c).reads_replication:
        found, remedy = f"it for a {architecture_of(c).model_type}", "PEFT finds no layers there"
    elif settings["bias"] != "none":
        found, remedy = f"it beside bias {settings['bias']}", "the copies share one bias"
    elif settings.get("init_lora_weights") in INIT_FROM_BASE:
        found = f"it beside init_lora_weights {settings['init_lora_weights']}"
        remedy = "PEFT takes each copy's start out of the one weight that all share"
    else:
        return replace(c, layers=layers)
    raise FormatError(path, "layer_replication", found, "none", remedy)


def _ties(c: Config, settings: Mapping[str, Any]) -> bool:
    """Whether PEFT ties the head's factors to the embedding's: it goes by their bare names."""
    if not (settings["ensure_weight_tying"] and c.causal and ties_head(c)):
        return False
    if any(name.split(".")[-1] in _TIED for name in settings["modules_to_save"]):
        return False
    wanted = settings["target_modules"]
    if isinstance(wanted, str):
        return any(matches(name, wanted) for name in _TIED)
    return any(name.split(".")[-1] in _TIED for name in wanted)


def _left(path: Path, settings: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, int]:
    """The rank that AdaLoRA's pruning has left of each module, 0 if nothing."""
    r, pattern = settings["init_r"], settings["rank_pattern"]
    known = {f"{key}.lora_E": at for at, key in paths.items()}
    if wrong := pattern.keys() - known.keys():
        remedy = "PEFT names the singular values of adapted modules"
        expected = f"some of {listed(known)}"
        raise FormatError(path, "rank_pattern", listed(wrong), expected, remedy)
    if wrong := {name for name, row in pattern.items() if len(row) != r}:
        found, remedy = (
            f"another length of {listed(wrong)}",
            "say of each singular value if it is left",
        )
        raise FormatError(path, "rank_pattern", found, f"{r} entries, as init_r says", remedy)
    if pattern and settings["lora_alpha"] <= 0:
        remedy = "PEFT takes the rank for it, before pruning one and after it another"
        raise FormatError(path, "lora_alpha", settings["lora_alpha"], "more than 0", remedy)
    left = dict.fromkeys(paths, r) | {known[name]: sum(row) for name, row in pattern.items()}
    if not any(left.values()):
        remedy = "nothing is left of the adapter: take the base"
        raise FormatError(path, "rank_pattern", "all pruned", "a singular value", remedy)
    return left


def _check_hit(path: Path, c: Config, settings: Mapping[str, Any], hit: list[str]) -> None:
    """Refuse modules that have no adapter, or none of this kind."""
    paths = _paths(c)
    if wrong := [paths[at] for at in hit if at not in c.matrices()]:
        remedy = "norms have no adapter of low rank"
        expected = "projections and embeddings only"
        raise FormatError(path, "target_modules", listed(wrong), expected, remedy)
    bare = [name for name in ("lora_bias", "alora_invocation_tokens") if settings.get(name)]
    bare += [settings["peft_type"]] if settings["peft_type"] != "LORA" else []
    if bare and (wrong := [paths[at] for at in hit if at in TABLES]):
        remedy = f"PEFT has no embedding with {bare[0]}"
        raise FormatError(path, "target_modules", listed(wrong), "projections only", remedy)
    init = settings.get("init_lora_weights")
    if init in INIT_FROM_BASE and "head" in hit and ties_head(c):
        remedy = "PEFT takes the start out of the embedding too, to which the head is tied"
        raise FormatError(path, "init_lora_weights", f"{init} of a tied head", "true", remedy)
    if (
        init == "olora"
        and architecture_of(c).transposed
        and any(at.startswith("layers.") for at in hit)
    ):
        remedy = "PEFT starts Conv1D with the factors of the transpose"
        raise FormatError(
            path,
            "init_lora_weights",
            f"{init} of a {architecture_of(c).model_type}",
            "true",
            remedy,
        )
    tied = {"embed", "head"} <= {*hit} and _ties(c, settings)
    if tied and (mixed := [name for name in _VARIANTS if settings.get(name)]):
        remedy = "the two share A and B, and nothing else"
        raise FormatError(path, mixed[0], "it beside ensure_weight_tying", "neither", remedy)


def _also(path: Path, c: Config, settings: Mapping[str, Any], hit: list[str]) -> list[str]:
    """The parameters of the modules that are trained in full."""
    paths = _paths(c)
    saved = {at for at, key in paths.items() if saved_in_full(key, settings["modules_to_save"])}
    if both := saved.intersection(hit):
        found = f"{listed(paths[at] for at in both)}, by the end of the name"
        remedy = "PEFT would save adapted modules in full: give whole names"
        raise FormatError(path, "modules_to_save", found, "modules without adapters", remedy)
    around = {outer for key in paths.values() for outer in outers(key)}
    whole = {outer for outer in around if outer.endswith(tuple(settings["modules_to_save"]))}
    if nested := {at for at in whole if not whole.isdisjoint([*outers(at)][:-1])}:
        found = f"{listed(nested)}, by the end of the name, in another of them"
        remedy = "PEFT saves a copy there that was not trained: name the outer ones alone, in full"
        raise FormatError(path, "modules_to_save", found, "no module in another", remedy)
    if ties_head(c) and saved & {"embed", "head"}:
        ensured = settings["ensure_weight_tying"] and architecture_of(c).heeds_weight_tying
        if not ensured or "head" in hit:
            found = f"{listed(paths[at] for at in saved & {'embed', 'head'})} of a tied model"
            remedy = (
                "PEFT trains it apart from its twin; ensure_weight_tying, which it heeds for a "
                "Llama only, keeps them one"
            )
            raise FormatError(path, "modules_to_save", found, "neither embedding nor head", remedy)
        saved.add("embed")
    return [name for name in c.shapes() if name.rpartition(".")[0] in saved]


def _touched(c: Config, adapted: Collection[str]) -> set[str]:
    """The adapted modules, and the embedding that an adapted head is tied to."""
    return {*adapted, "embed"} if "head" in adapted and ties_head(c) else {*adapted}


def _tokens(
    path: Path, c: Config, settings: Mapping[str, Any], hit: list[str]
) -> dict[str, list[int]]:
    """The rows of tables that are trained alone, by internal names."""
    given, paths = settings["trainable_token_indices"], _paths(c)
    if isinstance(given, list):
        given = {paths["embed"]: given} if given else {}
    found: dict[str, list[int]] = {}
    for name, ids in given.items():
        at = next((at for at, key in paths.items() if key.endswith(name)), "")
        several = [key for key in paths.values() if key.endswith(name)]
        rows = c.tables().get(at, c.vocab if at == "head" and c.causal else 0)
        if len(several) > 1 or not rows:
            text = f"{name!r}, which ends {listed(several) or 'no name'}"
            remedy = "PEFT goes by the end of names: give the whole"
            raise FormatError(path, "trainable_token_indices", text, "one table", remedy)
        if not ids or len({*ids}) < len(ids) or max(ids) >= rows:
            expected = f"tokens from 0 to {rows - 1}, each once"
            raise FormatError(path, "trainable_token_indices", ids, expected, "mend the list")
        found[at] = ids
    of_tied = found.pop("head", None) if ties_head(c) else None
    if of_tied not in (None, found.get("embed")):
        remedy = "PEFT parts the two: name the embedding alone"
        expected = "the tokens of its embedding"
        raise FormatError(path, "trainable_token_indices", "a tied head's", expected, remedy)
    taken = {at for at, key in paths.items() if saved_in_full(key, settings["modules_to_save"])}
    taken |= _touched(c, hit)
    if both := taken & found.keys():
        where = listed(paths[at] for at in both)
        remedy = "train the table in one way"
        text = f"{where}, which is adapted, tied to what is, or saved in full"
        raise FormatError(path, "trainable_token_indices", text, "another table", remedy)
    return found


def _beside(lora: LoraConfig, choice: ResolvedTargets, c: Config) -> set[str]:
    """The biases that are trained beside the factors."""
    biases = {name for name in c.shapes() if name.endswith(".bias")}
    of_adapted = {f"{at}.bias" for at in choice.rank}
    return {"none": set(), "lora_only": biases & of_adapted, "all": biases}[lora.bias]


def read_adapter(
    path: Path | str, c: Config, dtype: Any = None, base: Mapping[str, Array] | None = None
) -> tuple[Weights, TrainableSpec]:
    """The adapter's arrays under internal names, in ``dtype`` or the file's, and its
    `TrainableSpec`.

    c is the configuration of the model that the adapter is for: of the deeper one, where
    ``layer_replication`` says so, and not its base's. Beside the adapters' parts come the modules
    that were trained in full and the biases; put over the base's weights, ``W | adapter``, they
    give the adapted model. With a start that PEFT takes out of the base's weights when it loads the
    folder ("pissa", "olora"), and where rows of a table are trained alone, the adapter holds the
    changed weights too, and ``base``, those that it is put over, has to be given. Dropout and
    aLoRA's invocation are in :func:`read_lora_config`.

    Errors: FormatError as :func:`read_lora_config`, `files.read_tensors` and
    `huggingface.collect` have it; without a ``base`` that is needed.
    """
    file = Path(path) / WEIGHTS
    settings, lora, deeper, choice = _read_lora(Path(path) / CONFIG, c)
    if deeper.layers != c.layers:
        remedy = (
            "no command repeats a base's layers: merge it with PEFT and go on with that model, or "
            "in Python replicate the base by read_lora_config's layer_replication"
        )
        text = f"a model of {c.layers} layers"
        raise FormatError(Path(path) / CONFIG, "layer_replication", text, deeper.layers, remedy)
    if base is None and (lora.trainable_token_indices or lora.init_lora_weights in INIT_FROM_BASE):
        where = "trainable_token_indices" if lora.trainable_token_indices else "init_lora_weights"
        remedy = "give base, the weights that the adapter is loaded on, which it changes"
        text = json.dumps(settings[where])
        raise FormatError(Path(path) / CONFIG, where, text, "a base beside it", remedy)
    parts = choice.parts()
    beside, gone = _beside(lora, choice, c) | set(lora.modules_to_save), _gone(c, settings)
    if lora.bias == "lora_only":  # PEFT trains those of what it prunes, too
        beside |= {f"{at}.bias" for at in gone} & c.shapes().keys()
    if not file.exists() and file.with_suffix(".bin").exists():
        remedy = "a pickle can run code: let PEFT load it and save it as safetensors"
        raise FormatError(file, "file", "none, but a .bin", "a safetensors file", remedy)
    found = read_tensors(file, _pruned(file, gone))
    rows = {f"{at}.tokens": (len(ids), c.d) for at, ids in lora.trainable_token_indices.items()}
    placed = adapter_names(c, [*parts, *rows, *(name for name in c.shapes() if name in beside)])
    shared = {
        part: place for part, place in _PROJECTIONS.items() if settings.get("save_projection")
    }
    placed |= {f"shared.{part}": place for part, place in shared.items()}
    inside = {f"{at}.bias": f"{PREFIX}{path}.base_layer.bias" for at, path in gone.items()}
    placed |= {name: place for name, place in inside.items() if name in placed}
    _place_bases(file, c, found, placed, {*choice.rank, *gone})
    _drop_copies(file, c, found, placed, lora)
    head = f"{PREFIX}{_paths(c)['head']}.lora_"
    if settings.get("ensure_weight_tying") and any(
        place.startswith(head) for place in found.keys() - {*placed.values()}
    ):
        remedy = "PEFT left it out, and would not load the head's factors again: name it there, too"
        text = f"no head, whose factors are in {WEIGHTS}"
        raise FormatError(Path(path) / CONFIG, "target_modules", text, "both of the tie", remedy)
    _fit(file, found, placed, parts)
    transposed = {name: lies for name, (_, lies) in tensor_names(c).items()}
    places = {name: (place, transposed.get(name, False)) for name, place in placed.items()}
    m, n = (max(shape) for shape in zip(*choice.shape.values(), strict=True))
    shapes = c.shapes() | parts | rows | {"shared.A": (lora.r, n), "shared.B": (m, lora.r)}
    W = to_internal(file, found, places, shapes, dtype)
    s = scales(lora, choice)
    if lora.entry.variant == VERA:
        W |= _shared_parts(file, W, settings, choice, (m, n), dtype)
    if base is not None:
        W |= _changed(Path(path) / CONFIG, base, W, lora, choice, s)
    W = {name: w for name, w in W.items() if not name.startswith("shared.") and name not in rows}
    variant = {} if lora.equation == LORA else dict.fromkeys(s, lora.equation)
    return W, TrainableSpec(scale=s, trained=choice.trained() | beside, variant=variant)


def _gone(c: Config, settings: Mapping[str, Any]) -> dict[str, str]:
    """The modules of which AdaLoRA has left nothing, and their paths."""
    pattern = settings["rank_pattern"] if settings["peft_type"] == "ADALORA" else {}
    names = {name.removesuffix(".lora_E") for name, row in pattern.items() if not any(row)}
    return {at: path for at, path in _paths(c).items() if path in names}


def _pruned(file: Path, gone: Mapping[str, str]) -> str | None:
    """An expression for the tensors of the modules of which nothing is left: they are empty.

    Errors: FormatError if one of them is not.
    """
    empty = {f"{PREFIX}{path}.lora_{part}" for path in gone.values() for part in "ABE"}
    if not empty:
        return None
    try:
        with safe_open(file, framework="np") as tensors:
            for name in empty.intersection(tensors.keys()):
                shape = tensors.get_slice(name).get_shape()
                if 0 not in shape:
                    remedy = "rank_pattern says that nothing is left: is it another file's?"
                    raise FormatError(file, name, f"shape {shape}", "no entry", remedy)
    except (OSError, SafetensorError):
        pass  # which reading it says better
    return "|".join(rf"^{re.escape(name)}$" for name in sorted(empty))


def _place_bases(
    file: Path, c: Config, found: Weights, placed: dict[str, str], adapted: Collection[str]
) -> None:
    """Give a place to the base's weight of an adapted embedding and head, which PEFT writes too."""
    for at in ("embed", "head"):
        if at in adapted:
            place = f"{PREFIX}{_paths(c)[at]}.base_layer.weight"
            name = "embed.weight" if ties_head(c) else f"{at}.weight"
            if place in found and name in placed:
                twin = placed[name]
                if not np.array_equal(found[place], found.get(twin, place)):
                    remedy = "PEFT writes them as one: save the adapter again"
                    raise FormatError(file, place, "other entries", f"those of {twin}", remedy)
                del found[place]
            elif place in found:
                placed[name] = place


def _fit(
    file: Path, found: Weights, placed: dict[str, str], parts: Mapping[str, tuple[int, int]]
) -> None:
    """Make columns of the file's vectors, and take DoRA's name with ``.weight``, as PEFT does."""
    for name, place in placed.items():
        if name.endswith(".magnitude") and f"{place}.weight" in found:
            placed[name] = place = f"{place}.weight"
        if name.endswith(_VECTORS) and place in found:
            m, _ = parts[name]
            if found[place].shape != (m,):
                remedy = "it is a vector, with an entry for each row"
                shape = f"shape {found[place].shape}"
                raise FormatError(file, place, shape, f"shape {(m,)}", remedy)
            found[place] = found[place][:, None]


def _shared_parts(
    file: Path,
    W: Weights,
    settings: Mapping[str, Any],
    choice: ResolvedTargets,
    greatest: tuple[int, int],
    dtype: Any,
) -> Weights:
    """Each module's part of VeRA's A and B, which the file has, or the key that draws them."""
    m, n = greatest
    if settings["save_projection"]:
        A, B = W["shared.A"], W["shared.B"]
    else:
        drawn = vera_projections(settings["projection_prng_key"], settings["r"], m, n)
        A, B = (to_dtype(file, "vera", factor, dtype) for factor in drawn)
    return {
        name: part
        for at, (m, n) in choice.shape.items()
        for name, part in ((f"{at}.A", A[:, :n]), (f"{at}.B", B[:m]))
    }


class _TorchsDraws:
    """What PyTorch's generator on a CPU draws, in the one form that is needed of NumPy's."""

    def __init__(self, key: int) -> None:
        self.bits = np.random.RandomState(key % 2**32)

    def uniform(self, low: float, high: float, shape: tuple[int, int]) -> Array:
        """(hi - lo) u / 2²⁴ + lo, u the last 24 bits of 32 drawn; hi, lo, hi - lo in float32."""
        lo, hi = np.float32(low), np.float32(high)
        u = self.bits.randint(0, 2**32, shape, np.uint32) % 2**24 / 2**24
        drawn: Array = (u * np.float64(hi - lo) + np.float64(lo)).astype(np.float32)
        return drawn


def vera_projections(key: int, r: int, m: int, n: int) -> tuple[Array, Array]:
    """VeRA's A (r, n) and B (m, r) in float32, as PEFT draws them from ``projection_prng_key``.

    PyTorch seeds a Mersenne Twister, as NumPy's older generator does, by the key's last 32 bits.

    Source: PEFT 0.21, ``_init_vera_A_vera_B``, and PyTorch 2 on a CPU, whose order this is.
    """
    rng: Any = _TorchsDraws(key)
    return draw_vera(rng, r, m, n)


def _changed(
    path: Path,
    base: Mapping[str, Array],
    W: Weights,
    lora: LoraConfig,
    choice: ResolvedTargets,
    s: Mapping[str, Any],
) -> Weights:
    """The weights that the adapter changes: residuals of the start, tables with trained rows."""
    changed: Weights = {}
    if lora.init_lora_weights in INIT_FROM_BASE:
        for at, r in choice.rank.items():
            if at not in TABLES:
                changed[f"{at}.weight"] = _start(path, base, lora, at, r, s[at])[0]
    for at, ids in lora.trainable_token_indices.items():
        table = base[f"{at}.weight"]
        changed[f"{at}.weight"], _ = with_tokens(table, np.array(ids), W[f"{at}.tokens"])
    return changed


def _start(
    path: Path, base: Mapping[str, Array], lora: LoraConfig, at: str, r: int, s: Any
) -> tuple[Array, Array, Array]:
    """The residual of the base's weight, and the A and B that are taken out of it."""
    try:
        start = INITIALIZATIONS[lora.init_lora_weights].start
        return start(np.random.default_rng(0), base[f"{at}.weight"], r, s)
    except ValueError as error:
        remedy = "is it another model's?"
        raise FormatError(path, lora.init_lora_weights, error, f"a start of {at}", remedy) from None


def _drop_copies(
    file: Path, c: Config, found: Weights, placed: Mapping[str, str], lora: LoraConfig
) -> None:
    """Take out of ``found`` what PEFT writes twice.

    These are a tied head beside its embedding and, with bias "all", the biases of modules that are
    saved in full: once more as trained, and as the base has them, where nothing uses them.

    Errors: FormatError if what should be a copy differs.
    """
    kept = set(placed.values())
    head = f"{PREFIX}{architecture_of(c).outer['head']}.weight"
    for name in found.keys() - kept:
        if name == head and "embed.weight" in placed:
            twin = placed["embed.weight"]
        elif lora.bias == "all" and name.endswith(".bias"):
            # Below modules_to_save comes the adapter's name, if it comes at all.
            inner = r"\.(modules_to_save|original_module)(?=\.)", r"\.modules_to_save\.[^.]+(?=\.)"
            twins = (re.sub(part, "", name) for part in inner)
            twin = next((one for one in twins if one != name and one in kept & found.keys()), name)
        else:
            continue
        if twin not in kept or twin not in found:
            continue
        if ".original_module." not in name and not np.array_equal(found[name], found[twin]):
            remedy = "PEFT writes them as one: save the adapter again"
            raise FormatError(file, name, "other entries", f"those of {twin}", remedy)
        del found[name]


def write_adapter(
    path: Path | str,
    c: Config,
    W: Weights,
    tuning: TrainableSpec,
    lora: LoraConfig,
    *,
    dtype: Any = None,
    base: Mapping[str, Array] | None = None,
    of: str | None = None,
) -> None:
    """Write the adapter of W, in ``dtype`` or its own, to the folder ``path``.

    Beside the adapter goes what else ``tuning`` trains. Modules are named in full, one by one, in
    the settings. Where the start changed the weights that it was put beside ("pissa", "olora",
    "loftq"), ``base`` says on which the folder will be loaded: on those of W as they are, or on
    those from before the start, for which the adapter is written at the doubled rank. ``of`` names
    the model as ``from_pretrained`` takes it, so that PEFT's ``AutoPeftModel`` finds it. The same
    input gives the same bytes.

    Errors: FormatError if ``lora``, ``tuning`` and W do not agree; for what PEFT has no place or
    another function for; if a part of a module is trained that PEFT saves as a whole, or GPT-2's
    embedding, which PEFT cannot tie to its head; if the folder holds another adapter's weights,
    in PEFT's format or MLX's.
    """
    folder = Path(path)
    possible = c.matrices()
    shown = {
        at: m
        for at, m in possible.items()
        if at in c.linears()
        or f"{at}.A" in W
        or (lora.exclude_modules and matches(at, lora.exclude_modules))
    }
    choice = resolve_targets(lora, shown)
    _check_written(folder, c, W, tuning, lora, choice)
    lora, choice, W = _on_base(folder, W, lora, choice, base)
    parts = choice.parts()
    beside = tuning.trained - {
        f"{at}.{part}" for at in choice.rank for part in lora.entry.variant.parts
    }
    beside -= {f"{at}.weight" for at in lora.trainable_token_indices}
    saved = _saved_in_full(folder, c, lora, choice, beside)
    rows = {f"{at}.tokens": (len(ids), c.d) for at, ids in lora.trainable_token_indices.items()}
    W = {
        **W,
        **{
            f"{at}.tokens": W[f"{at}.weight"][[*ids]]
            for at, ids in lora.trainable_token_indices.items()
        },
    }
    shapes = c.shapes() | parts | rows

    tensors: Weights = {}
    transposed = {name: lies for name, (_, lies) in tensor_names(c).items()}
    for name, place in adapter_names(c, [*parts, *rows, *sorted(beside)]).items():
        if name not in W or W[name].shape != shapes[name]:
            found = f"shape {W[name].shape}" if name in W else "none"
            raise FormatError(folder, name, found, f"shape {shapes[name]}", "check it against c")
        lying = to_file_layout(name, W[name], transposed.get(name, False))
        lying = lying[:, 0] if name.endswith(_VECTORS) else lying
        tensors[place] = to_dtype(folder, name, lying, dtype)
    if lora.entry.variant == VERA:
        for part, array in _joined(folder, W, choice).items():
            tensors[_PROJECTIONS[part]] = to_dtype(folder, f"vera_{part}", array, dtype)
    paths = _paths(c)
    if "embed" in saved and ties_head(c):
        tensors[f"{PREFIX}{paths['head']}.weight"] = tensors[f"{PREFIX}{paths['embed']}.weight"]
    settings = _written(folder, c, lora, choice, saved) | {"base_model_name_or_path": of}
    files = {
        WEIGHTS: partial(pack, folder / WEIGHTS, tensors, {"format": "pt"}),
        CONFIG: partial(pack_json, settings),
    }
    write_files(folder, files, stale=r"(adapter_model|adapters)\..*")


def _check_written(
    folder: Path,
    c: Config,
    W: Weights,
    tuning: TrainableSpec,
    lora: LoraConfig,
    choice: ResolvedTargets,
) -> None:
    """Refuse what does not agree, and what PEFT would compute otherwise."""
    remedy = "give the LoraConfig that the adapter was made with"
    parts = choice.parts()
    if wrong := {name for name in W if not is_base(name)} ^ parts.keys():
        found, expected = listed(wrong), f"the {len(parts)} factors that lora chooses"
        raise FormatError(folder, "factors", f"{found} in one of the two", expected, remedy)
    for at, s in scales(lora, choice).items():
        if tuning.scale.get(at) != s:
            raise FormatError(folder, f"scale of {at}", tuning.scale.get(at), s, remedy)
        if tuning.variant.get(at, LORA) != lora.equation:
            found = "another equation"
            raise FormatError(folder, f"variant of {at}", found, lora.variant, remedy)
    if lora.entry.variant == DORA_FULL:
        remedy = "PEFT holds the norm constant in training: for inference write it as dora"
        raise FormatError(folder, "variant", lora.variant, "dora", remedy)
    if lora.entry.variant == VERA and (over := [n for n in _NOT_VERAS if getattr(lora, n)]):
        remedy = "PEFT's VeRA has no such setting"
        raise FormatError(folder, over[0], f"it with {lora.variant}", "none", remedy)
    if both := _touched(c, choice.rank) & lora.trainable_token_indices.keys():
        remedy = "PEFT trains a table in one way: adapt it, or train rows of it"
        text = f"rows of {listed(both)}, which is adapted, or tied to what is"
        raise FormatError(folder, "trainable_token_indices", text, "those of another table", remedy)
    bare = lora.equation in (LORA_BIAS, ADALORA, VERA, ALORA)
    if bare and (tables := listed(at for at in choice.rank if at in TABLES)):
        remedy = f"PEFT has no embedding with {lora.variant}"
        raise FormatError(folder, "adapted", tables, "projections only", remedy)
    if lora.equation == ALORA and not c.causal:
        remedy = "PEFT looks for the invocation in causal language models only"
        raise FormatError(folder, "variant", lora.variant, "another for a classifier", remedy)
    if lora.entry.variant == ADALORA:
        over = [at for at, r in choice.rank.items() if r > lora.r]
        pruned = any(r != lora.r for r in choice.rank.values())
        if over or (pruned and not lora.lora_alpha > 0):
            found = (
                f"more than r {lora.r} of {listed(over)}" if over else f"alpha {lora.lora_alpha}"
            )
            remedy = "PEFT prunes from r on, and takes the rank for an alpha of 0"
            raise FormatError(folder, "rank_pattern", found, "ranks up to r, alpha above 0", remedy)
    if lora.ensure_weight_tying and "head" in choice.rank:
        shared = twin(W["embed.A"], W["embed.B"])
        if not all(np.array_equal(W[f"head.{p}"], t) for p, t in zip("AB", shared, strict=True)):
            remedy = "train them as one, by tied_gradients, or leave ensure_weight_tying out"
            raise FormatError(folder, "head.A", "other factors", "the embedding's, tied", remedy)
    a = architecture_of(c)
    if lora.layer_replication and (lora.bias != "none" or not a.writes_replication):
        found = f"layer_replication with bias {lora.bias!r} of a {a.model_type}"
        remedy = "PEFT's copies share one bias, and in gpt2 and qwen2 it finds no layers, or fails"
        raise FormatError(
            folder, "layer_replication", found, "bias 'none', and a llama or bert", remedy
        )


def _on_base(
    folder: Path,
    W: Weights,
    lora: LoraConfig,
    choice: ResolvedTargets,
    base: Mapping[str, Array] | None,
) -> tuple[LoraConfig, ResolvedTargets, Weights]:
    """The adapter as one on ``base``, where the start changed the weights that it was made for."""
    if lora.init_lora_weights not in (*INIT_FROM_BASE, "loftq"):
        return lora, choice, W
    plain = replace(
        lora,
        init_lora_weights="kaiming",
        variant="lora" if lora.variant in INITIALIZATIONS else lora.variant,
    )
    if base is None:
        remedy = "give base, the weights that the folder will be loaded on"
        raise FormatError(
            folder, "base", "none", f"one, as {lora.init_lora_weights} changed W's", remedy
        )
    weights = {at: weight_of(at, W) for at in choice.rank if at not in TABLES}
    before = {at: base[weight_of(at, {**base})] for at in weights}
    if all(np.array_equal(W[name], before[at]) for at, name in weights.items()):
        return plain, choice, W
    s = scales(lora, choice)
    same_sum = (
        lora.equation != ALORA and lora.init_lora_weights != "loftq"
    )  # V = R + s B A is all that acts
    changed: Weights = {}
    for at, name in weights.items():
        residual, A0, B0 = _start(
            folder, {f"{at}.weight": before[at]}, lora, at, choice.rank[at], s[at]
        )
        if not same_sum or not np.array_equal(W[name], residual):
            remedy = "write the base of W beside it, with write_model, and give that"
            expected = f"W's, or one of which {lora.init_lora_weights} made W's"
            raise FormatError(folder, "base", f"another {at}.weight", expected, remedy)
        changed[f"{at}.A"], changed[f"{at}.B"] = as_plain(W[f"{at}.A"], W[f"{at}.B"], A0, B0)
    doubled = {at: r if at in TABLES else 2 * r for at, r in choice.rank.items()}
    alpha = {
        at: a if at in TABLES else plain_alpha(a, lora.use_rslora) for at, a in choice.alpha.items()
    }
    plain = replace(
        plain, r=2 * lora.r, lora_alpha=plain_alpha(lora.lora_alpha, lora.use_rslora),
        rank_pattern=doubled, alpha_pattern=alpha,
    )  # fmt: skip
    return (
        plain,
        replace(choice, rank=doubled, alpha=alpha, variant=plain.variant),
        {**W, **changed},
    )


def _joined(folder: Path, W: Weights, choice: ResolvedTargets) -> Weights:
    """VeRA's A and B of which each module has a part."""
    wide = max(choice.shape, key=lambda at: choice.shape[at][1])
    high = max(choice.shape, key=lambda at: choice.shape[at][0])
    A, B = W[f"{wide}.A"], W[f"{high}.B"]
    for at, (m, n) in choice.shape.items():
        if not (np.array_equal(W[f"{at}.A"], A[:, :n]) and np.array_equal(W[f"{at}.B"], B[:m])):
            remedy = "they are drawn once and stay as they are: adapt the base again"
            expected = f"parts of those of {wide} and {high}"
            raise FormatError(folder, f"A and B of {at}", "others", expected, remedy)
    return {"A": A, "B": B}


def _written(
    folder: Path, c: Config, lora: LoraConfig, choice: ResolvedTargets, saved: set[str]
) -> dict[str, Any]:
    """The settings that reading resolves to this choice."""
    paths, variant = _paths(c), lora.entry.variant
    task = None
    if c.causal:
        task = "CAUSAL_LM"
    elif "head" in saved:
        task = "SEQ_CLS"
    settings: dict[str, Any] = {
        "task_type": task,
        "inference_mode": True,
        "target_modules": sorted(paths[at] for at in choice.rank),
        "modules_to_save": sorted(paths[at] for at in saved) or None,
        "bias": lora.bias,
        "fan_in_fan_out": architecture_of(c).transposed,
    }
    if variant == VERA:
        return settings | {
            "peft_type": "VERA",
            "r": lora.r,
            "vera_dropout": lora.lora_dropout,
            "bias": lora.bias.replace("lora", "vera"),
            "save_projection": True,
            "projection_prng_key": 0,
        }
    tied = ties_head(c) and (
        "embed" in saved or (lora.ensure_weight_tying and "head" in choice.rank)
    )
    tokens = {paths[at]: [*map(int, ids)] for at, ids in lora.trainable_token_indices.items()}
    settings |= {
        "lora_alpha": _plain(folder, lora.lora_alpha),
        "lora_dropout": lora.lora_dropout,
        "trainable_token_indices": tokens or None,
        "layer_replication": [[*pair] for pair in lora.layer_replication] or None,
        "ensure_weight_tying": tied,
    }
    if variant == ADALORA:
        left = {
            f"{paths[at]}.lora_E": [i < r for i in range(lora.r)]
            for at, r in choice.rank.items()
            if r != lora.r
        }
        steps = {"total_step": 1, "tinit": 0, "tfinal": 0}  # of no training; PEFT asks for some
        ranks = {"init_r": lora.r, "target_r": lora.r, "rank_pattern": left or None}
        return settings | steps | ranks | {"peft_type": "ADALORA"}
    drawn = lora.init_lora_weights in ("gaussian", "orthogonal") and variant != LORA_BIAS
    settings |= {
        "peft_type": "LORA",
        "r": lora.r,
        "use_rslora": lora.use_rslora,
        "rank_pattern": {paths[at]: r for at, r in choice.rank.items() if r != lora.r},
        "alpha_pattern": {
            paths[at]: _plain(folder, v) for at, v in choice.alpha.items() if v != lora.lora_alpha
        },
        "init_lora_weights": lora.init_lora_weights if drawn else True,
        "use_dora": lora.variant == "dora",
        "lora_bias": variant == LORA_BIAS,
        "alora_invocation_tokens": [*map(int, lora.alora_invocation_tokens)] or None,
    }
    # An older PEFT refuses a name that it does not know, whatever its value.
    return {key: value for key, value in settings.items() if value or key not in _NEWER}


def _plain(folder: Path, alpha: Any) -> int | float:
    """Alpha as a number that JSON has."""
    value = alpha.item() if isinstance(alpha, np.generic) else alpha
    if not _is_number(value):
        raise FormatError(folder, "alpha", repr(alpha), "an int or a float", "convert it")
    number: int | float = value
    return number


def _saved_in_full(
    folder: Path, c: Config, lora: LoraConfig, choice: ResolvedTargets, beside: frozenset[str]
) -> set[str]:
    """The modules that hold what is trained beside the factors and their biases."""
    biases = _beside(lora, choice, c)
    whole = {name.rpartition(".")[0] for name in beside - biases}
    needed = biases | {name for name in c.shapes() if name.rpartition(".")[0] in whole}
    if needed != beside or whole & choice.rank.keys():
        found = listed(needed ^ beside or whole & choice.rank.keys())
        expected = f"bias {lora.bias!r} and whole modules that are not adapted"
        remedy = "PEFT trains all biases of a kind and all parameters of a module, or none"
        raise FormatError(folder, "trained", f"{found} left out or over", expected, remedy)
    apart = not architecture_of(c).heeds_weight_tying or "head" in choice.rank
    if "embed" in whole and ties_head(c) and apart:
        remedy = "PEFT would leave the head on the base's embedding: do not train it"
        raise FormatError(folder, "trained", "the tied embedding", "no tied embedding", remedy)
    return whole


def _read(path: Path, c: Config, dtype: Any, base: Params) -> AdapterWeights:
    return AdapterWeights(*read_adapter(path, c, dtype, base), read_lora_config(path, c))


def _write(path: Path, c: Config, adapter: AdapterWeights, base: Base) -> list[str]:
    weights, tuning, config = adapter
    config = config or config_from_factors(path, c, weights, tuning)
    write_adapter(path, c, weights, tuning, config, base=base.weights, of=base.name_or_path)
    return []


FORMAT = Format(
    name="peft",
    library="PEFT",
    adapter_file=WEIGHTS,
    read_adapter=_read,
    write_adapter=_write,
    holds_config=True,
    scaling="scale alpha / r, or alpha / √r with use_rslora: {scales}",
)
