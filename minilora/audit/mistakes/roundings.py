"""Right merges but for a rounding: coarser than the dtypes that are at hand, or cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from minilora.audit.floats import BF16, F16, F32, F64, format_of, rounded, spacing
from minilora.audit.low_rank import coarsest, low_rank
from minilora.audit.mistakes.mistake import Mistake
from minilora.audit.trial import SIGMAS, Case, Ending, Step, Trial, with_parts
from minilora.spec.ops import Array


def base_coarse(case: Case) -> Iterator[Trial]:
    """The base rounded to a narrower dtype before the change is added."""
    for dtype in _lossy(case.region.base.dtype):
        yield Trial(case.changes, dtype.name, rounding(dtype), free=False)


def _lossy(dtype: np.dtype[Any]) -> list[np.dtype[Any]]:
    """The half precisions that do not hold all numbers of the dtype."""
    digits, lowest = format_of(dtype).digits, format_of(dtype).lowest
    halves = [(half, format_of(half)) for half in (BF16, F16)]
    return [half for half, f in halves if f.digits < digits or f.lowest > lowest]


def rounding(dtype: np.dtype[Any], step: Step | None = None) -> Step:
    """A step whose result is rounded to the dtype."""
    return lambda W, i, j: rounded(step(W, i, j) if step else W, dtype)


def merged_coarse(case: Case) -> Iterator[Trial]:
    """A right merge in a narrower dtype than it is stored in."""
    for dtype in (BF16, F16):
        if format_of(dtype).u > format_of(case.region.merged.dtype).u:
            yield Trial(case.changes, dtype.name, end=narrowed(dtype), free=False, through=dtype)


def adapter_coarse(case: Case) -> Iterator[Trial]:
    """The adapter rounded to TF32 or half precision first, though all is stored in float32.

    As a GPU's products and autocast do; B A, or s B A too, may be rounded then.
    """
    dtypes = case.region.dtypes
    if {dtypes.base, dtypes.merged} != {F32} or len(case.changes) > 1:
        return
    (change,) = case.changes
    if not {"A", "B"} <= change.parts.keys() or not change.variant.additive:
        return
    A, B = (np.asarray(change.parts[name], F64) for name in "AB")
    for how, to_whole in _TO_TF32.items():
        near = (with_parts(change, A=_tf32(A, to_whole), B=_tf32(B, to_whole)),)
        yield Trial(near, f"TF32{how}", free=False)
    for dtype in (F16, BF16):
        for s in dict.fromkeys((change.s, 1.0)):
            end = _change_rounded(dtype, s)
            yield Trial(case.changes, f"the product in {dtype.name}", end=end, free=False)
        A_, B_ = (rounded(x, dtype).astype(F32) for x in (A, B))
        rounds = (with_parts(change, A=A_, B=B_),)
        yield Trial(rounds, dtype.name, free=False)
        for s in dict.fromkeys((1.0, change.s)):
            end = _change_rounded(dtype, s)
            yield Trial(rounds, f"{dtype.name}, the product too", end=end, free=False)


def _change_rounded(dtype: np.dtype[Any], s: float) -> Ending:
    """The change rounded to the dtype: itself, or what s is multiplied with."""

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        D, size = (T - W) / s, e / abs(s)
        border = rounded(D + size, dtype) - rounded(D - size, dtype)
        return W + s * rounded(D, dtype), e + abs(s) * border

    return end


def _half_away(x: Array) -> Array:
    """The nearest whole numbers; of two the one away from zero, as NVIDIA's conversion does."""
    away: Array = np.trunc(x + np.copysign(0.5, x))
    return away


_TO_TF32: dict[str, Callable[[Array], Array]] = {
    "": np.rint,
    ", ties away from zero": _half_away,
    ", cut off": np.trunc,
}


def _tf32(x: Array, to_whole: Callable[[Array], Array]) -> Array:
    """Numbers with 11 binary digits: the nearest, or those towards zero."""
    gap = np.ldexp(1.0, np.frexp(x)[1] - 11)
    near: Array = (to_whole(x / gap) * gap).astype(F32)
    return near


def adapter_quantized(case: Case) -> Iterator[Trial]:
    """A and B in eight bits: as whole numbers, with a scale for each matrix or row, or as FP8."""
    (change, *more) = case.changes
    if more or not {"A", "B"} <= change.parts.keys() or case.region.merged.scheme:
        return
    A, B = (np.asarray(change.parts[name], F64) for name in "AB")
    for name, step in _EIGHT_BITS.items():
        yield Trial((with_parts(change, A=step(A), B=step(B)),), name, free=False)


def _fp8(dtype: Any) -> Callable[[Array], Array]:
    return lambda x: x.astype(F32).astype(dtype).astype(F64)


def _int8(axis: int | None) -> Callable[[Array], Array]:
    def step(x: Array) -> Array:
        scale = abs(x).max(axis, keepdims=True) / 127
        near: Array = np.rint(x / np.where(scale > 0, scale, 1)) * scale
        return near

    return step


_EIGHT_BITS = {
    "int8 with one scale for each": _int8(None),
    "int8 with a scale for each row": _int8(1),
    "int8 with a scale for each column": _int8(0),
    "FP8, e4m3": _fp8(ml_dtypes.float8_e4m3fn),
    "FP8, e5m2": _fp8(ml_dtypes.float8_e5m2),
}


def stochastic(case: Case) -> Iterator[Trial]:
    """The sum rounded up or down at random: up with the share of the way that it has gone."""
    dtype = case.region.merged.dtype
    if case.region.merged.scheme or dtype.itemsize >= 4 or case.merge.sums is None:
        return
    off = chances = square = 0.0
    for i, j, W, M in case.sample:
        T, _ = case.merge.rows(W, i, j)
        gap = spacing(T, dtype)
        at = T / gap - np.floor(T / gap)
        v, expected = ((M - T) / gap) ** 2, at * (1 - at)
        off += float((v - expected).sum())
        chances += float(expected.sum())
        square += float((expected * (1 - 4 * expected)).sum())
    # Rounded to the nearest, it would be half of the expected number.
    if chances > 0 and abs(off) < SIGMAS * np.sqrt(square) < chances / 4:
        yield Trial(case.changes, dtype.name, end=_between(dtype), free=False, last=False)


def _between(dtype: np.dtype[Any]) -> Ending:
    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        return T, e + spacing(T, dtype)

    return end


def half_sums(case: Case) -> Iterator[Trial]:
    """The r products added up in half precision: each of r sums rounded, h Σ |s| |B| |A| each."""
    dtypes = case.region.dtypes
    sizes = []
    for change in case.changes:
        if change.kind in ("tokens", "saved", "bias") or not change.variant.additive:
            return
        low, (h, _, _) = low_rank(change), dtypes.with_adapter(coarsest(change))
        if h <= format_of(F32).u or change.rows:
            return
        sizes.append((low.r * h, replace(low, A=abs(low.A), B=abs(low.B), s=abs(low.s))))

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        for share, size in sizes:
            e = e + share * size.rows(i, j)
        return T, e

    yield Trial(case.changes, end=end, free=False)


def truncated(case: Case) -> Iterator[Trial]:
    """Numbers cut off towards zero, not rounded."""
    for dtype in (BF16, F16):
        if format_of(dtype).u >= format_of(case.region.merged.dtype).u:
            yield Trial(case.changes, dtype.name, end=_cut(dtype), free=False, through=dtype)


def _cut(dtype: np.dtype[Any]) -> Ending:
    def toward_zero(x: Array) -> Array:
        near = rounded(x, dtype)
        return np.where(abs(near) > abs(x), near - np.sign(x) * spacing(x, dtype), near)

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        low, high = toward_zero(T - e), toward_zero(T + e)
        return (low + high) / 2, (high - low) / 2

    return end


def clipped(case: Case) -> Iterator[Trial]:
    """Numbers beyond the dtype's largest set to the largest."""
    dtype = case.region.merged.dtype
    largest = format_of(dtype).largest
    if case.region.merged.scheme or dtype.itemsize >= 4:
        return
    if any((abs(M) == largest).any() for _, _, _, M in case.everything()):
        yield Trial(case.changes, f"{dtype}: {largest:g}", end=_within(largest), free=False)


def _within(largest: float) -> Ending:
    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        low, high = (np.clip(x, -largest, largest) for x in (T - e, T + e))
        return (low + high) / 2, (high - low) / 2

    return end


def narrowed(dtype: np.dtype[Any]) -> Ending:
    """The sum rounded to a narrower dtype."""

    def end(W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        low, high = rounded(T - e, dtype), rounded(T + e, dtype)
        return (low + high) / 2, (high - low) / 2

    return end


ROUNDINGS = (
    Mistake(
        "merged-coarse",
        "coarser",
        "merged in a narrower dtype than it is stored in",
        merged_coarse,
        ("peft 1388", "unsloth 3091"),
    ),
    Mistake(
        "adapter-quantized",
        "known-mistake",
        "A and B were quantized to eight bits first",
        adapter_quantized,
    ),
    Mistake(
        "stochastic-rounding",
        "coarser",
        "rounded up or down at random, not to the nearest",
        stochastic,
    ),
    Mistake(
        "clipped",
        "known-mistake",
        "it overflows, and the dtype's largest number stands there",
        clipped,
    ),
    Mistake("truncated", "known-mistake", "cut off, not rounded, to a narrower dtype", truncated),
    Mistake(
        "base-coarse", "coarser", "the base was rounded to a narrower dtype first", base_coarse
    ),
    Mistake(
        "adapter-coarse",
        "coarser",
        "the adapter was rounded to a narrower dtype first, as by autocast",
        adapter_coarse,
    ),
    Mistake(
        "half-precision-sums",
        "undecided",
        "within the bound of r products added up in half precision, as some GPUs do",
        half_sums,
    ),
)
