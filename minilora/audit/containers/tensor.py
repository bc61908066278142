"""A tensor in a file, whatever the container."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.spec.ops import Array


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read a block of rows at a time (`audit.change.Tensor`).

    ``dtype``: that of what ``rows`` gives: the stored one, float32 of a quantized tensor;
    ``scheme``: the quantizer's name, or None; ``nbytes``: what it takes in the file; ``read`` and
    ``step`` are `rows` and `spacing`; ``codes`` gives what lies in the file for these rows, of a
    quantized tensor; ``file``: the name of the shard that it lies in, if that is known.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[int, int], Array] = field(repr=False)
    scheme: str | None = None
    step: Callable[[int, int], Array] | None = field(default=None, repr=False)
    codes: Callable[[int, int], Sequence[Array]] | None = field(default=None, repr=False)
    file: str = ""

    def has_bits_of(self, other: StoredTensor, start: int, stop: int) -> bool:
        """Whether entries start … stop lie in both files with the same bits.

        False where that is not known, as of a quantized tensor that lies in another order.
        """
        if (self.shape, self.dtype, self.scheme) != (other.shape, other.dtype, other.scheme):
            return False
        if self.scheme is None:
            return _same_bits(self.rows(start, stop), other.rows(start, stop))
        if self.codes is None or other.codes is None:
            return False
        pairs = zip(self.codes(start, stop), other.codes(start, stop), strict=True)
        return all(a.shape == b.shape and _same_bits(a, b) for a, b in pairs)

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

    @property
    def width(self) -> int:
        """How many entries a row has."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    def blocks(self, entries: int = 2**20) -> Iterator[tuple[int, int]]:
        """Blocks of whole rows, of so many entries or one row."""
        step = max(1, entries // max(1, self.width))
        for start in range(0, self.length, step):
            yield start, min(start + step, self.length)


def _same_bits(one: Array, two: Array) -> bool:
    one, two = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, two))
    size = len(one) // 8 * 8
    whole = np.array_equal(one[:size].view(np.uint64), two[:size].view(np.uint64))
    return whole and np.array_equal(one[size:], two[size:])
