"""Eight-bit floats with scales, as checkpoints in FP8 have them: of the base, or of the merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from minilora.audit.floats import F32, F64, format_of, rounded
from minilora.audit.mistakes.roundings import narrowed
from minilora.audit.trial import Case, Ending, Step, Trial
from minilora.spec.ops import Array

FP8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}

BLOCK = 128
"""Rows and columns that share a scale in DeepSeek's checkpoints."""


def fp8_steps(case: Case) -> dict[str, Step]:
    """The base in FP8 and back, by what shares a scale."""
    steps: dict[str, Step] = {}
    for name, dtype in FP8.items():
        steps[f"FP8, {name}"] = _plain(dtype)
        steps[f"FP8, {name}, a scale for each row"] = _by_row(dtype)
    e4m3 = FP8["e4m3"]
    steps["FP8, e4m3, one scale"] = _scaled(e4m3, cache(partial(_largest, case)))
    steps["FP8, e4m3, a scale for each 128 x 128"] = _by_block(case, e4m3)
    return steps


def fp8_merges(case: Case) -> Iterator[Trial]:
    """The merged numbers rounded to FP8: without a scale, or with one for the tensor or the row."""
    for name, dtype in FP8.items():
        yield Trial(case.changes, f"FP8, {name}", end=narrowed(dtype), free=False, through=dtype)
    e4m3 = FP8["e4m3"]
    one = _scaled(e4m3, cache(partial(_largest_merged, case)))
    for name, step in (("a scale for each row", _by_row(e4m3)), ("one scale", one)):
        if _has_few_numbers(case, by_row=step is not one):
            end = _through(step, case.region.merged.dtype)
            yield Trial(case.changes, f"FP8, e4m3, {name}", end=end, free=False, bits=0.5)


CODES = 2**7
"""So many numbers without their signs FP8 has."""


def _has_few_numbers(case: Case, by_row: bool) -> bool:
    """Whether sampled rows hold no more numbers than FP8 has, each row or all of them."""
    blocks = [abs(M) for _, _, _, M in case.sample]
    rows = np.concatenate(blocks) if by_row else np.concatenate(blocks).reshape(1, -1)
    return all(len(np.unique(row)) <= CODES for row in rows)


def _largest_merged(case: Case) -> Array:
    dtype = case.region.merged.dtype
    found = [
        abs(rounded(case.merge.rows(W, i, j)[0], dtype)).max(initial=0)
        for i, j, W, _ in case.everything()
    ]
    return np.asarray(max(found, default=0), F32)


def _through(step: Step, dtype: np.dtype[Any]) -> Ending:
    """T rounded to the dtype, then to FP8; what lies at the border of two codes may be either."""
    w = format_of(dtype).u

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        near = step(rounded(T, dtype), i, j)
        e = 1.5 * e + 2 * w * abs(T)
        return near, abs(step(T + e, i, j) - step(T - e, i, j)) + 2 * w * abs(near)

    return end


def _plain(dtype: np.dtype[Any]) -> Step:
    return lambda W, i, j: rounded(W, dtype)


def _near(W: Array, largest: Array, dtype: np.dtype[Any]) -> Array:
    """W in steps of a scale with which the largest number is the dtype's; computed in float32."""
    scale = (largest / F32.type(format_of(dtype).largest)).astype(F32)
    scale = np.where(scale > 0, scale, F32.type(1))
    near: Array = rounded((W.astype(F32) / scale).astype(F64), dtype).astype(F32) * scale
    return near.astype(F64)


def _scaled(dtype: np.dtype[Any], largest: Callable[[], Array]) -> Step:
    return lambda W, i, j: _near(W, largest(), dtype)


def _by_row(dtype: np.dtype[Any]) -> Step:
    return lambda W, i, j: _near(W, abs(W.astype(F32)).max(1, keepdims=True), dtype)


def _largest(case: Case) -> Array:
    found = [abs(W.astype(F32)).max(initial=0) for _, _, W, _ in case.region.blocks()]
    return np.asarray(max(found, default=0), F32)


def _by_block(case: Case, dtype: np.dtype[Any]) -> Step:
    width = case.region.width
    edges = np.arange(0, width, BLOCK)

    def step(W: Array, i: int, j: int) -> Array:
        first, last = i // BLOCK * BLOCK, min(-(-j // BLOCK) * BLOCK, case.region.rows)
        whole = abs(case.region.read(first, last)[0].astype(F32))
        by_row = np.maximum.reduceat(whole, edges, axis=1)
        blocks = np.maximum.reduceat(by_row, np.arange(0, last - first, BLOCK), axis=0)
        largest = blocks.repeat(BLOCK, 0)[i - first : j - first].repeat(BLOCK, 1)[:, :width]
        return _near(W, largest, dtype)

    return step
