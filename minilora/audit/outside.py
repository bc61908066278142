"""Where a stored number is no right merge, given T and e: beyond [○(T - e), ○(T + e)]."""

from __future__ import annotations

from minilora.audit.floats import rounded, spacing
from minilora.audit.region import Region
from minilora.audit.rounding import reach
from minilora.spec.ops import Array


def beyond(M: Array, T: Array, e: Array, region: Region, gap: Array | None) -> Array:
    """Which entries of M lie outside; all in float64. ``gap``: of a quantized M."""
    if region.merged.scheme is not None:
        outside: Array = abs(M - T) > half_gap(M, region, gap) + e
        return outside
    dtype = region.merged.dtype
    outside = (rounded(T - e, dtype) > M) | (rounded(T + e, dtype) < M)
    return outside


def half_gap(M: Array, region: Region, gap: Array | None) -> Array:
    """How far the last rounding may have moved what is now M."""
    if region.merged.scheme is None:
        return spacing(M, region.merged.dtype) / 2
    return reach(region.merged.scheme, spacing(M, "bfloat16") if gap is None else gap, M)


def deviations(M: Array, T: Array, e: Array, region: Region, gap: Array | None) -> Array:
    """|M - T| as a share of how far a right merge may be."""
    share: Array = abs(M - T) / (e + half_gap(M, region, gap))
    return share
