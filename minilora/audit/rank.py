"""Of which rank was the change, before the merged weight was rounded? From D = W' - W alone.

A merged entry is known to half a unit h of what can be stored: the change ΔW lies in the interval
D - h … D + h. A matrix of rank r has r (m + n - r) free numbers, and can lie in so many intervals
by chance. In how many more of the intervals a matrix of rank r lies tells of the change: it is
greatest at the rank of ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from minilora.spec.ops import Array

ROUNDS = 12
"""How often the matrix of rank r is moved towards the intervals."""

OVER = 1.8
"""How far it is moved: 1 to the edge, 2 to the mirror image. It has to lie inside at the end."""


@dataclass(frozen=True)
class Rank:
    """What is known of the rank of a change.

    ``r``: the rank that explains most, 0 if none explains anything; ``explained``: the share of the
    changed numbers that W plus a matrix of rank r gives, less what it gives by chance; ``least``:
    how many singular values of D lie above the floor of rounding: the rank is at least this.
    """

    r: int
    explained: float
    least: int

    @property
    def is_low(self) -> bool:
        """Whether a matrix of this rank explains most of the changed numbers."""
        return self.explained > 0.5


def floor(h: Array) -> float:
    """What the singular values of the rounding errors stay below.

    Of independent errors with standard deviations s the greatest singular value is about
    max_i √(Σ_j s_ij²) + max_j √(Σ_i s_ij²). The error of a rounding has s = h / √3: h itself leaves
    room for what is not independent.

    Shapes: h (m, n).
    Source: Bandeira and van Handel, "Sharp nonasymptotic bounds on the norm of random matrices with
    independent entries", 2016.
    """
    squares = h * h
    return float(np.sqrt(squares.sum(0).max()) + np.sqrt(squares.sum(1).max()))


def rank(D: Array, h: Array, guess: int = 1) -> Rank:
    """The rank of the change. ``guess``: where to look first; D and h (m, n) in float64.

    Shapes: D (m, n), h (m, n).
    """
    if D.shape[0] > D.shape[1]:
        D, h = D.T, h.T
    if not D.any():
        return Rank(0, 1.0, 0)
    squares, U = np.linalg.eigh(D @ D.T)
    sigma = np.sqrt(np.maximum(squares[::-1], 0))
    # The squares are known to machine precision of the greatest.
    known = sigma[0] * (len(D) * np.finfo(D.dtype).eps) ** 0.5
    least = int(np.count_nonzero(sigma > max(floor(h), known)))
    changed = int(np.count_nonzero(D))

    @cache
    def share(r: int) -> float:
        free = r * (sum(D.shape) - r)
        if not 0 < r <= len(D) // 2 or free >= changed:
            return -1.0
        return (explained(D, h, U[:, : -r - 1 : -1]) - free) / (changed - free)

    lowest = max(least, 1)

    def rises(r: int) -> bool:
        """Whether one more rank explains more, by three standard deviations of such a count."""
        p, free = min(max(share(r), 0.0), 1.0), r * (sum(D.shape) - r)
        deviation = math.sqrt(p * (1 - p) / max(changed - free, 1))
        return share(r + 1) - share(r) > 3 * deviation

    r = _end_of_rise(rises, lowest, max(guess, lowest))
    return Rank(r if share(r) > 0 else 0, max(share(r), 0.0), least)


def explained(D: Array, h: Array, U: Array) -> int:
    """In how many intervals D ± h of changed numbers a matrix of rank r lies.

    It is found from the left singular vectors U (m, r) of D by turns: towards the intervals, and
    to the nearest matrix of rank r.
    """
    X = U @ (U.T @ D)
    for _ in range(ROUNDS):
        P = X + OVER * (np.clip(X, D - h, D + h) - X)
        V, _ = np.linalg.qr(P.T @ U)
        U, _ = np.linalg.qr(P @ V)
        X = U @ (U.T @ P)
    return int(np.count_nonzero((abs(X - D) <= h) & (D != 0)))


def _end_of_rise(rises: Callable[[int], bool], lowest: int, guess: int) -> int:
    """The first number from ``lowest`` on at which what rises before rises no more."""
    low = high = guess
    while low > lowest and not rises(low - 1):
        low = max(lowest, low // 2)
    while rises(high):
        high *= 2
    while low < high:
        middle = (low + high) // 2
        if rises(middle):
            low = middle + 1
        else:
            high = middle
    return low
