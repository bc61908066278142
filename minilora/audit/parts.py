"""What a part of a tensor lacks: rows, columns, single entries or ranks; and the order of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from minilora.audit.explanation import Explanation
from minilora.audit.floats import F64
from minilora.audit.low_rank import LowRank
from minilora.audit.outside import beyond
from minilora.audit.trial import Case, Trial, scaled, with_parts
from minilora.spec.ops import Array


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in order as ranges: 0 to 7, 12."""
    found = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        found.append(f"{values[0]} to {values[-1]}" if len(values) > 1 else str(values[0]))
    return ", ".join(found[:8]) + (" and others" if len(found) > 8 else "")


def lacking(case: Case) -> Explanation | None:
    """Rows, columns or entries that have the base's bits, where all others are right."""
    region = case.region
    rows, columns = np.zeros(region.rows, np.int64), np.zeros(region.width, np.int64)
    wrong_rows, wrong_columns = rows.copy(), columns.copy()
    lost, kept = 0.0, np.inf  # the greatest change that is lacking, the smallest that is there
    for i, j, W, M in case.everything():
        T, e = case.merge.rows(W, i, j)
        out = beyond(M, T, e, region, region.gaps(i, j))
        base = beyond(M, W, _cast_error(case, W), region, region.gaps(i, j))
        if (out & base).any():
            return None
        lost = max(lost, float(abs(T - W)[out].max(initial=0)))
        kept = min(kept, float(abs(T - W)[base].min(initial=np.inf)))
        wrong_rows[i:j] = out.sum(1)
        rows[i:j] = base.sum(1)  # entries that are not the base's
        wrong_columns += out.sum(0)
        columns += base.sum(0)
    lost_rows, lost_columns = np.nonzero(wrong_rows)[0], np.nonzero(wrong_columns)[0]
    count = int(wrong_rows.sum())
    if not rows.any():
        text = f"it is the base: all entries may be its, and {count} cannot have the change"
        return Explanation("not-applied", "", text, {"outside": count})
    what = "entries"
    if not rows[lost_rows].any() and len(lost_rows) < region.rows:
        what = f"rows {ranges(lost_rows.tolist())} of {region.rows}"
    elif not columns[lost_columns].any() and len(lost_columns) < region.width:
        what = f"columns {ranges(lost_columns.tolist())} of {region.width}"
    text = f"{what} lack the change and have the base's numbers; all others are right"
    if what == "entries":
        text = f"{count} entries lack the change and have the base's numbers; all others are right"
        if lost <= kept:
            text += ": those with the smallest changes were left out, as TIES trims them"
    return Explanation("partly", "part-not-merged", text, {"outside": count})


def dropped(case: Case) -> Explanation | None:
    """DARE: a share p of the entries lacks the change, all others have 1 / (1 - p) of it."""
    if case.merge.sums is None or case.region.merged.scheme:
        return None
    along = square = 0.0
    for i, j, W, M in case.sample:
        T, _ = case.merge.rows(W, i, j)
        there = beyond(M, W, _cast_error(case, W), case.region, None)
        D = (T - W)[there]
        along, square = along + float(((M - W)[there] * D).sum()), square + float((D * D).sum())
    if not along > 1.01 * square > 0:
        return None
    p = round(100 * (1 - square / along)) / 100  # people give it in percent
    if not 0 < p < 1:
        return None
    changes = tuple(scaled(change, 1 / (1 - p)) for change in case.changes)
    merge = case.merged(Trial(changes))
    for i, j, W, M in case.everything():
        T, e = merge.rows(W, i, j)
        out = beyond(M, T, e, case.region, None)
        if (out & beyond(M, W, _cast_error(case, W), case.region, None)).any():
            return None
    text = f"{p:.0%} of the change's entries were dropped, the others divided by {1 - p:g} (DARE)"
    return Explanation("known-mistake", "dropped", text, {"dropped": p})


def _cast_error(case: Case, W: Array) -> Array:
    dtypes = case.region.dtypes
    error: Array = (dtypes.w if dtypes.base != dtypes.merged else 0.0) * abs(W)
    return error


def _difference(case: Case) -> Array:
    """M - W of the sample's rows, and ΔW's factors there."""
    return np.concatenate([M - W for _, _, W, M in case.sample])


def ranks(case: Case) -> Explanation | None:
    """Which ranks were applied: M - W = s B diag(c) A, c by least squares from some rows."""
    change, sums = case.changes[0], case.merge.sums
    if len(case.changes) > 1 or sums is None or set(change.parts) != {"A", "B"}:
        return None
    low = sums.bound.changes[0]
    left, right = (low.A.T, low.B.T) if low.transposed else (low.B, low.A)
    left = low.s * np.concatenate([left[i:j] for i, j, _, _ in case.sample])
    moved = _difference(case)
    gram = (left.T @ left) * (right @ right.T)
    c = np.linalg.lstsq(gram, np.einsum("ir,in,rn->r", left, moved, right), rcond=None)[0]
    kept = np.nonzero(c > 0.5)[0]
    if not 0 < len(kept) < low.r:
        return None
    A, B = (np.asarray(change.parts[name]) for name in "AB")
    if not case.holds(Trial((with_parts(change, A=A[kept], B=B[:, kept]),), free=False)):
        return None
    text = f"of {low.r} ranks only {ranges(kept.tolist())} are merged"
    return Explanation("partly", "ranks-lost", text, {"ranks": len(kept)})


def order(case: Case) -> Explanation | None:
    """In which order B's rows, or A's columns, were applied, whatever the order is."""
    change, sums = case.changes[0], case.merge.sums
    if len(case.changes) > 1 or sums is None or "A" not in change.parts:
        return None
    if max(case.region.rows, case.region.width) > 2**14:
        return None
    low = sums.bound.changes[0]
    for part, found in zip("BA", _factors(case, low), strict=True):
        factor = low.B if part == "B" else low.A.T
        if (places := _places(found, factor)) is None:
            continue
        own = np.asarray(change.parts[part])
        moved_part = own[places] if part == "B" else own[:, places]
        extra = {
            n: p[places] for n, p in change.parts.items() if part == "B" and n in ("lambda_b",)
        }
        trial = Trial((with_parts(change, **{part: moved_part}, **extra),), free=False)
        if case.holds(trial):
            what = "output" if part == "B" else "input"
            first = ", ".join(map(str, places[:8].tolist()))
            text = f"the {what} features are in another order: {first}, …"
            return Explanation("permuted", "permuted", text)
    return None


def _factors(case: Case, low: LowRank) -> tuple[Array, Array]:
    """B, given A, and Aᵀ, given B, that M - W is by least squares; by blocks of rows."""
    B, At = np.zeros(low.B.shape), np.zeros(low.A.T.shape)
    of_A, of_B = np.linalg.pinv(low.s * low.A), np.linalg.pinv(low.s * low.B)
    for i, j, W, M in case.everything():
        R = M - W
        if low.transposed:
            At[i:j] = R @ of_B.T
            B += R.T @ of_A[i:j]
        else:
            B[i:j] = R @ of_A
            At += R.T @ of_B[:, i:j].T
    return B, At


def _places(found: Array, factor: Array) -> Array | None:
    """Which row of the factor each found row is; None unless each is one, once."""
    square = (factor * factor).sum(1)
    nearest = np.empty(len(found), np.int64)
    for i in range(0, len(found), 256):
        nearest[i : i + 256] = (square - 2 * found[i : i + 256] @ factor.T).argmin(1)
    same = len(set(nearest.tolist())) == len(nearest)
    moved = (nearest != np.arange(len(nearest))).any()
    return nearest if same and moved else None


def share_explained(case: Case) -> float:
    """How much of ‖M - W‖² least squares explains by the change, on the sample."""
    along = square = moved = 0.0
    for i, j, W, M in case.sample:
        (D, *more) = case.merge.deltas(W, i, j)
        D = sum(more, D).astype(F64)
        along += float(((M - W) * D).sum())
        square += float((D * D).sum())
        moved += float(((M - W) ** 2).sum())
    return along * along / (square * moved) if square and moved else 0.0
