"""Is a tensor of the merged model the base's with the adapters' changes? One verdict for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any

import numpy as np

from minilora.audit.change import Around, Change, Tensor
from minilora.audit.containers.tensor import StoredTensor
from minilora.audit.explain import chance, explain
from minilora.audit.explanation import Explanation
from minilora.audit.floats import F32, F64, differing, format_of, on_grid, wide
from minilora.audit.lengths import other_lengths
from minilora.audit.merges import Merge, Played
from minilora.audit.outside import beyond, deviations
from minilora.audit.region import Region, regions
from minilora.audit.result import SEVERITIES, VERDICTS, Entry, Figure
from minilora.audit.trial import SIGMAS, Case
from minilora.spec.ops import Array

SURVIVES = 0.9
"""Below this share of the change that survived rounding a tensor is warned of."""


@dataclass(eq=False)
class Tally:
    """What one passage through a region counts.

    ``is_base``: all entries have the base's bits, cast to the merged tensor's dtype; ``farthest``:
    row, column, what is there and the truth, of the greatest ``deviation``; ``along``: ⟨M - W, Dᵢ⟩
    of each change Dᵢ, ``gram`` ⟨Dᵢ, Dⱼ⟩, ``moved`` ‖M - W‖²; ``beside`` and ``spread``: the sums of
    (M - N) D and of its square, N the merge in the way that was chosen.
    """

    k: int
    entries: int = 0
    equal: int = 0
    is_base: bool = True
    outside: int = 0
    corrupt: int = 0
    deviation: float = 0.0
    farthest: tuple[int, int, float, float] = (0, 0, 0.0, 0.0)
    moved: float = 0.0
    beside: float = 0.0
    spread: float = 0.0
    along: Array = field(init=False)
    gram: Array = field(init=False)

    def __post_init__(self) -> None:
        self.along, self.gram = np.zeros(self.k), np.zeros((self.k, self.k))

    def measure(self, W: Array, M: Array, deltas: Sequence[Array]) -> bool:
        """Add what least squares needs; False, and nothing is added, where M is not finite."""
        moved = np.subtract(M, W, dtype=F32).ravel()
        square = float(np.dot(moved, moved))
        if not np.isfinite(square) and (broken := ~np.isfinite(M)).any():
            self.corrupt += int(np.count_nonzero(broken))
            return False
        flat = [d.ravel() for d in deltas]
        self.moved += square
        for i, d in enumerate(flat):
            self.along[i] += np.dot(moved, d)
            for j in range(i + 1):
                self.gram[i, j] += np.dot(d, flat[j])
                self.gram[j, i] = self.gram[i, j]
        return True

    @property
    def square(self) -> float:
        """‖D‖², D the sum of the changes."""
        return float(self.gram.sum())

    @property
    def survived(self) -> float | None:
        """⟨M - W, D⟩ / ⟨D, D⟩; None where D is 0."""
        return float(self.along.sum() / self.square) if self.square > 0 else None

    @property
    def noise(self) -> float | None:
        """‖M - W - D‖ / ‖D‖."""
        if not self.square > 0:
            return None
        left = self.moved - 2 * self.along.sum() + self.square
        return float(np.sqrt(max(0.0, left) / self.square))

    @property
    def factor(self) -> tuple[float, float] | None:
        """⟨M - W, D⟩ / ⟨N - W, D⟩ and its standard deviation: 1 where M differs from N by chance.

        What rounding takes of D is in both.
        """
        way = float(self.along.sum()) - self.beside
        if not way > 0:
            return None
        return 1 + self.beside / way, float(np.sqrt(self.spread)) / way

    def figures(self) -> dict[str, Figure]:
        """As an entry has them."""
        shares = {"survived": self.survived, "noise": self.noise, "deviation": self.deviation}
        return {**shares, "share_of_bits": self.equal / max(1, self.entries)}


def _pick(merge: Merge) -> Played:
    """The way whose bits the first rows have most often."""
    region, best, least = merge.region, None, 0
    few = max(1, min(region.rows, 2**15 // max(1, region.width)))
    W, M = map(wide, region.read(0, few))
    for way in merge.replays():
        differ = differing(way.play(W, 0, few)[0], M, way.grid)
        if differ is None:
            return way
        others = int(np.count_nonzero(differ))
        if best is None or others < least:
            best, least = way, others
    assert best is not None  # there is one way at least
    return best


def _lean(tally: Tally, M: Array, N: Array, D: Array) -> None:
    """Add the projection of M - N on the change D, N the merge in this way, where they differ."""
    apart = (M.astype(F64) - N) * D
    tally.beside += float(apart.sum())
    tally.spread += float((apart * apart).sum())


def _check(merge: Merge, tally: Tally, W: Array, M: Array, differ: Array, i: int, j: int) -> None:
    """Look at the entries that have not the bits of the way's merge: are they in the bound?"""
    sums, gap = merge.sums, merge.region.gaps(i, j)
    if sums is None or gap is not None or sums.cost * np.count_nonzero(differ) > differ.size:
        T, e = merge.rows(W.astype(F64), i, j)
        M, at = M.astype(F64), None
    else:
        at = np.nonzero(differ)
        M = M[at].astype(F64)
        T, e = sums.at(W[at].astype(F64), at[0] + i, at[1])
    tally.outside += int(np.count_nonzero(beyond(M, T, e, merge.region, gap)))
    share = deviations(M, T, e, merge.region, gap)
    if share.max(initial=0.0) > tally.deviation:
        farthest = np.unravel_index(int(np.argmax(share)), share.shape)
        row, column = farthest if at is None else (at[0][farthest], at[1][farthest])
        tally.deviation = float(share[farthest])
        tally.farthest = int(row) + i, int(column), float(M[farthest]), float(T[farthest])


def count(merge: Merge, way: Played, bound: bool = True) -> Tally:
    """Pass through the region once: bits, bound if asked for, and least squares' figures."""
    tally, region = Tally(merge.count), merge.region
    narrow = region.merged.dtype
    for i, j, stored, M in region.blocks():
        W, M = wide(stored), wide(M)
        tally.entries += M.size
        V, deltas = way.play(W, i, j)
        if not tally.measure(W, M, deltas):
            continue
        tally.is_base = tally.is_base and _are_cast(stored, narrow, M)
        differ = differing(V, M, way.grid)
        if differ is None:
            tally.equal += M.size
            continue
        tally.equal += M.size - int(np.count_nonzero(differ))
        D = sum(deltas[1:], deltas[0])
        _lean(tally, M[differ], on_grid(V[differ], way.grid), D[differ])
        if bound:
            _check(merge, tally, W, M, differ, i, j)
    return tally


def _are_cast(stored: Array, dtype: np.dtype[Any], M: Array) -> bool:
    """Whether M are the stored numbers, cast to the dtype."""
    with np.errstate(over="ignore"):
        kept = stored if stored.dtype == dtype else stored.astype(dtype)
    return bool((wide(kept) == M).all())


def judge(
    base: Tensor, merged: Tensor, changes: Sequence[Change], around: Around | None = None
) -> Entry:
    """The verdict on one tensor of the merged model that the changes act on, in their order.

    Without changes it is that of a tensor that is to stay as it is.
    """
    if base.shape != merged.shape:
        text = f"its shape is {merged.shape}, the base's {base.shape}"
        return Entry(base.name, "mismatch", text)
    if 0 in base.shape:
        return Entry(base.name, "exact" if changes else "unchanged", "it has no entries")
    found = [_judged(region, around or Around()) for region in regions(base, merged, changes)]
    return _together(found)


def base_again(base: StoredTensor, merged: StoredTensor, changes: Sequence[Change]) -> Entry | None:
    """The verdict on a tensor with the base's bits that no right merge has; None of all others.

    What the change may be rounded away from is left to `judge`, but for quantized tensors, of which
    it cannot tell more.
    """
    few = min(merged.length, 1 + 2**12 // max(1, merged.width))
    if not base.has_bits_of(merged, 0, few):
        return None
    if not all(base.has_bits_of(merged, *at) for at in merged.blocks()):
        return None
    quantized, figures = merged.scheme is not None, {"survived": 0.0, "share_of_bits": 0.0}
    for region in regions(base, merged, changes):
        if not region.changes or not region.rows or _unusable(region):
            quantized = False
            continue
        merge = Merge.of(region)
        quantized = quantized and merge.sums is not None and merge.sums.is_something
        first = 0, min(region.rows, 1 + 2**12 // max(1, region.width))
        for i, j in chain([first], region.spans()):
            W, M = region.read(i, j)
            T, e = merge.rows(W.astype(F64), i, j)
            if beyond(M.astype(F64), T, e, region, region.gaps(i, j)).any():
                text = "every entry has the base's bits"
                return Entry(base.name, "not-applied", text, figures)
    if not quantized:
        return None
    return Entry(base.name, "rounded-away", _nothing_left(merged), figures)


def _nothing_left(merged: Tensor) -> str:
    stored = merged.scheme or merged.dtype.name
    return f"the change is too small for {stored}: nothing of it is left, applied or not"


def _judged(region: Region, around: Around) -> Entry:
    if not region.changes:
        return _untouched(region)
    read = (replace(change, parts=dict(change.parts)) for change in region.changes)
    region.changes = tuple(read)  # each part is read once
    if (wrong := _unusable(region)) is not None:
        return wrong
    merge = Merge.of(region)
    way = _pick(merge)
    tally = count(merge, way)
    name, figures = region.base.name, tally.figures()
    if tally.corrupt:
        return _corrupt(merge, tally)
    figures["rounding"] = way.name
    case = Case(merge, around, cache(lambda: _another_factor(merge, tally)))
    longer = None if tally.outside or tally.equal == tally.entries else other_lengths(merge)
    if not tally.outside and case.beside() is None and longer is None:
        return _right(name, region, way, tally, figures)
    if tally.is_base:
        return Entry(name, "not-applied", "every entry has the base's bits", figures)
    found = explain(case) if tally.outside else chance(case) or longer
    found = found or _unexplained(tally)
    return Entry(name, found.verdict, found.text, figures | dict(found.figures), found.mistake)


def _corrupt(merge: Merge, tally: Tally) -> Entry:
    """The verdict on numbers that are none; that it overflows, where a right merge would too."""
    name, region = merge.region.base.name, merge.region
    text = f"{tally.corrupt} of {tally.entries} entries are NaN or infinite"
    figures: dict[str, Figure] = {"corrupt": tally.corrupt}
    largest = format_of(region.dtypes.merged).largest
    greatest, overflows = 0.0, region.merged.scheme is None
    for i, j, stored, M in region.blocks():
        if not (broken := ~np.isfinite(M.astype(F32))).any() or not overflows:
            continue
        W = stored.astype(F64)
        T, e = merge.rows(W, i, j)
        size = (abs(T) + e)[broken]
        overflows = bool(np.isfinite(W[broken]).all() and (size >= largest).all())
        greatest = max(greatest, float(size.max()))
    if not overflows:
        return Entry(name, "corrupt", text, figures)
    dtype = region.merged.dtype
    text += f": with the change they reach {greatest:.4g}, and {dtype} ends at {largest:g}"
    return Entry(name, "corrupt", text, figures, "overflow")


def _unusable(region: Region) -> Entry | None:
    """The verdict where the adapter's numbers are none, or do not fit the tensor."""
    name, m, n = region.base.name, region.rows, region.width
    for change in region.changes:
        for part, value in change.parts.items():
            if part != "ids" and not np.isfinite(wide(np.asarray(value))).all():
                text = f"the adapter's {part} holds NaN or infinity: nothing right can be merged"
                return Entry(name, "corrupt", text)
        if {"A", "B"} <= change.parts.keys():
            own = len(change.parts["B"]), np.shape(change.parts["A"])[1]
            stored = own[::-1] if change.transposed else own
            whole = (change.rows[1] - change.rows[0] if change.rows else m, n)
            if stored != whole:
                text = (
                    f"the change is {stored[0]} x {stored[1]}, the tensor {whole[0]} x {whole[1]}"
                )
                return Entry(name, "mismatch", f"{text}: the adapter is another model's")
    return None


def _another_factor(merge: Merge, tally: Tally) -> tuple[float, float] | None:
    """The factor, if the difference from the merge in this way points along the change.

    All entries may be within their bounds, which hold for the worst of all roundings. But roundings
    do not know the change: what they add is as often along it as against it. It has to be so beside
    every way, since a coarse one loses more of the change than a fine one.
    """
    region = merge.region
    if region.base.scheme and region.merged.scheme:
        return None
    if any(change.slack for change in region.changes):
        return None
    found = _beside(merge, tally)
    if found is not None:
        for way in chain(merge.replays(), merge.slow_replays()):
            if _beside(merge, count(merge, way, bound=False)) is None:
                return None
    return found


def _beside(merge: Merge, tally: Tally) -> tuple[float, float] | None:
    """The factor beside the way's merge and its deviation, None if it may be 1."""
    if tally.factor is None:
        return None
    f, sigma = tally.factor
    if f == 1:
        return None
    drift = merge.sums.bound.drift if merge.sums else 8 * merge.region.dtypes.w
    return (f, sigma) if abs(f - 1) > drift + SIGMAS * sigma else None


def _right(
    name: str, region: Region, way: Played, tally: Tally, figures: dict[str, Figure]
) -> Entry:
    survived, stored = tally.survived, region.merged.scheme or region.merged.dtype.name
    if survived is None and tally.equal == tally.entries:
        return Entry(
            name, "exact", "the adapter's change is 0, and it has the base's bits", figures
        )
    if survived is not None and tally.is_base:
        figures["survived"] = 0.0
        return Entry(name, "rounded-away", _nothing_left(region.merged), figures)
    if survived is not None and survived < SURVIVES:
        text = f"{survived:.1%} of the change survived the rounding to {stored}"
        return Entry(name, "rounded-away", text, figures)
    if tally.equal == tally.entries:
        return Entry(name, "exact", f"has the bits of: {way.name}", figures)
    share = tally.equal / tally.entries
    text = f"within the bound; {share:.2%} of the entries have the bits of: {way.name}"
    return Entry(name, "within", text, figures)


def _unexplained(tally: Tally) -> Explanation:
    explained = 0.0
    if tally.moved > 0 and tally.square > 0:
        explained = float(tally.along.sum() ** 2 / (tally.square * tally.moved))
    row, column, got, want = tally.farthest
    text = (
        f"{tally.outside} of {tally.entries} entries lie outside the bound of a right merge, the "
        f"farthest [{row}, {column}]: found {got:.6g}, expected {want:.6g}; the change explains "
        f"{explained:.1%} of what differs from the base"
    )
    return Explanation("mismatch", "", text, {"explained": explained, "outside": tally.outside})


def _untouched(region: Region) -> Entry:
    """The verdict on what no adapter changes: the base's bits, or those of a cast of them."""
    name, other, entries = region.base.name, 0, 0
    narrow, wider = region.merged.dtype, region.base.dtype
    for _, _, W, M in region.blocks():
        kept = W if wider == narrow else W.astype(narrow)
        entries += M.size
        other += int(np.count_nonzero(wide(kept) != wide(M)))
    if other:
        text = f"{other} of {entries} entries differ from the base's, and no adapter changes them"
        return Entry(name, "changed", text)
    cast = "" if wider == narrow else f", cast from {wider} to {narrow}"
    return Entry(name, "unchanged", f"has the base's bits{cast}")


def _together(found: Sequence[Entry]) -> Entry:
    """One entry of those of a tensor's parts: the worst, which says of how many it is."""
    acting = [entry for entry in found if entry.verdict != "unchanged"] or list(found)
    order = list(VERDICTS)

    def badness(entry: Entry) -> tuple[int, int]:
        return SEVERITIES.index(entry.severity), -order.index(entry.verdict)

    worst = min(acting, key=badness)
    alike = sum(entry.verdict == worst.verdict for entry in acting)
    if len(acting) == 1:
        return worst
    return replace(worst, text=f"{alike} of {len(acting)} parts: {worst.text}")
