"""The tensors' names in ``adapter_model.safetensors``."""

from collections.abc import Container, Iterable, Mapping

from minilora.io.architectures import architecture_of
from minilora.spec.lora import TABLES, Variant, is_base
from minilora.spec.models import Config
from minilora.spec.variants import REGISTRY, extended

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

PROJECTIONS = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
"""VeRA's A and B, which all modules share."""

_TABLE_FACTORS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
_NOT_OF_ADAPTERS = {"weight", "bias", "tokens"}


def vectors(variant: Variant) -> tuple[str, ...]:
    """The ends of the parameters that are vectors in the file, and columns here."""
    details = extended(variant)
    return () if details.peft.flat else tuple(f".{part}" for part in details.columns)


def paths(c: Config) -> dict[str, str]:
    """The modules' paths, a tied head's among them."""
    return architecture_of(c).paths(c)


def adapter_names(c: Config, names: Iterable[str]) -> dict[str, str]:
    """Internal parameter name -> the tensor's name in ``adapter_model.safetensors``.

    LoRA's factors are ``<path>.lora_A.weight`` and ``<path>.lora_B.weight``, of a table
    ``<path>.lora_embedding_A`` and ``_B``; what other parameters are called, the variant's `Peft`
    says. What else there is of an adapted module lies under ``<path>.base_layer``; every other
    parameter at the module's path; ``tokens``, its rows that are trained alone, under
    ``<path>.token_adapter``. VeRA's A and B are left out: all modules share them.

    Errors: ValueError for a name that belongs to no module of the model.
    """
    return tensor_names(names, paths(c), TABLES)


def tensor_names(
    names: Iterable[str], path_of: Mapping[str, str], tables: Container[str]
) -> dict[str, str]:
    """The same of modules with these paths, of which some are tables."""
    names = list(names)
    parts: dict[str, set[str]] = {}
    for name in names:
        at, _, part = name.rpartition(".")
        if at not in path_of:
            raise ValueError(f"{name!r}: found no module {at!r}; check the names")
        parts.setdefault(at, set()).add(part)
    places = {}
    for name in names:
        at, _, part = name.rpartition(".")
        part_names = _part_names(at in tables, parts[at])
        if part == "tokens":
            end = "token_adapter.trainable_tokens_delta"
        elif is_base(name):
            end = f"base_layer.{part}" if parts[at] - _NOT_OF_ADAPTERS else part
        elif "lambda_b" in parts[at] and part in PROJECTIONS:
            continue
        elif part not in part_names:
            raise ValueError(f"{name!r}: found no such part, expected {', '.join(part_names)}")
        else:
            end = part_names[part]
        places[name] = f"{PREFIX}{path_of[at]}.{end}"
    return places


def _part_names(is_table: bool, parts: set[str]) -> Mapping[str, str]:
    """The end of the name of each of a module's parameters, of which it has ``parts``."""
    known = [extended(entry.equation).peft for entry in REGISTRY.values()]
    if is_table:
        known = [peft for peft in known if "embedding" not in peft.refuses]
    parts = parts - _NOT_OF_ADAPTERS
    names = next((p.tensors for p in known if parts <= p.tensors.keys()), known[0].tensors)
    return {**names, **_TABLE_FACTORS} if is_table else names
