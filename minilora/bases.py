"""The model that is fine-tuned, by the name that a person gives it: a folder, a file, a reference.

All of it is data: nothing in a model's files is executed, and their sizes are checked before memory
is taken for them.
"""

import hashlib
import shutil
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minilora import reference
from minilora.formats.files import FormatError, listed, pack_json, write_files
from minilora.formats.tokenizers import Tokenizer, Words, read_tokenizer
from minilora.lora import Weights
from minilora.models import Config
from minilora.ops import Array
from minilora.tasks import task

REFERENCE = "reference:"
"""What the names of the shipped models begin with."""

BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
"""The files of a model folder that go along with changed weights."""


@dataclass(frozen=True)
class Base:
    """A model: its name, its configuration, its weights, and where it was read from."""

    name: str
    config: Config
    weights: Mapping[str, Array]
    path: Path

    @property
    def reference(self) -> str | None:
        """The name of the reference model, if it is one."""
        return self.name.removeprefix(REFERENCE) if self.name.startswith(REFERENCE) else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns text into this model's tokens.

        Errors: FormatError where the files have none; ImportError without the library for it.
        """
        if self.reference is not None:
            own = task(reference.tasks(self.reference)[0])
            return Words(own.symbols, own.causal)
        if self.path.suffix == ".gguf":
            from minilora.formats import gguf

            return gguf.read_tokenizer(self.path)
        return read_tokenizer(self.path)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the configuration's and the weights' files, in the order of their names."""
        files = [self.path]
        if self.path.is_dir():
            files = sorted([self.path / "config.json", *self.path.glob("*.safetensors")])
        sha = hashlib.sha256()
        for file in files:
            with file.open("rb") as opened:
                sha.update(hashlib.file_digest(opened, "sha256").digest())
        return sha.hexdigest()


def open_base(name: str, dtype: Any = np.float32) -> Base:
    """The model of this name: ``reference:NAME``, a Hugging Face folder, or a GGUF file.

    Errors: FormatError as the format's reader has it, and for a name that is none of the three;
    ImportError without the library for a GGUF file.
    """
    path = Path(name)
    if name.startswith(REFERENCE):
        known = reference.names()
        if name.removeprefix(REFERENCE) not in known:
            remedy = "give one of these, a model folder or a GGUF file"
            expected = listed(REFERENCE + one for one in known)
            raise FormatError(name, "model", "no reference model", expected, remedy)
        path = reference.folder() / name.removeprefix(REFERENCE) / "base"
    if path.suffix == ".gguf":
        from minilora.formats import gguf

        c, W = gguf.read_model(path, dtype=dtype)
    else:
        from minilora.formats.huggingface import read_model

        if not path.is_dir():
            expected = f"a model folder, a .gguf file or {REFERENCE}NAME"
            raise FormatError(path, "model", "nothing", expected, "check the path")
        c, W = read_model(path, dtype=dtype)
    return Base(name, c, W, path)


def copy_tokenizer(base: Base, folder: Path | str) -> None:
    """Puts the tokenizer's files, and what else is read beside the weights, into a model's folder.

    Nothing is put there for a GGUF file, whose tokenizer lies in other terms.

    Errors: OSError where the disk is full or closed.
    """
    folder = Path(folder)
    if base.reference is not None:
        words = base.tokenizer
        assert isinstance(words, Words)
        files = {"tokenizer.json": words.json(), "tokenizer_config.json": words.settings()}
        write_files(folder, {name: (lambda v=v: pack_json(v)) for name, v in files.items()})
    elif base.path.is_dir() and base.path.resolve() != folder.resolve():
        for name in BESIDE:
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, folder / name)


def weights_with(base: Mapping[str, Array], changed: Mapping[str, Array]) -> Weights:
    """The base's weights and, in place of or beside them, what changed; none is copied."""
    over: Any = ChainMap(dict(changed), base)  # type: ignore[arg-type]
    return over

