"""What older releases of PEFT lack: found by signatures and names, and skipped with a reason."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import peft

_LATER = {
    "create_loraplus_optimizer": "peft.optimizers",
    "hotswap_adapter_from_state_dict": "peft.utils.hotswap",
}
"""Functions that came with a later release, and their modules."""


def lora_config(**settings: Any) -> Any:
    """LoraConfig. Errors: NotImplementedError for a setting that the release lacks.

    A setting that is off is left out there.
    """
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    lacking = [name for name, value in settings.items() if name not in fields and value]
    if lacking:
        raise NotImplementedError(f"PEFT {peft.__version__} has no {', '.join(lacking)}")
    return peft.LoraConfig(**{name: v for name, v in settings.items() if name in fields})


def taken(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that a function takes in this release.

    Before `autocast_adapter_dtype` and `save_embedding_layers` were options, nothing was cast.
    """
    names = _arguments(getattr(function, "__func__", function))
    return {name: value for name, value in options.items() if name in names}


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def later(name: str) -> Callable[..., Any]:
    """A function that came with a later release; without it, one that says so."""
    try:
        found: Callable[..., Any] = getattr(import_module(_LATER[name]), name)
    except (ImportError, AttributeError):

        def absent(*args: Any, **options: Any) -> Any:
            raise NotImplementedError(f"PEFT {peft.__version__} has no {name}")

        return absent
    return found


def magnitude_of(layer: Any, name: str) -> Any:
    """DoRA's magnitude of an adapter: once a parameter, later a module that has it."""
    held = layer.lora_magnitude_vector[name]
    return getattr(held, "weight", held)
