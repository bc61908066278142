"""The changes of a tensor, one after another: T and e of a right merge, in float64.

Changes with factors that follow one another are one stage, `Sums`, since they may be added up
first; DoRA is `Rescaled`; what replaces rows or all of the tensor is `Replaced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from minilora.audit.change import Change
from minilora.audit.floats import F32, F64, format_of, wide
from minilora.audit.low_rank import LowRank, coarsest, low_rank, matrix
from minilora.audit.region import Region
from minilora.audit.rounding import Bound, Dtypes, gamma
from minilora.spec.ops import Array
from minilora.spec.variants.dora import rescaled_rows, row_norm


class Stage(Protocol):
    """One or several changes, as a step from one weight to the next."""

    def deltas(self, W: Array, i: int, j: int) -> list[Array]:
        """What each change adds to W, in float32, for least squares."""

    def step(self, W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        """T and e after this stage, of those before it and the base's W, in float64."""


@dataclass(frozen=True, eq=False)
class Sums:
    """W with changes that have factors."""

    bound: Bound

    @property
    def is_something(self) -> bool:
        """Whether one of the changes is not 0."""
        return any(c.s and c.A.any() and c.B.any() for c in self.bound.changes)

    @property
    def cost(self) -> int:
        """How many entries of a whole block `at` takes for one of its own, about."""
        return 4 + sum(c.r for c in self.bound.changes)

    def deltas(self, W: Array, i: int, j: int) -> list[Array]:
        """ΔW of each."""
        return [c.rows(i, j).astype(F32) for c in self.bound.changes]

    def step(self, W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        """T + Σ ΔW."""
        deltas = [c.rows(i, j) for c in self.bound.changes]
        sizes = [c.rows(i, j) for c in self.bound.products]
        return sum(deltas, start=T), e + self.bound.e(T, deltas, sizes)

    def at(self, W: Array, i: Array, j: Array) -> tuple[Array, Array]:
        """T and e of entries (i, j), W being the base's there."""
        deltas = [c.at(i, j) for c in self.bound.changes]
        sizes = [c.at(i, j) for c in self.bound.products]
        return sum(deltas, start=W), self.bound.e(W, deltas, sizes)


@dataclass(eq=False)
class Rescaled:
    """DoRA: T + (m ∘ V / ‖V‖ - W), V = W + s B A on the base itself.

    e: V misses by e_V, that of `Bound` and one rounding h of V; its norm by ρ relatively, the norm
    of e_V over ‖V‖, γ_{n + 2} for the sum of n squares in any order (half of it for the root), and
    h; m, the quotient and the product are rounded by h each. So with g = m / ‖V‖
    e = |T| ((1 + h)³ / (1 - ρ) - 1) + |g| e_V (1 + h)³ / (1 - ρ), and eta / 2 (1 + |V|) where
    numbers are subnormal.
    """

    change: LowRank
    magnitude: Array
    bound: Bound
    region: Region
    _norms: tuple[Array, Array] | None = field(default=None, repr=False)

    @staticmethod
    def of(change: Change, region: Region) -> Rescaled:
        """DoRA's change of a region."""
        A, B = (np.asarray(change.parts[name]).astype(F64) for name in "AB")
        stored = coarsest(change)
        low = LowRank(A, B, change.s, stored, 0, change.transposed, change.slack)
        magnitude = np.asarray(change.parts["magnitude"]).reshape(-1, 1).astype(F64)
        if change.rows and not change.transposed:
            low = _here(low, change, region)
            magnitude = magnitude[region.start - change.rows[0] :][: region.rows]
        return Rescaled(low, magnitude, Bound(region.dtypes, (low,)), region)

    def missed(self, W: Array, i: int, j: int) -> tuple[Array, Array]:
        """V of rows i … j, as stored, and by how much W + s B A misses it before V is rounded."""
        delta, size = self.change.rows(i, j), self.bound.products[0].rows(i, j)
        return W + delta, self.bound.e(W, [delta], [size])

    def _V(self, W: Array, i: int, j: int) -> tuple[Array, Array]:
        """V and e_V of rows i … j, as stored."""
        V, e = self.missed(W, i, j)
        h, _, _ = self.bound.dtypes.with_adapter(self.change.dtype)
        return V, e + h * abs(V)

    def _norm(self, V: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        """‖V‖ and ‖e_V‖ of each row of the matrix: of the columns, if it is stored transposed."""
        if not self.change.transposed:
            return row_norm(V)[0], row_norm(e)[0]
        if self._norms is None:
            squares = np.zeros((2, self.region.width))
            for a, b, W, _ in self.region.blocks():
                for k, part in enumerate(self._V(W.astype(F64), a, b)):
                    squares[k] += (part * part).sum(0)
            v = np.sqrt(squares)[:, None]
            self._norms = v[0] + (v[0] == 0), v[1]
        return self._norms

    def deltas(self, W: Array, i: int, j: int) -> list[Array]:
        """W' - W."""
        W = W.astype(F64)
        return [(self._rescaled(W, i, j)[0] - W).astype(F32)]

    def step(self, W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        """T + (W' - W)."""
        merged, error = self._rescaled(W, i, j)
        return T + (merged - W), e + error

    def _rescaled(self, W: Array, i: int, j: int) -> tuple[Array, Array]:
        V, e = self._V(W, i, j)
        v, size = self._norm(V, e, i, j)
        m = self.magnitude.T if self.change.transposed else self.magnitude[i:j]
        h, eta, _ = self.bound.dtypes.with_adapter(self.change.dtype)
        n = len(self.change.A.T)
        rho = np.minimum(size / v + gamma(n + 2) / 2 + h + eta / 2 / v, 0.5)
        T = rescaled_rows(V, m, v)
        grown = (1 + h) ** 3 / (1 - rho)
        flat = eta / 2 * (1 + abs(V))
        return T, abs(T) * (grown - 1) + abs(m / v) * e * grown + flat


@dataclass(frozen=True, eq=False)
class Replaced:
    """All rows, or some, are what the adapter holds; they may pass through the base's dtype."""

    values: Array
    ids: Array | None
    dtypes: Dtypes

    @staticmethod
    def of(change: Change, region: Region) -> Replaced:
        """Of ``kind`` saved or tokens."""
        if change.kind == "tokens":
            ids = np.asarray(change.parts["ids"]).reshape(-1).astype(np.int64)
            return Replaced(np.asarray(change.parts["rows"]), ids, region.dtypes)
        weight = np.asarray(change.parts["weight"])
        whole = weight if region.index is None else weight[region.index]
        return Replaced(matrix(whole)[region.start : region.stop], None, region.dtypes)

    def _at(self, i: int, j: int) -> tuple[Array | slice, Array]:
        """Which of rows i … j are replaced, and by what."""
        if self.ids is None:
            return slice(None), self.values[i:j]
        here = (self.ids >= i) & (self.ids < j)
        return self.ids[here] - i, self.values[here]

    def deltas(self, W: Array, i: int, j: int) -> list[Array]:
        """What the rows are more than the base's."""
        at, values = self._at(i, j)
        delta = np.zeros_like(W, F32)
        delta[at] = wide(values) - W[at]
        return [delta]

    def step(self, W: Array, T: Array, e: Array, i: int, j: int) -> tuple[Array, Array]:
        """The rows in place of T's."""
        at, values = self._at(i, j)
        T, e = T.copy(), e.copy()
        T[at] = values.astype(F64)
        coarser = format_of(self.dtypes.base).u > format_of(self.dtypes.merged).u
        e[at] = coarser * format_of(self.dtypes.base).u * abs(T[at])
        return T, e


def stages_of(region: Region, changes: Sequence[Change]) -> tuple[Stage, ...]:
    """The changes in their order as stages."""
    stages: list[Stage] = []
    for kind, group in groupby(changes, key=_stage):
        if kind is Sums:
            low = tuple(_here(low_rank(c), c, region) for c in group)
            stages.append(Sums(Bound(region.dtypes, low)))
        else:
            stages += [kind.of(c, region) for c in group]
    return tuple(stages)


def _stage(change: Change) -> Any:
    if change.kind in ("tokens", "saved"):
        return Replaced
    return Sums if change.kind == "bias" or change.variant.additive else Rescaled


def _here(low: LowRank, change: Change, region: Region) -> LowRank:
    """The part of the change that acts on the region's rows."""
    first = change.rows[0] if change.rows else 0
    if (region.start, region.stop) == (first, first + region.rows) and not change.rows:
        whole = low.A.shape[1] if low.transposed else len(low.B)
        if whole == region.rows:
            return low
    return low.part(region.start - first, region.stop - first)
