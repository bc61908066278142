"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

Which projections an adapter has, its ranks and its scales follow from the settings as PEFT 0.21
resolves them when it loads the folder; the tensors must agree with that, and none is ignored.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.files import (
    FormatError,
    check_settings,
    convert,
    listed,
    pack,
    pack_json,
    read_json,
    read_tensors,
    write_files,
)
from minilora.formats.huggingface import architecture, collect, modules, names, to_file
from minilora.lora import Tuning, Weights, scale
from minilora.models import GPT2, Bert, Config, Llama
from minilora.targets import Choice, Lora, choose, pattern_value, saved_in_full, targeted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    # Draws of A and B that leave the base weight as it is; the others change it, or freeze B.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "lora_bias": (False, None),
    "use_bdlora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "trainable_token_indices": (None,),
    "velora_config": (None,),
}
"""Settings with the values under which the function is the one here."""

INERT = """
auto_mapping base_model_name_or_path revision inference_mode peft_version runtime_config
megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config fan_in_fan_out
"""
"""Settings that change no function: bookkeeping; what acts only through a setting of `FIXED`; and
``fan_in_fan_out``, which PEFT corrects by the kind of layer, with A (r, n) and B (m, r) in both."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= sys.maxsize


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _are_layers(value: Any) -> bool:
    return all(type(v) is int for v in value) if isinstance(value, list) else type(value) is int


# Each setting that is read: its default, whether a value fits, and what fits, in words.
READ: Mapping[str, tuple[Any, Callable[[Any], bool], str]] = {
    "r": (None, _is_count, "a whole number from 1"),
    "lora_alpha": (None, _is_number, "a number"),
    "target_modules": (None, lambda v: isinstance(v, str) or _are_strings(v), "text or a list"),
    "exclude_modules": ([], lambda v: isinstance(v, str) or _are_strings(v), "text or a list"),
    "modules_to_save": ([], _are_strings, "a list of names"),
    "layers_to_transform": ([], _are_layers, "a whole number or a list"),
    "layers_pattern": ([], lambda v: isinstance(v, str) or _are_strings(v), "text or a list"),
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
    "use_rslora": (False, lambda v: type(v) is bool, "true or false"),
    "lora_dropout": (0.0, lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 and below 1"),
    "bias": ("none", ("none", "all", "lora_only").__contains__, "none, all or lora_only"),
    "task_type": ("", lambda v: isinstance(v, str), "text"),
    "ensure_weight_tying": (False, lambda v: type(v) is bool, "true or false"),
}


def adapter_names(c: Config, names: Iterable[str]) -> dict[str, str]:
    """Internal parameter name -> the tensor's name in ``adapter_model.safetensors``.

    The factors are ``<path>.lora_A.weight`` and ``<path>.lora_B.weight``; what else there is of an
    adapted module lies under ``<path>.base_layer``; every other parameter at the module's path.

    Errors: ValueError for a name that belongs to no module of the model.
    """
    asked, paths = list(names), modules(c)
    adapted = {name.removesuffix(".A") for name in asked if name.endswith(".A")}
    places = {}
    for name in asked:
        at, _, part = name.rpartition(".")
        if at not in paths:
            raise ValueError(f"{name!r}: found no module {at!r} in {c}; check the names")
        if part in ("A", "B"):
            part = f"lora_{part}.weight"
        elif at in adapted:
            part = f"base_layer.{part}"
        places[name] = f"{PREFIX}{paths[at]}.{part}"
    return places


def read_lora(path: Path | str, c: Config) -> Lora:
    """The choice of adapters that ``adapter_config.json`` makes, in internal names.

    Patterns come resolved: ``targets``, ``rank_pattern`` and ``alpha_pattern`` name projections,
    ``also`` names parameters. Where several patterns fit a projection, the first in the file
    counts; PEFT sorts them when it writes.

    Errors: FormatError for a damaged file; for an unknown setting, or one that changes the function
    to one that is not implemented; for a choice that hits nothing, or what is no projection here
    (embeddings, norms, a tied head).
    """
    path = Path(path) / CONFIG
    settings = _settings(path, c)
    paths = modules(c) | {"head": architecture(c)[1].outer["head"]}
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
        own = {
            kind: {at: pattern_value(settings[kind], paths[at]) for at in hit}
            for kind in ("rank_pattern", "alpha_pattern")
        }
    except (re.error, OverflowError, RecursionError) as error:
        remedy = "mend the regular expression"
        raise FormatError(path, "expressions", error, "what Python reads", remedy) from None
    if not hit:
        found = f"{json.dumps(settings['target_modules'])}, which hits nothing"
        expected = f"some of {listed(paths[at] for at in c.linears())}"
        raise FormatError(path, "target_modules", found, expected, "is it another model's?")
    if wrong := [paths[at] for at in hit if at not in c.linears()]:
        remedy = "adapters of embeddings, norms and tied heads are not implemented here"
        raise FormatError(path, "target_modules", listed(wrong), "projections only", remedy)
    saved = {at for at, key in paths.items() if saved_in_full(key, settings["modules_to_save"])}
    if both := saved.intersection(hit):
        found = f"{listed(paths[at] for at in both)}, by the end of the name"
        remedy = "PEFT would save adapted modules in full: give whole names"
        raise FormatError(path, "modules_to_save", found, "modules without adapters", remedy)
    if "head" not in c.linears() and saved & {"embed", "head"}:
        if not (settings["ensure_weight_tying"] and isinstance(c, Llama)):
            found = f"{listed(paths[at] for at in saved & {'embed', 'head'})} of a tied model"
            remedy = (
                "PEFT trains it apart from its twin; ensure_weight_tying, which it heeds for a "
                "Llama only, keeps them one"
            )
            raise FormatError(path, "modules_to_save", found, "neither embedding nor head", remedy)
        saved.add("embed")
    return Lora(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        rslora=settings["use_rslora"],
        dropout=float(settings["lora_dropout"]),
        targets=hit,
        rank_pattern={at: r for at, r in own["rank_pattern"].items() if r is not None},
        alpha_pattern={at: v for at, v in own["alpha_pattern"].items() if v is not None},
        bias=settings["bias"],
        also=[name for name in c.shapes() if name.rpartition(".")[0] in saved],
        init="gaussian" if settings["init_lora_weights"] == "gaussian" else "kaiming",
    )


def _settings(path: Path, c: Config) -> dict[str, Any]:
    """The settings, checked, with defaults where there are none."""
    given = read_json(path)
    task = "SEQ_CLS" if isinstance(c, Bert) else "CAUSAL_LM"
    check_settings(path, given, READ, FIXED | {"task_type": (None, task)}, INERT)
    settings = {"init_lora_weights": given.get("init_lora_weights", True)}
    for key, (default, fits, expected) in READ.items():
        value = default if given.get(key) is None else given[key]
        if not fits(value):
            raise FormatError(path, key, json.dumps(value), expected, "write it as PEFT does")
        settings[key] = value
    if "peft_type" not in given:
        raise FormatError(path, "peft_type", "none", "LORA", "is it a PEFT adapter?")
    if isinstance(settings["target_modules"], str) and settings["layers_to_transform"] != []:
        remedy = "PEFT refuses it too: list the modules"
        raise FormatError(path, "layers_to_transform", "it beside an expression", "none", remedy)

    if isinstance(settings["layers_to_transform"], int):
        settings["layers_to_transform"] = [settings["layers_to_transform"]]
    if settings["task_type"] == "SEQ_CLS":  # PEFT trains the classification head unasked
        settings["modules_to_save"] = [*settings["modules_to_save"], "classifier", "score"]
    if str(settings["target_modules"]).lower() == "all-linear":
        left_out = {"head"} if c.causal or settings["task_type"] == "SEQ_CLS" else set()
        paths = modules(c)
        settings["target_modules"] = [paths[at] for at in c.linears() if at not in left_out]
    return settings


def _beside(lora: Lora, choice: Choice, c: Config) -> set[str]:
    """The biases that are trained beside the factors."""
    biases = {name for name in c.shapes() if name.endswith(".bias")}
    of_adapted = {f"{at}.bias" for at in choice.rank}
    return {"none": set(), "lora_only": biases & of_adapted, "all": biases}[lora.bias]


def _factors(choice: Choice) -> dict[str, tuple[int, int]]:
    """The factors' names and shapes."""
    shapes: dict[str, tuple[int, int]] = {}
    for at, r in choice.rank.items():
        m, n = choice.shape[at]
        shapes |= {f"{at}.A": (r, n), f"{at}.B": (m, r)}
    return shapes


def read_adapter(path: Path | str, c: Config, dtype: Any = None) -> tuple[Weights, Tuning]:
    """The adapter's arrays under internal names, in ``dtype`` or the file's, and its `Tuning`.

    Beside the factors these are the modules that were trained in full and the biases; put over the
    base's weights, ``W | adapter``, they give the adapted model. Dropout acts in training only: its
    probability is in :func:`read_lora`.

    Errors: FormatError as :func:`read_lora`, :func:`minilora.formats.files.read_tensors` and
    :func:`minilora.formats.huggingface.collect` have it.
    """
    file = Path(path) / WEIGHTS
    lora = read_lora(path, c)
    choice = choose(lora, c.linears())
    factors = _factors(choice)
    beside = _beside(lora, choice, c) | set(lora.also)
    if not file.exists() and file.with_suffix(".bin").exists():
        remedy = "a pickle can run code: let PEFT load it and save it as safetensors"
        raise FormatError(file, "file", "none, but a .bin", "a safetensors file", remedy)
    found = read_tensors(file)
    placed = adapter_names(c, [*factors, *(name for name in c.shapes() if name in beside)])
    if "head.A" in factors:  # of which PEFT writes the base weight too
        place = adapter_names(c, ["head.A", "head.weight"])["head.weight"]
        placed |= {"head.weight": place} if place in found else {}
    _drop_copies(file, c, found, placed, lora)
    transposed = {name: lies for name, (_, lies) in names(c).items()}
    places = {name: (place, transposed.get(name, False)) for name, place in placed.items()}
    files = dict.fromkeys(found, file)
    W = collect(files, file, found, places, c.shapes() | factors, dtype)
    s = {at: scale(choice.alpha[at], r, lora.rslora) for at, r in choice.rank.items()}
    return W, Tuning(scale=s, trained=frozenset(factors) | beside)


def _drop_copies(
    file: Path, c: Config, found: Weights, placed: Mapping[str, str], lora: Lora
) -> None:
    """Take out of ``found`` what PEFT writes twice.

    These are a tied head beside its embedding and, with bias "all", the biases of modules that are
    saved in full: once more as trained, and as the base has them, where nothing uses them.

    Errors: FormatError if what should be a copy differs.
    """
    kept = set(placed.values())
    head = f"{PREFIX}{architecture(c)[1].outer['head']}.weight"
    for name in found.keys() - kept:
        if name == head and "embed.weight" in placed:
            twin = placed["embed.weight"]
        elif lora.bias == "all" and name.endswith(".bias"):
            twin = re.sub(r"\.(modules_to_save(\.default)?|original_module)(?=\.)", "", name)
        else:
            continue
        if twin not in kept or twin not in found:
            continue
        if ".original_module." not in name and not np.array_equal(found[name], found[twin]):
            remedy = "PEFT writes them as one: save the adapter again"
            raise FormatError(file, name, "other entries", f"those of {twin}", remedy)
        del found[name]


def write_adapter(
    path: Path | str, c: Config, W: Weights, tuning: Tuning, lora: Lora, *, dtype: Any = None
) -> None:
    """Write the adapter of W, in ``dtype`` or its own, to the folder ``path``.

    Beside the factors goes what else ``tuning`` trains. Modules are named in full, one by one, in
    the settings. The same input gives the same bytes.

    Errors: FormatError if ``lora``, ``tuning`` and W do not agree; if a part of a module is trained
    that PEFT saves as a whole, or GPT-2's embedding, which PEFT cannot tie to its head; if the
    folder holds another adapter's weights.
    """
    folder = Path(path)
    choice = choose(lora, c.linears())
    factors = _factors(choice)
    shapes = c.shapes() | factors
    if wrong := {name for name in W if name.endswith((".A", ".B"))} ^ factors.keys():
        found, expected = listed(wrong), f"the {len(factors)} factors that lora chooses"
        remedy = "give the Lora that the adapter was made with"
        raise FormatError(folder, "factors", f"{found} in one of the two", expected, remedy)
    for at, r in choice.rank.items():
        s = scale(choice.alpha[at], r, lora.rslora)
        if tuning.scale.get(at) != s:
            remedy = "give the Lora that the adapter was made with"
            raise FormatError(folder, f"scale of {at}", tuning.scale.get(at), s, remedy)
    beside = tuning.trained - factors.keys()
    saved = _saved_in_full(folder, c, lora, choice, beside)

    tensors: Weights = {}
    transposed = {name: lies for name, (_, lies) in names(c).items()}
    for name, place in adapter_names(c, [*factors, *sorted(beside)]).items():
        if name not in W or W[name].shape != shapes[name]:
            found = f"shape {W[name].shape}" if name in W else "none"
            raise FormatError(folder, name, found, f"shape {shapes[name]}", "check it against c")
        lying = to_file(name, W[name], transposed.get(name, False))
        tensors[place] = convert(folder, name, lying, dtype)
    paths = modules(c)
    tied = "embed" in saved and "head" not in c.linears()
    if tied:
        tensors[f"{PREFIX}{architecture(c)[1].outer['head']}.weight"] = tensors[
            f"{PREFIX}{paths['embed']}.weight"
        ]
    task = None
    if c.causal:
        task = "CAUSAL_LM"
    elif "head" in saved:
        task = "SEQ_CLS"
    settings = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": _plain(folder, lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "rank_pattern": {paths[at]: r for at, r in choice.rank.items() if r != lora.r},
        "alpha_pattern": {
            paths[at]: _plain(folder, v) for at, v in choice.alpha.items() if v != lora.alpha
        },
        "target_modules": sorted(paths[at] for at in choice.rank),
        "modules_to_save": sorted(paths[at] for at in saved) or None,
        "bias": lora.bias,
        "init_lora_weights": True if lora.init == "kaiming" else lora.init,
        "fan_in_fan_out": isinstance(c, GPT2),
        "ensure_weight_tying": tied,
    }
    files = {
        WEIGHTS: partial(pack, folder / WEIGHTS, tensors, {"format": "pt"}),
        CONFIG: partial(pack_json, settings),
    }
    write_files(folder, files, stale=r"adapter_model\..*")


def _plain(folder: Path, alpha: Any) -> int | float:
    """Alpha as a number that JSON has."""
    value = alpha.item() if isinstance(alpha, np.generic) else alpha
    if not _is_number(value):
        raise FormatError(folder, "alpha", repr(alpha), "an int or a float", "convert it")
    number: int | float = value
    return number


def _saved_in_full(
    folder: Path, c: Config, lora: Lora, choice: Choice, beside: frozenset[str]
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
    if "embed" in whole and "head" not in c.linears() and not isinstance(c, Llama):
        remedy = "PEFT would leave the head on the base's embedding: do not train it"
        raise FormatError(folder, "trained", "the tied embedding", "no tied embedding", remedy)
    return whole
