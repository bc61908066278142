"""Tensors that no adapter changes: have they the base's numbers, and what could explain others?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minilora.audit.mistakes.fp8 import FP8
from minilora.audit.result import Entry
from minilora.audit.tensors import StoredTensor
from minilora.io.files import WEIGHT_DTYPES
from minilora.spec.ops import Array

_SEARCHED = ("k", "s", "m", "l")
"""The ends of the names of GGUF's schemes whose constants are searched for, and quantized too."""


@dataclass
class _Tally:
    """What one passage through the two counts; ``first`` and ``last``: rows that differ."""

    entries: int = 0
    other: int = 0
    beyond: int = 0
    broken: int = 0
    greatest: float = 0.0
    moved: float = 0.0
    square: float = 0.0
    first: int = -1
    last: int = -1

    def add(self, start: int, one: Array, two: Array, spacing: Callable[[], Array | None]) -> None:
        """Compare rows from ``start``; ``spacing`` gives that of what a quantizer can store."""
        self.entries += one.size
        expected = cast(one, two.dtype)
        off = (_bits(expected) != _bits(two)).reshape(one.shape) & (expected != two)  # 0 is -0
        if not off.any():
            return
        rows = start + np.flatnonzero(off.reshape(len(off), -1).any(1) if off.ndim else off)
        self.first, self.last = int(rows[0] if self.first < 0 else self.first), int(rows[-1])
        step = spacing()
        W, M = one.astype(np.float64), two.astype(np.float64)
        self.broken += int(np.count_nonzero(np.isfinite(W) & ~np.isfinite(M)))
        gap = np.where(off, abs(M - W), 0.0)
        self.other += int(np.count_nonzero(off))
        self.greatest = max(self.greatest, float(np.nan_to_num(gap, nan=np.inf).max()))
        self.moved += float(np.nansum(gap * gap))
        self.square += float(np.nansum(W * W))
        if step is not None:
            # A clipped code is off by a step, and a constant in half precision by 2^-11 of it.
            self.beyond += int(np.count_nonzero(gap > step * (1 + 2.0**-7) + abs(W) * 2.0**-10))


def untouched(tensor: StoredTensor, other: StoredTensor, own: bool = False) -> Entry:
    """The verdict on a tensor of the merged model beside the base's, which no adapter changes.

    It is to have the base's bits, or those of one rounding to its own dtype; a quantized one what
    its quantizer can store next to the base's numbers. ``own``: ``tensor`` is an adapter's, saved
    whole, in place of the base's.
    """
    if tensor.shape != other.shape:
        return _other_shape(tensor, other)
    tally, quantized = _Tally(), other.scheme is not None
    coarser = other if quantized else tensor
    for start, stop in tensor.blocks():
        if tensor.has_bits_of(other, start, stop):
            tally.entries += (stop - start) * tensor.width
            continue
        one, two = tensor.rows(start, stop), other.rows(start, stop)
        tally.add(start, one, two, partial(coarser.spacing, start, stop))
    if tally.broken:
        text = f"{tally.broken} entries are NaN or infinite, and finite in the base"
        return Entry(tensor.name, "corrupt", text)
    if not tally.other:
        return Entry(tensor.name, "unchanged", _kept(tensor, other))
    if quantized:
        return _quantized(tensor, other, tally)
    return _changed(tensor, other, tally, own)


def _kept(tensor: StoredTensor, other: StoredTensor) -> str:
    if tensor.dtype == other.dtype:
        return "it has the base's numbers"
    return f"it has the base's numbers, cast from {tensor.dtype} to {other.dtype}"


def _quantized(tensor: StoredTensor, other: StoredTensor, tally: _Tally) -> Entry:
    """The verdict on what a quantizer has rounded."""
    figures = {"error": (tally.moved / tally.square) ** 0.5 if tally.square else 0.0}
    if not tally.beyond:
        text = f"it has the base's numbers, each within a step of {other.scheme}"
        return Entry(tensor.name, "unchanged", text, figures)
    text = f"{tally.beyond} of {tally.entries} entries are more than a step of {other.scheme} off"
    if str(other.scheme).endswith(_SEARCHED):
        text += ", which its own search for constants may do"
        return Entry(tensor.name, "undecided", text, figures)
    return Entry(tensor.name, "changed", text, figures)


def _other_shape(tensor: StoredTensor, other: StoredTensor) -> Entry:
    """The verdict on another shape: a table may have been padded or cut."""
    text = f"its shape is {other.shape}, the base's {tensor.shape}"
    rows = min(tensor.length, other.length)
    if tensor.shape[1:] != other.shape[1:] or not tensor.shape:
        return Entry(tensor.name, "changed", f"{text}: another model's")
    same = all(
        np.array_equal(cast(tensor.rows(i, j), other.dtype), other.rows(i, j), equal_nan=True)
        for i, j in _blocks(tensor, rows)
    )
    how = "more rows: a padded or resized vocabulary" if other.length > rows else "fewer rows"
    kept = f"the first {rows} are the base's" if same else "and not even the common ones agree"
    return Entry(tensor.name, "changed", f"{text}: {how}; {kept}", {"common_rows_kept": same})


def _blocks(tensor: StoredTensor, rows: int) -> Sequence[tuple[int, int]]:
    return [(i, min(j, rows)) for i, j in tensor.blocks() if i < rows]


def _changed(tensor: StoredTensor, other: StoredTensor, tally: _Tally, own: bool) -> Entry:
    """The verdict on other numbers, with what could explain them."""
    share = tally.other / tally.entries
    relative = (tally.moved / tally.square) ** 0.5 if tally.square else float("inf")
    text = f"{tally.other} of {tally.entries} entries differ, by {tally.greatest:.3g} at most"
    if tally.last + 1 - tally.first < tensor.length:
        text += f", in rows {tally.first} to {tally.last} of {tensor.length}"
    why = "trained, though no adapter says so, or another revision of the base"
    if own:
        why = "it is to be the adapter's own, which was saved whole"
    if tensor.scheme is not None and not tally.beyond:
        why = (
            f"each within a step of {tensor.scheme}: it was merged into the base as it was before "
            "it was quantized; give that as the base"
        )
    if _is_transpose(tensor, other):
        figures = {"differing": share}
        text = "it is stored transposed"
        return Entry(tensor.name, "changed", text, figures, "tensor-transposed")
    for coarse in (WEIGHT_DTYPES["F16"], WEIGHT_DTYPES["BF16"], *FP8.values()):
        if _passed_through(tensor, other, coarse):
            why = f"the base's numbers, rounded to {coarse} and back"
            break
    else:
        why = _in_all(tensor, other) or why
    figures = {"differing": share, "greatest": tally.greatest, "relative": relative}
    return Entry(tensor.name, "changed", f"{text}: {why}", figures)


_MOVED = {
    1.0: "the base's numbers plus 1, as GGUF files of Gemma hold the weights of norms",
    -1.0: "the base's numbers less 1, as Gemma's files hold the weights of norms",
}


def _in_all(tensor: StoredTensor, other: StoredTensor) -> str:
    """What all entries have in common: one number, or the same distance to the base's; else ""."""
    first = other.rows(0, 1).reshape(-1)[:1]
    if not first.size:
        return ""
    if all((other.rows(i, j) == first[0]).all() for i, j in tensor.blocks()):
        return f"all entries are {float(first[0]):g}: never written, or drawn anew"
    for by, why in _MOVED.items():
        if all(_is_moved(tensor.rows(i, j), other.rows(i, j), by) for i, j in tensor.blocks()):
            return why
    return ""


def _is_moved(one: Array, two: Array, by: float) -> bool:
    """Whether two are one plus ``by``, rounded to their dtype."""
    return np.array_equal(cast(one.astype(np.float64) + by, two.dtype), two)


def _is_transpose(tensor: StoredTensor, other: StoredTensor) -> bool:
    """Whether a square tensor is the base's transpose."""
    if len(tensor.shape) != 2 or tensor.shape[0] != tensor.shape[1]:
        return False
    first = cast(tensor.rows(0, 1), other.dtype)[0]
    if not np.array_equal(other.rows(0, other.length)[:, 0], first):
        return False
    return all(
        np.array_equal(cast(tensor.rows(i, j), other.dtype), other.rows(0, other.length)[:, i:j].T)
        for i, j in tensor.blocks()
    )


def _passed_through(tensor: StoredTensor, other: StoredTensor, coarse: np.dtype[Any]) -> bool:
    """Whether the numbers are the base's, cast to a coarser dtype and then to their own."""
    for i, j in tensor.blocks():
        once = cast(cast(tensor.rows(i, j), coarse), other.dtype)
        if not np.array_equal(once, other.rows(i, j), equal_nan=True):
            return False
    return True


def cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """The numbers in another dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        converted: Array = array.astype(dtype)
    return converted


def _bits(array: Array) -> Array:
    """The entries' bits as whole numbers."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"u{flat.dtype.itemsize}")
