"""Trying what may have been done in place of the right merge: on some rows, then on all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from minilora.audit.change import Around, Change
from minilora.audit.floats import F64, rounded
from minilora.audit.low_rank import coarsest
from minilora.audit.merges import Merge
from minilora.audit.outside import beyond, half_gap
from minilora.audit.region import Region
from minilora.spec.ops import Array

SIGMAS = 7.0
"""How many standard deviations are no chance: 1 in 10¹¹ tensors."""

RUNS = 6
"""In how many places of a tensor rows are looked at before all are."""

Block = tuple[int, int, Array, Array]
Step = Callable[[Array, int, int], Array]
Ending = Callable[[Array, Array, Array, int, int], tuple[Array, Array]]


@dataclass(frozen=True, eq=False)
class Trial:
    """What may have been done instead: changes in place of the right ones, another base or end.

    ``detail``: what distinguishes it from others of its mistake; ``weight(W, i, j)``: what was the
    base instead of W; ``end(W, T, e, i, j)``: what became of T, with its error; ``free``: it may
    be by another factor, too; ``through``: a narrower dtype in which it was computed, and on whose
    grid the result is; ``order``: of the merged tensor's rows, base and all; ``turned``: the merged
    tensor is stored transposed, base and all; ``last``: the last rounding is to the nearest, not at
    random; ``bits``: the share of entries that have to be T rounded once, where e is wide.
    """

    changes: tuple[Change, ...]
    detail: str = ""
    weight: Step | None = None
    end: Ending | None = None
    free: bool = True
    through: np.dtype[Any] | None = None
    order: Array | None = None
    turned: bool = False
    last: bool = True
    bits: float = 0.0

    def adds_noise(self, case: Case) -> bool:
        """Whether it only rounds more, without another change or a coarser grid."""
        wide = self.end is not None or self.changes == case.changes
        return wide and self.last and self.through is None


@dataclass(frozen=True)
class Bracket:
    """The factors c for which all entries lie within the bound of W + c ΔW: low … high.

    ``best``: by least squares.
    """

    low: float
    high: float
    best: float

    def __contains__(self, c: float) -> bool:
        return self.low <= c <= self.high


@dataclass(eq=False)
class Case:
    """A tensor's part whose merge is wrong, and what is around.

    ``beside()``: the factor that least squares finds beside a right merge, and its standard
    deviation, if it is not 1 by chance.
    """

    merge: Merge
    around: Around
    beside: Callable[[], tuple[float, float] | None] = lambda: None
    _sample: list[Block] = field(default_factory=list)

    @property
    def region(self) -> Region:
        """The part."""
        return self.merge.region

    @property
    def changes(self) -> tuple[Change, ...]:
        """What should have been applied."""
        return self.region.changes

    def everything(self) -> Iterator[Block]:
        """All rows, in float64."""
        for i, j, W, M in self.region.blocks():
            yield i, j, W.astype(F64), M.astype(F64)

    @cached_property
    def sample(self) -> list[Block]:
        """Rows at several places, first those with much of the change; in float64."""
        rows, width = self.region.rows, max(1, self.region.width)
        each = max(1, min(16, 2**17 // (width * RUNS)))
        if rows <= each * RUNS:
            return [(0, rows, *self._read(0, rows))]
        places = {int(x) for x in np.linspace(0, rows - each, RUNS)}
        strongest = min(self._strongest(), rows - each)
        order = [strongest, *sorted(places - {strongest})]
        return [(i, i + each, *self._read(i, i + each)) for i in order]

    def _read(self, i: int, j: int) -> tuple[Array, Array]:
        W, M = self.region.read(i, j)
        return W.astype(F64), M.astype(F64)

    def _strongest(self) -> int:
        sums = self.merge.sums
        if sums is None:
            return 0
        low = sums.bound.changes[0]
        factor = low.A.T if low.transposed else low.B
        return int(np.argmax((factor * factor).sum(1)))

    def merged(self, trial: Trial) -> Merge:
        """The trial's changes as a merge of this part."""
        region = self.region
        if trial.through is not None:
            region = replace(region, through=trial.through)
        return Merge.of(region, trial.changes)

    def holds(self, trial: Trial) -> bool:
        """Whether all entries are within the bound of what the trial does, and lean to no side.

        As `judge` asks of a right merge: the difference from T rounded once may have no greater
        projection on T - W than roundings have.
        """
        merge = self.merged(trial)
        return self._all(trial, merge, self.sample) and self._all(trial, merge, self.everything())

    def _all(self, trial: Trial, merge: Merge, blocks: Iterable[Block]) -> bool:
        beside = spread = square = 0.0
        same = entries = 0
        dtype = trial.through or self.region.merged.dtype
        for i, j, W, M in blocks:
            if trial.through is not None and (rounded(M, trial.through) != M).any():
                return False
            W, T, e = tried(trial, merge, W, i, j)
            if beyond(M, T, e, self.region, self.region.gaps(i, j)).any():
                return False
            N, D = rounded(T, dtype) if trial.last else T, T - W
            apart = (M - N) * D
            same, entries = same + int(np.count_nonzero(M == N)), entries + M.size
            beside += float(apart.sum())
            spread += float((apart * apart).sum())
            square += float(((N - W) * D).sum())
        if same < trial.bits * entries:
            return False
        if square <= 0 or self.region.merged.scheme or trial.through is not None:
            return True
        h = max((self.region.dtypes.with_adapter(coarsest(c))[0] for c in self.changes), default=0)
        return bool(abs(beside) <= 8 * h * square + SIGMAS * np.sqrt(spread))

    def residual(self, trial: Trial) -> float:
        """The root mean square of (M - T) in the last roundings' units, over the sample."""
        merge, total, entries = self.merged(trial), 0.0, 0
        for i, j, W, M in self.sample:
            _, T, _ = tried(trial, merge, W, i, j)
            share = (M - T) / half_gap(M, self.region, self.region.gaps(i, j))
            total, entries = total + float((share * share).sum()), entries + share.size
        return float(np.sqrt(total / max(1, entries)))

    def bracket(self, trial: Trial) -> Bracket | None:
        """The factors by which the trial's change explains all entries; None if none does."""
        merge = self.merged(trial)
        if merge.sums is None or trial.end:
            return None
        if self._factor(trial, merge, self.sample[:1]) is None:
            return None
        found = self._bracket(trial, merge, self.sample)
        return self._bracket(trial, merge, self.everything(), found) if found else None

    def _bracket(
        self, trial: Trial, merge: Merge, blocks: Iterable[Block], first: Bracket | None = None
    ) -> Bracket | None:
        sums = merge.sums
        assert sums is not None
        bound, low, high = sums.bound, -np.inf, np.inf
        best = first.best if first else self._factor(trial, merge, self.sample)
        if best is None:
            return None
        # e grows with the factor: that of the sample's bracket, or twice what least squares says.
        grown = max(abs(first.low), abs(first.high)) if first else 2 * max(1.0, abs(best))
        along = square = 0.0
        for i, j, W, M in blocks:
            V = W if trial.weight is None else trial.weight(W, i, j)
            deltas = [c.rows(i, j) for c in bound.changes]
            sizes = [c.rows(i, j) for c in bound.products]
            e = bound.e(V, [grown * d for d in deltas], [grown * P for P in sizes])
            e = e + half_gap(M, self.region, self.region.gaps(i, j))
            D, moved = sum(deltas[1:], deltas[0]), M - V
            along, square = along + float((moved * D).sum()), square + float((D * D).sum())
            with np.errstate(divide="ignore", invalid="ignore"):
                ends = np.stack([(moved - e) / D, (moved + e) / D])
            still = D == 0
            if (abs(moved[still]) > e[still]).any():
                return None
            ends = ends[:, ~still]
            low = max(low, float(ends.min(0).max(initial=-np.inf)))
            high = min(high, float(ends.max(0).min(initial=np.inf)))
            if low > high:
                return None
        return Bracket(low, high, along / square if square else best)

    def _factor(self, trial: Trial, merge: Merge, blocks: Sequence[Block]) -> float | None:
        """⟨M - W, D⟩ / ⟨D, D⟩ over these rows; None where that is chance, below two deviations."""
        along = square = moved = 0.0
        entries = 0
        for i, j, W, M in blocks:
            entries += M.size
            V = W if trial.weight is None else trial.weight(W, i, j)
            (D, *more) = merge.deltas(W, i, j)
            D = sum(more, D).astype(F64)
            along += float(((M - V) * D).sum())
            square += float((D * D).sum())
            moved += float(((M - V) ** 2).sum())
        if not square or along * along * entries < 4 * square * moved:
            return None
        return along / square


def tried(trial: Trial, merge: Merge, W: Array, i: int, j: int) -> tuple[Array, Array, Array]:
    """What stands for W, T and e in what the trial does."""
    if trial.order is not None:
        places = trial.order[i:j]
        first, last = int(places.min()), int(places.max()) + 1
        W, _ = merge.region.read(first, last)
        whole = W.astype(F64), *merge.rows(W.astype(F64), first, last)
        W, T, e = (array[places - first] for array in whole)
        return W, T, e
    if trial.turned:
        return _turned(merge, i, j)
    V = W if trial.weight is None else trial.weight(W, i, j)
    T, e = merge.rows(V, i, j)
    return V, *(trial.end(W, T, e, i, j) if trial.end else (T, e))


def _turned(merge: Merge, i: int, j: int) -> tuple[Array, Array, Array]:
    """W, T and e of columns i … j, as rows."""
    parts: list[list[Array]] = []
    for a, b in merge.region.spans():
        W = merge.region.read(a, b)[0].astype(F64)
        parts.append([x[:, i:j].T.copy() for x in (W, *merge.rows(W, a, b))])
    W, T, e = (np.hstack(part) for part in zip(*parts, strict=True))
    return W, T, e


def scaled(change: Change, factor: float) -> Change:
    """The change with its scale times the factor."""
    return replace(change, scale=change.scale * factor)


def with_parts(change: Change, **parts: Array) -> Change:
    """The change with other parameters."""
    return replace(change, parts={**change.parts, **parts})
