"""A format: one value that says how its files are recognised, read and written.

Each module of a format exports one, and `registry` lists them; nothing else knows a format by its
name. What a format cannot do, it leaves out.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from minilora.io.formats.tokenizers import Tokenizer
from minilora.spec.lora import Params, TrainableSpec, Variant, Weights
from minilora.spec.models import Config
from minilora.spec.target_modules import LoraConfig

REFERENCE = "reference:"
"""What the names of the shipped models begin with."""


class LoadedModel(NamedTuple):
    """A model as a format reads it; ``classes`` are a classifier's classes in their order."""

    config: Config
    weights: Params
    classes: tuple[str, ...] | None = None


class AdapterWeights(NamedTuple):
    """An adapter as a format reads it: its parameters and what was trained beside them.

    ``config`` is None in a format that holds factors and scales only.
    """

    weights: Weights
    tuning: TrainableSpec
    config: LoraConfig | None = None


@dataclass(frozen=True)
class ReadOptions:
    """How a model is read: dtype (None: the file's), and what only some formats heed.

    ``classes``: those of the head that a model without one is to get. ``keep_quantized``: the
    matrices stay as they are in the file, and are expanded whenever they are read.
    """

    dtype: Any = None
    classes: int = 2
    keep_quantized: bool = False


def _no_settings(path: Path) -> dict[str, Any]:
    return {}


def _no_origin(path: Path) -> str | None:
    return None


@dataclass(frozen=True)
class Format:
    """How the files of one library hold models, adapters, or both.

    ``name`` is what ``--to`` takes, ``library`` who computes with the files. A format of single
    files has their ``suffix``; one of folders has the names of the files by which a folder is
    recognised, ``model_file`` and ``adapter_file``. A format with none of these is not recognised,
    and is read and written from Python only.

    Models: ``read_model``, ``read_tokenizer``, ``generation_settings`` (special tokens and context
    length), ``origin`` (the name on Hugging Face's Hub, if the files tell it), ``files`` (of a
    model, for its digest) and ``write_model``: the weights of a model made of ``base``, with the
    names of its classes. Adapters: ``read_adapter`` (over the weights of a
    base) and ``write_adapter``. Writers return notes to the user. ``variants``: those that an
    adapter may have; all of a `LoraConfig` if none are named. ``holds_config``: a `LoraConfig` can
    be read from and written to it. ``scaling``: what the library multiplies B A x by, with a place
    for the scales that the adapter has.
    """

    name: str
    library: str
    suffix: str = ""
    model_file: str = ""
    adapter_file: str = ""
    read_model: Callable[[Path, ReadOptions], LoadedModel] | None = None
    read_tokenizer: Callable[[Path], Tokenizer] | None = None
    generation_settings: Callable[[Path], dict[str, Any]] = _no_settings
    origin: Callable[[Path], str | None] = _no_origin
    files: Callable[[Path], list[Path]] = field(default=lambda path: [path])
    write_model: "WriteModel | None" = None
    read_adapter: Callable[[Path, Config, Any, Params], AdapterWeights] | None = None
    write_adapter: "WriteAdapter | None" = None
    variants: tuple[Variant, ...] = ()
    holds_config: bool = False
    scaling: str = "{scales}"

    def fits(self, path: Path) -> bool:
        """Whether the path names a single file of this format; a folder is one by any name."""
        return bool(self.suffix) and path.suffix == self.suffix and not path.is_dir()


@dataclass(frozen=True)
class Base:
    """A model: its name, its configuration, its weights, and where it was read from.

    ``classes``: the names of a classifier's classes in their order, if it has any.
    """

    name: str
    config: Config
    weights: Params
    path: Path
    format: Format
    classes: tuple[str, ...] | None = None

    @property
    def reference(self) -> str | None:
        """The name of the reference model, if it is one."""
        return self.name.removeprefix(REFERENCE) if self.name.startswith(REFERENCE) else None

    @property
    def name_or_path(self) -> str | None:
        """What transformers' ``from_pretrained`` takes for it: a user's folder, or nothing."""
        return self.name if self.path.is_dir() and self.path == Path(self.name) else None

    @cached_property
    def generation_settings(self) -> dict[str, Any]:
        """Its special tokens and context length, which new weights keep."""
        return self.format.generation_settings(self.path)

    @cached_property
    def origin(self) -> str | None:
        """Its name on Hugging Face's Hub, or that of its maker, if its files tell it."""
        return self.format.origin(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns text into this model's tokens.

        Errors: FormatError where the files have none; ImportError without the library for it.
        """
        assert self.format.read_tokenizer is not None  # of every format that has models
        return self.format.read_tokenizer(self.path)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of those of the configuration's, the weights' and the tokenizer's files."""
        sha = hashlib.sha256()
        for path in self.format.files(self.path):
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()


WriteModel = Callable[[Path, Config, Params, Base, Sequence[str] | None], list[str]]
WriteAdapter = Callable[[Path, Config, AdapterWeights, Base], list[str]]
