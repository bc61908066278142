"""Are DoRA's rows as long as they are to be? A whole row tells more of it than each of its entries.

A right merge is M = ○(ĝ V̂), g = m / ‖V‖ for each row of V. The bound of one entry is wide, as all
roundings may fall together there. In c = ⟨M, V⟩ / (g ⟨V, V⟩) of a row, 1 without roundings, most of
them cancel one another.
"""

from __future__ import annotations

import numpy as np

from minilora.audit.explanation import Explanation
from minilora.audit.floats import F64
from minilora.audit.merges import Merge
from minilora.audit.outside import half_gap
from minilora.audit.rounding import gamma
from minilora.audit.stages import Rescaled
from minilora.audit.trial import SIGMAS, Case, Trial, with_parts
from minilora.spec.ops import Array


def lengths(stage: Rescaled) -> tuple[Array, Array]:
    """c of each row, and how far from 1 it may be in a right merge; NaN where it says nothing.

    V̂ misses V by roundings of V (and of W, where base and merged differ in dtype), which may all
    lean to one side: h |V| each; by those of s and B, of which one meets a whole row: R of `Bound`
    times |s Bᵢₖ| |⟨Aₖ, V⟩| for each rank k; and by those of single entries, e each at most, which
    are as often along V as against it: by Hoeffding's inequality |Σ e V| < 7 √Σ (e V)², but for one
    row in 10¹⁰.
    So with a for the three over ⟨V, V⟩, b = Σ e² / ⟨V, V⟩, z for the last rounding's third, and the
    three roundings of m, ‖V‖ and their quotient,
    |c - 1| ≤ (1 + h)³ (1 + a) / (√(1 - 2 a) (1 - γ_{n+2} / 2)) - 1 + b / 2 + z.

    Source: Hoeffding 1963, "Probability inequalities for sums of bounded random variables".
    """
    low, dtypes = stage.change, stage.bound.dtypes
    h, _, _ = dtypes.with_adapter(low.dtype)
    parts: list[list[Array]] = []
    for i, j, stored, merged in stage.region.blocks():
        W, M = stored.astype(F64), merged.astype(F64)
        V, e = stage.missed(W, i, j)
        gap = half_gap(M, stage.region, None)
        if low.transposed:
            V, M, e, gap = V.T, M.T, e.T, gap.T
        A = low.A[:, i:j] if low.transposed else low.A
        terms = (M * V, V * V, (e * V) ** 2, (gap * V) ** 2, e * e)
        parts.append([*(term.sum(1) for term in terms), V @ A.T])
    joined = [
        sum(part) if low.transposed else np.concatenate(part) for part in zip(*parts, strict=True)
    ]
    along, square, errors, last, far, on_A = map(np.asarray, joined)
    lean = stage.bound.relative(low) * (abs(low.s * low.B) * abs(on_A)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        g = stage.magnitude.reshape(-1) / np.sqrt(square)
        sides = 1 + (dtypes.base != dtypes.merged)
        a = sides * h + (lean + SIGMAS * np.sqrt(errors)) / square
        z = SIGMAS * np.sqrt(last) / (abs(g) * square)
        grown = (1 + h) ** 3 * (1 + a) / np.sqrt(1 - 2 * a) / (1 - gamma(low.A.shape[1] + 2) / 2)
        return along / (g * square), grown - 1 + far / square / 2 + z


def other_lengths(merge: Merge) -> Explanation | None:
    """The factor of the rows that are longer or shorter than any right merge leaves them."""
    stage = merge.stages[0]
    if len(merge.stages) > 1 or not isinstance(stage, Rescaled) or merge.region.merged.scheme:
        return None
    c, bound = lengths(stage)
    wrong = abs(c - 1) > bound
    if not wrong.any():
        return None
    return _told(float(c[wrong].mean()), float(bound[wrong].max()), int(wrong.sum()), len(c))


def _told(factor: float, error: float, rows: int, of: int) -> Explanation:
    text = (
        f"DoRA's norm by another factor: {rows} of {of} rows are {factor:.4g} ± {error:.1g} times "
        "as long as the magnitude says"
    )
    return Explanation("factor", "norm-factor", text, {"factor": factor, "factor_error": error})


def of_rows(case: Case) -> Explanation | None:
    """DoRA's rows, each by a factor of its own, where that explains all entries."""
    stage = case.merge.stages[0]
    if len(case.changes) > 1 or not isinstance(stage, Rescaled) or case.region.merged.scheme:
        return None
    c, bound = lengths(stage)
    if not np.isfinite(c).all() or (change := case.changes[0]).rows:
        return None
    m = np.asarray(change.parts["magnitude"])
    longer = (c.reshape(m.shape) * m).astype(F64)
    if not case.holds(Trial((with_parts(change, magnitude=longer),), free=False)):
        return None
    wrong = abs(c - 1) > np.nan_to_num(bound)
    return _told(float(c[wrong].mean()), float(bound[wrong].max()), int(wrong.sum()), len(c))
