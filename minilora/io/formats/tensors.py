"""Tensors as a file names and lays them out -> weights under internal names and layouts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.architectures import Architecture, is_vector
from minilora.io.errors import FormatError, listed
from minilora.io.files import to_dtype
from minilora.spec.lora import Params, Weights
from minilora.spec.models import Config


def to_internal(
    path: Path,
    tensors: Weights,
    names: Mapping[str, tuple[str, bool]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
    files: Mapping[str, Path] | None = None,
) -> Weights:
    """The file's tensors under internal names and in internal layout, in ``dtype`` if given.

    ``names``: each parameter's name in the file, and whether it lies transposed there; ``shapes``:
    its shape inside. ``files``: the file of each tensor, ``path`` unless given.

    Errors: FormatError for missing and extra tensors and for wrong shapes.
    """
    files = files or dict.fromkeys(tensors, path)
    wanted = {place for place, _ in names.values()}
    if missing := wanted - tensors.keys():
        expected = f"{len(wanted)} tensors with {listed(missing)}"
        remedy = "the file is incomplete, or the configuration is another model's"
        raise FormatError(path, "tensors", f"none named {listed(missing)}", expected, remedy)
    if extra := tensors.keys() - wanted:
        remedy = "nothing here would use them: the configuration is another model's"
        where = files[min(extra)]
        raise FormatError(where, "tensors", listed(extra), f"these {len(wanted)} only", remedy)
    W = {}
    for name, (place, transposed) in names.items():
        array, shape = tensors[place], shapes[name]
        stored_shape = shape[:1] if is_vector(name) else shape[::-1] if transposed else shape
        if array.shape != stored_shape:
            remedy = "the configuration is another model's, or the tensor lies transposed"
            found = f"shape {array.shape}"
            raise FormatError(files[place], place, found, f"shape {stored_shape}", remedy)
        # Laid out as it was before it was written, so that products give the same bits.
        array = np.ascontiguousarray(array.T if transposed else array).reshape(shape)
        W[name] = to_dtype(files[place], place, array, dtype)
    return W


def drop_tied_head(
    files: Mapping[str, Path],
    tensors: Weights,
    names: Mapping[str, tuple[str, bool]],
    a: Architecture,
    remedy: str = "save it again",
) -> None:
    """Take a head that is tied, and so has no name in ``names``, out of ``tensors``.

    Errors: FormatError if it is not equal to the embedding.
    """
    head, embed = f"{a.outer['head']}.weight", names["embed.weight"][0]
    if "head.weight" not in names and head in tensors and embed in tensors:
        if not np.array_equal(tensors[head], tensors[embed]):
            found, expected = "other entries than the embedding's", f"{embed}, to which it is tied"
            raise FormatError(files[head], head, found, expected, remedy)
        del tensors[head]


def check_complete(path: Path | str, c: Config, W: Params) -> None:
    """Refuse to write weights that are not exactly the model's.

    Errors: FormatError for missing weights, and for more.
    """
    shapes = c.shapes()
    if wrong := set(W) ^ shapes.keys():
        remedy = "merge or disable adapters first, and give every weight of the model"
        found = f"{listed(wrong)} in one of the two only"
        raise FormatError(path, "weights", found, f"the {len(shapes)} of {c}", remedy)
