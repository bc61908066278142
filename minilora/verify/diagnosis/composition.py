"""What an answer is made of: which row has whose adapter, and how often each adapter acts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import Comparison
from minilora.verify.diagnosis.fit import agreeing, sigma_of

Array = np.ndarray

MAX_ROWS = 6
"""So many rows are told one by one."""

MAX_PARTS = 3
"""So many parts that act alike are told by name."""


def compositions(named: Sequence[tuple[str, Comparison]]) -> Iterator[tuple[str, str]]:
    """Of the first comparison that deviates and says its parts: what it has, and what it should."""
    for case, comparison in named:
        if comparison.parts is not None and comparison.judge().verdict == "fail":
            of = _rows if comparison.parts_by_row else _factors
            if words := of(comparison, comparison.parts()):
                yield "composition", f"{words}, in {case}"
            return


def _rows(comparison: Comparison, parts: Mapping[str, Array]) -> str:
    """Each row that deviates, if every one of them is the row of another part."""
    got, want = (np.asarray(v, float) for v in (comparison.got, comparison.want))
    # Another part rounds by about as much; an element of sigma 0 has to be equal.
    sigma = np.maximum(4 * sigma_of(comparison), np.finfo(float).tiny)
    told = []
    for j in range(len(got)):
        if agreeing((got[j] - want[j]) / sigma[j]):
            continue
        has = [name for name, part in parts.items() if agreeing((got[j] - part[j]) / sigma[j])]
        should = [
            name for name, part in parts.items() if (np.asarray(part[j], float) == want[j]).all()
        ]
        if not has or not should:
            return ""
        told.append(f"row {j} has {has[0]} and should have {should[0]}")
    more = f"; and {len(told) - MAX_ROWS} more rows so" if len(told) > MAX_ROWS else ""
    return "; ".join(told[:MAX_ROWS]) + more


def _shown(factor: float) -> str:
    """A factor in six digits, 0 where it is the solver's rounding beside a factor of 1."""
    return f"{factor:.6g}" if abs(factor) > 1e-6 else "0"


def is_made_of(got: Array, parts: Mapping[str, Array]) -> bool:
    """Whether an array is a sum of multiples of these, within the rounding of float32."""
    matrix = np.stack([np.asarray(part, float).ravel() for part in parts.values()], 1)
    has = np.linalg.lstsq(matrix, np.asarray(got, float).ravel(), rcond=None)[0]
    return bool(np.allclose(matrix @ has, got.ravel(), 1e-5, 1e-6 * float(np.abs(got).max())))


def _factors(comparison: Comparison, parts: Mapping[str, Array]) -> str:
    """How often each part acts, if the answer is a sum of multiples of them."""
    matrix = np.stack([np.asarray(part, float).ravel() for part in parts.values()], 1)
    if np.linalg.matrix_rank(matrix) < len(parts) or len(matrix) <= len(parts):
        return ""
    got, want = (np.asarray(v, float).ravel() for v in (comparison.got, comparison.want))
    has, should = (np.linalg.lstsq(matrix, v, rcond=None)[0] for v in (got, want))
    dtype = str(comparison.got.dtype)
    rounded = max(1e-12, 2 * unit_roundoff(dtype) if dtype in DTYPES else 0.0) * np.abs(got).max()
    sigma = np.maximum(sigma_of(comparison).ravel(), rounded)
    if not agreeing((got - matrix @ has) / sigma):
        return ""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, a, b in zip(parts, has, should, strict=True):
        if abs(a - b) > 1e-6 * max(1, abs(b)):
            alike.setdefault((_shown(a), _shown(b)), []).append(name)
    return ", ".join(
        f"{_several(names)} {a} times, expected {b}" for (a, b), names in alike.items()
    )


def _several(names: Sequence[str]) -> str:
    """Who acts: of many the first ones, and how many more."""
    if len(names) == 1:
        return f"{names[0]} acts"
    more = f" and {len(names) - MAX_PARTS} more" if len(names) > MAX_PARTS else ""
    return f"{', '.join(names[:MAX_PARTS])}{more} act"
