"""Frozen weights that are made when they are read: quantised, or in a file, one at a time in full.

A model reads its parameters by name, so whatever gives an array by its name will do. Where nothing
else holds what was given, it is freed when the block that read it is done.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.lora import TABLES, Params
from minilora.ops import Array
from minilora.quantised import Quantised, dequantise

ROWS = 4096
"""So many rows of a table are expanded at a time."""


@dataclass(frozen=True)
class Table:
    """A table of which rows are looked up: ``E[ids]`` expands no others; as an array, all of them.

    ``rows(ids)`` gives rows of the table, ``shape`` and ``dtype`` are those of the whole.
    """

    rows: Callable[[Array], Array]
    shape: tuple[int, int]
    dtype: Any
    __array_ufunc__ = None  # NumPy leaves the products to this class

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: Array) -> Array:
        found: Array = self.rows(ids)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for start in range(0, len(self), ROWS):
            ids = np.arange(start, min(start + ROWS, len(self)))
            whole[ids[0] : ids[-1] + 1] = self.rows(ids)
        return whole

    @property
    def T(self) -> Array:
        """The transpose, expanded."""
        return np.asarray(self).T

    def __matmul__(self, x: Array) -> Array:
        y: Array = np.asarray(self) @ x
        return y


@dataclass(frozen=True)
class OnDemand:
    """A quantised weight as an entry of `Expanded`, expanded anew whenever it is read.

    Where each row has codes of its own, as in GGUF's schemes, rows can be expanded alone.
    """

    q: Quantised

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
        """The whole weight, of which a part at a time is made."""
        if not self.by_rows:
            return dequantise(self.q)
        return np.asarray(Table(self.rows, self.shape, self.dtype))

    def rows(self, ids: Array) -> Array:
        """These rows of the weight.

        Shapes: ids (k,) -> rows (k, n).
        """
        q = self.q
        if not self.by_rows:
            chosen: Array = dequantise(q)[ids]
            return chosen
        constants = {name: v[ids] for name, v in q.constants.items()}
        part = replace(q, shape=(len(ids), q.shape[1]), codes=q.codes[ids], constants=constants)
        return dequantise(part)


class Expanded(Mapping[str, Array]):
    """Parameters by name: arrays, or functions without arguments that give one whenever it is read.

    A table's function may have ``rows(ids)``, ``shape`` and ``dtype``, as `OnDemand` has: then only
    the rows that are looked up are made, until the table is used as a matrix. ``W | others`` is
    another one, with more parameters or others in their place.
    """

    def __init__(self, entries: Mapping[str, Array | Callable[[], Array]]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        entry: Any = self.entries[name]
        if not callable(entry):
            return entry
        if name.removesuffix(".weight") in TABLES and hasattr(entry, "rows"):
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
