"""The sequential test: which settings of the adapter's strength explain what a server answered.

A setting h gives a log-probability l_j(h) for each token j that was scored. The noise model: a
server of setting h answers y_j = l_j(h) + noise, where the noise

- is, given what was answered before, a symmetric number moved by no more than its own median
  absolute deviation (a server that rounds is as often above as below, or nearly so). So it is
  above 0 with probability at most 3/4, and below 0 too;
- is at most 1 + √2 times as large as that of a server with four-bit weights, q_j, which the oracle
  computes (for the base and for the adapter, of which it takes the greater). The quotient of two
  normal numbers of standard deviations c and 1 exceeds k with probability 2/π arctan(c / k): so
  |noise| > k |q_j| has at most 2/π arctan((1 + √2) / k), which is 3/4 for k = 1.

The noise's size need not be known: a server in half precision and one in four bits are judged
alike. Each bet is on an event that has at most a probability p₀ if h is true, 3/4 for a direction.
Against it one bets that it has a probability q > p₀: the capital is multiplied by q / p₀ if it
happens, by (1 - q) / (1 - p₀) if not, which is at most 1 in expectation. So is the mean over
several q and several bets, which is the evidence E(h) against h. By Ville's inequality the true
setting ever reaches E ≥ 1/ε with probability at most ε, however long one goes on and whenever one
stops. The settings with E < 1/ε are therefore a confidence set, valid at every moment: it holds the
true setting with probability at least 1 - ε.

Sources: Wald 1945 for the sequential ratio; Ville 1939; Ramdas et al. 2023, "Game-theoretic
statistics and safe anytime-valid inference", for bets and confidence sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from minilora.spec.ops import Array

CHANCE = 0.75
"""p₀ of a direction: the most that noise may have to lie on one side."""

MULTIPLES = {k: 2 / math.pi * math.atan((1 + math.sqrt(2)) / k) for k in (1, 4, 16)}
"""p₀ of noise that exceeds so many times that of a four-bit server."""

LEAST_EFFECTS = (0.0, 1.0, 4.0)
"""Directions are bet on for all tokens, for those on which two settings differ by more than a
four-bit server's noise, and by more than four times that."""

SAME = 3 * 2.0**-8
"""Factors within this of 1 are 1: the scale, A x and B (A x) may each round in bfloat16."""


def odds(p0: float) -> Array:
    """The probabilities q > p₀ that are bet on, more of them near p₀ and near 1."""
    powers = 2.0 ** -np.arange(1, 8)
    return p0 + (1 - p0) * np.concatenate([powers[3:0:-1], 1 - powers])


def log_evidence(happened: Array, tried: Array, p0: float = CHANCE) -> Array:
    """log of the mean capital of the bets against "the event has probability at most p₀".

    The capital after k of n: (q / p₀)ᵏ ((1 - q) / (1 - p₀))ⁿ⁻ᵏ.

    Shapes: happened (...), tried (...) -> log E (...).
    """
    q = odds(p0)
    won, lost = np.log(q / p0), np.log((1 - q) / (1 - p0))
    each = np.multiply.outer(happened, won) + np.multiply.outer(tried - happened, lost)
    return _log_mean(each)


def _log_mean(each: Array) -> Array:
    """The log of the mean of exp, over the last axis."""
    most = each.max(-1, keepdims=True)
    mean: Array = np.log(np.exp(each - most).mean(-1)) + most[..., 0]
    return mean


class Evidence(Protocol):
    """What the answers so far say about each setting."""

    @property
    def nodes(self) -> Array:
        """The adapter's factors that the oracle has computed; none without an adapter."""

    @property
    def tokens(self) -> int:
        """How many tokens have been scored."""

    @property
    def sharpens(self) -> bool:
        """Whether further tokens narrow the factor's interval to any width."""

    def against(self, f: Array) -> Array:
        """log E against the adapter at the factors f: (m,) -> (m,)."""

    def against_base(self) -> float:
        """log E against the base alone."""

    def near(self, f: float | None) -> float:
        """log E against "it is not mostly near this setting"; None is the base."""

    def factors(self) -> Array:
        """The factors that are looked at, closely spaced where it matters."""

    def around(self, low: float, high: float) -> tuple[float, float]:
        """The interval of all factors that may be left, if these are the least and the greatest."""

    def estimate(self) -> float:
        """The factor that explains the answers best."""


@dataclass(frozen=True, eq=False)
class Values:
    """Log-probabilities y of n tokens that a server gave.

    ``base``: those of the base alone; ``curves``: of the adapter at the factors ``nodes``, between
    which they are interpolated; none of either without an adapter. ``since``: the tokens before
    which a node was not chosen, so that no bet on them was made towards it. ``coarse``: the size of
    a four-bit server's noise; ``least``: the oracle's own rounding, within which nothing is told
    apart.

    Shapes: y (n,), base (n,), nodes (k,), since (k,), curves (k, n), coarse (n,).
    """

    y: Array
    base: Array
    nodes: Array
    curves: Array
    coarse: Array
    least: float
    since: Array | None = None

    sharpens: ClassVar[bool] = True

    @property
    def tokens(self) -> int:  # noqa: D102
        return int(self.y.size)

    @cached_property
    def effect(self) -> Array:
        """How much the adapter changes each token's log-probability."""
        if not len(self.nodes):
            return np.zeros_like(self.base)
        return np.asarray(self.at(np.array([1.0]))[0] - self.base)

    @cached_property
    def _interpolated(self) -> Any:
        from scipy.interpolate import PchipInterpolator  # no other audit needs SciPy

        return PchipInterpolator(self.nodes, self.curves, axis=0)

    def at(self, f: Array) -> Array:
        """The log-probabilities at the factors f: (m,) -> (m, n)."""
        return np.asarray(self._interpolated(f))

    def slopes(self, f: Array) -> Array:
        """Their derivatives by the factor: (m,) -> (m, n)."""
        return np.asarray(self._interpolated(f, nu=1))

    def against(self, f: Array) -> Array:  # noqa: D102
        return self._against(self.at(f), self.slopes(f))

    def against_base(self) -> float:  # noqa: D102
        return float(self._against(self.base[None], self.effect[None])[0])

    def near(self, f: float | None) -> float:
        """log E against "at most half of the tokens are near this setting"; None is the base.

        Near is what is nearer than half of the adapter's effect, or than a four-bit server. Without
        an adapter, of which a quarter of the tokens has to be shown.
        """
        level = self.base if f is None else self.at(np.array([f]))[0]
        room = np.maximum(abs(self.effect) / 2, np.maximum(abs(self.coarse), self.least))
        happened, tried = (abs(self.y - level) <= room).sum(), np.asarray(self.y.size)
        return float(log_evidence(happened, tried, 0.5 if len(self.nodes) else 1 - CHANCE))

    def precision(self) -> float:
        """The standard deviation of the estimate: the noise's by the root of Σ l'(f)²."""
        f = self.estimate()
        slopes = self.slopes(np.array([f]))[0]
        return self.noise(f) / float(max(np.sqrt((slopes**2).sum()), self.least))

    def noise(self, f: float | None) -> float:
        """The noise's standard deviation, from its median: at least the oracle's own rounding."""
        level = self.base if f is None else self.at(np.array([f]))[0]
        return max(float(1.4826 * np.median(abs(self.y - level))), self.least)

    def _against(self, levels: Array, slopes: Array) -> Array:
        """Half of the capital is bet on the spread, the other half on directions.

        The directions are those in which each other setting lies, also one that was fitted to the
        tokens before, and both of the slope. A tie,
        within the oracle's rounding, speaks for the setting.
        """
        off = np.where(abs(self.y - levels) > self.least, self.y - levels, 0.0)
        bets, order = [], np.arange(self.y.size)
        since = np.zeros(len(self.nodes)) if self.since is None else self.since
        for rival, first in zip((self.base, *self.curves), (0, *since), strict=True):
            apart = np.where(order >= first, rival - levels, 0.0)
            for least in LEAST_EFFECTS:
                counts = abs(apart) > np.maximum(least * abs(self.coarse), self.least)
                bets.append(_bet(off * apart > 0, counts))
        counts = slopes != 0
        bets += [_bet(off * slopes * sign > 0, counts) for sign in (1, -1)]
        off, spread = abs(self.y - levels), []
        for k, p0 in MULTIPLES.items():
            far = (off > np.maximum(k * abs(self.coarse), self.least)).sum(-1)
            spread.append(log_evidence(far, np.full(len(levels), self.y.size), p0))
        return _halves(spread, bets)

    def factors(self) -> Array:  # noqa: D102
        if not len(self.nodes):
            return np.zeros(0)
        low, high = self.nodes[[0, -1]]
        wide = np.concatenate([np.linspace(low, high, 61), self.nodes, _around(1.0, SAME)])
        close = np.concatenate([_around(f, 0.3) for f in (*self.nodes, self.estimate())])
        every = np.unique(np.concatenate([wide, close]))
        return np.asarray(every[(every >= low) & (every <= high)])

    def around(self, low: float, high: float) -> tuple[float, float]:  # noqa: D102
        return low, high

    def estimate(self) -> float:
        """argmin over f of Σ |y - l(f)|, the median's estimate: the noise may have heavy tails.

        On a grid first. Then y = l(f) + l'(f) (f' - f) is solved for each token, and f' is the
        median of the solutions with weights |l'(f)|.
        """
        low, high = self.nodes[[0, -1]]
        grid = np.unique(np.concatenate([np.linspace(low, high, 201), self.nodes]))
        f = float(grid[abs(self.y - self.at(grid)).sum(1).argmin()])
        for _ in range(8):
            (level,), (slope,) = self.at(np.array([f])), self.slopes(np.array([f]))
            if not slope.any():
                break
            with np.errstate(divide="ignore", invalid="ignore"):
                solutions = np.where(slope != 0, f + (self.y - level) / slope, f)
            order = np.argsort(solutions)
            weights = np.cumsum(abs(slope)[order])
            median = solutions[order][np.searchsorted(weights, weights[-1] / 2)]
            f = float(np.clip(median, low, high))
        return f


@dataclass(frozen=True, eq=False)
class Choices:
    """The tokens that a server takes for the most probable, where it gives no log-probabilities.

    Whether they are those of the base, and of the adapter at the factors ``nodes``; of either at
    half a server's rounding in four bits.

    Of two settings that take different tokens, one of which the server takes, the other is right
    with probability at most 1/2 if h is true: noise moves h's own token, which is the more
    probable, below the other one less often than not.

    Shapes: base (n,), nodes (k,), curves (k, n), coarse (n,), all of them bool but the nodes.
    """

    base: Array
    nodes: Array
    curves: Array
    coarse: Array

    sharpens: ClassVar[bool] = False

    @property
    def tokens(self) -> int:  # noqa: D102
        return int(self.base.size)

    def against(self, f: Array) -> Array:  # noqa: D102
        return np.array([self._against(self._right(one)) for one in f])

    def against_base(self) -> float:  # noqa: D102
        return self._against(self.base)

    def near(self, f: float | None) -> float:  # noqa: D102
        right = self.base if f is None else self._right(f)
        return float(log_evidence(right.sum(), np.asarray(right.size), 0.5))

    def _right(self, f: float) -> Array:
        right: Array = self.curves[abs(self.nodes - f).argmin()]
        return right

    def _against(self, right: Array) -> float:
        wrong, missed = ~right & self.coarse, right & ~self.coarse
        spread = log_evidence(wrong.sum(), wrong.sum() + missed.sum())
        bets = [np.zeros(())]
        for other in (self.base, *self.curves):
            better, worse = (other & ~right).sum(), (right & ~other).sum()
            if better or worse:
                bets.append(log_evidence(better, better + worse, 0.5))
        return float(_halves([spread], bets))

    def factors(self) -> Array:  # noqa: D102
        return self.nodes

    def around(self, low: float, high: float) -> tuple[float, float]:  # noqa: D102
        below, above = self.nodes[self.nodes < low], self.nodes[self.nodes > high]
        return float(below.max(initial=-np.inf)), float(above.min(initial=np.inf))

    def estimate(self) -> float:  # noqa: D102
        return float(self.nodes[self.curves.sum(1).argmax()]) if len(self.nodes) else 0.0


def _bet(happened: Array, counts: Array) -> Array:
    """log E of the bet on the tokens that count: (m, n) bool each -> (m,)."""
    return log_evidence((happened & counts).sum(-1), counts.sum(-1))


def _halves(*bets: Sequence[Array]) -> Array:
    """The evidence of a capital of which one half lies on these bets and the other on those."""
    return _log_mean(np.stack([_log_mean(np.stack(half, -1)) for half in bets], -1))


def _around(f: float, width: float) -> Array:
    """Factors around f, the closer to it the denser."""
    steps = width * 2.0 ** -np.arange(0, 20)
    return np.concatenate([f - steps, [f], f + steps])
