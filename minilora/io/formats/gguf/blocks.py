"""The tensors of a GGUF file: mapped, and expanded whenever they are read."""

import math
import mmap
from functools import cache
from typing import Any

import numpy as np

from minilora.io.errors import FormatError
from minilora.io.files import NOT_FINITE, check_finite
from minilora.io.formats.gguf.contents import Contents, library
from minilora.spec.ops import Array
from minilora.spec.quantization import dequantize, from_gguf

_SPECIFIED = ("q4_0", "q4_1", "q8_0")
"""The block types whose equation `quantization` has; the library expands the others."""


class Blocks:
    """A weight as its file has it: called, it gives a fresh array (a lazy weight of `Expanded`).

    ``order``: for each row of the weight its row in the file, where the two differ. Pages of the
    file are released after they have been read.
    """

    def __init__(
        self,
        contents: Contents,
        name: str,
        shape: tuple[int, int],
        dtype: Any,
        order: Array | None = None,
    ) -> None:
        self.contents, self.name, self.shape, self.dtype = contents, name, shape, np.dtype(dtype)
        self.tensor, self.order = contents.tensors[name], order
        size = self.tensor.end - self.tensor.start
        data = np.frombuffer(contents.bytes, np.uint8, size, self.tensor.start)
        self.data = data.reshape(-1, self.tensor.row)
        self.checked = False

    def __call__(self) -> Array:
        """The whole weight.

        Errors: FormatError if an entry is not finite.
        """
        weight = self._expanded(self.order)
        self.checked = True
        return weight.reshape(self.shape)

    def rows(self, ids: Any) -> Array:
        """The rows of the weight that ``ids`` name, an array or a slice, and no others.

        Shapes: ids (t,) -> (t, n).
        Errors: FormatError if an entry is not finite.
        """
        ids = np.arange(*ids.indices(len(self.data))) if isinstance(ids, slice) else np.asarray(ids)
        return self._expanded(ids if self.order is None else self.order[ids])

    def _expanded(self, order: Array | None) -> Array:
        """These rows of the file, in this order; all of them for None."""
        rows = len(self.data) if order is None else len(order)
        columns = math.prod(self.shape) // len(self.data)
        expanded = np.empty((rows, columns), self.dtype)
        step = max(1, 2**17 // columns)  # few enough entries for their codes to stay in a cache
        for start in range(0, rows, step):
            chunk = slice(start, start + step)
            expanded[chunk] = self._expand(chunk if order is None else order[chunk])
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self.tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
            self.contents.bytes.madvise(mmap.MADV_DONTNEED, start, self.tensor.end - start)
        if not self.checked:
            check_finite(self.contents.path, self.name, expanded, NOT_FINITE)
        return expanded

    def _expand(self, rows: Any) -> Array:
        data, kind = self.data[rows], self.tensor.kind
        if kind.lower() in _SPECIFIED:
            return dequantize(from_gguf(data, kind.lower()))
        gguf = library()
        weights: Array = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        return weights


def check_tensor(contents: Contents, place: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape, or of a type that is not expanded."""
    path, tensor = contents.path, contents.tensors[place]
    if tensor.shape != shape:
        remedy = "the metadata are another model's"
        raise FormatError(path, place, f"shape {tensor.shape}", f"shape {shape}", remedy)
    if not expands(tensor.kind):
        remedy = "gguf cannot expand this type: quantize the model to another"
        raise FormatError(path, place, f"type {tensor.kind}", "one that gguf expands", remedy)


@cache
def expands(kind: str) -> bool:
    """Whether the library can expand the type, tried on one block."""
    gguf = library()
    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True
