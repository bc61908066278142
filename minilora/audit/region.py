"""Rows of a stored tensor that the same changes act on, read a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from minilora.audit.change import Change, Tensor
from minilora.audit.floats import BF16
from minilora.audit.low_rank import matrix
from minilora.audit.rounding import Dtypes
from minilora.spec.ops import Array

BLOCK = 2**18
"""How many entries are looked at at once: a few arrays of this size in float32 fit a cache."""


@dataclass(eq=False)
class Region:
    """Rows of a stored tensor, or of one matrix of it, that the same changes act on."""

    base: Tensor
    merged: Tensor
    changes: tuple[Change, ...]
    start: int
    stop: int
    index: int | None = None
    through: np.dtype[Any] | None = None
    _whole: tuple[Array, Array] | None = field(default=None, repr=False)

    @property
    def width(self) -> int:
        """How many entries a row has."""
        first = 1 if self.index is None else 2
        return int(np.prod(self.base.shape[first:], dtype=np.int64))

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start

    @property
    def dtypes(self) -> Dtypes:
        """In which dtypes a right merge may compute."""
        base, merged = (BF16 if t.scheme else t.dtype for t in (self.base, self.merged))
        return Dtypes(base, self.through or merged)

    def spans(self) -> Iterator[tuple[int, int]]:
        """The first and the last row of each block."""
        step = max(1, BLOCK // max(1, self.width))
        return ((i, min(i + step, self.rows)) for i in range(0, self.rows, step))

    def blocks(self) -> Iterator[tuple[int, int, Array, Array]]:
        """Rows i … j of the region, with the base's and the merged ones as stored."""
        return ((i, j, *self.read(i, j)) for i, j in self.spans())

    def read(self, i: int, j: int) -> tuple[Array, Array]:
        """Rows i … j of the region: the base's, and the merged."""
        i, j = i + self.start, j + self.start
        if self.index is None:
            return matrix(self.base.rows(i, j)), matrix(self.merged.rows(i, j))
        if self._whole is None:
            e = self.index
            W, M = (matrix(t.rows(e, e + 1)[0]) for t in (self.base, self.merged))
            self._whole = W, M
        return self._whole[0][i:j], self._whole[1][i:j]

    def gaps(self, i: int, j: int) -> Array | None:
        """How far a right quantizer may leave the numbers of rows i … j; None if not quantized."""
        if self.merged.scheme is None:
            return None
        i, j = i + self.start, j + self.start
        if self.index is not None:
            whole = self.merged.spacing(self.index, self.index + 1)
            gap = None if whole is None else matrix(whole[0])[i:j]
        else:
            whole = self.merged.spacing(i, j)
            gap = None if whole is None else matrix(whole)
        return None if gap is None else gap.astype(np.float64)


def regions(base: Tensor, merged: Tensor, changes: Sequence[Change]) -> Iterator[Region]:
    """The tensor in parts that the same changes act on; those without come with none."""
    for index, here in _matrices(base, changes):
        rows = base.shape[0] if index is None else base.shape[1]
        cuts = {0, rows} | {c for change in here for c in change.rows or ()}
        ends = sorted(cut for cut in cuts if 0 <= cut <= rows)
        for start, stop in pairwise(ends):
            acting = tuple(
                c for c in here if c.rows is None or (c.rows[0] <= start and stop <= c.rows[1])
            )
            yield Region(base, merged, acting, start, stop, index)


def _matrices(base: Tensor, changes: Sequence[Change]) -> Iterator[tuple[int | None, list[Change]]]:
    if all(change.index is None for change in changes):
        yield None, list(changes)
        return
    for e in range(base.shape[0]):
        yield e, [change for change in changes if change.index in (None, e)]
