"""The files of a Hugging Face folder that stand beside the weights: the tokenizer's."""

from functools import partial
from pathlib import Path

from minilora.io.atomic import write_files
from minilora.io.files import pack_json
from minilora.io.formats.format import Base
from minilora.io.formats.tokenizers import LibraryTokenizer

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
"""The files of a model folder that go along with changed weights."""


def copy_tokenizer(base: Base, folder: Path | str) -> None:
    """Put the files of the base's tokenizer into a model's folder.

    Those of a model that is one file are made of the tokenizer that it describes.

    Errors: OSError where the disk is full or closed; of such a file those of its tokenizer.
    """
    folder = Path(folder)
    if base.path.is_dir():
        if base.path.resolve() != folder.resolve():
            paths = [base.path / name for name in TOKENIZER_FILES]
            write_files(folder, {p.name: p.read_bytes for p in paths if p.is_file()})
    elif isinstance(tokenizer := base.tokenizer, LibraryTokenizer):
        write_files(folder, {n: partial(pack_json, said) for n, said in tokenizer.files().items()})
