"""What a right merge of some rows is: T and e in float64, and the merges of the named ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from minilora.audit.change import Change
from minilora.audit.floats import BF16, F16, F32, F64, on_grid, rounded, wide
from minilora.audit.low_rank import LowRank
from minilora.audit.region import Region
from minilora.audit.rounding import WAYS, Dtypes, Replay, Way
from minilora.audit.stages import Rescaled, Stage, Sums, stages_of
from minilora.spec.ops import Array
from minilora.spec.quantization import SCHEMES, dequantize, quantize
from minilora.spec.variants.dora import row_norm


@dataclass(frozen=True, eq=False)
class Merge:
    """All stages of a region."""

    stages: tuple[Stage, ...]
    region: Region

    @staticmethod
    def of(region: Region, changes: Sequence[Change] | None = None) -> Merge:
        """The region's changes in their order, or others in their place."""
        changes = region.changes if changes is None else changes
        return Merge(stages_of(region, changes), region)

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

    def replays(self, ways: Sequence[Way] = WAYS) -> Iterator[Played]:
        """The merge in each of the named ways."""
        sums, dtypes = self.sums, self.region.dtypes
        if sums is None:
            (first, *more) = self.stages
            if isinstance(first, Rescaled) and not more:
                yield from (RescaledIn(first, *names) for names in RESCALED_WAYS)
            else:
                yield Exactly(self)
            return
        single = [c.cast(F32) for c in sums.bound.changes]
        scheme = self.region.merged.scheme
        if scheme is not None and scheme in SCHEMES and self.region.width % BLOCKS == 0:
            for through in (F32, F16, BF16):
                d = Dtypes(dtypes.base, through)
                yield from (Requantized(Replay.of(way, d, single), scheme) for way in ways[:4])
        else:
            yield from (Replay.of(way, dtypes, single) for way in ways)

    def slow_replays(self) -> Iterator[Played]:
        """Ways that take long."""
        if self.sums is not None and {self.region.dtypes.base, self.region.dtypes.merged} == {F32}:
            yield RankByRank(tuple(c.cast(F32) for c in self.sums.bound.changes))


@dataclass(frozen=True, eq=False)
class RankByRank:
    """One rank after another added to W in float32: what is lost of W is lost r times.

    It takes r passages, so that only what no other way explains is compared with it.
    """

    changes: tuple[LowRank, ...]
    name: str = "rank by rank into W, float32"
    grid: np.dtype[Any] = F32

    def play(self, W: Array, i: int, j: int) -> tuple[Array, list[Array]]:
        """The merged rows, and the changes."""
        for change in self.changes:
            for k in range(change.r):
                one = replace(change, A=change.A[k : k + 1], B=change.B[:, k : k + 1])
                W = one.added(W, i, j)
        return W, [change.rows(i, j) for change in self.changes]


class Played(Protocol):
    """A merge in one way, in float32."""

    @property
    def name(self) -> str:
        """The way's name."""

    @property
    def grid(self) -> np.dtype[Any]:
        """The dtype that the merged rows are rounded to at last."""

    def play(self, W: Array, i: int, j: int) -> tuple[Array, list[Array]]:
        """The merged rows before their last rounding, and what each change adds."""


@dataclass(frozen=True, eq=False)
class Exactly:
    """T rounded once: the way of what has no other."""

    merge: Merge
    name: str = "rounded once"
    grid: np.dtype[Any] = F32

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


BLOCKS = 64
"""A multiple of the blocks of all schemes that can be quantized again."""


@dataclass(frozen=True, eq=False)
class Requantized:
    """A merge in one way, quantized again."""

    replay: Replay
    scheme: str
    grid: np.dtype[Any] = F32

    @property
    def name(self) -> str:
        """The way's name, with the scheme."""
        through = self.replay.dtypes.merged
        return f"{self.replay.name}, {through.name} quantized to {self.scheme}"

    def play(self, W: Array, i: int, j: int) -> tuple[Array, list[Array]]:
        """What the quantized merged rows stand for, and the changes."""
        V, deltas = self.replay.play(W, i, j)
        N = np.nan_to_num(np.ascontiguousarray(on_grid(V, self.replay.grid), F32))
        return dequantize(quantize(N, self.scheme)), deltas


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

    @property
    def grid(self) -> np.dtype[Any]:
        """The merged tensor's dtype."""
        return self.stage.bound.dtypes.merged

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
        """The merged rows before their last rounding, and W' - W."""
        V, dtype = self._V(W, i, j), self._dtype
        m = self.stage.magnitude.astype(F32)
        m = m.T if self.stage.change.transposed else m[i:j]
        g = on_grid(m / on_grid(self._norm(V), dtype), dtype)
        T = on_grid(g * V, dtype)
        return T, [T - W]
