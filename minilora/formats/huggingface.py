"""Hugging Face model folders: ``config.json`` and ``model.safetensors``, one file or shards."""

from pathlib import Path
from typing import Any

from minilora.lora import Weights
from minilora.models import Config


def read_config(path: Path | str) -> Config:
    """The configuration in the folder ``path`` (or in the file itself)."""
    raise NotImplementedError


def config_to_json(c: Config) -> dict[str, Any]:
    """What ``config.json`` says for ``c``."""
    raise NotImplementedError


def names(c: Config) -> dict[str, tuple[str, bool]]:
    """Internal parameter name -> (the file's tensor name, whether it lies transposed there)."""
    raise NotImplementedError


def read_model(path: Path | str, dtype: Any = None) -> tuple[Config, Weights]:
    """The configuration and the weights in the folder ``path``."""
    raise NotImplementedError


def write_model(
    path: Path | str, c: Config, W: Weights, *, dtype: Any = None, shard_bytes: int | None = None
) -> None:
    """Write ``config.json`` and the weights to the folder ``path``."""
    raise NotImplementedError
