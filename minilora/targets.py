"""Where the adapters go: a choice of projections, its report, and the factors put in place.

Projections are named as the models name them: ``layers.0.q``, ``layers.1.down``, ``pooler``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.lora import DRAW, Tuning, Weights, draw_factors, scale


@dataclass(frozen=True)
class Lora:
    """A choice of adapters: where, of which rank and scale, and what is trained beside them.

    ``targets``: "all-linear" (every projection but the head), a regular expression that must match
    a projection's whole name, or names, each matching a name or its dotted end; ``exclude``
    likewise takes away; ``layers`` keeps those of these numbers. ``rank_pattern`` and
    ``alpha_pattern`` map an expression for a name's dotted end to a rank or alpha of its own.
    ``bias``: "none", "lora_only" or "all"; ``also``: expressions for whole names of parameters
    trained in full (norms, embeddings, heads). ``init``: "kaiming" or "gaussian".
    """

    r: int = 8
    alpha: Any = 8
    rslora: bool = False
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict)
    bias: str = "none"
    also: Sequence[str] = ()
    init: str = "kaiming"

    def __post_init__(self) -> None:
        for name, known in (("bias", ("none", "lora_only", "all")), ("init", tuple(DRAW))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {known}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: expected at least 0 and below 1")


@dataclass(frozen=True)
class Choice:
    """What a `Lora` hit: for each adapted projection its rank, its alpha and its shape (m, n)."""

    rank: Mapping[str, int]
    alpha: Mapping[str, Any]
    shape: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        """A line per adapted projection, and their count of parameters."""
        size = {at: self.rank[at] * sum(self.shape[at]) for at in self.rank}
        lines = [
            f"{at}: r {r}, alpha {self.alpha[at]}, {size[at]} parameters"
            for at, r in self.rank.items()
        ]
        return "\n".join([*lines, f"{len(size)} projections, {sum(size.values())} parameters"])


def _matches(name: str, wanted: str | Sequence[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith("." + end) for end in wanted)


def choose(lora: Lora, linears: Mapping[str, tuple[int, int]]) -> Choice:
    """The projections among ``linears`` (name to shape) that ``lora`` hits.

    Errors: ValueError if it hits nothing, or if one of its names or patterns hits nothing.
    """
    if lora.targets == "all-linear":
        hit = [at for at in linears if at != "head"]
    else:
        hit = [at for at in linears if _matches(at, lora.targets)]
    if lora.layers is not None:
        numbers = [f"layers.{i}." for i in lora.layers]
        hit = [at for at in hit if at.startswith(tuple(numbers))]
    hit = [at for at in hit if not _matches(at, lora.exclude)]

    def own(patterns: Mapping[str, Any], default: Any) -> dict[str, Any]:
        found = {
            at: [v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", at)] for at in hit
        }
        return {at: values[0] if values else default for at, values in found.items()}

    names = [] if isinstance(lora.targets, str) else list(lora.targets)
    idle = [name for name in names if not any(_matches(at, [name]) for at in linears)]
    idle += [
        p
        for p in (*lora.rank_pattern, *lora.alpha_pattern)
        if not any(own({p: True}, False).values())
    ]
    if not hit or idle:
        what = f"{idle} of the choice" if idle else f"targets {lora.targets!r}"
        raise ValueError(f"{what} hit no projection; there are: {', '.join(linears)}")
    return Choice(
        own(lora.rank_pattern, lora.r),
        own(lora.alpha_pattern, lora.alpha),
        {at: linears[at] for at in hit},
    )


def adapt(
    W: Weights,
    lora: Lora,
    linears: Mapping[str, tuple[int, int]],
    rng: np.random.Generator,
) -> tuple[Weights, Tuning]:
    """The weights with fresh factors beside each chosen projection, and what is trained of them.

    The factors have their weight's dtype. Errors: those of :func:`choose`; ValueError if W has
    adapters already or if an expression of ``lora.also`` matches no parameter.
    """
    if any(name.endswith(".A") for name in W):
        raise ValueError("the weights have adapters already; disable or merge them first")
    choice = choose(lora, linears)
    factors: Weights = {}
    for at, r in choice.rank.items():
        A, B = draw_factors(rng, lora.init, r, *choice.shape[at])
        factors[f"{at}.A"], factors[f"{at}.B"] = (v.astype(W[f"{at}.weight"].dtype) for v in (A, B))
    beside = {name for name in W if any(re.fullmatch(p, name) for p in lora.also)}
    idle = [p for p in lora.also if not any(re.fullmatch(p, name) for name in W)]
    if idle:
        raise ValueError(f"{idle} match no parameter; there are: {', '.join(W)}")
    if lora.bias == "all":
        beside |= {name for name in W if name.endswith(".bias")}
    if lora.bias == "lora_only":
        beside |= {f"{at}.bias" for at in choice.rank if f"{at}.bias" in W}
    s = {at: scale(choice.alpha[at], r, lora.rslora) for at, r in choice.rank.items()}
    return {**W, **factors}, Tuning(scale=s, trained=frozenset(factors) | beside)
