"""Models in GGUF files, by their Hugging Face names."""

from pathlib import Path

from minilora.audit.tensors import TensorStore
from minilora.io.errors import FormatError


def open_gguf(path: Path) -> TensorStore:
    """The tensors of a GGUF model."""
    raise FormatError(path, "file", "a GGUF file", "safetensors", "convert it")
