"""What is known of llama.cpp's converter, without the library that reads its files."""

from minilora.io.architectures import ARCHITECTURES

VERBATIM = {a.gguf_name for a in ARCHITECTURES.values() if a.gguf}
"""The architectures of which it is known what llama.cpp's converter changes."""
