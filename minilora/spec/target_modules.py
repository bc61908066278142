"""Which modules get an adapter, and the adapters put in place: PEFT's LoraConfig and its rules.

Modules are named as the models name them: ``layers.0.q``, ``layers.1.down``, ``pooler``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import accumulate
from typing import Any

import numpy as np

from minilora.spec.initialization import INITIALIZATIONS, shared_part
from minilora.spec.lora import LORA, TABLES, TrainableSpec, Variant, Weights, twin, weight_of
from minilora.spec.models import Config
from minilora.spec.ops import Array
from minilora.spec.variants import REGISTRY, Entry, extended, fresh_parts, invocation, part_shapes


def ties_head(c: Config) -> bool:
    """Whether the head has no weight of its own, and takes its embedding's."""
    return "head" not in c.linears()


@dataclass(frozen=True)
class LoraConfig:
    """Which modules get an adapter, of which rank and scale, and what is trained beside them.

    The fields have PEFT's names. ``target_modules``: "all-linear" (every projection but the head),
    a regular expression that must match a module's whole name, or names, each matching a name or
    its dotted end; ``exclude_modules`` likewise takes away; ``layers_to_transform`` keeps those of
    these numbers, and what is named in full (:func:`is_target`). ``rank_pattern`` and
    ``alpha_pattern`` map an expression for a name's dotted end to a rank or alpha of its own
    (:func:`pattern_value`). ``bias``: "none", "lora_only" or "all"; ``modules_to_save``:
    expressions for whole names of parameters trained in full (norms, embeddings, heads).

    ``variant``: a name in `variants.REGISTRY`; ``init_lora_weights``: a name in
    `initialization.INITIALIZATIONS`, the variant's own unless given; ``use_rslora``: s = α/√r, as
    the variant of that name. ``alora_invocation_tokens``: the tokens from which aLoRA acts
    (:func:`with_invocation`). ``ensure_weight_tying``: a tied head takes its embedding's factors,
    `lora.twin`. ``trainable_token_indices``: rows of tables that are trained alone, by
    `layers.with_tokens` and not by :func:`inject`. ``layer_replication``: the ranges of
    :func:`replicate_layers` that the model was made with.

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
        self._check_names()
        init = self.init_lora_weights or self.entry.init
        object.__setattr__(self, "init_lora_weights", init)
        object.__setattr__(self, "use_rslora", self.use_rslora or self.entry.rslora)
        self._check_patterns()
        self._check_numbers()
        self._check_variant()

    def _check_names(self) -> None:
        known: dict[str, Iterable[str]] = {
            "variant": REGISTRY,
            "bias": ("none", "lora_only", "all"),
            "init_lora_weights": ("", *INITIALIZATIONS),
        }
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                close = get_close_matches(str(value).lower(), values, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                expected = f"expected one of {', '.join(filter(None, values))}{hint}"
                raise ValueError(f"{name} {value!r}: {expected}")

    def _check_patterns(self) -> None:
        """Refuse what is no regular expression, and a table that is trained in two ways."""
        whole = [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        for pattern in (*whole, *self.rank_pattern, *self.alpha_pattern, *self.modules_to_save):
            try:
                re.compile(pattern)
            except re.error as error:
                expected = "a name or a regular expression"
                raise ValueError(f"{pattern!r}: {error}; expected {expected}") from None
        for at in self.trainable_token_indices:
            if any(re.fullmatch(pattern, f"{at}.weight") for pattern in self.modules_to_save):
                expected = "rows of it, or all of it by modules_to_save"
                raise ValueError(f"trainable_token_indices of {at}: expected {expected}, not both")

    def _check_numbers(self) -> None:
        if self.layers_to_transform is not None and len(self.layers_to_transform) == 0:
            expected = "numbers; leave it out for all layers"
            raise ValueError(f"layers_to_transform: found none, expected {expected}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not alpha - alpha == 0:
                raise ValueError(f"lora_alpha {alpha}: expected a finite number")
        for r in (self.r, *self.rank_pattern.values()):
            if not (isinstance(r, int | np.integer) and r >= 1):
                raise ValueError(f"rank {r}: expected at least 1, a whole number")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout {self.lora_dropout}: expected at least 0 and below 1")

    def _check_variant(self) -> None:
        """Refuse what the variant does not take."""
        entry, init = self.entry, self.init_lora_weights
        if init != entry.init and not (entry.init == "kaiming" and INITIALIZATIONS[init].general):
            expected = f"{entry.init!r}, as the variant {self.variant!r} starts"
            raise ValueError(f"init_lora_weights {init!r}: expected {expected}")
        tokens = list(self.alora_invocation_tokens)
        if (entry.injected is not None) != bool(tokens):
            expected = "the tokens of aLoRA's invocation, and none for another variant"
            raise ValueError(f"alora_invocation_tokens {tokens}: expected {expected}")
        if self.ensure_weight_tying and self.equation != LORA:
            expected = f"LoRA's own factors, found the variant {self.variant!r}"
            raise ValueError(f"ensure_weight_tying: expected {expected}")
        for name, why in entry.refuses.items():
            if getattr(self, name):
                raise ValueError(f"{name}: not with {self.variant}, {why}; leave it out")

    @property
    def entry(self) -> Entry:
        """The variant in the registry."""
        return REGISTRY[self.variant]

    @property
    def reads_weights(self) -> bool:
        """Whether `inject` reads the adapted weights' entries, beside their shapes and dtypes."""
        columns = extended(self.equation).columns.values()
        kept = INITIALIZATIONS[self.init_lora_weights].base == "kept"
        return not kept or any(callable(column.start) for column in columns)

    @property
    def equation(self) -> Variant:
        """What the adapted modules compute."""
        return self.entry.equation


@dataclass(frozen=True)
class ResolvedTargets:
    """The modules that a `LoraConfig` matches: their ranks, their alphas, their shapes (m, n)."""

    rank: Mapping[str, int]
    alpha: Mapping[str, Any]
    shape: Mapping[str, tuple[int, int]]
    variant: str = "lora"

    def parts(self) -> dict[str, tuple[int, int]]:
        """The shape of each parameter of the adapters, by name."""
        variant = REGISTRY[self.variant].variant
        return {
            f"{at}.{part}": shape
            for at, r in self.rank.items()
            for part, shape in part_shapes(variant, r, *self.shape[at]).items()
        }

    def trained(self) -> frozenset[str]:
        """The names of the parameters that the variant trains."""
        ends = tuple(f".{part}" for part in REGISTRY[self.variant].trained)
        return frozenset(name for name in self.parts() if name.endswith(ends))

    def __str__(self) -> str:
        """A line for each adapted module, and how many parameters are trained."""
        shapes, count = self.parts(), dict.fromkeys(self.rank, 0)
        for name in self.trained():
            m, n = shapes[name]
            count[name.rpartition(".")[0]] += m * n
        lines = [
            f"{at}: r {r}, alpha {self.alpha[at]}, {count[at]} parameters"
            for at, r in self.rank.items()
        ]
        return "\n".join([*lines, f"{len(count)} projections, {sum(count.values())} parameters"])


def matches(name: str, target_modules: str | Sequence[str]) -> bool:
    """Whether ``target_modules`` matches the module's name.

    A string is a regular expression for the whole name: "q" does not match ``layers.0.q``, ".*q"
    also matches ``mlp.seq``. A list has names: each matches itself and what ends with a dot and
    it. "q" matches ``q`` and ``layers.0.q``, but not ``seq``, ``q2`` or ``q.extra``. An empty list
    matches nothing.

    Errors: re.error for a string that is no regular expression.
    Source: PEFT 0.21, ``check_target_module_exists``.
    """
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == end or name.endswith("." + end) for end in target_modules)


def layer_index(name: str, layers_pattern: str | Sequence[str] = ()) -> int | None:
    """The index of the layer that contains the module; None outside of layers.

    With ``layers_pattern`` it is the first number after one of the patterns, which begins the name
    or follows a dot; the first pattern that matches counts. Without, it is the first number after
    any part but the first: ``model.layers.1.experts.0.up`` is in layer 1, but
    ``layers.1.experts.0.up`` in 0 and ``layers.1.up`` in none. Give the pattern where names begin
    with the blocks. A number that ends the name is no layer. Patterns are regular expressions
    without a group: "layers|h" finds no layer in ``layers.1.up``, ["layers", "h"] finds 1.

    Source: PEFT 0.21, ``check_target_module_exists``.
    """
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    before = [rf"(?:^|.*?\.){name}" for name in names] if layers_pattern else [r".*?\.[^.]*"]
    matched = (re.match(rf"{start}\.(?P<idx>\d+)\.", name) for start in before)
    match = next((match for match in matched if match), None)
    return None if match is None or match["idx"] is None else int(match["idx"])


def is_target(
    name: str,
    target_modules: str | Sequence[str],
    *,
    exclude_modules: str | Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] = (),
) -> bool:
    """Whether the module gets an adapter. The first of these rules that applies decides.

    1. No, if ``exclude_modules`` matches it, as :func:`matches` does.
    2. No, if a regular expression of ``modules_to_save`` matches whole parts of the name, at any
       place. Which modules are saved is another question: :func:`is_saved`.
    3. Yes, if its whole name is in the list ``target_modules``, whatever its layer.
    4. Yes, if ``target_modules`` matches it and, unless ``layers_to_transform`` is empty, its
       :func:`layer_index` is among them.

    PEFT's configuration refuses ``layers_to_transform`` beside a regular expression; here both
    apply.

    Source: PEFT 0.21, ``check_target_module_exists``.
    """
    if matches(name, exclude_modules):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in modules_to_save):
        return False
    if not isinstance(target_modules, str) and name in target_modules:
        return True
    if not matches(name, target_modules):
        return False
    layers = layers_to_transform
    indices = [layers] if isinstance(layers, int) else list(layers or ())
    return not indices or layer_index(name, layers_pattern) in indices


def all_linear(linears: Iterable[str], heads: Iterable[str] = ("head",)) -> list[str]:
    """The modules of the target "all-linear": all projections except the output head.

    For PEFT a classifier's head is an output head only under the task type SEQ_CLS. PEFT turns
    "all-linear" into a list of last names: a head ``lm.out`` is then adapted if there is a
    projection ``out``.

    Source: PEFT 0.21, ``_maybe_include_all_linear_layers``.
    """
    left_out = set(heads)
    return [at for at in linears if at not in left_out]


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value, a rank or an alpha, of the first pattern that matches the module's name.

    A pattern is a regular expression for the whole name or for what follows a dot, in a group:
    "q|up" matches ``layers.0.up``; "q" matches neither ``seq`` nor ``q.extra``. The first in the
    mapping's order counts, even if another is longer. The name itself as a key counts last.

    Source: PEFT 0.21, ``get_pattern_key``.
    """
    values = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name))
    return next(values, patterns.get(name, default))


def with_parents(name: str) -> Iterator[str]:
    """The modules that contain the module by its dotted name, the outermost first, and itself."""
    return accumulate(name.split("."), "{}.{}".format)


def is_saved(name: str, modules_to_save: Sequence[str]) -> bool:
    """Whether ``modules_to_save`` trains the module, or one that contains it, in full.

    The end of a name decides, without a dot before it: "norm" also matches ``layers.0.norm``, "q"
    also ``seq``, and "_proj" every projection. Give whole names.

    Source: PEFT 0.21, ``_set_trainable``.
    """
    return any(parent.endswith(tuple(modules_to_save)) for parent in with_parents(name))


def resolve_targets(lora: LoraConfig, linears: Mapping[str, tuple[int, int]]) -> ResolvedTargets:
    """The modules among ``linears`` (name to shape) that ``lora`` matches.

    ``linears`` are a model's projections, or its ``matrices()``: those, the tables as (d, v), and a
    tied head. "all-linear" matches projections only, whichever is given.

    ``exclude_modules`` and ``layers_to_transform`` may name what is not there, as in PEFT.

    Errors: ValueError if it matches nothing, or if a name of ``target_modules`` or a pattern of
    ranks or alphas matches nothing; if it ties what is not both there, or gives the two other
    ranks.
    """
    matched = _matched(lora, linears)
    _check_matched(lora, linears, matched)
    rank = {at: pattern_value(lora.rank_pattern, at, lora.r) for at in matched}
    alpha = {at: pattern_value(lora.alpha_pattern, at, lora.lora_alpha) for at in matched}
    if lora.ensure_weight_tying and _TIED.issubset(rank) and rank["head"] != rank["embed"]:
        raise ValueError(
            f"ensure_weight_tying: ranks {rank['embed']} and {rank['head']}, expected one"
        )
    return ResolvedTargets(rank, alpha, {at: linears[at] for at in matched}, lora.variant)


_TIED = {"embed", "head"}


def _matched(lora: LoraConfig, linears: Mapping[str, tuple[int, int]]) -> list[str]:
    """The modules that get an adapter; of a tied pair, both or none."""
    possible: Iterable[str] = linears
    wanted = lora.target_modules
    if wanted == "all-linear":
        possible, wanted = all_linear(linears, ("head", *TABLES)), ".*"
    matched = {
        at
        for at in possible
        if is_target(
            at,
            wanted,
            exclude_modules=lora.exclude_modules,
            layers_to_transform=lora.layers_to_transform,
            layers_pattern="layers",
        )
    }
    if lora.ensure_weight_tying and _TIED & matched:
        if not _TIED.issubset(linears):
            expected = "an embedding and a head; give the model's matrices()"
            raise ValueError(f"ensure_weight_tying: expected {expected}")
        matched |= _TIED
    return [at for at in linears if at in matched]


def _check_matched(
    lora: LoraConfig, linears: Mapping[str, tuple[int, int]], matched: Sequence[str]
) -> None:
    """Refuse a name or a pattern that matches nothing."""
    targets = lora.target_modules
    names = [] if isinstance(targets, str) else targets
    unmatched: list[Any] = [n for n in names if not any(matches(at, [n]) for at in linears)]
    if not matched and not unmatched:
        unmatched = [targets]
    _refuse_unmatched("target_modules", unmatched, linears)
    for name in ("rank_pattern", "alpha_pattern"):
        unmatched = [
            pattern
            for pattern in getattr(lora, name)
            if not any(pattern_value({pattern: True}, at, False) for at in matched)
        ]
        _refuse_unmatched(name, unmatched, linears)


def _refuse_unmatched(name: str, unmatched: Sequence[Any], linears: Iterable[str]) -> None:
    """Errors: ValueError with the names that there are, and the most similar one."""
    if not unmatched:
        return
    at, ends = next(iter(linears)), list(dict.fromkeys(at.rpartition(".")[2] for at in linears))
    asked = str(unmatched[0])
    close = get_close_matches(asked.rpartition(".")[2], [end for end in ends if end != asked], 1)
    hint = f"did you mean {close[0]}? " if close and asked not in ends else ""
    raise ValueError(
        f"{name}: {', '.join(map(repr, unmatched))} matches no module; {hint}names, such as {at}, "
        f"end with {', '.join(ends)}"
    )


def scales(lora: LoraConfig, targets: ResolvedTargets) -> dict[str, Any]:
    """s of each adapted module: α / r, or α / √r, or as its variant's entry has it."""
    of = lora.entry.scale
    return {at: of(targets.alpha[at], r, lora.r, lora.use_rslora) for at, r in targets.rank.items()}


def inject(
    W: Weights,
    lora: LoraConfig,
    linears: Mapping[str, tuple[int, int]],
    rng: np.random.Generator,
) -> tuple[Weights, TrainableSpec]:
    """The weights with fresh adapters beside each chosen module, and what is trained of them.

    The adapters have their weight's dtype. An initialization that takes them out of the weight
    leaves its residual in what is returned, and W as it was; tables start as "embedding" whatever
    ``init_lora_weights`` says. Where an initialization is shared (VeRA's), A and B are parts of
    one draw.

    Errors: those of :func:`resolve_targets` and of the initialization; ValueError if W has adapters
    already, if an expression of ``lora.modules_to_save`` matches no parameter, if a table has no
    such adapter, no such row, or the head to tie has a weight of its own; if W is not made of
    ``lora.layer_replication``.
    """
    if any(name.endswith(".A") for name in W):
        raise ValueError("the weights have adapters already; disable or merge them first")
    targets = resolve_targets(lora, linears)
    _check_tables(W, lora, targets)
    _check_layers(W, lora.layer_replication)
    s = scales(lora, targets)
    factors = _shared_factors(W, lora, targets, rng)
    changed: Weights = {}
    for at, r in targets.rank.items():
        weight = W[weight_of(at, W)]
        M = weight.T if at in TABLES else weight
        if factors:
            base = M
            A, B = shared_part(*factors, *M.shape)
        else:
            init = "embedding" if at in TABLES else lora.init_lora_weights
            base, A, B = INITIALIZATIONS[init].start(rng, M, r, s[at])
        parts = fresh_parts(lora.equation, base, A, B, s[at])
        changed |= {f"{at}.{part}": v for part, v in zip(lora.equation.parts, parts, strict=True)}
        if base is not M:
            changed[f"{at}.weight"] = base
    if lora.ensure_weight_tying and "head" in targets.rank:
        changed["head.A"], changed["head.B"] = twin(changed["embed.A"], changed["embed.B"])
    trained = targets.trained() | _trained_of_base(W, lora, targets)
    variants = {} if lora.equation == LORA else dict.fromkeys(targets.rank, lora.equation)
    return {**W, **changed}, TrainableSpec(scale=s, trained=trained, variant=variants)


def _shared_factors(
    W: Weights, lora: LoraConfig, targets: ResolvedTargets, rng: np.random.Generator
) -> tuple[Array, Array] | None:
    """A and B for the greatest height and width, where all modules share one draw."""
    init = INITIALIZATIONS[lora.init_lora_weights]
    if not init.shared:
        return None
    heights, widths = zip(*targets.shape.values(), strict=True)
    dtype = W[weight_of(next(iter(targets.rank)), W)].dtype
    outline = np.broadcast_to(dtype.type(0), (max(heights), max(widths)))
    _, A, B = init.start(rng, outline, lora.r, 1)
    return A.astype(dtype), B.astype(dtype)


def _trained_of_base(W: Weights, lora: LoraConfig, targets: ResolvedTargets) -> set[str]:
    """The base's parameters that are trained: ``modules_to_save`` and ``bias``.

    Errors: ValueError for an expression that matches no parameter.
    """
    idle = [p for p in lora.modules_to_save if not any(re.fullmatch(p, name) for name in W)]
    if idle:
        raise ValueError(f"modules_to_save: {idle} match no parameter; there are: {', '.join(W)}")
    trained = {name for name in W if any(re.fullmatch(p, name) for p in lora.modules_to_save)}
    if lora.bias == "all":
        trained |= {name for name in W if name.endswith(".bias")}
    if lora.bias == "lora_only":
        trained |= {f"{at}.bias" for at in targets.rank} & W.keys()
    return trained


def _check_tables(W: Weights, lora: LoraConfig, targets: ResolvedTargets) -> None:
    """Refuse what a table or a tied head cannot have."""
    for at in TABLES:
        if at in targets.rank and not lora.entry.tables:
            raise ValueError(f"{at} is a table: it has no adapter of the variant {lora.variant!r}")
    if lora.ensure_weight_tying and "head" in targets.rank and "head.weight" in W:
        raise ValueError(
            "ensure_weight_tying: the head has a weight of its own; expected a tied model"
        )
    for at, ids in lora.trainable_token_indices.items():
        rows = len(W.get(f"{at}.weight", ()))
        if len({*ids} & {*range(rows)}) < len(ids) or not ids:
            expected = f"expected each once, from 0 to {rows - 1}"
            raise ValueError(f"trainable_token_indices {list(ids)} of {at}: {expected}")


def _check_layers(W: Weights, ranges: Sequence[tuple[int, int]]) -> None:
    """Refuse a model that ``layer_replication`` has not made."""
    layers = {int(name.split(".")[1]) for name in W if name.startswith("layers.")}
    if ranges and len(layers) != sum(end - begin for begin, end in ranges):
        raise ValueError(f"layer_replication {ranges} of {len(layers)} layers: replicate first")


def with_invocation(tuning: TrainableSpec, ids: Array, tokens: Sequence[int]) -> TrainableSpec:
    """The tuning for one batch of aLoRA: K is 0 before the last invocation, times dropout's K.

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
    """dA = dA₁ + dB₂ᵀ, dB = dB₁ + dA₂ᵀ, for an embedding's factors that a tied head shares.

    The head's gradients are their transposes: an optimizer that works by entries keeps the two
    equal.

    Source: A₂ = B₁ᵀ and B₂ = A₁ᵀ, as `lora.twin` has it, by the chain rule.
    """
    dA, dB = twin(gradients["head.A"], gradients["head.B"])
    dA, dB = gradients["embed.A"] + dA, gradients["embed.B"] + dB
    head = dict(zip(("head.A", "head.B"), twin(dA, dB), strict=True))
    return {**gradients, "embed.A": dA, "embed.B": dB, **head}


def replicated_layers(layers: int, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """The original index of each layer of the deeper model that ``layer_replication`` makes.

    The ``ranges`` (0, 4) and (2, 5) of five layers give 0 1 2 3 2 3 4: the end is excluded, and a
    layer may be repeated, reordered or left out.

    Errors: ValueError without a range, or for one that is empty or outside the layers.
    Source: PEFT 0.21, ``replicate_layers``, which counts negative numbers from the end.
    """
    wrong = [pair for pair in ranges if not 0 <= pair[0] < pair[1] <= layers]
    if wrong or not ranges:
        raise ValueError(
            f"ranges: found {wrong or 'none'}, expected 0 ≤ start < end ≤ {layers} in each"
        )
    return [i for start, end in ranges for i in range(start, end)]


def replicate_layers(W: Weights, c: Any, ranges: Sequence[tuple[int, int]]) -> tuple[Weights, Any]:
    """A deeper model of the same layers, those of :func:`replicated_layers`: weights and config.

    The copies share their arrays: a frozen base takes no more memory. :func:`inject` gives each
    copy its own adapters. Trained parameters of the base become separate arrays; to keep them
    equal, sum their gradients.

    Errors: those of :func:`replicated_layers`; ValueError if W has adapters already.
    """
    source = replicated_layers(c.layers, ranges)
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
