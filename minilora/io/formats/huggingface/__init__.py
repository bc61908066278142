"""Hugging Face model folders: ``config.json`` and ``model.safetensors``, one file or shards."""

from minilora.io.formats.huggingface.config import (
    CONFIG,
    FIXED,
    INERT,
    config_to_json,
    generation_settings,
    read_config,
    read_labels,
)
from minilora.io.formats.huggingface.format import FORMAT
from minilora.io.formats.huggingface.model import (
    INDEX,
    WEIGHTS,
    headless,
    read_encoder,
    read_model,
    write_model,
)
from minilora.io.formats.huggingface.tokenizer import TOKENIZER_FILES, copy_tokenizer

__all__ = [
    "CONFIG",
    "FIXED",
    "FORMAT",
    "INDEX",
    "INERT",
    "TOKENIZER_FILES",
    "WEIGHTS",
    "config_to_json",
    "copy_tokenizer",
    "generation_settings",
    "headless",
    "read_config",
    "read_encoder",
    "read_labels",
    "read_model",
    "write_model",
]
