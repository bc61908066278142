"""The weights of a Hugging Face model: ``model.safetensors``, one file or shards."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minilora.io.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    tensor_names,
    to_file_layout,
)
from minilora.io.atomic import write_files
from minilora.io.errors import FormatError, listed
from minilora.io.files import pack, pack_json, read_json, read_tensors, to_dtype
from minilora.io.formats.huggingface.config import CONFIG, config_to_json, parse_config, read_config
from minilora.io.formats.tensors import check_complete, drop_tied_head, to_internal
from minilora.spec.lora import Weights
from minilora.spec.models import Config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_STALE = r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
"""Files of weights that a reader would take for a part of the model."""


def read_model(path: Path | str, dtype: Any = None) -> tuple[Config, Weights]:
    """The configuration and the weights in the folder ``path``, in ``dtype`` or the file's own.

    The names may be without the prefix that the base model has inside the whole (as in the first
    GPT-2 files). A tied head may be absent, or present and equal to the embedding.

    Errors: FormatError as :func:`read_config`, `files.read_tensors` and `tensors.to_internal` have
    it; for an index that does not match its shards; for a tied head that differs.
    """
    folder = Path(path)
    if not folder.is_dir():
        expected = f"a folder with {CONFIG}"
        raise FormatError(folder, "folder", "a file or nothing", expected, "check the path")
    c = read_config(folder)
    a = architecture_of(c)
    tensors, files = _read_weights(folder, a.buffers)
    first = min(files.values(), default=folder / WEIGHTS)
    _check_layers(first, c, tensors)
    prefixed = any(name.startswith(a.prefix) for name in tensors)
    names = tensor_names(c) if prefixed else _without_prefix(c, a)
    remedy = "a head of its own needs tie_word_embeddings false, and a Llama or Qwen2"
    drop_tied_head(files, tensors, names, a, remedy)
    return c, to_internal(first, tensors, names, c.shapes(), dtype, files)


def _without_prefix(c: Config, a: Architecture) -> dict[str, tuple[str, bool]]:
    names = tensor_names(c).items()
    return {at: (name.removeprefix(a.prefix), transposed) for at, (name, transposed) in names}


def _check_layers(path: Path, c: Config, tensors: Weights) -> None:
    """Refuse more layers than tensors, before a name is made for each."""
    if c.layers > len(tensors):
        expected = f"{c.layers} layers of several tensors each"
        raise FormatError(path, "tensors", len(tensors), expected, f"compare with {CONFIG}")


def headless(path: Path | str) -> Architecture | None:
    """The architecture of which the folder has all but the head, as a ``BertModel``.

    Errors: FormatError for a damaged ``config.json``.
    """
    names = read_json(Path(path) / CONFIG).get("architectures")
    return next((a for a in ARCHITECTURES.values() if a.headless and [a.headless] == names), None)


def read_encoder(path: Path | str, classes: int, dtype: Any = None) -> tuple[Config, Weights]:
    """A model without its head, such as ``BertModel``, as one with a head of so many classes.

    All weights but the head's come from the folder: the head is whoever trains it to draw.

    Errors: those of :func:`read_model`.
    """
    folder = Path(path)
    settings, a = read_json(folder / CONFIG), headless(folder)
    if a is None:
        found, remedy = settings.get("architectures"), "read it with read_model"
        expected = f"{listed(a.headless for a in ARCHITECTURES.values() if a.headless)} alone"
        raise FormatError(folder / CONFIG, "architectures", found, expected, remedy)
    settings = {key: value for key, value in settings.items() if key != "id2label"}
    settings |= {"architectures": [a.name], "num_labels": classes}
    c = parse_config(folder / CONFIG, settings)
    tensors, files = _read_weights(folder, a.buffers)
    first = min(files.values(), default=folder / WEIGHTS)
    _check_layers(first, c, tensors)
    names = {at: n for at, n in _without_prefix(c, a).items() if not at.startswith("head.")}
    return c, to_internal(first, tensors, names, c.shapes(), dtype, files)


def _read_weights(folder: Path, buffers: str | None) -> tuple[Weights, dict[str, Path]]:
    """The tensors of the one file or of all shards, and the file that each came from."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() == index.exists():
        both = f"both {WEIGHTS} and {INDEX}"
        found = both if single.exists() else listed(p.name for p in folder.iterdir())
        remedy = "remove the one that is out of date, or save the model as safetensors"
        raise FormatError(folder, "folder", found, f"{WEIGHTS} or {INDEX}", remedy)
    if single.exists():
        tensors = read_tensors(single, buffers)
        return tensors, dict.fromkeys(tensors, single)
    file_of = read_index(index)
    tensors = {}
    for shard in sorted(set(file_of.values())):
        path = folder / shard
        in_shard = read_tensors(path, buffers)
        indexed = {name for name, file in file_of.items() if file == shard}
        indexed = {name for name in indexed if not (buffers and re.search(buffers, name))}
        if wrong := in_shard.keys() ^ indexed:
            expected = f"the {len(indexed)} tensors of {INDEX}"
            remedy = "shards and index are of different models: save it again"
            found = f"{listed(wrong)} in one of the two only"
            raise FormatError(path, "tensors", found, expected, remedy)
        tensors |= in_shard
    return tensors, {name: folder / file_of[name] for name in tensors}


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> the name of its file, which lies in the same folder."""
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(map(_is_shard, file_of.values())):
        expected = "tensor names with names of files in the same folder"
        raise FormatError(index, "weight_map", file_of, expected, "save the model again")
    return file_of


def _is_shard(name: Any) -> bool:
    """Whether this names a file of tensors, and none outside its folder."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) is not None


def write_model(
    path: Path | str,
    c: Config,
    W: Weights,
    *,
    dtype: Any = None,
    shard_bytes: int | None = None,
    labels: Sequence[str] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json`` and the weights, in ``dtype`` or their own, to the folder ``path``.

    ``labels`` are the classes' names, as :func:`config_to_json` has them; ``kept`` are settings of
    the model that these weights come from, :func:`generation_settings`. Beyond ``shard_bytes``
    bytes of tensors a new shard begins. The same input gives the same bytes.

    Errors: FormatError if W is not exactly the model's weights (adapters are merged or disabled
    first) or its entries do not fit in ``dtype``; if the folder holds weights that would stay;
    ValueError for other labels than the classes.
    """
    folder = Path(path)
    settings, shapes = config_to_json(c, labels), c.shapes()
    for key, value in (kept or {}).items():
        settings[key] = value if settings.get(key) is None else settings[key]
    tensors: Weights = {}
    check_complete(folder, c, W)
    for name, (place, transposed) in tensor_names(c).items():
        if W[name].shape != shapes[name]:
            found = f"shape {W[name].shape}"
            raise FormatError(folder, name, found, f"shape {shapes[name]}", "check c against W")
        tensors[place] = to_dtype(folder, name, to_file_layout(name, W[name], transposed), dtype)
    dtypes = {array.dtype.name for array in tensors.values()}
    if len(dtypes) == 1:
        settings["dtype"] = dtypes.pop()
    files = _weight_files(folder, tensors, shard_bytes)
    write_files(folder, {**files, CONFIG: partial(pack_json, settings)}, stale=_STALE)


def _weight_files(
    folder: Path, tensors: Weights, shard_bytes: int | None
) -> dict[str, Callable[[], bytes]]:
    """The files of the weights, and of their index where they are several."""
    shards = _shards(tensors, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS]
    files: dict[str, Callable[[], bytes]] = {
        name: partial(pack, folder / name, shard, {"format": "pt"})
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        file_of = {at: name for name, shard in zip(names, shards, strict=True) for at in shard}
        size = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        files[INDEX] = partial(pack_json, index)
    return files


def _shards(tensors: Weights, limit: int | None) -> list[Weights]:
    """The tensors in order, a new part where the next would pass ``limit`` bytes."""
    shards: list[Weights] = [{}]
    size = 0
    for name, array in tensors.items():
        if limit is not None and shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards
