"""Where a stored number is no right merge, given T and e: beyond [○(T - e), ○(T + e)]."""

from __future__ import annotations

import numpy as np

from minilora.audit.floats import rounded, spacing
from minilora.audit.region import Region
from minilora.audit.rounding import reach
from minilora.spec.ops import Array

K_PARTS = {"q2_k": 16, "q3_k": 16, "q4_k": 32, "q5_k": 32, "q6_k": 16}
"""How many entries share a scale, by K-quant."""


def beyond(M: Array, T: Array, e: Array, region: Region, gap: Array | None) -> Array:
    """Which entries of M lie outside; all in float64. ``gap``: of a quantized M."""
    if region.merged.scheme is not None:
        outside: Array = ~(abs(M - T) <= half_gap(M, region, gap) + e)  # NaN is outside
        outside &= ~_clipped(M, T, region.merged.scheme)
        return outside
    dtype = region.merged.dtype
    outside = ~((rounded(T - e, dtype) <= M) & (rounded(T + e, dtype) >= M))
    return outside


def _clipped(M: Array, T: Array, scheme: str) -> Array:
    """Which entries of a K-quant may be clipped: the ends of their part of a block, T beyond.

    Its scales are searched for and then rounded to whole numbers: the ends may lie beyond.
    """
    size = K_PARTS.get(scheme)
    if size is None or M.shape[-1] % size:
        return np.zeros(M.shape, bool)
    parts = M.reshape(len(M), -1, size)
    high, low = (end(-1, keepdims=True) for end in (parts.max, parts.min))
    above = (parts == high) & (T.reshape(parts.shape) > parts)
    below = (parts == low) & (T.reshape(parts.shape) < parts)
    clipped: Array = (above | below).reshape(M.shape)
    return clipped


def half_gap(M: Array, region: Region, gap: Array | None) -> Array:
    """How far the last rounding may have moved what is now M."""
    if region.merged.scheme is None:
        return spacing(M, region.merged.dtype) / 2
    return reach(region.merged.scheme, spacing(M, "bfloat16") if gap is None else gap, M)


def deviations(M: Array, T: Array, e: Array, region: Region, gap: Array | None) -> Array:
    """|M - T| as a share of how far a right merge may be."""
    share: Array = abs(M - T) / (e + half_gap(M, region, gap))
    return share
