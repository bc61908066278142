"""From the evidence against each setting to a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minilora.audit.served.sequential import SAME, Evidence

SHARP = 0.1
"""Tokens are asked for until the factor's interval is this narrow, or there are no more."""


@dataclass(frozen=True)
class Decision:
    """What a server serves, as far as the answers tell.

    ``serves``: "adapter", "base", "factor" (the adapter at another scale), "other" (none of
    these), or "" (it cannot be told yet); ``sharp``: more tokens would not change what is said;
    ``factor``, ``low``, ``high``: the factor and its interval; ``tokens``: those scored; ``more``:
    about so many more are needed, None if no number of such tokens would do; ``elsewhere``: it is
    neither the base nor the adapter as it should be.
    """

    serves: str
    sharp: bool
    tokens: int
    factor: float | None = None
    low: float | None = None
    high: float | None = None
    more: int | None = None
    elsewhere: bool = False


def decide(evidence: Evidence, error: float) -> Decision:
    """The verdict whose error has probability at most ``error``, however often this is called."""
    enough = -math.log(error)
    if not len(evidence.nodes):
        return _base_only(evidence, enough)
    f, estimate = evidence.factors(), evidence.estimate()
    log_e, base = evidence.against(f), evidence.against_base()
    left = f[log_e < enough]
    if not len(left) and base >= enough:
        return Decision("other", True, evidence.tokens, estimate, elsewhere=True)
    ends = (float(left.min()), float(left.max())) if len(left) else (0.0, 0.0)
    width, (low, high) = ends[1] - ends[0], evidence.around(*ends)
    one = bool((abs(left - 1) <= SAME).any())
    elsewhere = base >= enough and not one
    serves = ""
    if base < enough:
        if not one and low >= -0.5 and high <= 0.5 and evidence.near(None) >= enough:
            serves = "base"
    elif one:
        if low >= 0.5 and high <= 2 and evidence.near(1.0) >= enough:
            serves = "adapter"
    elif evidence.near(estimate) >= enough:
        serves = "factor"
    scale = max(map(abs, ends)) if serves == "factor" else 1.0
    more = None if serves else _more(_rivals(f, log_e, base, enough, estimate), enough, evidence)
    sharp = bool(serves) and width <= SHARP * scale
    return Decision(serves, sharp, evidence.tokens, estimate, low, high, more, elsewhere)


def _base_only(evidence: Evidence, enough: float) -> Decision:
    """Of a server that is to serve the base, no adapter being given."""
    n, near = evidence.tokens, evidence.near(None)
    if evidence.against_base() >= enough:
        return Decision("other", True, n)
    if near >= enough:
        return Decision("base", True, n)
    return Decision("", False, n, more=_more([near], enough, evidence))


def _rivals(
    f: np.ndarray, log_e: np.ndarray, base: float, enough: float, estimate: float
) -> list[float]:
    """log E against those that are still to be excluded for the most probable verdict."""
    far = (f <= 0.5) | (f >= 2) if abs(estimate) > 0.5 else abs(f) >= 0.5
    rivals = [float(e) for e in log_e[far & (log_e < enough)]]
    return rivals + ([base] if abs(estimate) > 0.5 and base < enough else [])


def _more(rivals: list[float], enough: float, evidence: Evidence) -> int | None:
    """How many more tokens exclude the rival against which the evidence grows most slowly."""
    slowest = min(rivals, default=0.0)
    if slowest <= 0:
        return None
    return math.ceil((enough - slowest) * evidence.tokens / slowest)
