"""A tensor in a file, whatever the container."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.spec.ops import Array


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read a block of rows at a time (`audit.change.Tensor`).

    ``dtype``: that of what ``rows`` gives: the stored one, float32 of a quantized tensor;
    ``scheme``: the quantizer's name, or None; ``nbytes``: what it takes in the file; ``read`` and
    ``step`` are `rows` and `spacing`.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[int, int], Array] = field(repr=False)
    scheme: str | None = None
    step: Callable[[int, int], Array] | None = field(default=None, repr=False)

    def rows(self, start: int, stop: int) -> Array:
        """Entries start … stop along the first axis, in ``dtype``; a scalar is one row."""
        return self.read(start, stop)

    def spacing(self, start: int, stop: int) -> Array | None:
        """How far apart the numbers lie that the quantizer can store; None for plain numbers."""
        return None if self.step is None else self.step(start, stop)

    @property
    def length(self) -> int:
        """How many rows `rows` can give."""
        return self.shape[0] if self.shape else 1

    def blocks(self, entries: int = 2**20) -> Iterator[tuple[int, int]]:
        """Blocks of whole rows, of so many entries or one row."""
        step = max(1, entries // max(1, int(np.prod(self.shape[1:], dtype=np.int64))))
        for start in range(0, self.length, step):
            yield start, min(start + step, self.length)
