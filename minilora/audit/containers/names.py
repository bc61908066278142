"""What is known of llama.cpp's converter, without the library that reads its files."""

from minilora.io.architectures import ARCHITECTURES

VERBATIM = {a.model_type for a in ARCHITECTURES.values() if a.gguf is not None} | {"qwen3"}
"""The architectures of which llama.cpp's converter changes names and layouts alone."""
