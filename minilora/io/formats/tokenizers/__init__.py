"""Text to tokens and back, and chats to text: the tokenizer in a Hugging Face model folder.

``tokenizer.json`` is read by the library ``tokenizers``, and a chat template rendered by
``jinja2``: both come with the extra ``text``. The tokenizers of `synthetic_data`, whose
symbols are words, need neither.
"""

from minilora.io.formats.tokenizers.base import Tokenizer
from minilora.io.formats.tokenizers.chat import EXTRA, compile_template, missing_library
from minilora.io.formats.tokenizers.library import LibraryTokenizer
from minilora.io.formats.tokenizers.read import read_tokenizer
from minilora.io.formats.tokenizers.words import WordTokenizer

__all__ = [
    "EXTRA",
    "LibraryTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "compile_template",
    "missing_library",
    "read_tokenizer",
]
