"""Every tensor of a model by its Hugging Face name, whatever the files, a block of rows at a time.

Only names, shapes and dtypes are known of a model here, so that any architecture can be audited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from minilora.audit.containers import bitsandbytes, mlx
from minilora.audit.containers.tensor import StoredTensor as StoredTensor
from minilora.io.architectures import architecture_of, tensor_names, to_file_layout
from minilora.io.errors import FormatError, listed
from minilora.io.files import read_json
from minilora.io.formats.format import Format, ReadOptions
from minilora.io.formats.huggingface.model import read_index
from minilora.io.header import places
from minilora.io.loading import model_format, model_path
from minilora.spec.ops import Array

_ENDING = 4
_RENAMED = ((".mlp.", ".block_sparse_moe."),)
"""Modules of transformers that have another name in files: Mixtral's."""

CONFIG = "config.json"
INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLE_REMEDY = (
    "a pickle can run code, and is never opened: load it where it was made, and save it again by "
    "save_pretrained(…, safe_serialization=True) or safetensors.torch.save_file"
)


class TensorStore(Mapping[str, StoredTensor]):
    """A model's tensors by name, and its settings.

    ``container``: safetensors, gguf or mlx; ``settings``: what ``config.json`` says, {} without
    one; ``folder``: where it and the tokenizer's files lie, None of a single file; ``alias`` gives
    the name under which a tensor of another name is here.
    """

    def __init__(
        self,
        path: Path,
        container: str,
        tensors: Mapping[str, StoredTensor],
        settings: Mapping[str, Any],
        folder: Path | None,
        alias: Callable[[str], str | None] | None = None,
    ) -> None:
        self.path, self.container, self.tensors = path, container, dict(tensors)
        self.settings, self.folder, self.alias = settings, folder, alias

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def with_tensors(self, tensors: Mapping[str, StoredTensor]) -> TensorStore:
        """The same model with these tensors."""
        kind, settings = self.container, self.settings
        return TensorStore(self.path, kind, tensors, settings, self.folder, self.alias)

    def find(self, name: str) -> str | None:
        """The tensor of this name, which may lack the base model's prefix here or there."""
        if name in self.tensors:
            return name
        if self.alias is not None and (other := self.alias(name)) in self.tensors:
            return other
        for here, there in _RENAMED:
            if here in name and (other := name.replace(here, there)) in self.tensors:
                return other
        parts = name.split(".")
        for start in range(len(parts) - 1):
            if start and parts[start - 1].isdigit():
                break  # another layer's number would be passed over
            rest = ".".join(parts[start:])
            ending = self._by_end.get(".".join(parts[start:][-_ENDING:]), [])
            ending = [other for other in ending if _adds_prefix(other, rest)]
            if len(ending) == 1:
                return ending[0]
        return None

    def weight_of(self, module: str) -> str | None:
        """The weight of the module, or None."""
        return self.find(f"{module}.weight")

    def parameters_of(self, module: str) -> list[str]:
        """The tensors that lie in the module and in no module of it."""
        exact = [name for name in self.tensors if name.rpartition(".")[0] == module]
        return exact or [
            name
            for name in self.tensors
            if name.rpartition(".")[0].endswith(f".{module}")
            or module.endswith(f".{name.rpartition('.')[0]}")
        ]

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """The names by their last parts."""
        ends: dict[str, list[str]] = {}
        for name in self.tensors:
            parts = name.split(".")
            for count in range(1, min(len(parts), _ENDING) + 1):
                ends.setdefault(".".join(parts[-count:]), []).append(name)
        return ends

    @property
    def nbytes(self) -> int:
        """What all tensors take in the files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _adds_prefix(name: str, rest: str) -> bool:
    """Whether the name is ``rest``, or a prefix without a layer's number and then ``rest``."""
    prefix = name.removesuffix(rest)
    fits = name.endswith(rest) and (not prefix or prefix.endswith("."))
    return fits and not any(part.isdigit() for part in prefix.split("."))


def open_tensors(name: str | Path) -> TensorStore:
    """The tensors of a model: a path, ``reference:NAME`` or ``package:NAME``.

    A .safetensors file, a folder with one or with shards and their index, a GGUF file, or a folder
    of mlx-lm's. Nothing but headers is read.

    Errors: FormatError for what is none of these, and for damaged headers; for pickles (.bin, .pt),
    which are never opened.
    """
    path = model_path(str(name))
    if path.suffix in _PICKLES:
        raise FormatError(path, "file", "a pickle", "safetensors or GGUF", _PICKLE_REMEDY)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".gguf":
        from minilora.audit.containers.gguf import open_gguf

        return open_gguf(path)
    f = model_format(path)
    if f is not None and f.suffix:
        return _read_whole(path, f)
    if not path.exists():
        expected = "a model's folder, a .safetensors or a .gguf file"
        raise FormatError(path, "model", "nothing there", expected, "check the path")
    config = path.parent / CONFIG
    settings = read_json(config) if config.exists() else {}
    tensors = stored(places(path)[0])
    _check_scheme(path, tensors)
    return TensorStore(path, "safetensors", tensors, settings, None)


def _read_whole(path: Path, f: Format) -> TensorStore:
    """A small model in a format of single files that minilora reads whole."""
    assert f.read_model is not None  # of all model formats
    c, W, _ = f.read_model(path, ReadOptions(dtype=None))
    tensors = {}
    for name, (place, transposed) in tensor_names(c).items():
        array = to_file_layout(name, W[name], transposed)
        tensors[place] = StoredTensor(
            place, array.dtype, array.shape, array.nbytes, partial(_rows_of, array)
        )
    a = architecture_of(c)
    settings = {"architectures": [a.name], "model_type": a.model_type}
    return TensorStore(path, f.name, tensors, settings, None)


def _rows_of(array: Array, start: int, stop: int) -> Array:
    return array[start:stop]


def stored(found: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors at these places of safetensors files."""
    return {
        name: StoredTensor(
            name, place.dtype, place.shape, place.nbytes, place.rows, file=place.path.name
        )
        for name, place in found.items()
    }


_OTHER_CODES = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
"""Ends of names in models of quantizers that are not judged: GPTQ, AWQ, FP8, compressed-tensors."""


def _check_scheme(path: Path, tensors: Mapping[str, Any]) -> None:
    """Refuse codes whose numbers are not known here: their bits say nothing of an adapter."""
    if found := [name for name in tensors if name.endswith(_OTHER_CODES)]:
        expected = "plain numbers, or codes of bitsandbytes, MLX or GGUF"
        remedy = "GPTQ, AWQ and FP8 are not judged: audit the model as it was before"
        raise FormatError(path, found[0], "codes of another quantizer", expected, remedy)


def _open_folder(folder: Path) -> TensorStore:
    config = folder / CONFIG
    settings = read_json(config) if config.exists() else {}
    tensors = stored(_places_in(folder))
    _check_scheme(folder, tensors)
    if bitsandbytes.is_quantized(tensors):
        tensors = bitsandbytes.dequantized(folder, tensors)
        return TensorStore(folder, "bitsandbytes", tensors, settings, folder)
    if isinstance(settings.get("quantization"), dict):
        tensors = mlx.dequantized(folder / CONFIG, tensors, settings["quantization"])
        return TensorStore(folder, "mlx", tensors, settings, folder)
    return TensorStore(folder, "safetensors", tensors, settings, folder)


def _places_in(folder: Path) -> dict[str, Any]:
    """The places of all tensors: of the one file, or of the shards that the index names."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    files = sorted(path for path in folder.glob("*.safetensors") if _is_weights(path.name))
    if len(indices) == 1:
        return _sharded(folder, indices[0])
    whole = [path for path in files if path.name == "model.safetensors"]
    if not indices and len(whole or files) == 1:
        return places((whole or files)[0])[0]
    if not files and not indices:
        names = [path.name for path in folder.iterdir()]
        pickles = [name for name in names if name.endswith(_PICKLES)]
        remedy = _PICKLE_REMEDY if pickles else "check the path"
        found = listed(pickles or names) or "nothing"
        raise FormatError(folder, "weights", found, "a .safetensors file", remedy)
    found = listed(path.name for path in [*indices, *files])
    remedy = "remove what is out of date, or name one file"
    raise FormatError(folder, "weights", found, "one file, or one index with shards", remedy)


def _is_weights(name: str) -> bool:
    return not name.startswith(("adapter_model", "adapters"))


def _sharded(folder: Path, index: Path) -> dict[str, Any]:
    """The places of the tensors of the index, each in the shard that it names."""
    file_of = read_index(index)
    found: dict[str, Any] = {}
    for shard in sorted(set(file_of.values())):
        in_shard, _ = places(folder / shard)
        indexed = {name for name, file in file_of.items() if file == shard}
        if wrong := in_shard.keys() ^ indexed:
            text = f"{listed(wrong)} in one of the two only"
            expected = f"the {len(indexed)} tensors of {index.name}"
            remedy = "shards and index are of different models: save it again"
            raise FormatError(folder / shard, "tensors", text, expected, remedy)
        found |= in_shard
    return {name: found[name] for name in file_of}


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor lies in: the first number in its name."""
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(match[1]) if match else None
