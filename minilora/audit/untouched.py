"""Tensors that no adapter changes: have they the base's bits, and what if not?"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.audit.result import Entry
from minilora.audit.tensors import StoredTensor, TensorStore
from minilora.spec.ops import Array


def untouched(
    tensor: StoredTensor, other: StoredTensor, base: TensorStore, merged: TensorStore
) -> Entry:
    """The verdict on a tensor of the merged model beside the base's, which no adapter changes."""
    name = tensor.name
    if tensor.shape != other.shape:
        return _other_shape(tensor, other)
    differing = count = 0
    worst = 0.0
    for start, stop in tensor.blocks():
        one, two = tensor.rows(start, stop), other.rows(start, stop)
        if one.dtype == two.dtype and same_bits(one, two):
            count += one.size
            continue
        if not _finite(two) and _finite(one):
            return Entry(name, "corrupt", "it holds NaN or infinity, where the base does not")
        expected = rounded(one, two.dtype)
        off = ~same_entries(expected, two)
        differing += int(off.sum())
        count += one.size
        if off.any():
            gap = np.abs(two[off].astype(np.float64) - one[off].astype(np.float64))
            worst = max(worst, float(gap.max()))
    if differing:
        return _changed(tensor, other, differing, count, worst)
    if tensor.dtype != other.dtype:
        text = f"the base's numbers, rounded from {tensor.dtype} to {other.dtype}"
        return Entry(name, "unchanged", text)
    return Entry(name, "unchanged", "it has the base's bits")


def same_bits(one: Array, two: Array) -> bool:
    """Whether two arrays of one dtype have the same bytes."""
    return one.shape == two.shape and bool(np.array_equal(_bytes(one), _bytes(two)))


def _bytes(array: Array) -> Array:
    flat = np.ascontiguousarray(array).reshape(-1)
    size = flat.dtype.itemsize
    wide = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    return flat.view(wide[size])


def same_entries(one: Array, two: Array) -> Any:
    """Where two arrays of one dtype have the same bits, or both NaN."""
    with np.errstate(invalid="ignore"):
        return (_bytes(one) == _bytes(two)).reshape(one.shape)


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """The numbers in another dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        converted: Array = array.astype(dtype)
    return converted


def _finite(array: Array) -> bool:
    with np.errstate(invalid="ignore"):
        return array.dtype.kind in "biu" or bool(np.isfinite(array.astype(np.float32)).all())


def _other_shape(tensor: StoredTensor, other: StoredTensor) -> Entry:
    text = f"its shape is {other.shape}, the base's is {tensor.shape}"
    return Entry(tensor.name, "changed", text)


def _changed(
    tensor: StoredTensor, other: StoredTensor, differing: int, count: int, worst: float
) -> Entry:
    text = f"{differing} of {count} entries differ, by {worst:.3g} at most"
    return Entry(tensor.name, "changed", text, {"differing": differing / count, "greatest": worst})
