"""What is known of llama.cpp's converter, without the library that reads its files."""

from minilora.io.architectures import ARCHITECTURES

VERBATIM = {a.gguf_name for a in ARCHITECTURES.values() if a.gguf and not a.gguf.one_added}
"""The architectures of which llama.cpp's converter changes names and layouts alone."""
