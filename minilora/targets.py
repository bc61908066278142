"""Where the adapters go: a choice of projections, its report, and the factors put in place.

Projections are named as the models name them: ``layers.0.q``, ``layers.1.down``, ``pooler``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np

from minilora.lora import DRAW, Tuning, Weights, draw_factors, scale


@dataclass(frozen=True)
class Lora:
    """A choice of adapters: where, of which rank and scale, and what is trained beside them.

    ``targets``: "all-linear" (every projection but the head), a regular expression that must match
    a projection's whole name, or names, each matching a name or its dotted end; ``exclude``
    likewise takes away; ``layers`` keeps those of these numbers, and what is named in full. How all
    these match is said at :func:`targeted` and :func:`pattern_value`. ``rank_pattern`` and
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
        if self.layers is not None and len(self.layers) == 0:
            raise ValueError("layers: found none, expected numbers; leave it out for all layers")
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


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """Whether ``wanted`` hits the module's name: an expression for all of it, or names of its ends.

    A string is a regular expression that must match from the first character to the last: "q" hits
    no ``layers.0.q``, ".*q" hits ``mlp.seq`` too. An entry of a list is no expression: it is the
    name or a dotted end of it, so "q" hits ``q`` and ``layers.0.q``, but neither ``seq`` nor ``q2``
    nor ``q.extra``. An empty list hits nothing.

    Errors: re.error for a string that is no expression.
    Source: PEFT 0.21, ``check_target_module_exists``.
    """
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith("." + end) for end in wanted)


def layer_of(name: str, patterns: str | Sequence[str] = ()) -> int | None:
    """The number of the layer that the module lies in, or None: the first number that counts.

    With ``patterns`` it follows one of them, which is the name's start or follows a dot; of several
    the first that fits counts. Without, it follows any part of the name that is not its first, so
    that ``model.layers.1.experts.0.up`` lies in 1, but ``layers.1.experts.0.up`` in 0 and
    ``layers.1.up`` in none: name the pattern where the blocks are the outermost. A number that ends
    the name is no layer. Patterns are expressions and are not grouped: "layers|h" finds none in
    ``layers.1.up``, where the list ["layers", "h"] finds 1.

    Source: PEFT 0.21, ``check_target_module_exists``.
    """
    names = [patterns] if isinstance(patterns, str) else patterns
    starts = [rf"(?:^|.*?\.){name}" for name in names] if patterns else [r".*?\.[^.]*"]
    found = (re.match(rf"{start}\.(?P<idx>\d+)\.", name) for start in starts)
    match = next((match for match in found if match), None)
    return None if match is None or match["idx"] is None else int(match["idx"])


def targeted(
    name: str,
    wanted: str | Sequence[str],
    *,
    exclude: str | Sequence[str] = (),
    saved: Sequence[str] = (),
    layers: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] = (),
) -> bool:
    """Whether the module gets an adapter. The first of these rules that speaks, decides.

    1. ``exclude``, which hits as :func:`matches` has it, takes away whatever else is said.
    2. So does ``saved`` (``modules_to_save``): an expression, ungrouped, for whole parts of the
       name, wherever they stand. Such modules are found otherwise: :func:`saved_in_full`.
    3. A whole name in the list ``wanted`` is not asked for its layer.
    4. What ``wanted`` hits is asked for it if ``layers`` (``layers_to_transform``) names any; an
       empty list asks nothing. A module in no layer is then left out.

    Beside an expression PEFT's configuration refuses ``layers``; here it asks all the same.

    Source: PEFT 0.21, ``check_target_module_exists``.
    """
    if matches(name, exclude):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved):
        return False
    if not isinstance(wanted, str) and name in wanted:
        return True
    if not matches(name, wanted):
        return False
    asked = [layers] if isinstance(layers, int) else list(layers or ())
    return not asked or layer_of(name, layers_pattern) in asked


def all_linear(linears: Iterable[str], heads: Iterable[str] = ("head",)) -> list[str]:
    """What the target "all-linear" stands for: the projections but the output head.

    A classifier's head is one for PEFT only under the task type SEQ_CLS. PEFT takes the names for a
    list of targets, by which a head ``lm.out`` comes back where there is a projection ``out``.

    Source: PEFT 0.21, ``_maybe_include_all_linear_layers``.
    """
    left_out = set(heads)
    return [at for at in linears if at not in left_out]


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value (a rank, an alpha) of the first of the ``patterns`` that fits the module's name.

    A pattern is an expression for the whole name or for a dotted end, grouped: "q|up" fits
    ``layers.0.up``, but "q" fits neither ``seq`` nor ``q.extra``. It is the first in the mapping's
    order that counts, be another one longer; the very name counts after all that fit.

    Source: PEFT 0.21, ``get_pattern_key``.
    """
    fitting = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name))
    return next(fitting, patterns.get(name, default))


def saved_in_full(name: str, wanted: Sequence[str]) -> bool:
    """Whether ``modules_to_save`` trains the module, or one that it lies in, in full.

    The end of a name decides, with no dot before it: "norm" also hits ``layers.0.norm``, "q" also
    ``seq``, and "_proj" every projection. Give whole names.

    Source: PEFT 0.21, ``_set_trainable``.
    """
    around = accumulate(name.split("."), "{}.{}".format)
    return any(outer.endswith(tuple(wanted)) for outer in around)


def choose(lora: Lora, linears: Mapping[str, tuple[int, int]]) -> Choice:
    """The projections among ``linears`` (name to shape) that ``lora`` hits.

    Errors: ValueError if it hits nothing, or if one of its names or patterns hits nothing.
    """
    every = lora.targets == "all-linear"
    hit = [
        at
        for at in (all_linear(linears) if every else linears)
        if targeted(
            at,
            ".*" if every else lora.targets,
            exclude=lora.exclude,
            layers=lora.layers,
            layers_pattern="layers",
        )
    ]

    def own(patterns: Mapping[str, Any], default: Any) -> dict[str, Any]:
        return {at: pattern_value(patterns, at, default) for at in hit}

    names = [] if isinstance(lora.targets, str) else list(lora.targets)
    idle = [name for name in names if not any(matches(at, [name]) for at in linears)]
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


def replicated(layers: int, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """The source of each layer, once the ``ranges`` (``layer_replication``) are put on one another.

    (0, 4) and (2, 5) of five layers give 0 1 2 3 2 3 4: a range's end is left out, and layers may
    come again, in another order, or not at all.

    Errors: ValueError if there is no range, or one that is empty or goes beyond the layers.
    Source: PEFT 0.21, ``replicate_layers``, which counts negative numbers from the end.
    """
    wrong = [pair for pair in ranges if not 0 <= pair[0] < pair[1] <= layers]
    if wrong or not ranges:
        found = wrong or "none"
        raise ValueError(f"ranges: found {found}, expected 0 ≤ start < end ≤ {layers} in each")
    return [i for start, end in ranges for i in range(start, end)]


def replicate(W: Weights, c: Any, ranges: Sequence[tuple[int, int]]) -> tuple[Weights, Any]:
    """A deeper model of the same layers: weights and configuration of what :func:`replicated` says.

    The copies share their arrays, so that a frozen base takes no more memory; :func:`adapt` then
    gives each of them adapters of its own. What is trained of the base itself parts, copy by copy:
    for one trained array, sum its gradients.

    Errors: those of :func:`replicated`; ValueError if W has adapters already.
    """
    source = replicated(c.layers, ranges)
    if any(name.endswith(".A") for name in W):
        raise ValueError("the weights have adapters: replicate the base, then adapt it")
    blocks = {
        f"layers.{i}.{name.removeprefix(f'layers.{j}.')}": w
        for i, j in enumerate(source)
        for name, w in W.items()
        if name.startswith(f"layers.{j}.")
    }
    beyond = {name: w for name, w in W.items() if not name.startswith("layers.")}
    return beyond | blocks, replace(c, layers=len(source))
