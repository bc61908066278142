"""What an adapter changes of one tensor of the base: what a file says, and what the judge takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from minilora.spec.lora import LORA, Variant
from minilora.spec.ops import Array

KINDS = ("linear", "conv", "embedding", "expert", "bias", "tokens", "saved")
"""What is changed: a matrix (four kinds), a bias, rows of a table, or the whole tensor."""


class Tensor(Protocol):
    """A tensor in a file: all that the judge asks of it. It is read a block of rows at a time.

    ``scheme``: the quantizer's name, None for plain numbers; ``dtype``: that of plain numbers as
    stored, float32 of a quantized tensor.
    """

    @property
    def name(self) -> str:
        """Its name in the base."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers of `rows`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""

    @property
    def scheme(self) -> str | None:
        """The quantizer's name."""

    def rows(self, start: int, stop: int) -> Array:
        """Entries start … stop along the first axis, in ``dtype``; dequantized if quantized."""

    def spacing(self, start: int, stop: int) -> Array | None:
        """How far apart the numbers lie that the quantizer can store, for each entry of `rows`.

        In float32, and broadcast against `rows`; of a scheme with a table (NF4) the greater
        distance to the two neighbours. None for plain numbers.
        """


@dataclass(frozen=True, eq=False)
class Change:
    """One adapter's change of one tensor of the base.

    ``tensor``: the base's name of it; ``module``: the path that the adapter has for it; ``kind``:
    one of `KINDS`; ``variant``: the equation; ``parts``: its parameters by their names in the
    variant, in the dtype of the file and in the shapes of `minilora.spec.variants.part_shapes`
    for the matrix W (m, n) that the equation takes: A (r, n), B (m, r), columns (m, 1) or (r, 1).
    A convolution's kernels are flattened: A (r, c·kernel). Of ``kind`` bias they are {"c": (m, 1)},
    and b' = b + s c; of tokens {"ids": (k,), "rows": (k, d)}; of saved {"weight": the tensor}.

    ``scale``: s, as the configuration means it; ``weight``: what the adapter is multiplied with
    among several; the change is that of s · weight. ``transposed``: the tensor stores Wᵀ, as
    embeddings and Conv1D do. ``index``: which matrix of a tensor (experts, …) it is; ``rows``:
    which rows of the stored matrix it changes, where a projection is one part of a fused one.
    All else of the stored tensor is to stay.

    ``adapter``: the adapter's name; ``config``: the settings that led to the scale, as read: r,
    lora_alpha, use_rslora, rank_pattern's and alpha_pattern's defaults as default_r and
    default_alpha, use_dora, …; ``slack``: how much ΔW may be off in each entry because the file
    does not hold all of it (the start of PiSSA, which an SVD finds again).

    PiSSA as trained, on a base that lost its start s B₀ A₀, is two changes: -s B₀ A₀, then s B A.
    """

    tensor: str
    module: str
    parts: Mapping[str, Array]
    kind: str = "linear"
    variant: Variant = LORA
    scale: float = 1.0
    weight: float = 1.0
    transposed: bool = False
    index: int | None = None
    rows: tuple[int, int] | None = None
    adapter: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    slack: float = 0.0

    @property
    def s(self) -> float:
        """The scale with which the change counts: ``scale`` times ``weight``."""
        return self.scale * self.weight

    @property
    def values(self) -> tuple[Array, ...]:
        """The parameters in the order in which the variant's equation takes them."""
        return tuple(self.parts[name] for name in self.variant.parts)


@dataclass(frozen=True, eq=False)
class Around:
    """What else there is, where a wrong merge may have taken its change from.

    ``modules``: the adapter's changes of other tensors, and of a tensor of several matrices those
    of each; ``adapters``: other adapters' changes of
    this tensor; ``heads``: the numbers of query and of key heads, if known. Reading parts may be
    lazy: the judge looks at a change's parts only where its shapes fit.
    """

    modules: Sequence[Change] = ()
    adapters: Sequence[Change] = ()
    heads: tuple[int, int] | None = None
