"""What differs where no known mistake explains it: a change of low rank, or the base itself?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minilora.audit.explanation import Explanation
from minilora.audit.floats import BF16, format_of
from minilora.audit.outside import beyond, half_gap
from minilora.audit.rank import Rank, rank
from minilora.audit.trial import SIGMAS, Case
from minilora.spec.ops import Array

MOST = 1024
"""So many columns of the sample are looked at."""


COARSE = format_of(BF16).u
"""The coarsest rounding that a merge is computed in."""


@dataclass(eq=False)
class _Sample:
    """Sampled rows of the tensor: D = M - W, what the right changes add, and h, half a unit of M.

    ``others``: the share of entries that are not the right merge, rounded once.
    """

    case: Case

    @cached_property
    def _rows(self) -> tuple[Array, Array, Array, float]:
        D, right, h, others = [], [], [], 0
        for i, j, W, M in self.case.sample:
            T, _ = self.case.merge.rows(W, i, j)
            gaps = self.case.region.gaps(i, j)
            others += int(np.count_nonzero(beyond(M, T, 0 * T, self.case.region, gaps)))
            D.append(M - W)
            right.append(T - W)
            h.append(np.broadcast_to(half_gap(M, self.case.region, gaps), M.shape))
        whole, changes, units = (np.concatenate(part) for part in (D, right, h))
        return whole, changes, units, others / whole.size

    @property
    def others(self) -> float:
        """The share of entries with another number."""
        return self._rows[3]

    @property
    def is_whole(self) -> bool:
        """Whether all of the right change is in it, as far as chance lets tell, and some is."""
        f, sigma = self.share
        return abs(f - 1) <= SIGMAS * sigma and abs(f) > SIGMAS * sigma

    @property
    def rows(self) -> float:
        """The share of rows in which an entry is farther off than a rounding of W and ΔW."""
        D, right, h, _ = self._rows
        return float((abs(D - right) > 2 * h).any(1).mean())

    @property
    def beside(self) -> float:
        """‖D - ΔW‖ / ‖ΔW‖."""
        D, right, _, _ = self._rows
        return float(np.linalg.norm(D - right) / np.linalg.norm(right))

    @property
    def far(self) -> float:
        """The share of entries that are farther off than a rounding to bfloat16 of W and ΔW."""
        D, right, _, _ = self._rows
        W = np.concatenate([W for _, _, W, _ in self.case.sample])
        off = abs(D - right) > COARSE * (abs(W) + abs(right))
        return float(np.count_nonzero(off) / off.size)

    @cached_property
    def share(self) -> tuple[float, float]:
        """⟨D, ΔW⟩ / ⟨ΔW, ΔW⟩ and its standard deviation, if the rest of D is independent of ΔW."""
        D, right, _, _ = self._rows
        square = float((right * right).sum())
        if not square > 0:
            return 0.0, np.inf
        rest = (D - right) * right
        return 1 + float(rest.sum()) / square, float(np.sqrt((rest * rest).sum())) / square

    def rank_of(self, rest: bool, guess: int) -> Rank:
        """The rank of D, or of the rest beside the right changes."""
        D, right, h, _ = self._rows
        u = 0.0 if self.case.region.merged.scheme else format_of(self.case.region.merged.dtype).u
        X, at = (D - right if rest else D), slice(None, None, -(-D.shape[1] // MOST))
        return rank(X[:, at], (h + u * abs(D))[:, at], guess)


def remainder(case: Case) -> Explanation | None:
    """Another change of low rank in the place of the right one or beside it; or another base.

    Told only of a tensor most of whose entries differ, and whose changes are sums of products.
    """
    if case.merge.sums is None or any(c.kind == "bias" for c in case.changes):
        return None
    sample = _Sample(case)
    if sample.others < 0.5:
        return _after_merge(sample)
    own = sum(c.r for c in case.merge.sums.bound.changes)
    whole, rest = sample.rank_of(False, own), sample.rank_of(True, own)
    f, sigma = sample.share
    figures = {"factor": f, "factor_error": sigma}
    if rest.is_low and rest.r and not (whole.is_low and whole.r <= rest.r):
        text = (
            f"the adapter's change is in it, and another one of rank {rest.r} beside it: of a "
            "second adapter, or of a base that has one merged in"
        )
        return Explanation("known-mistake", "another-change", text, {"rank": rest.r})
    if whole.is_low and whole.r:
        text = (
            f"what differs from the base has rank {whole.r}, but it is not this adapter's change: "
            "another adapter's, or another step's of its training"
        )
        return Explanation("other-adapter", "other-change", text, {"rank": whole.r})
    if sample.is_whole and sample.far >= 0.5:  # else it may be a coarser arithmetic
        text = (
            f"it is another base with the adapter, or was trained on after the merge: {f:.3g} ± "
            f"{sigma:.1g} of the change is in it, and what else differs from the base has no low "
            "rank"
        )
        return Explanation("known-mistake", "other-base", text, figures)
    return _after_merge(sample)


def _after_merge(sample: _Sample) -> Explanation | None:
    """That all of the change is in it, and little beside it, in rows all over the tensor."""
    if not sample.is_whole or sample.rows < 0.5:
        return None
    f, sigma = sample.share
    text = (
        f"all of the change is in it ({f:.4g} ± {sigma:.1g}), and beside it differences of "
        f"{sample.beside:.2g} of its norm, of no low rank: a step of training after the merge, or "
        "roundings of more than one merge"
    )
    figures = {"factor": f, "factor_error": sigma, "beside": sample.beside}
    return Explanation("known-mistake", "after-merge", text, figures)
