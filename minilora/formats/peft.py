"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minilora.lora import Tuning, Weights
from minilora.models import Config
from minilora.targets import Lora


def adapter_names(c: Config, names: Iterable[str]) -> dict[str, str]:
    """Internal parameter name -> the tensor's name in ``adapter_model.safetensors``."""
    raise NotImplementedError


def read_adapter(path: Path | str, c: Config, dtype: Any = None) -> tuple[Weights, Tuning]:
    """The adapter's arrays under internal names, and their scales and what is trained."""
    raise NotImplementedError


def write_adapter(
    path: Path | str, c: Config, W: Weights, tuning: Tuning, lora: Lora, *, dtype: Any = None
) -> None:
    """Write the adapter of ``W`` to the folder ``path``."""
    raise NotImplementedError
