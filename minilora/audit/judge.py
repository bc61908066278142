"""Is a tensor of the merged model the base's with the adapters' changes? One verdict for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.audit.change import Around, Change, Tensor
from minilora.audit.result import Entry, Figure
from minilora.audit.rounding import (
    F32,
    WAYS,
    Bound,
    Replay,
    low_rank,
    matrix,
    rounded,
    spacing,
)
from minilora.spec.ops import Array

BLOCK = 2**18
"""How many entries are looked at at once: a few arrays of this size in float32 fit a cache."""

SURVIVES = 0.9
"""Below this share of the change that survived rounding a tensor is warned of."""


@dataclass(frozen=True, eq=False)
class Region:
    """The rows of a stored tensor that the same changes act on, as a matrix."""

    base: Tensor
    merged: Tensor
    changes: tuple[Change, ...]
    index: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def width(self) -> int:
        """How many entries a row has."""
        first = 2 if self.index is not None else 1
        return int(np.prod(self.base.shape[first:], dtype=np.int64))

    def blocks(self) -> Iterator[tuple[int, int, Array, Array]]:
        """Rows i … j of the region, with the base's and the merged ones."""
        step = max(1, BLOCK // max(1, self.width))
        for i in range(self.start, self.stop, step):
            j = min(i + step, self.stop)
            yield i - self.start, j - self.start, *self.read(i, j)

    def read(self, i: int, j: int) -> tuple[Array, Array]:
        """Rows i … j of the matrix."""
        if self.index is None:
            return matrix(self.base.rows(i, j)), matrix(self.merged.rows(i, j))
        e = self.index
        W, M = (t.rows(e, e + 1)[0] for t in (self.base, self.merged))
        return matrix(W[i:j]), matrix(M[i:j])


def wide(x: Array) -> Array:
    """x in float32, or as it is where that is wider."""
    return x if x.dtype.itemsize >= 4 else x.astype(F32)


def bits_equal(a: Array, b: Array) -> Array:
    """Where two arrays of one dtype have the same bits; 0 and -0 count as the same."""
    same: Array = a == b
    return same


@dataclass(eq=False)
class Tally:
    """What one passage through a region counts."""

    k: int
    entries: int = 0
    equal: int = 0
    base_bits: int = 0
    outside: int = 0
    corrupt: int = 0
    deviation: float = 0.0
    along: Array = field(init=False)
    gram: Array = field(init=False)
    left: float = 0.0
    moved: float = 0.0

    def __post_init__(self) -> None:
        self.along, self.gram = np.zeros(self.k), np.zeros((self.k, self.k))

    def measure(self, W: Array, M: Array, deltas: Sequence[Array]) -> None:
        """Add what least squares needs: ⟨M - W, Dᵢ⟩ and ⟨Dᵢ, Dⱼ⟩."""
        moved = np.subtract(M, W, dtype=F32).ravel()
        flat = [d.ravel() for d in deltas]
        self.moved += float(np.dot(moved, moved))
        for i, d in enumerate(flat):
            self.along[i] += np.dot(moved, d)
            for j in range(i + 1):
                self.gram[i, j] += np.dot(d, flat[j])
                self.gram[j, i] = self.gram[i, j]

    @property
    def survived(self) -> float | None:
        """⟨M - W, D⟩ / ⟨D, D⟩, D the sum of the changes; None where D is 0."""
        square = self.gram.sum()
        return float(self.along.sum() / square) if square > 0 else None

    @property
    def noise(self) -> float | None:
        """‖M - W - D‖ / ‖D‖."""
        square = self.gram.sum()
        if not square > 0:
            return None
        return float(np.sqrt(max(0.0, self.moved - 2 * self.along.sum() + square) / square))


@dataclass(frozen=True, eq=False)
class Sums:
    """W with changes that have factors: T and e in float64, and the ways to merge in float32."""

    bound: Bound
    replays: tuple[Replay, ...]

    @staticmethod
    def of(region: Region, ways: Sequence[Any] = WAYS) -> Sums:
        """The region's changes."""
        b, m = region.base.dtype, region.merged.dtype
        exact = tuple(low_rank(c) for c in region.changes)
        single = [c.cast(F32) for c in exact]
        return Sums(Bound(b, m, exact), tuple(Replay.of(w, b, m, single) for w in ways))

    def rows(self, W: Array, i: int, j: int) -> tuple[Array, Array]:
        """T and e of rows i … j; W in float64."""
        deltas = [c.rows(i, j) for c in self.bound.changes]
        sizes = [c.rows(i, j) for c in self.bound.magnitudes]
        return sum(deltas, start=W), self.bound.e(W, deltas, sizes)

    def at(self, W: Array, i: Array, j: Array) -> tuple[Array, Array]:
        """T and e of entries (i, j)."""
        deltas = [c.at(i, j) for c in self.bound.changes]
        sizes = [c.at(i, j) for c in self.bound.magnitudes]
        return sum(deltas, start=W), self.bound.e(W, deltas, sizes)


def outside(M: Array, T: Array, e: Array, dtype: Any) -> Array:
    """Where M, in float64, is no right merge: it lies beyond [○(T - e), ○(T + e)]."""
    beyond: Array = (rounded(T - e, dtype) > M) | (rounded(T + e, dtype) < M)
    return beyond


def deviations(M: Array, T: Array, e: Array, dtype: Any) -> Array:
    """|M - T| as a share of e and half a unit in M's last place."""
    share: Array = abs(M - T) / (e + spacing(M, dtype) / 2)
    return share


def _check(sums: Sums, tally: Tally, W: Array, M: Array, equal: Array, i: int, j: int) -> None:
    """Count which entries without the way's bits lie outside the bound."""
    dtype = sums.bound.merged
    if 4 * np.count_nonzero(equal) < equal.size:
        V, N = W.astype(np.float64), M.astype(np.float64)
        T, e = sums.rows(V, i, j)
    else:
        at = np.nonzero(~equal)
        V, N = W[at].astype(np.float64), M[at].astype(np.float64)
        T, e = sums.at(V, at[0] + i, at[1])
    tally.outside += np.count_nonzero(outside(N, T, e, dtype))
    tally.deviation = max(tally.deviation, float(deviations(N, T, e, dtype).max(initial=0.0)))


def _pick(sums: Sums, region: Region) -> Replay:
    """The way whose bits the first rows have most often."""
    i, j, W, M = next(region.blocks())
    few = max(1, min(j - i, 2**15 // max(1, region.width)))
    W, M = wide(W[:few]), M[:few]

    def same(replay: Replay) -> int:
        return int(np.count_nonzero(bits_equal(replay.rows(W, replay.deltas(0, few)), M)))

    return max(sums.replays, key=same)


def count(sums: Sums, region: Region) -> tuple[Replay, Tally]:
    """Pass through the region once: bits, bound, and the figures of least squares."""
    replay, tally = _pick(sums, region), Tally(len(region.changes))
    for i, j, W, M in region.blocks():
        tally.entries += M.size
        V, N = wide(W), wide(M)
        if not np.isfinite(N).all():
            tally.corrupt += int(np.count_nonzero(~np.isfinite(N)))
            continue
        deltas = replay.deltas(i, j)
        equal = bits_equal(replay.rows(V, deltas), M)
        same = int(np.count_nonzero(equal))
        tally.equal += same
        kept = V if W.dtype == M.dtype else wide(W.astype(M.dtype))
        tally.base_bits += int(np.count_nonzero(bits_equal(kept, N)))
        tally.measure(V, N, deltas)
        if same < M.size:
            _check(sums, tally, W, M, equal, i, j)
    return replay, tally


NOTHING = Around()


def judge(
    base: Tensor, merged: Tensor, changes: Sequence[Change], around: Around = NOTHING
) -> Entry:
    """The verdict on one tensor of the merged model that the changes act on, in their order.

    Without changes it is that of a tensor that is to stay as it is.
    """
    if base.shape != merged.shape:
        text = f"its shape is {merged.shape}, the base's {base.shape}"
        return Entry(base.name, "mismatch", text)
    region = Region(base, merged, tuple(changes), None, 0, base.shape[0] if base.shape else 1)
    if not changes:
        return _untouched(region)
    sums = Sums.of(region)
    replay, tally = count(sums, region)
    return _verdict(region, replay, tally)


def _verdict(region: Region, replay: Replay, tally: Tally) -> Entry:
    name = region.base.name
    figures: dict[str, Figure] = {"survived": tally.survived, "noise": tally.noise}
    figures |= {"rounding": replay.way.name, "share_of_bits": tally.equal / max(1, tally.entries)}
    figures |= {"deviation": tally.deviation}
    if tally.corrupt:
        return Entry(name, "corrupt", f"{tally.corrupt} entries are NaN or infinite")
    if not tally.outside:
        return _right(name, replay, tally, figures)
    if tally.base_bits == tally.entries:
        return Entry(name, "not-applied", "all entries have the base's bits", figures)
    text = f"{tally.outside} of {tally.entries} entries lie outside the bound"
    return Entry(name, "mismatch", text, figures)


def _right(name: str, replay: Replay, tally: Tally, figures: dict[str, Figure]) -> Entry:
    survived = tally.survived
    if survived is not None and tally.base_bits == tally.entries:
        figures["survived"] = 0.0
        text = "the change lies below half a unit of the stored numbers: it has the base's bits"
        return Entry(name, "rounded-away", text, figures)
    if survived is not None and survived < SURVIVES:
        text = f"{survived:.1%} of the change survived the rounding to {replay.merged}"
        return Entry(name, "rounded-away", text, figures)
    if tally.equal == tally.entries:
        return Entry(name, "exact", f"has the bits of {replay.way.name}", figures)
    share = tally.equal / tally.entries
    text = f"within the bound; {share:.4%} of the entries have the bits of {replay.way.name}"
    return Entry(name, "within", text, figures)


def _untouched(region: Region) -> Entry:
    """The verdict on what no adapter changes: the base's bits, or those of a cast of them."""
    name, other = region.base.name, 0
    narrow, wider = region.merged.dtype, region.base.dtype
    for _, _, W, M in region.blocks():
        kept = W if wider == narrow else W.astype(narrow)
        other += int(np.count_nonzero(~bits_equal(wide(kept), wide(M))))
    if other:
        return Entry(name, "changed", f"{other} entries differ from the base's")
    cast = "" if wider == narrow else f", cast from {wider} to {narrow}"
    return Entry(name, "unchanged", f"has the base's bits{cast}")
