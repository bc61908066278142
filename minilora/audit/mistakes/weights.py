"""Another base, or what became of the merged weight: quantized, lost, of other lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora.audit.floats import F64, rounded
from minilora.audit.mistakes.magnitudes import with_rows
from minilora.audit.mistakes.mistake import Mistake, additive
from minilora.audit.mistakes.roundings import rounding
from minilora.audit.trial import Case, Ending, Step, Trial
from minilora.spec.ops import Array
from minilora.spec.quantization import dequantize, quantize
from minilora.spec.variants.dora import row_norm


def base_lost(case: Case) -> Iterator[Trial]:
    """The change alone."""
    yield Trial(case.changes, weight=lambda W, i, j: np.zeros_like(W))


def all_zero(case: Case) -> Iterator[Trial]:
    """Zeros."""
    yield Trial((), weight=lambda W, i, j: np.zeros_like(W), free=False)


QUANTIZERS = ("nf4", "q4_0", "q4_1", "q8_0", "int8-symmetric")


def base_quantized(case: Case) -> Iterator[Trial]:
    """The base quantized and dequantized before the change is added, as QLoRA trains on it."""
    if case.region.base.scheme or case.region.merged.scheme:
        return
    for scheme in QUANTIZERS:
        block = 64 if scheme == "nf4" else 32
        if case.region.width % block == 0:
            step = _quantized(scheme)
            yield Trial(case.changes, scheme, weight=step)
            if case.region.dtypes.merged.itemsize < 4:
                dtype = case.region.dtypes.merged
                yield Trial(
                    case.changes,
                    f"{scheme} in {dtype}",
                    weight=rounding(dtype, step),
                )


def merged_quantized(case: Case) -> Iterator[Trial]:
    """The merged weight quantized and dequantized."""
    if case.region.merged.scheme:
        return
    w = case.region.dtypes.w
    for scheme in QUANTIZERS:
        block = 64 if scheme == "nf4" else 32
        if case.region.width % block:
            continue
        step = _quantized(scheme)
        step = _rounded_first(step, case.region.merged.dtype)
        yield Trial(case.changes, scheme, end=_through(step, block, w), free=False, bits=0.5)


def _rounded_first(step: Step, dtype: np.dtype[Any]) -> Step:
    return lambda W, i, j: step(rounded(W, dtype), i, j)


def _through(step: Step, block: int, w: float) -> Ending:
    """T rounded, w, quantized and dequantized; what moves across a border of codes may differ."""

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        e = e + w * abs(T)
        largest = abs(T).reshape(len(T), -1, block).max(-1).repeat(block, 1)
        e = e + largest * (4 * w + 2.0**-9)  # the block's constants, kept in float16, move too
        through = step(T, i, j)
        gap = abs(step(T + 1.5 * e, i, j) - step(T - 1.5 * e, i, j))
        lost = abs(T - through)
        neighbour = abs(step(T + np.sign(T - through) * (lost + 2 * e), i, j) - through)
        return through, e + np.maximum(gap, neighbour * (neighbour <= 2 * (lost + 3 * e)))

    return end


def _quantized(scheme: str) -> Step:
    def step(W: Array, i: int, j: int) -> Array:
        W = np.ascontiguousarray(W, np.float32)
        block = 32 if scheme.startswith("int8") else None
        return dequantize(quantize(W, scheme, block)).astype(F64)

    return step


def lengths_kept(case: Case) -> Iterator[Trial]:
    """The rows of W' rescaled to the lengths of W's."""

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        return with_rows(case, T, e, row_norm(W)[0], row_norm(T)[0])

    if (change := additive(case)) is not None and not change.transposed:
        yield Trial((change,), end=end, free=False)


WEIGHTS = (
    Mistake("base-lost", "known-mistake", "the change alone, without the base", base_lost),
    Mistake("all-zero", "known-mistake", "all zeros", all_zero),
    Mistake(
        "base-quantized",
        "known-mistake",
        "merged into the base as it is after quantizing",
        base_quantized,
        ("unsloth 869",),
    ),
    Mistake(
        "merged-quantized",
        "known-mistake",
        "the merged weight went through a quantizer",
        merged_quantized,
    ),
    Mistake(
        "lengths-kept", "known-mistake", "the rows keep the lengths of the base's", lengths_kept
    ),
)
