"""What a right merge of some rows is: T and e in float64, and the merges of the named ways.

The changes of a tensor act one after another, each a `Stage`. Changes with factors that follow one
another are one stage, `Sums`, since they may be added up first; DoRA is `Rescaled`; what replaces
rows or all of the tensor is `Replaced`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, Protocol

import numpy as np

from minilora.audit.change import Change, Tensor
from minilora.audit.floats import BF16, F32, F64, format_of, on_grid, rounded, wide
from minilora.audit.low_rank import LowRank, coarsest, low_rank, matrix
from minilora.audit.rounding import WAYS, Bound, Dtypes, Replay, Way, gamma
from minilora.spec.ops import Array
from minilora.spec.variants.dora import rescaled_rows, row_norm

BLOCK = 2**18
"""How many entries are looked at at once: a few arrays of this size in float32 fit a cache."""


@dataclass(eq=False)
class Region:
    """Rows of a stored tensor, or of one matrix of it, that the same changes act on."""

    base: Tensor
    merged: Tensor
    changes: tuple[Change, ...]
    start: int
    stop: int
    index: int | None = None
    through: np.dtype[Any] | None = None
    _whole: tuple[Array, Array] | None = field(default=None, repr=False)

    @property
    def width(self) -> int:
        """How many entries a row has."""
        first = 1 if self.index is None else 2
        return int(np.prod(self.base.shape[first:], dtype=np.int64))

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start

    @property
    def dtypes(self) -> Dtypes:
        """In which dtypes a right merge may compute."""
        base, merged = (BF16 if t.scheme else t.dtype for t in (self.base, self.merged))
        return Dtypes(base, self.through or merged)

    def blocks(self) -> Iterator[tuple[int, int, Array, Array]]:
        """Rows i … j of the region, with the base's and the merged ones as stored."""
        step = max(1, BLOCK // max(1, self.width))
        for i in range(0, self.rows, step):
            j = min(i + step, self.rows)
            yield i, j, *self.read(i, j)

    def read(self, i: int, j: int) -> tuple[Array, Array]:
        """Rows i … j of the region: the base's, and the merged."""
        i, j = i + self.start, j + self.start
        if self.index is None:
            return matrix(self.base.rows(i, j)), matrix(self.merged.rows(i, j))
        if self._whole is None:
            e = self.index
            W, M = (matrix(t.rows(e, e + 1)[0]) for t in (self.base, self.merged))
            self._whole = W, M
        return self._whole[0][i:j], self._whole[1][i:j]

    def gaps(self, i: int, j: int) -> Array | None:
        """How far a right quantizer may leave the numbers of rows i … j; None if not quantized."""
        if self.merged.scheme is None:
            return None
        i, j = i + self.start, j + self.start
        if self.index is not None:
            whole = self.merged.spacing(self.index, self.index + 1)
            gap = None if whole is None else matrix(whole[0])[i:j]
        else:
            whole = self.merged.spacing(i, j)
            gap = None if whole is None else matrix(whole)
        return None if gap is None else gap.astype(np.float64)


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

    def _V(self, W: Array, i: int, j: int) -> tuple[Array, Array]:
        """V and e_V of rows i … j, as stored."""
        delta, size = self.change.rows(i, j), self.bound.products[0].rows(i, j)
        h, _, _ = self.bound.dtypes.with_adapter(self.change.dtype)
        V = W + delta
        return V, self.bound.e(W, [delta], [size]) + h * abs(V)

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


@dataclass(frozen=True, eq=False)
class Merge:
    """All stages of a region."""

    stages: tuple[Stage, ...]
    region: Region

    @staticmethod
    def of(region: Region, changes: Sequence[Change] | None = None) -> Merge:
        """The region's changes in their order, or others in their place."""
        changes = region.changes if changes is None else changes
        stages: list[Stage] = []
        for kind, group in groupby(changes, key=_stage):
            if kind is Sums:
                low = tuple(_here(low_rank(c), c, region) for c in group)
                stages.append(Sums(Bound(region.dtypes, low)))
            else:
                stages += [kind.of(c, region) for c in group]
        return Merge(tuple(stages), region)

    @property
    def count(self) -> int:
        """How many changes there are."""
        return sum(len(s.bound.changes) if isinstance(s, Sums) else 1 for s in self.stages)

    @property
    def sums(self) -> Sums | None:
        """The one stage, if all changes have factors."""
        if len(self.stages) != 1 or not isinstance(self.stages[0], Sums):
            return None
        return self.stages[0]

    def rows(self, W: Array, i: int, j: int) -> tuple[Array, Array]:
        """T and e of rows i … j of the region, W in float64."""
        T, e = W, np.zeros(W.shape)
        for stage in self.stages:
            T, e = stage.step(W, T, e, i, j)
        return T, e

    def deltas(self, W: Array, i: int, j: int) -> list[Array]:
        """What each change adds, in float32; W too."""
        return [delta for stage in self.stages for delta in stage.deltas(W, i, j)]

    def replays(self, ways: Sequence[Way] = WAYS) -> list[Played]:
        """The merge in each of the named ways."""
        sums, dtypes = self.sums, self.region.dtypes
        if sums is None:
            (first, *more) = self.stages
            if isinstance(first, Rescaled) and not more:
                return [RescaledIn(first, *names) for names in RESCALED_WAYS]
            return [Exactly(self)]
        single = [c.cast(F32) for c in sums.bound.changes]
        return [Replay.of(way, dtypes, single) for way in ways]


class Played(Protocol):
    """A merge in one way, in float32."""

    @property
    def name(self) -> str:
        """The way's name."""

    def play(self, W: Array, i: int, j: int) -> tuple[Array, list[Array]]:
        """The merged rows on the merged tensor's grid, and what each change adds."""


@dataclass(frozen=True, eq=False)
class Exactly:
    """T rounded once: the way of what has no other."""

    merge: Merge
    name: str = "rounded once"

    def play(self, W: Array, i: int, j: int) -> tuple[Array, list[Array]]:
        """T, and the changes."""
        T, _ = self.merge.rows(W.astype(F64), i, j)
        merged = rounded(T, self.merge.region.dtypes.merged).astype(F32)
        return merged, self.merge.deltas(W, i, j)


RESCALED_WAYS = (
    ("float32", "float32", "float32"),
    ("delta in the adapter's dtype, float32", "adapter", "float32"),
    ("the adapter's dtype", "adapter", "adapter"),
    ("the base's dtype", "base", "base"),
    ("delta in the adapter's dtype, the base's dtype", "adapter", "base"),
)
"""DoRA's ways: the dtype that s B A is rounded to, and that V, ‖V‖, m / ‖V‖ and W' are."""


@dataclass(eq=False)
class RescaledIn:
    """DoRA merged in one way: in float32, each result rounded to a dtype."""

    stage: Rescaled
    name: str
    delta: str
    dtype: str
    _norms: Array | None = field(default=None, repr=False)

    def _V(self, W: Array, i: int, j: int) -> Array:
        change = self._single
        dtypes = self.stage.bound.dtypes
        delta = on_grid(change.rows(i, j), dtypes.named(self.delta, change.dtype))
        return on_grid(W + delta, self._dtype)

    @cached_property
    def _single(self) -> LowRank:
        return self.stage.change.cast(F32)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return self.stage.bound.dtypes.named(self.dtype, self.stage.change.dtype)

    def _norm(self, V: Array) -> Array:
        if not self.stage.change.transposed:
            return row_norm(V)[0]
        if self._norms is None:
            squares = np.zeros(self.stage.region.width, F32)
            for i, j, W, _ in self.stage.region.blocks():
                part = self._V(wide(W), i, j)
                squares += (part * part).sum(0)
            v = np.sqrt(squares)
            self._norms = v + (v == 0)
        return self._norms

    def play(self, W: Array, i: int, j: int) -> tuple[Array, list[Array]]:
        """The merged rows, and W' - W."""
        V, dtype = self._V(W, i, j), self._dtype
        m = self.stage.magnitude.astype(F32)
        m = m.T if self.stage.change.transposed else m[i:j]
        g = on_grid(m / on_grid(self._norm(V), dtype), dtype)
        T = on_grid(g * V, dtype)
        return on_grid(T, self.stage.bound.dtypes.merged), [T - W]


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


def regions(base: Tensor, merged: Tensor, changes: Sequence[Change]) -> Iterator[Region]:
    """The tensor in parts that the same changes act on; those without come with none."""
    for index, here in _matrices(base, changes):
        rows = base.shape[0] if index is None else base.shape[1]
        cuts = {0, rows} | {c for change in here for c in change.rows or ()}
        ends = sorted(cut for cut in cuts if 0 <= cut <= rows)
        for start, stop in pairwise(ends):
            acting = tuple(
                c for c in here if c.rows is None or (c.rows[0] <= start and stop <= c.rows[1])
            )
            yield Region(base, merged, acting, start, stop, index)


def _matrices(base: Tensor, changes: Sequence[Change]) -> Iterator[tuple[int | None, list[Change]]]:
    if all(change.index is None for change in changes):
        yield None, list(changes)
        return
    for e in range(base.shape[0]):
        yield e, [change for change in changes if change.index in (None, e)]
