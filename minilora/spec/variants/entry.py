"""What a variant is in the registry: its equation, its parameters, what it changes and breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.lora import LORA, Variant, merge_weight, scale
from minilora.spec.ops import Array


@dataclass(frozen=True)
class Column:
    """A parameter beside A and B: a column of numbers.

    ``rows``: "m", an entry for each output feature, or "r", one for each rank. ``start``: its
    value before the first step, or a function that forms it from V = W + s B A (m, n).
    """

    rows: str
    start: float | Callable[[Array], Array] = 0.0

    def shape(self, r: int, m: int) -> tuple[int, int]:
        """(m, 1) or (r, 1)."""
        return ({"m": m, "r": r}[self.rows], 1)


@dataclass(frozen=True)
class Peft:
    """How PEFT's files say a variant.

    ``peft_type``: the kind of configuration; ``setting``: the field of it that turns the variant
    on, "" where none does; ``tensors``: the end of each parameter's name after the module's path;
    ``flat``: a convolution's factors lie as matrices; ``takes_init``: PEFT takes another
    ``init_lora_weights`` than true with it; ``refuses``: the kinds of layers (see
    `verify.properties.layer_kinds`) on which PEFT has no such adapter, with the reason.
    """

    peft_type: str = "LORA"
    setting: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)
    flat: bool = False
    takes_init: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)


LORA_TENSORS = {"A": "lora_A.weight", "B": "lora_B.weight"}
"""The names of LoRA's factors in PEFT's files, after the module's path."""


@dataclass(frozen=True)
class ExtendedVariant(Variant):
    """An equation other than LoRA's.

    ``columns``: its parameters beside A and B, in the order of ``parts``; ``factors(*parts)``: A, B
    and c with ΔW = s B A and Δb = s c (c None: no Δb), None where ΔW is of full rank; ``peft``: how
    PEFT's files say it.
    """

    columns: Mapping[str, Column] = field(default_factory=dict, compare=False)
    factors: Callable[..., tuple[Array, Array, Array | None]] | None = field(
        default=None, compare=False
    )
    peft: Peft = field(default=Peft(tensors=LORA_TENSORS), compare=False)


_EXTENDED_LORA = ExtendedVariant(
    LORA.parts, LORA.linear, LORA.merge, factors=lambda A, B: (A, B, None)
)


def extended(variant: Variant) -> ExtendedVariant:
    """The variant with its columns, factors and PEFT's names; LoRA itself has no columns."""
    return variant if isinstance(variant, ExtendedVariant) else _EXTENDED_LORA


def part_shapes(variant: Variant, r: int, m: int, n: int) -> dict[str, tuple[int, int]]:
    """The shape of each of the variant's parameters: A (r, n), B (m, r), and its columns."""
    columns = extended(variant).columns.items()
    return {"A": (r, n), "B": (m, r)} | {part: c.shape(r, m) for part, c in columns}


def fresh_parts(variant: Variant, W: Array, A: Array, B: Array, s: Any) -> tuple[Array, ...]:
    """The variant's parameters before the first step, in W's dtype, given the frozen W, A and B.

    Shapes: W (m, n), A (r, n), B (m, r), s () -> the parameters, as in `part_shapes`.
    """
    A, B = A.astype(W.dtype, copy=False), B.astype(W.dtype, copy=False)
    parts = [A, B]
    for column in extended(variant).columns.values():
        if callable(column.start):
            value = column.start(merge_weight(W, A, B, s))
        else:
            value = np.full(column.shape(*B.shape[::-1]), column.start)
        parts.append(value.astype(W.dtype))
    return tuple(parts)


def start(
    variant: Variant, init: str, rng: np.random.Generator, W: Array, r: int, s: Any
) -> tuple[Array, tuple[Array, ...]]:
    """The frozen base, and the variant's parameters before the first step, in W's dtype.

    ``init`` is one of `INITIALIZATIONS`.

    Shapes: W (m, n), r (), s () -> base (m, n), and the parameters as in `part_shapes`.
    Errors: ValueError as the initialization has it.
    """
    base, A, B = INITIALIZATIONS[init].start(rng, W, r, s)
    return base, fresh_parts(variant, base, A, B, s)


LAWS = {
    "merge": "W' x + b' is the output, and dx the merged layer's.",
    "initial-output": "With fresh parameters the output is the base's.",
    "frozen-weight": "The base's weight stays as it is, from the start on.",
    "zero-B": "With B = 0 the output is the base's.",
    "balance": "Bᵀ dB = dA Aᵀ.",
    "basis-change": "A → R A, B → B R⁻¹ changes neither y nor dx.",
    "rescaling": "s → c s, B → B / c changes neither y, dx nor dA; dB becomes c dB.",
    "rank": "The rank of W' - W is at most r.",
    "concatenation": "Two adapters are one of the summed rank: A stacked, B side by side.",
    "single-combination": "An adapter combined alone at weight 1 is itself.",
    "dropout-mean": "The mean over all dropout masks is the output without dropout.",
    "token-independence": (
        "Each token's output and dx are its own, and the parameters' gradients add up."
    ),
}
"""The laws that LoRA keeps, a sentence each; an `Entry` says which its variant breaks, and why."""


def module_scale(lora_alpha: Any, r: int, config_r: int, use_rslora: bool) -> Any:
    """s = α / r or α / √r of one module, by its own α and rank."""
    return scale(lora_alpha, r, use_rslora)


@dataclass(frozen=True)
class Entry:
    """A variant in the registry: all that is said of it.

    ``differs``: what it changes of LoRA, in a sentence; ``source``: the paper or the library;
    ``variant``: its equation; ``injected``: the equation that `inject` puts there, where a batch
    has to say on which tokens it acts; ``trained``: which of its parameters are; ``init``: its
    initialization, which ``init_lora_weights`` may replace where it is "kaiming"; ``rslora``:
    whether s = α/√r; ``scale(lora_alpha, r, config_r, use_rslora)``: s of a module of rank r, under
    a `LoraConfig` of rank config_r; ``lr_ratio``: how much faster B learns.

    ``breaks``: each law of `LAWS` that it does not keep; ``lacks``: the kinds of layers that it
    does not go with; ``refuses``: the fields of `LoraConfig` that it does not take; ``untrained``:
    why no run trains it; each with the reason. ``tables``: whether embeddings have it;
    ``constant_norm``: ``back`` holds the norm of V constant, so that it is not the derivative of
    the forward lines; ``pruned``: AdaLoRA's budget prunes its rank in training; ``written_as``: the
    variant as which PEFT's files have it, since the two compute the same.
    """

    differs: str
    source: str
    variant: Variant = LORA
    injected: Variant | None = None
    trained: tuple[str, ...] = ("A", "B")
    init: str = "kaiming"
    rslora: bool = False
    scale: Callable[[Any, int, int, bool], Any] = module_scale
    lr_ratio: float = 1.0
    breaks: Mapping[str, str] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    untrained: str = ""
    tables: bool = True
    constant_norm: bool = False
    pruned: bool = False
    written_as: str = ""

    @property
    def equation(self) -> Variant:
        """What the adapted modules compute."""
        return self.injected or self.variant


NO_TABLE = {"embedding": "PEFT has no embedding with it"}
DIAGONAL_BETWEEN = "a diagonal matrix stands between A and B; only its own scalings pass through"
ONE_SCALE = {
    "use_rslora": "it has no rsLoRA's scale",
    "alpha_pattern": "it has one scale for all modules",
}
