"""Frozen weights that are made when they are read: quantized, or in a file, one at a time in full.

A model reads its parameters by name, so whatever gives an array by its name will do. Where nothing
else holds what was given, it is freed when the block that read it is done.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.spec.lora import TABLES, TIE, Params
from minilora.spec.ops import Array
from minilora.spec.quantization import Quantized, dequantize

ENTRIES = 2**20
"""So many entries of a table are expanded at a time, in whole rows."""


@dataclass(frozen=True)
class Table:
    """A matrix with a row for each token, expanded a part at a time: to look rows up, as a head.

    ``E[ids]`` are rows that are looked up, ``E @ x`` and ``E.T @ dy`` products, block of rows by
    block of rows; every other operation gets the dense array. ``rows`` gives the rows that an array
    of numbers or a slice says, ``shape`` and ``dtype`` are those of the dense array.
    """

    rows: Callable[[Any], Array]
    shape: tuple[int, int]
    dtype: Any

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return _on_dense(ufunc, method, inputs, options)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: Any) -> Array:
        return self.rows(ids)

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """Blocks of rows, where they lie and what they are."""
        step = max(1, ENTRIES // self.shape[1])
        for start in range(0, len(self), step):
            rows = slice(start, min(start + step, len(self)))
            yield rows, self.rows(rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for rows, part in self.parts():
            whole[rows] = part
        return whole

    @property
    def T(self) -> "TransposedTable":
        """The transpose."""
        return TransposedTable(self)

    def __matmul__(self, x: Array) -> Array:
        y = np.empty((len(self), x.shape[1]), np.result_type(self.dtype, x))
        for rows, part in self.parts():
            y[rows] = part @ x
        return y


@dataclass(frozen=True)
class TransposedTable:
    """The transpose of a `Table`, whose products are sums over its blocks of rows."""

    table: Table

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return _on_dense(ufunc, method, inputs, options)

    @property
    def T(self) -> Table:
        """The table."""
        return self.table

    def __getitem__(self, at: tuple[slice, Array]) -> Array:
        return self.table.rows(at[1]).T

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.table, dtype).T

    def __matmul__(self, dy: Any) -> Any:
        if not isinstance(dy, np.ndarray):
            return NotImplemented  # a product of its own, as that of one-hot columns
        products = (part.T @ dy[rows] for rows, part in self.table.parts())
        return sum(products, next(products))


def _on_dense(ufunc: Any, method: str, inputs: Any, options: Any) -> Any:
    lazy = Table | TransposedTable
    dense = [np.asarray(x) if isinstance(x, lazy) else x for x in inputs]
    return getattr(ufunc, method)(*dense, **options)


def as_table(E: Any) -> Table:
    """The matrix as a `Table`, if it is none yet: then its products have the same bits as one's."""
    return E if isinstance(E, Table) else Table(E.__getitem__, E.shape, E.dtype)


@dataclass(frozen=True)
class OnDemand:
    """A quantized weight as an entry of `Expanded`, expanded anew whenever it is read.

    Where each row has codes of its own, as in GGUF's schemes, rows can be expanded alone.
    """

    q: Quantized

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight."""
        return self.q.shape

    @property
    def dtype(self) -> Any:
        """That of what it expands to."""
        return np.dtype(self.q.dtype)

    @property
    def by_rows(self) -> bool:
        """Whether each row has codes of its own."""
        return self.q.codes.ndim > 1

    def __call__(self) -> Array:
        """The whole weight; of a large one, a part at a time is made."""
        if not self.by_rows or math.prod(self.shape) <= ENTRIES:
            return dequantize(self.q)
        return np.asarray(Table(self.rows, self.shape, self.dtype))

    def rows(self, at: Any) -> Array:
        """The rows that an array of numbers or a slice says.

        Shapes: at (k,) -> rows (k, n).
        """
        q = self.q
        if not self.by_rows:
            chosen: Array = dequantize(q)[at]
            return chosen
        codes, constants = q.codes[at], {name: v[at] for name, v in q.constants.items()}
        shape = len(codes), q.shape[1]
        return dequantize(replace(q, shape=shape, codes=codes, constants=constants))


class Expanded(Mapping[str, Array]):
    """Parameters by name: arrays, or functions without arguments that give one whenever it is read.

    That of a table or a head may have ``rows``, ``shape`` and ``dtype``, as `OnDemand` has: then
    what is read is a `Table`.
    ``W | others`` is another one, with more parameters or others in their place.
    """

    def __init__(self, entries: Mapping[str, Array | Callable[[], Array]]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        entry: Any = self.entries[name]
        if not callable(entry):
            return entry
        if name.removesuffix(".weight") in (*TABLES, *TIE) and hasattr(entry, "rows"):
            return Table(entry.rows, entry.shape, entry.dtype)
        return entry()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __or__(self, others: Params) -> "Expanded":
        more = others.entries if isinstance(others, Expanded) else others
        return Expanded({**self.entries, **more})
