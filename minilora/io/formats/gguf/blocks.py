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

HERE = ("q4_0", "q4_1", "q8_0")
"""The block types whose equation `quantization` has; the library expands the others."""


class Blocks:
    """A weight as its file has it, an entry of `Expanded`: called, it gives a fresh array.

    ``order``: of the file's rows, where they are others' than the weight's. What has been read of
    the file is given back to the operating system.
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
        whole = self._made(self.order)
        self.checked = True
        return whole.reshape(self.shape)

    def rows(self, ids: Any) -> Array:
        """The rows of the weight that ``ids`` name, an array or a slice, and no others.

        Shapes: ids (t,) -> (t, n).
        Errors: FormatError if an entry is not finite.
        """
        ids = np.arange(*ids.indices(len(self.data))) if isinstance(ids, slice) else np.asarray(ids)
        return self._made(ids if self.order is None else self.order[ids])

    def _made(self, order: Array | None) -> Array:
        """Those rows of the file, in that order, or all of them."""
        rows = len(self.data) if order is None else len(order)
        columns = math.prod(self.shape) // len(self.data)
        made = np.empty((rows, columns), self.dtype)
        step = max(1, 2**17 // columns)  # few enough entries for their codes to stay in a cache
        for start in range(0, rows, step):
            part = slice(start, start + step)
            made[part] = self._expand(part if order is None else order[part])
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self.tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
            self.contents.bytes.madvise(mmap.MADV_DONTNEED, start, self.tensor.end - start)
        if not self.checked:
            check_finite(self.contents.path, self.name, made, NOT_FINITE)
        return made

    def _expand(self, rows: Any) -> Array:
        data, kind = self.data[rows], self.tensor.kind
        if kind.lower() in HERE:
            return dequantize(from_gguf(data, kind.lower()))
        gguf = library()
        known: Array = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        return known


def check_tensor(contents: Contents, place: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape, or of a type that is not expanded."""
    path, tensor = contents.path, contents.tensors[place]
    if tensor.shape != shape:
        remedy = "the metadata are another model's"
        raise FormatError(path, place, f"shape {tensor.shape}", f"shape {shape}", remedy)
    if not _expands(tensor.kind):
        remedy = "gguf expands none such: quantize the model to another type"
        raise FormatError(path, place, f"type {tensor.kind}", "one that is read", remedy)


@cache
def _expands(kind: str) -> bool:
    """Whether the type can be expanded: asked of one block."""
    gguf = library()
    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True
