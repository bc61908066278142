"""From the evidence against each setting to a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minilora.audit.served.sequential import CHANCE, SAME, Evidence
from minilora.spec.ops import Array

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
    more = None
    if not serves:
        more = _more(_rivals(evidence, f, log_e, base, enough), enough, evidence)
    sharp = bool(serves) and (width <= SHARP * scale or not evidence.sharpens)
    return Decision(serves, sharp, evidence.tokens, estimate, low, high, more, elsewhere)


def _base_only(evidence: Evidence, enough: float) -> Decision:
    """Of a server that is to serve the base, no adapter being given."""
    n, near = evidence.tokens, evidence.near(None)
    if evidence.against_base() >= enough:
        return Decision("other", True, n)
    if near >= enough:
        return Decision("base", True, n)
    return Decision("", False, n, more=_more([near], enough, evidence))


def _rivals(evidence: Evidence, f: Array, log_e: Array, base: float, enough: float) -> list[float]:
    """log E of all that is still to be shown before the most probable verdict."""
    estimate, one = evidence.estimate(), abs(f - 1) <= SAME
    if 0.5 < estimate < 2 and log_e[one].min() <= log_e[~one].min():  # the adapter
        rivals = [base, evidence.near(1.0), *log_e[(f <= 0.5) | (f >= 2)]]
    elif abs(estimate) < 0.5 and base <= log_e.min():
        rivals = [evidence.near(None), *log_e[abs(f) >= 0.5]]
    else:
        rivals = [base, evidence.near(estimate), *log_e[one]]
    return [float(e) for e in rivals if e < enough]


def _more(rivals: list[float], enough: float, evidence: Evidence) -> int | None:
    """How many more tokens show what is shown most slowly so far; evidence grows by a rate.

    A token multiplies a capital by 1 / p₀ at most: so many are needed at least.
    """
    slowest, least = min(rivals, default=0.0), math.ceil(enough / -math.log(CHANCE))
    if slowest <= 0:
        return least if evidence.tokens < 4 * least else None
    return math.ceil((enough - slowest) * evidence.tokens / slowest)
