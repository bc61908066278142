"""A change as factors, ΔW = s B A, a block of rows of the stored tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.audit.change import Change
from minilora.audit.floats import F64
from minilora.spec.lora import merge_weight
from minilora.spec.ops import Array
from minilora.spec.variants import extended


def matrix(array: Array) -> Array:
    """A stored tensor, or rows of it, as rows: a kernel is flattened, a vector a column."""
    return array.reshape(len(array), -1)


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = s B A of a change, in the factors that the variant's `factors` gives.

    ``dtype``: of the file; ``columns``: how many parameters beside A and B are multiplied in, each
    a rounding; ``transposed``: the tensor stores Wᵀ; ``slack``: that of the change.
    """

    A: Array
    B: Array
    s: float
    dtype: np.dtype[Any]
    columns: int = 0
    transposed: bool = False
    slack: float = 0.0

    @property
    def r(self) -> int:
        """How many products are added up."""
        return len(self.A)

    def cast(self, dtype: Any) -> LowRank:
        """The same with factors in another dtype."""
        A, B = (part.astype(dtype, copy=False) for part in (self.A, self.B))
        return replace(self, A=A, B=B)

    def part(self, start: int, stop: int) -> LowRank:
        """The same of some rows of the stored matrix alone."""
        if self.transposed:
            return replace(self, A=self.A[:, start:stop])
        return replace(self, B=self.B[start:stop])

    def added(self, W: Array, start: int, stop: int) -> Array:
        """W + ΔW, W being rows start … stop of the stored matrix."""
        part, s = self.part(start, stop), self.A.dtype.type(self.s)
        return (
            merge_weight(W.T, part.A, part.B, s).T
            if self.transposed
            else merge_weight(W, part.A, part.B, s)
        )

    def rows(self, start: int, stop: int) -> Array:
        """ΔW itself of these rows."""
        return self.added(self.A.dtype.type(0), start, stop)

    def at(self, i: Array, j: Array) -> Array:
        """ΔW at entries (i, j) of the stored matrix."""
        if self.transposed:
            i, j = j, i
        delta: Array = self.s * np.einsum("kr,rk->k", self.B[i], self.A[:, j])
        return delta


def low_rank(change: Change, dtype: Any = F64) -> LowRank:
    """The change as factors, computed in the dtype from the file's numbers.

    A bias's change s c is that of B = c and A = 1.

    Errors: ValueError if the variant's change is of full rank, as DoRA's is.
    """
    if change.kind == "bias":
        c = np.asarray(change.parts["c"]).reshape(-1, 1)
        one = np.ones((1, 1), dtype)
        return LowRank(one, c.astype(dtype), change.s, c.dtype, slack=change.slack)
    variant = extended(change.variant)
    if variant.factors is None:
        raise ValueError(f"{change.tensor}: the change of {variant.parts} has no factors")
    A, B, _ = variant.factors(*(np.asarray(part).astype(dtype) for part in change.values))
    columns = len(variant.columns.keys() - {"c"})
    stored = coarsest(change)
    return LowRank(A, B, change.s, stored, columns, change.transposed, change.slack)


def coarsest(change: Change) -> np.dtype[Any]:
    """The dtype of the file's parts; where they differ, the one with fewer bytes."""
    dtypes = [np.asarray(part).dtype for name, part in change.parts.items() if name != "ids"]
    return min(dtypes, key=lambda dtype: dtype.itemsize)
