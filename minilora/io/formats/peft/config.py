"""``adapter_config.json`` beside a model -> the `LoraConfig` that it makes, in internal names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilora.io.architectures import architecture_of, module_paths
from minilora.io.errors import FormatError
from minilora.io.formats.peft.names import CONFIG
from minilora.io.formats.peft.settings import read_settings
from minilora.io.formats.peft.starts import INIT_FROM_BASE
from minilora.io.formats.peft.targets import (
    RULES,
    Selected,
    adapted_modules,
    own_values,
    ties_factors,
    token_rows,
    variant_of,
)
from minilora.io.formats.rules import check
from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.models import Config
from minilora.spec.target_modules import (
    LoraConfig,
    ResolvedTargets,
    replicated_layers,
    resolve_targets,
)


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` comes to for a model.

    ``c`` is the configuration of the model that the adapter is for: a deeper one than the base's
    with ``layer_replication``.
    """

    settings: Mapping[str, Any]
    lora: LoraConfig
    c: Config
    targets: ResolvedTargets


def read_lora_config(path: Path | str, c: Config) -> LoraConfig:
    """The `LoraConfig` that ``adapter_config.json`` makes, in internal names.

    Where the adapter is for a deeper model of the base's layers (``layer_replication``), c is the
    configuration of either. Patterns come resolved: ``target_modules``, ``rank_pattern`` and
    ``alpha_pattern`` name modules, ``modules_to_save`` names parameters. Where several patterns fit
    a module, the first in the file counts; PEFT sorts them when it writes.

    Errors: FormatError for a damaged file; for an unknown setting, or one that changes the function
    to one that is not implemented; for ``target_modules`` that match nothing, or what has no such
    adapter.
    """
    return read_config(Path(path) / CONFIG, c).lora


def read_config(path: Path, c: Config) -> AdapterConfig:
    """What the file ``path`` comes to for the model; errors as :func:`read_lora_config`."""
    settings = read_settings(path)
    c = _replicated(path, c, settings)
    _complete(path, c, settings)
    adapted = adapted_modules(path, c, settings)
    ranks, alphas = own_values(path, c, settings, adapted)
    adapted = [at for at in adapted if ranks.get(at, 1)]
    selected = Selected(c, settings, adapted)
    check(path, RULES, selected)
    saved = selected.saved | ({"embed"} if selected.saved_of_tie else set())
    rows = token_rows(path, selected)
    init = settings.get("init_lora_weights")
    try:
        lora = LoraConfig(
            r=settings["init_r"] if settings["peft_type"] == "ADALORA" else settings["r"],
            lora_alpha=settings.get("lora_alpha", 1),
            use_rslora=settings.get("use_rslora", False),
            lora_dropout=float(settings.get("lora_dropout", settings.get("vera_dropout", 0))),
            target_modules=adapted,
            bias=settings["bias"].replace("vera", "lora"),
            modules_to_save=[n for n in c.shapes() if n.rpartition(".")[0] in saved],
            init_lora_weights=init if isinstance(init, str) and init in INITIALIZATIONS else "",
            variant=variant_of(settings),
            alora_invocation_tokens=settings.get("alora_invocation_tokens", ()),
            ensure_weight_tying=ties_factors(c, settings),
            trainable_token_indices=rows,
            layer_replication=[(begin, end) for begin, end in settings["layer_replication"]],
            rank_pattern={at: r for at, r in ranks.items() if r},
            alpha_pattern=alphas,
        )
        targets = resolve_targets(lora, c.matrices())
    except ValueError as error:
        raise FormatError(path, "settings", error, "a choice", "write them as PEFT does") from None
    return AdapterConfig(settings, lora, c, targets)


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
        path_of = module_paths(c)
        settings["target_modules"] = [path_of[at] for at in c.linears() if at not in left_out]


def _replicated(path: Path, c: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration of the model that the adapter is for: c, or c with its layers repeated."""
    ranges, a = settings["layer_replication"], architecture_of(c)
    if not ranges:
        return c
    deeper = sum(end - begin for begin, end in ranges) == c.layers  # c is the deeper one's already
    depth = max(c.layers, *(end for _, end in ranges)) if deeper else c.layers
    try:
        layers = len(replicated_layers(depth, ranges))
    except ValueError as error:
        remedy = "is it another model's?"
        raise FormatError(path, "layer_replication", error, "ranges of layers", remedy) from None
    init = settings.get("init_lora_weights")
    if not a.reads_replication:
        found, remedy = f"it for a {a.model_type}", "PEFT finds no layers there"
    elif settings["bias"] != "none":
        found, remedy = f"it beside bias {settings['bias']}", "the copies share one bias"
    elif init in INIT_FROM_BASE:
        found = f"it beside init_lora_weights {init}"
        remedy = "PEFT takes each copy's start out of the one weight that all share"
    else:
        return replace(c, layers=layers)
    raise FormatError(path, "layer_replication", found, "none", remedy)


def trained_biases(lora: LoraConfig, targets: ResolvedTargets, c: Config) -> set[str]:
    """The biases that are trained beside the adapters' parameters."""
    biases = {name for name in c.shapes() if name.endswith(".bias")}
    of_adapted = {f"{at}.bias" for at in targets.rank}
    return {"none": set(), "lora_only": biases & of_adapted, "all": biases}[lora.bias]
