"""Another base, or what became of the merged weight: quantized, lost, of other lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.audit.floats import F32, F64, rounded
from minilora.audit.mistakes.fp8 import fp8_merges, fp8_steps
from minilora.audit.mistakes.magnitudes import with_rows
from minilora.audit.mistakes.mistake import Mistake, additive
from minilora.audit.mistakes.roundings import rounding
from minilora.audit.outside import half_gap
from minilora.audit.rounding import reach
from minilora.audit.trial import SIGMAS, Case, Ending, Step, Trial
from minilora.spec.ops import Array
from minilora.spec.quantization import (
    dequantize,
    dequantize_dynamic,
    quantize,
    quantize_dynamic,
)
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
    steps = {scheme: _quantized(scheme) for scheme in QUANTIZERS if _fits(case, scheme)}
    steps["int8, a scale for each row"] = _int8_rows
    steps |= fp8_steps(case)
    if _fits(case, "nf4") and case.region.index is None and _is_near_nf4(case):
        steps["nf4-double"] = _nf4_double(case)
    width, rows = case.region.width, case.region.rows
    if width % NF4 and width * rows % NF4 == 0 and case.region.index is None:
        steps["nf4, in blocks that run through the rows"] = _through_rows(case)
    for scheme, step in steps.items():
        yield Trial(case.changes, scheme, weight=step, free=False)
        if case.region.dtypes.merged.itemsize < 4:
            dtype = case.region.dtypes.merged
            there = f"{scheme} in {dtype}"
            yield Trial(case.changes, there, weight=rounding(dtype, step), free=False)


def _fits(case: Case, scheme: str) -> bool:
    """Whether a row is of whole blocks."""
    return case.region.width % (NF4 if scheme == "nf4" else 32) == 0


NF4 = 64
"""bitsandbytes' block."""


def _int8_rows(W: Array, i: int, j: int) -> Array:
    """Rows of whole numbers from -127 to 127, as in LLM.int8()."""
    W = W.astype(F32)
    scale = abs(W).max(1, keepdims=True) / F32.type(127)
    near: Array = (np.rint(W / np.where(scale > 0, scale, 1)) * scale).astype(F64)
    return near


def finite(x: Array) -> Array:
    """The numbers, infinities as the largest and NaN as 0: a quantizer takes no others."""
    return x if np.isfinite(x).all() else np.nan_to_num(x)


def _is_near_nf4(case: Case) -> bool:
    """Whether sampled rows are what NF4 leaves of the base, if its scales are quantized too.

    Only then is it worth to read all of the base for its scales.
    """
    scheme = "nf4-double"
    for i, j, W, M in case.sample:
        T, e = case.merge.rows(_quantized("nf4")(W, i, j), i, j)
        room = (
            e + half_gap(M, case.region, None) + reach(scheme, 0 * W, T) + reach(scheme, 0 * W, W)
        )
        if (abs(M - T) > room).any():
            return False
    return True


def _nf4_double(case: Case) -> Step:
    """NF4 whose scales are quantized too, over the whole tensor, as QLoRA's default has them."""
    found = [quantize(_base(W), "nf4").constants["absmax"] for _, _, W, _ in case.region.blocks()]
    absmax = np.concatenate(found)
    mean = absmax.mean(dtype=F32)
    small, nested = quantize_dynamic(absmax - mean)
    scales = dequantize_dynamic(small, nested) + mean
    each = case.region.width // NF4

    def step(W: Array, i: int, j: int) -> Array:
        q = quantize(_base(W), "nf4")
        own = dict(q.constants, absmax=scales[i * each : j * each].astype(F32))
        near: Array = dequantize(replace(q, constants=own)).astype(F64)
        return near

    return step


def _base(W: Array) -> Array:
    return finite(np.ascontiguousarray(W, F32))


def _through_rows(case: Case) -> Step:
    """bitsandbytes' blocks of 64 do not end where a row does."""
    width = case.region.width
    each = NF4 // math.gcd(NF4, width)

    def step(W: Array, i: int, j: int) -> Array:
        first, last = i // each * each, min(-(-j // each) * each, case.region.rows)
        whole = finite(np.asarray(case.region.read(first, last)[0], np.float32))
        q = dequantize(quantize(np.ascontiguousarray(whole).reshape(-1, NF4), "nf4"))
        near: Array = q.reshape(whole.shape)[i - first : j - first].astype(F64)
        return near

    return step


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
    yield from fp8_merges(case)


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
        W = finite(np.ascontiguousarray(W, np.float32))
        block = 32 if scheme.startswith("int8") else None
        return dequantize(quantize(W, scheme, block)).astype(F64)

    return step


def rescaled(case: Case) -> Iterator[Trial]:
    """W' times a number, which least squares gives: a norm that was kept, a decay, a mean."""
    if case.merge.sums is None or case.region.merged.scheme:
        return
    along = square = spread = 0.0
    for i, j, W, M in case.sample:
        T, e = case.merge.rows(W, i, j)
        along, square = along + float((M * T).sum()), square + float((T * T).sum())
        reach = e + half_gap(M, case.region, None)
        spread += float(((reach * T) ** 2).sum())
    if not square:
        return
    c, off = along / square, SIGMAS * math.sqrt(spread) / square
    if abs(c - 1) > off:
        off += case.region.dtypes.merged_u  # the merged number was rounded before
        yield Trial(case.changes, f"by {c:.6g}", end=_times(c, off), free=False)


def _times(c: float, off: float) -> Ending:
    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        return c * T, abs(c) * e + off * abs(T)

    return end


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
    Mistake("rescaled", "known-mistake", "the merged weight times a number", rescaled),
    Mistake(
        "lengths-kept", "known-mistake", "the rows keep the lengths of the base's", lengths_kept
    ),
)
