"""Where the adapters go: a choice of projections, its report, and the factors put in place.

Projections are named as the models name them: ``layers.0.q``, ``layers.1.down``, ``pooler``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np

from minilora.spec.adalora import adalora_scale
from minilora.spec.initialization import STARTS, draw_vera, vera_part
from minilora.spec.lora import LORA, TABLES, TrainableSpec, Variant, Weights, scale, twin, weight_of
from minilora.spec.ops import Array, Back
from minilora.spec.variants import (
    ADALORA,
    REGISTRY,
    VERA,
    Entry,
    invocation,
    part_shapes,
    start,
)


def _alora_linear(
    x: Array, W: Array, b: Array | None, A: Array, B: Array, s: Any, K: Array | None = None
) -> tuple[Array, Back]:
    """LoRA's y, once K says on which tokens it acts."""
    if K is None:
        raise ValueError("aLoRA acts from its invocation on: give the batch's tuning, by invoked")
    return LORA.linear(x, W, b, A, B, s, K)


def _merge_alora(*parts: Any) -> tuple[Array, Array | None]:
    raise ValueError("aLoRA acts on some tokens only, and a weight on all: it has no merge")


ALORA = Variant(("A", "B"), _alora_linear, _merge_alora)
"""LoRA's equation for aLoRA, which refuses to act where no batch's tokens are given."""


@dataclass(frozen=True)
class LoraConfig:
    """Which modules get an adapter, of which rank and scale, and what is trained beside them.

    The fields have PEFT's names. ``target_modules``: "all-linear" (every projection but the head),
    a regular expression that must match a module's whole name, or names, each matching a name or
    its dotted end; ``exclude_modules`` likewise takes away; ``layers_to_transform`` keeps those of
    these numbers, and what is named in full (:func:`targeted`). ``rank_pattern`` and
    ``alpha_pattern`` map an expression for a name's dotted end to a rank or alpha of its own
    (:func:`pattern_value`). ``bias``: "none", "lora_only" or "all"; ``modules_to_save``:
    expressions for whole names of parameters trained in full (norms, embeddings, heads).

    ``variant``: a name in `variants.REGISTRY`; ``init_lora_weights``: a name in
    `initialization.STARTS`, the variant's own unless given; ``use_rslora``: s = α/√r, as with
    the variant of that name. ``alora_invocation_tokens``: the tokens from which aLoRA acts
    (:func:`invoked`). ``ensure_weight_tying``: a tied head takes its embedding's factors,
    `lora.twin`. ``trainable_token_indices``: rows of tables that are trained alone, by
    `ops.with_tokens` and not by :func:`inject`. ``layer_replication``: the ranges of
    :func:`replicate` that the model was made with.

    Errors: ValueError for what contradicts itself, or names no variant, start or bias.
    """

    r: int = 8
    lora_alpha: Any = 8
    use_rslora: bool = False
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    init_lora_weights: str = ""
    variant: str = "lora"
    alora_invocation_tokens: Sequence[int] = ()
    ensure_weight_tying: bool = False
    trainable_token_indices: Mapping[str, Sequence[int]] = field(default_factory=dict)
    layer_replication: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        if self.variant in REGISTRY:
            object.__setattr__(self, "init_lora_weights", self.init_lora_weights or self.entry.init)
            object.__setattr__(self, "use_rslora", self.use_rslora or self.entry.rslora)
        for name, known in (
            ("variant", tuple(REGISTRY)),
            ("bias", ("none", "lora_only", "all")),
            ("init_lora_weights", tuple(STARTS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {known}")
        if self.layers_to_transform is not None and len(self.layers_to_transform) == 0:
            raise ValueError(
                "layers_to_transform: found none, expected numbers; leave it out for all"
            )
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not alpha - alpha == 0:
                raise ValueError(f"lora_alpha {alpha}: expected a finite number")
        expressions = [v for v in (self.target_modules, self.exclude_modules) if isinstance(v, str)]
        for expression in (
            *expressions,
            *self.rank_pattern,
            *self.alpha_pattern,
            *self.modules_to_save,
        ):
            try:
                re.compile(expression)
            except re.error as error:
                expected = "a name or a regular expression"
                raise ValueError(f"{expression!r}: {error}; expected {expected}") from None
        for r in (self.r, *self.rank_pattern.values()):
            if not (isinstance(r, int | np.integer) and r >= 1):
                raise ValueError(f"rank {r}: expected at least 1, a whole number")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout {self.lora_dropout}: expected at least 0 and below 1")
        for at in self.trainable_token_indices:
            if any(re.fullmatch(expression, f"{at}.weight") for expression in self.modules_to_save):
                expected = "rows of it, or all of it by modules_to_save"
                raise ValueError(f"trainable_token_indices of {at}: expected {expected}, not both")
        own, entry = self.entry.init, self.entry
        if self.init_lora_weights != own and (
            own != "kaiming" or self.init_lora_weights in ("vera", "adalora")
        ):
            expected = f"{own!r}, as the variant {self.variant!r} starts"
            raise ValueError(f"init_lora_weights {self.init_lora_weights!r}: expected {expected}")
        if (self.variant == "alora") != bool(self.alora_invocation_tokens):
            expected = "the tokens of aLoRA's invocation, and none for another variant"
            raise ValueError(
                f"alora_invocation_tokens {list(self.alora_invocation_tokens)}: expected {expected}"
            )
        if self.ensure_weight_tying and self.equation != LORA:
            raise ValueError(
                f"ensure_weight_tying: factors are shared by LoRA itself only, not {self.variant!r}"
            )
        shared = {"use_rslora": "no rsLoRA's scale", "alpha_pattern": "one scale for all modules"}
        shared |= {"rank_pattern": "one rank for all modules"} if entry.variant == VERA else {}
        for name, why in shared.items() if entry.variant in (VERA, ADALORA) else ():
            if getattr(self, name):
                raise ValueError(f"{name}: found it, but {self.variant} has {why}; leave it out")

    @property
    def entry(self) -> Entry:
        """The variant in the registry."""
        return REGISTRY[self.variant]

    @property
    def equation(self) -> Variant:
        """What the adapted modules compute: the entry's, or :data:`ALORA`."""
        return ALORA if self.variant == "alora" else self.entry.variant


@dataclass(frozen=True)
class ResolvedTargets:
    """What a `LoraConfig` hit: for each adapted module its rank, its alpha and its shape (m, n)."""

    rank: Mapping[str, int]
    alpha: Mapping[str, Any]
    shape: Mapping[str, tuple[int, int]]
    variant: str = "lora"

    def parts(self) -> dict[str, tuple[int, int]]:
        """Every parameter of the adapters, and its shape."""
        variant = REGISTRY[self.variant].variant
        return {
            f"{at}.{part}": shape
            for at, r in self.rank.items()
            for part, shape in part_shapes(variant, r, *self.shape[at]).items()
        }

    def trained(self) -> frozenset[str]:
        """Those of the parameters that the variant trains."""
        ends = tuple(f".{part}" for part in REGISTRY[self.variant].trained)
        return frozenset(name for name in self.parts() if name.endswith(ends))

    def __str__(self) -> str:
        """A line per adapted projection, and their count of trained parameters."""
        shapes, trained = self.parts(), self.trained()
        size = dict.fromkeys(self.rank, 0)
        for name in trained:
            m, n = shapes[name]
            size[name.rpartition(".")[0]] += m * n
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


def outers(name: str) -> Iterator[str]:
    """The modules that a module lies in by its dotted name, the outermost first, and itself."""
    return accumulate(name.split("."), "{}.{}".format)


def saved_in_full(name: str, wanted: Sequence[str]) -> bool:
    """Whether ``modules_to_save`` trains the module, or one that it lies in, in full.

    The end of a name decides, with no dot before it: "norm" also hits ``layers.0.norm``, "q" also
    ``seq``, and "_proj" every projection. Give whole names.

    Source: PEFT 0.21, ``_set_trainable``.
    """
    return any(outer.endswith(tuple(wanted)) for outer in outers(name))


def resolve_targets(lora: LoraConfig, linears: Mapping[str, tuple[int, int]]) -> ResolvedTargets:
    """The modules among ``linears`` (name to shape) that ``lora`` hits.

    ``linears`` are a model's projections, or its ``matrices()``: those, the tables as (d, v), and a
    tied head. "all-linear" hits projections only, whichever is given.

    ``exclude_modules`` and ``layers_to_transform`` may name what is not there, as in PEFT.

    Errors: ValueError if it hits nothing, or if a name of ``target_modules`` or a pattern of ranks
    or alphas hits nothing; if it ties what is not both there, or gives the two other ranks.
    """
    every = lora.target_modules == "all-linear"
    hit = [
        at
        for at in (all_linear(linears, ("head", *TABLES)) if every else linears)
        if targeted(
            at,
            ".*" if every else lora.target_modules,
            exclude=lora.exclude_modules,
            layers=lora.layers_to_transform,
            layers_pattern="layers",
        )
    ]
    twins = {"embed", "head"}
    if lora.ensure_weight_tying and twins.intersection(hit):
        if not twins <= linears.keys():
            raise ValueError(
                "ensure_weight_tying: expected an embedding and a head; give the model's matrices()"
            )
        hit = [at for at in linears if at in twins.union(hit)]

    def own(patterns: Mapping[str, Any], default: Any) -> dict[str, Any]:
        return {at: pattern_value(patterns, at, default) for at in hit}

    names = [] if isinstance(lora.target_modules, str) else list(lora.target_modules)
    idle = [name for name in names if not any(matches(at, [name]) for at in linears)]
    idle += [
        p
        for p in (*lora.rank_pattern, *lora.alpha_pattern)
        if not any(own({p: True}, False).values())
    ]
    if not hit or idle:
        what = f"{idle} of the choice" if idle else f"target_modules {lora.target_modules!r}"
        raise ValueError(f"{what} hit no projection; there are: {', '.join(linears)}")
    rank = own(lora.rank_pattern, lora.r)
    if lora.ensure_weight_tying and twins <= rank.keys() and rank["head"] != rank["embed"]:
        raise ValueError(
            f"ensure_weight_tying: ranks {rank['embed']} and {rank['head']}, expected one"
        )
    shapes = {at: linears[at] for at in hit}
    return ResolvedTargets(rank, own(lora.alpha_pattern, lora.lora_alpha), shapes, lora.variant)


def scales(lora: LoraConfig, choice: ResolvedTargets) -> dict[str, Any]:
    """s of each adapted module: α / r, or α / √r; AdaLoRA's has the choice's one r, VeRA's is 1."""
    if lora.entry.variant == VERA:
        return dict.fromkeys(choice.rank, 1)
    if lora.entry.variant == ADALORA:
        return dict.fromkeys(choice.rank, adalora_scale(lora.lora_alpha, lora.r))
    return {at: scale(choice.alpha[at], r, lora.use_rslora) for at, r in choice.rank.items()}


def inject(
    W: Weights,
    lora: LoraConfig,
    linears: Mapping[str, tuple[int, int]],
    rng: np.random.Generator,
) -> tuple[Weights, TrainableSpec]:
    """The weights with fresh adapters beside each chosen module, and what is trained of them.

    The adapters have their weight's dtype. A start that takes them out of the weight leaves its
    residual in what is returned, and W as it was; tables start as "embedding" under every ``init``.
    VeRA's A and B are parts of one draw.

    Errors: those of :func:`resolve_targets` and of the start; ValueError if W has adapters
    already, if an expression of ``lora.modules_to_save`` matches no parameter, if a table has no
    such adapter, no such row, or the head to tie has a weight of its own; if W is not made of
    ``lora.layer_replication``.
    """
    if any(name.endswith(".A") for name in W):
        raise ValueError("the weights have adapters already; disable or merge them first")
    choice = resolve_targets(lora, linears)
    _check_tables(W, lora, choice)
    s = scales(lora, choice)
    variant = lora.entry.variant
    if variant == VERA:
        heights, widths = zip(*choice.shape.values(), strict=True)
        dtype = W[weight_of(next(iter(choice.rank)), W)].dtype
        A, B = (f.astype(dtype) for f in draw_vera(rng, lora.r, max(heights), max(widths)))
    changed: Weights = {}
    for at, r in choice.rank.items():
        weight = W[weight_of(at, W)]
        M = weight.T if at in TABLES else weight
        base, parts = M, tuple[Array, ...]()
        if variant == VERA:
            A, B = (f.astype(M.dtype, copy=False) for f in (A, B))
            parts = vera_part(A, B, *M.shape)
        else:
            init = "embedding" if at in TABLES else lora.init_lora_weights
            base, parts = start(variant, init, rng, M, r, s[at])
        changed |= {f"{at}.{part}": v for part, v in zip(variant.parts, parts, strict=True)}
        if base is not M:
            changed[f"{at}.weight"] = base
    if lora.ensure_weight_tying and "head" in choice.rank:
        changed["head.A"], changed["head.B"] = twin(changed["embed.A"], changed["embed.B"])
    beside = {name for name in W if any(re.fullmatch(p, name) for p in lora.modules_to_save)}
    idle = [p for p in lora.modules_to_save if not any(re.fullmatch(p, name) for name in W)]
    if idle:
        raise ValueError(f"{idle} match no parameter; there are: {', '.join(W)}")
    if lora.bias == "all":
        beside |= {name for name in W if name.endswith(".bias")}
    if lora.bias == "lora_only":
        beside |= {f"{at}.bias" for at in choice.rank if f"{at}.bias" in W}
    variants = {} if lora.equation == LORA else dict.fromkeys(choice.rank, lora.equation)
    return {**W, **changed}, TrainableSpec(
        scale=s, trained=choice.trained() | beside, variant=variants
    )


def _check_tables(W: Weights, lora: LoraConfig, choice: ResolvedTargets) -> None:
    """Refuse what a table, a tied head or a replicated model cannot have."""
    entry = lora.entry
    plain = {"A", "B"} <= {*entry.trained} <= {"A", "B", "magnitude"} and lora.equation != ALORA
    for at in TABLES:
        if at in choice.rank and not plain:
            raise ValueError(f"{at} is a table: it has no adapter of the variant {lora.variant!r}")
    if lora.ensure_weight_tying and "head" in choice.rank and "head.weight" in W:
        raise ValueError(
            "ensure_weight_tying: the head has a weight of its own; expected a tied model"
        )
    for at, ids in lora.trainable_token_indices.items():
        rows = len(W[f"{at}.weight"]) if f"{at}.weight" in W else 0
        if len({*ids} & {*range(rows)}) < len(ids) or not ids:
            expected = f"expected each once, from 0 to {rows - 1}"
            raise ValueError(f"trainable_token_indices {list(ids)} of {at}: {expected}")
    layers = {int(name.split(".")[1]) for name in W if name.startswith("layers.")}
    if lora.layer_replication and len(layers) != sum(
        end - begin for begin, end in lora.layer_replication
    ):
        raise ValueError(
            f"layer_replication {lora.layer_replication} of {len(layers)} layers: replicate first"
        )


def invoked(tuning: TrainableSpec, ids: Array, tokens: Sequence[int]) -> TrainableSpec:
    """The tuning of one batch under aLoRA: K is 0 before the last invocation, beside its dropout.

    Shapes: ids (b, t).
    Errors: those of `variants.invocation`.
    """
    on = invocation(ids, np.asarray(tokens)).reshape(1, -1)
    keep = {
        at: on * tuning.dropout_scale[at] if at in tuning.dropout_scale else on
        for at in tuning.scale
    }
    return replace(tuning, dropout_scale=keep)


def tied_gradients(gradients: Weights) -> Weights:
    """dA = dA₁ + dB₂ᵀ, dB = dB₁ + dA₂ᵀ: of an embedding's factors that are a tied head's too.

    The head's become their transposes, so that an optimizer that goes by entries keeps the two one.

    Source: A₂ = B₁ᵀ and B₂ = A₁ᵀ, as `lora.twin` has it, by the chain rule.
    """
    dA, dB = twin(gradients["head.A"], gradients["head.B"])
    dA, dB = gradients["embed.A"] + dA, gradients["embed.B"] + dB
    head = dict(zip(("head.A", "head.B"), twin(dA, dB), strict=True))
    return {**gradients, "embed.A": dA, "embed.B": dB, **head}


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

    The copies share their arrays, so that a frozen base takes no more memory; :func:`inject` then
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
