"""What settings adapt and train of a model of which only the names are known.

A name says what a module is: the last part ``embed_tokens`` an embedding, one that ends with
``norm`` a norm, ``lm_head`` the head; every other module is a linear layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.io.errors import FormatError, listed
from minilora.io.formats.peft.names import CONFIG, tensor_names
from minilora.io.formats.peft.settings import checked_settings
from minilora.io.formats.peft.targets import own_of, selected, variant_of
from minilora.spec.target_modules import all_linear, is_saved
from minilora.spec.variants import REGISTRY

_FILE = Path(CONFIG)


def is_embedding(name: str) -> bool:
    """Whether the module is an embedding."""
    return name.rpartition(".")[2] == "embed_tokens"


def is_norm(name: str) -> bool:
    """Whether the module is a norm."""
    return name.endswith("norm")


def is_head(name: str) -> bool:
    """Whether the module is the output head, which "all-linear" leaves out."""
    return name.rpartition(".")[2] == "lm_head"


def adapted_names(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[int, Any]]:
    """The modules that the fields of ``adapter_config.json`` adapt, each with its rank and alpha.

    Errors: FormatError for settings without a meaning, and if no module matches.
    """
    return _adapted(_settings(config, names), names)


def trained_names(config: Mapping[str, Any], parameters: Sequence[str]) -> list[str]:
    """The tensors in ``adapter_model.safetensors`` of all that is trained of these parameters.

    These are the adapters' own, the biases that ``bias`` names, and ``modules_to_save``.

    Errors: as :func:`adapted_names`.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    settings = _settings(config, modules)
    adapted = _adapted(settings, modules)
    trained = REGISTRY[variant_of(settings)].trained
    biases = {
        name
        for name in parameters
        if name.endswith(".bias")
        and settings["bias"] != "none"
        and (settings["bias"] == "all" or name.removesuffix(".bias") in adapted)
    }
    saved = {
        name
        for name in parameters
        if is_saved(name.rpartition(".")[0], settings["modules_to_save"])
    }
    if both := {name.rpartition(".")[0] for name in saved} & adapted.keys():
        remedy = "PEFT would save adapted modules in full: give whole names"
        expected = "modules without adapters"
        raise FormatError(_FILE, "modules_to_save", listed(both), expected, remedy)
    parts = [f"{at}.{part}" for at in adapted for part in trained]
    beside = [name for name in parameters if name in biases | saved]
    tables = {at for at in modules if is_embedding(at)}
    return list(tensor_names([*parts, *beside], {at: at for at in modules}, tables).values())


def _settings(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """The settings, "all-linear" as a list."""
    settings = checked_settings(_FILE, {"peft_type": "LORA", **config})
    if str(settings["target_modules"]).lower() == "all-linear":
        linears = [at for at in modules if not (is_embedding(at) or is_norm(at))]
        settings["target_modules"] = all_linear(linears, filter(is_head, linears))
    return settings


def _adapted(settings: Mapping[str, Any], modules: Sequence[str]) -> dict[str, tuple[int, Any]]:
    adapted = selected(_FILE, settings, modules)
    if not adapted:
        remedy = "is it another model's?"
        found = f"{settings['target_modules']}, which match no module"
        raise FormatError(_FILE, "target_modules", found, f"some of {listed(modules)}", remedy)
    if norms := [at for at in adapted if is_norm(at)]:
        remedy = "norms have no adapter of low rank"
        expected = "linear layers and embeddings only"
        raise FormatError(_FILE, "target_modules", listed(norms), expected, remedy)
    of_own = {at: at for at in adapted}
    ranks = own_of(_FILE, settings["rank_pattern"], of_own)
    alphas = own_of(_FILE, settings["alpha_pattern"], of_own)
    r, alpha = settings["r"], settings["lora_alpha"]
    return {at: (ranks.get(at, r), alphas.get(at, alpha)) for at in adapted}
