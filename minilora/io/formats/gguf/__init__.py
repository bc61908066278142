"""GGUF files, as llama.cpp reads them: models of any tensor type, tokenizers, and LoRA adapters.

A model's matrices can stay in the file, mapped, and be expanded whenever they are read.
"""

from minilora.io.formats.gguf.adapter import read_adapter, write_adapter
from minilora.io.formats.gguf.contents import Contents
from minilora.io.formats.gguf.format import FORMAT
from minilora.io.formats.gguf.names import file_rows
from minilora.io.formats.gguf.read import generation_settings, read_model
from minilora.io.formats.gguf.tokenizer import read_tokenizer
from minilora.io.formats.gguf.write import CONTEXT, write_model

__all__ = [
    "CONTEXT",
    "FORMAT",
    "Contents",
    "file_rows",
    "generation_settings",
    "read_adapter",
    "read_model",
    "read_tokenizer",
    "write_adapter",
    "write_model",
]
