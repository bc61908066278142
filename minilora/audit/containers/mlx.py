"""Models that mlx-lm has quantized: a weight in codes, scales and biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.audit.tensors import StoredTensor
from minilora.io.errors import FormatError


def dequantized(
    config: Path, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """The tensors, with each triple as one."""
    raise FormatError(config, "quantization", settings, "none", "dequantize it")
