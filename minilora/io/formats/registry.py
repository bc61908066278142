"""The formats that are known. A new one is a module that exports its `Format`, and a line here."""

from minilora.io.formats import gguf, glassllm, huggingface, kohya, loralib, mlx, peft
from minilora.io.formats.format import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (peft, mlx, gguf, huggingface, glassllm, kohya, loralib)
}
"""The formats by name, in the order in which commands list them."""


def adapter_formats() -> list[Format]:
    """The formats in which an adapter is recognised, and which write one."""
    formats = [f for f in FORMATS.values() if f.adapter_file or f.suffix]
    return [f for f in formats if f.read_adapter is not None and f.write_adapter is not None]


def model_formats() -> list[Format]:
    """The formats in which a model is recognised."""
    return [f for f in FORMATS.values() if f.read_model is not None]
