"""Every kind of layer, adapted by any variant: how a case of it is drawn, run, merged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from minilora.spec.layers import (
    Geometry,
    adapted_conv,
    adapted_embedding,
    adapted_experts,
    adapted_fused,
    block_diagonal,
    conv,
)
from minilora.spec.lora import Variant, merge_weight
from minilora.spec.ops import Array, Back, embedding, linear
from minilora.spec.variants import REGISTRY, extended, part_shapes
from minilora.verify.properties.exact_numbers import SqrtFraction, exactly

Part = tuple[Array, ...]


@dataclass(frozen=True)
class LayerCase:
    """An adapted layer with its input and a cotangent: the arguments of forward and backward.

    ``W`` is laid out as the kind stores it; ``P`` has a tuple of the variant's parameters for each
    adapted matrix. ``x`` has numbers, or a table's row indices. ``on`` is aLoRA's multiplier, 0
    before the invocation, which also applies outside training. ``extra``: the kind's own settings.
    """

    kind: str
    entry: str
    x: Array
    W: Array
    b: Array | None
    P: tuple[Part, ...]
    s: Any
    K: Array | None
    dy: Array
    alpha: Any
    r: int
    on: Array | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> Variant:
        """The variant under test."""
        return REGISTRY[self.entry].variant

    def without_dropout(self) -> LayerCase:
        """The case outside training."""
        return replace(self, K=self.on)

    def forward(self, f: Any = None) -> tuple[Array, Back]:
        """y, back; back(dy) returns dx (None for row indices) and each matrix's gradients."""
        return KINDS[self.kind].forward(self, f or self.variant.linear)

    def base(self) -> tuple[Array, Back]:
        """y, back of the layer without its adapter; back(dy) returns dx or None."""
        return KINDS[self.kind].base(self)

    def matrices(self) -> list[tuple[Array, Array | None, Part]]:
        """Each adapted matrix (m, n) with its bias and its parameters."""
        return KINDS[self.kind].take(self)

    def with_matrices(self, new: list[tuple[Array, Array | None]]) -> LayerCase:
        """The case with other matrices and biases in their places."""
        return KINDS[self.kind].put(self, new)

    def merged(self) -> LayerCase:
        """The case whose base is the merged weight."""
        return self.with_matrices(
            [self.variant.merge(W, b, *P, self.s) for W, b, P in self.matrices()]
        )

    def with_parts(self, **change: Callable[[Array], Array]) -> LayerCase:
        """The case with some of its parameters changed, by their names, in each matrix."""

        def new(part: Part) -> Part:
            named = zip(self.variant.parts, part, strict=True)
            return tuple(change[name](p) if name in change else p for name, p in named)

        return replace(self, P=tuple(map(new, self.P)))


@dataclass(frozen=True)
class CaseDraw:
    """What a kind draws its arrays with: random entries, and adapted matrices.

    ``exact``: rationals instead of floats; ``square``: square matrices.
    """

    entry: str
    rng: np.random.Generator
    exact: bool
    square: bool

    def __call__(self, *shape: int) -> Array:
        """Entries of mean 0: normal, or halves of odd numbers, none of them 0."""
        if not self.exact:
            return self.rng.standard_normal(shape)
        if shape[1:] == (1,):  # no two equal: a diagonal matrix that is no multiple of I
            return exactly((2 * self.rng.permutation(24)[: shape[0], None] - 23) / 2)
        return exactly((2 * self.rng.integers(-4, 4, shape) + 1) / 2)

    def multiplier(self, *shape: int) -> Array:
        """K at p = ¼."""
        keep = self.rng.random(shape) >= 1 / 4
        return exactly(keep) * SqrtFraction(4, 3) if self.exact else keep / 0.75

    @property
    def sizes(self) -> tuple[int, int]:
        """m, n of a matrix, both above the rank."""
        return (self.r + 2, self.r + 2) if self.square else (self.r + 1, self.r + 3)

    @property
    def alpha(self) -> Any:
        """7/2: with r = 2 the scale is 7/4, for rsLoRA r = 4 and s = 7/4."""
        return SqrtFraction(7, 2) if self.exact else 3.5

    @property
    def r(self) -> int:
        """The rank, whose root is rational."""
        return 4 if REGISTRY[self.entry].rslora else 2

    @property
    def s(self) -> Any:
        """The scale."""
        return self.alpha / (2 if REGISTRY[self.entry].rslora else self.r)

    def adapted(self, m: int, n: int) -> tuple[Array, Part]:
        """A matrix W and random parameters.

        Over rationals the rows of W + s B A have rational norms if the variant needs them:
        (2 a, ‖a‖² - 1) / (‖a‖² + 1) is a unit vector for every a.
        """
        shapes = part_shapes(REGISTRY[self.entry].variant, self.r, m, n)
        P = {part: self(*shape) for part, shape in shapes.items()}
        W = self(m, n)
        if self.exact and "magnitude" in P:
            a = self(m, n - 1)
            square = (a * a).sum(1, keepdims=True)
            unit = np.concatenate([2 * a, square - 1], axis=1) / (square + 1)
            W = merge_weight(unit * self(m, 1), P["A"], P["B"], -self.s)
        return W, tuple(P.values())


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: how it is drawn and run, and where its adapted matrices are.

    ``take(case)`` returns the adapted matrices, ``put(case, matrices)`` the case with others in
    their places. `Entry.lacks` has the variants that do not apply to it.
    """

    description: str
    draw: Callable[[CaseDraw], dict[str, Any]]
    forward: Callable[[LayerCase, Any], tuple[Array, Back]]
    base: Callable[[LayerCase], tuple[Array, Back]]
    take: Callable[[LayerCase], list[tuple[Array, Array | None, Part]]]
    put: Callable[[LayerCase, list[tuple[Array, Array | None]]], LayerCase]


def _linear(case: LayerCase, f: Any) -> tuple[Array, Back]:
    y, back = f(case.x, case.W, case.b, *case.P[0], case.s, case.K)

    def back_parts(dy: Array) -> tuple[Any, ...]:
        dx, *dP = back(dy)
        return dx, tuple(dP)

    return y, back_parts


def _put(case: LayerCase, new: list[tuple[Array, Array | None]], **changed: Any) -> LayerCase:
    ((W, b),) = new
    return replace(case, W=W, b=b, extra=case.extra | changed)


def _transposed(case: LayerCase) -> LayerCase:
    return replace(case, W=case.W.T)


def _put_transposed(case: LayerCase, new: list[tuple[Array, Array | None]]) -> LayerCase:
    return _transposed(_put(case, new))


def _embedding(case: LayerCase, f: Any) -> tuple[Array, Back]:
    y, back = adapted_embedding(f, case.x, case.W, case.P[0], case.s, case.extra["factor"])
    return y, lambda dy: (None, back(dy))


def _embedding_base(case: LayerCase) -> tuple[Array, Back]:
    return case.extra["factor"] * embedding(case.x, case.W)[0], lambda dy: None


def _tied(case: LayerCase, f: Any) -> tuple[Array, Back]:
    """The head on the rows of its table; after a merge, on those of the original table."""
    h, _ = embedding(case.x, case.extra.get("table", case.W))
    y, back = f(h, case.W, case.b, *case.P[0], case.s, case.K)
    return y, lambda dy: (None, tuple(back(dy)[1:]))


def _tied_base(case: LayerCase) -> tuple[Array, Back]:
    h, _ = embedding(case.x, case.extra.get("table", case.W))
    return linear(h, case.W, case.b)[0], lambda dy: None


def _put_tied(case: LayerCase, new: list[tuple[Array, Array | None]]) -> LayerCase:
    """The case without the tie: the embedding keeps its table."""
    return _put(case, new, table=case.extra.get("table", case.W))


def _fused(case: LayerCase, f: Any) -> tuple[Array, Back]:
    q, v = case.P
    rows = case.extra["rows"]
    return adapted_fused(f, case.x, case.W, case.b, (q, None, v), rows, case.s, case.K)


def _ends(case: LayerCase) -> tuple[slice, slice]:
    q, k, _ = case.extra["rows"]
    return slice(q), slice(q + k, None)


def _take_fused(case: LayerCase) -> list[tuple[Array, Array | None, Part]]:
    biases = [None if case.b is None else case.b[rows] for rows in _ends(case)]
    weights = [case.W[rows] for rows in _ends(case)]
    return list(zip(weights, biases, case.P, strict=True))


def _put_fused(case: LayerCase, new: list[tuple[Array, Array | None]]) -> LayerCase:
    W, b = case.W.copy(), None if case.b is None else case.b.copy()
    for rows, (Wi, bi) in zip(_ends(case), new, strict=True):
        W[rows] = Wi
        if b is not None and bi is not None:
            b[rows] = bi
    return replace(case, W=W, b=b)


def _experts(case: LayerCase, f: Any) -> tuple[Array, Back]:
    stacked = [np.stack(parts) for parts in zip(*case.P, strict=True)]
    y, back = adapted_experts(f, case.x, case.W, case.b, stacked, case.extra["index"], case.s)

    def back_parts(dy: Array) -> tuple[Any, ...]:
        dx, *dP = back(dy)
        return dx, *(tuple(d[e] for d in dP) for e in range(len(case.P)))

    return y, back_parts


def _experts_base(case: LayerCase) -> tuple[Array, Back]:
    y, back = adapted_experts(linear, case.x, case.W, case.b, (), case.extra["index"], None, ())
    return y, lambda dy: back(dy)[0]


def _take_experts(case: LayerCase) -> list[tuple[Array, Array | None, Part]]:
    biases = [None] * len(case.W) if case.b is None else list(case.b)
    return list(zip(case.W, biases, case.P, strict=True))


def _put_experts(case: LayerCase, new: list[tuple[Array, Array | None]]) -> LayerCase:
    W, b = zip(*new, strict=True)
    return replace(case, W=np.stack(W), b=None if case.b is None else np.stack(b))


def _conv(case: LayerCase, f: Any) -> tuple[Array, Back]:
    y, back = adapted_conv(f, case.x, case.W, case.b, case.P[0], case.s, case.K, **case.extra)

    def back_parts(dy: Array) -> tuple[Any, ...]:
        dx, *dP = back(dy)
        return dx, tuple(dP)

    return y, back_parts


def _take_conv(case: LayerCase) -> list[tuple[Array, Array | None, Part]]:
    groups = case.extra["groups"]
    W, _ = block_diagonal(case.W.reshape(len(case.W), -1), groups)
    A, B, *others = case.P[0]
    return [(W, case.b, (A, block_diagonal(B, groups)[0], *others))]


def _put_conv(case: LayerCase, new: list[tuple[Array, Array | None]]) -> LayerCase:
    """The case without groups: an adapter has entries everywhere."""
    ((W, b),) = new
    W = W.reshape(len(W), -1, *case.extra["geometry"].kernel)
    (_, _, P) = _take_conv(case)[0]
    return replace(case, W=W, b=b, P=(P,), extra=case.extra | {"groups": 1})


def _draw_linear(draw: CaseDraw) -> dict[str, Any]:
    m, n = draw.sizes
    W, P = draw.adapted(m, n)
    K = draw.multiplier(n, 4)
    return {"x": draw(n, 4), "W": W, "b": draw(m, 1), "P": (P,), "K": K, "dy": draw(m, 4)}


def _draw_transposed(draw: CaseDraw) -> dict[str, Any]:
    drawn = _draw_linear(draw)
    return drawn | {"W": drawn["W"].T}


def _draw_embedding(draw: CaseDraw) -> dict[str, Any]:
    d, v = draw.sizes
    W, P = draw.adapted(d, v)
    ids = draw.rng.integers(0, v, 6)  # more columns than rows: some number comes twice
    factor = {"factor": SqrtFraction(3, 2) if draw.exact else 1.5}
    return {"x": ids, "W": W.T, "b": None, "P": (P,), "K": None, "dy": draw(d, 6), "extra": factor}


def _draw_tied(draw: CaseDraw) -> dict[str, Any]:
    v, d = draw.sizes
    W, P = draw.adapted(v, d)
    ids = draw.rng.integers(0, v, 4)
    K = draw.multiplier(d, 4)
    return {"x": ids, "W": W, "b": None, "P": (P,), "K": K, "dy": draw(v, 4)}


def _draw_fused(draw: CaseDraw) -> dict[str, Any]:
    m, n = draw.sizes
    rows = (m, m, m) if draw.square else (2 * m, m, m)
    (q, Pq), (v, Pv) = (draw.adapted(m, n) for m in (rows[0], rows[2]))
    W = np.concatenate([q, draw(rows[1], n), v])
    drawn = {"x": draw(n, 4), "W": W, "b": draw(len(W), 1), "P": (Pq, Pv)}
    return drawn | {"K": draw.multiplier(n, 4), "dy": draw(len(W), 4), "extra": {"rows": rows}}


def _draw_experts(draw: CaseDraw) -> dict[str, Any]:
    m, n = draw.sizes
    W, P = zip(*(draw.adapted(m, n) for _ in range(3)), strict=True)
    index = np.array([2, 0, 2, 0, 2])  # one expert has no columns
    drawn = {"x": draw(n, 5), "W": np.stack(W), "b": draw(3, m, 1), "P": P, "K": None}
    return drawn | {"dy": draw(m, 5), "extra": {"index": index}}


def _draw_conv(dimensions: int, draw: CaseDraw) -> dict[str, Any]:
    c, m, rng = 2, draw.r + 2, draw.rng
    kernel = (3, 2)[:dimensions]
    mode = ("zeros", "reflect", "replicate", "circular")[rng.integers(4)]
    stride, dilation = ((2, 1), (1, 2)) if rng.random() < 0.5 else ((1, 2), (2, 1))
    padding = ((1, 0), (1, 1))[:dimensions]
    geometry = Geometry(kernel, stride[:dimensions], padding, dilation[:dimensions], mode)
    # In groups the rest of a row is 0 - s B A, of no rational norm, and each has a component alone.
    variant = extended(REGISTRY[draw.entry].variant)
    ranks = any(column.rows == "r" for column in variant.columns.values())
    groups = 2 if variant.additive and not ranks else 1
    size = math.prod(kernel)
    W, (A, B, *others) = draw.adapted(m, c // groups * size)
    if groups > 1:
        A, B = draw(draw.r, c * size), B[:, : draw.r // groups]
    x = draw(c, 2, *(5, 4)[:dimensions])
    y, _ = geometry.places(x.shape[2:])
    drawn = {"x": x, "W": W.reshape(m, -1, *kernel), "b": draw(m, 1), "P": ((A, B, *others),)}
    extra = {"geometry": geometry, "groups": groups}
    return drawn | {"K": draw.multiplier(*x.shape), "dy": draw(m, 2, *y), "extra": extra}


_CONV = (_conv, lambda case: conv(case.x, case.W, case.b, **case.extra), _take_conv, _put_conv)


KINDS: dict[str, LayerKind] = {
    "linear": LayerKind(
        "a weight (out, in)",
        _draw_linear,
        _linear,
        lambda case: linear(case.x, case.W, case.b),
        lambda case: [(case.W, case.b, case.P[0])],
        _put,
    ),
    "transposed": LayerKind(
        "a weight stored (in, out), as GPT-2's Conv1D has it",
        _draw_transposed,
        lambda case, f: _linear(_transposed(case), f),
        lambda case: linear(case.x, case.W.T, case.b),
        lambda case: [(case.W.T, case.b, case.P[0])],
        _put_transposed,
    ),
    "fused": LayerKind(
        "Q, K and V in one weight, Q and V adapted, of unequal rows as grouped heads have them",
        _draw_fused,
        _fused,
        lambda case: linear(case.x, case.W, case.b),
        _take_fused,
        _put_fused,
    ),
    "embedding": LayerKind(
        "a table with a factor, as Gemma's",
        _draw_embedding,
        _embedding,
        _embedding_base,
        lambda case: [(case.W.T, None, case.P[0])],
        _put_transposed,
    ),
    "tied": LayerKind(
        "a head whose weight is the embedding's, the head adapted",
        _draw_tied,
        _tied,
        _tied_base,
        lambda case: [(case.W, case.b, case.P[0])],
        _put_tied,
    ),
    "experts": LayerKind(
        "one weight per expert; each column goes through one",
        _draw_experts,
        _experts,
        _experts_base,
        _take_experts,
        _put_experts,
    ),
    "conv1": LayerKind(
        "a 1-D convolution, with stride, dilation, padding and groups",
        partial(_draw_conv, 1),
        *_CONV,
    ),
    "conv2": LayerKind(
        "a 2-D convolution, with stride, dilation, padding and groups",
        partial(_draw_conv, 2),
        *_CONV,
    ),
}
"""Every kind of layer by its name."""


def draw_case(
    entry: str, kind: str, rng: np.random.Generator, exact: bool = True, square: bool = False
) -> LayerCase:
    """A case with a bias, dropout, the scale 7/4, B ≠ 0 and magnitudes unlike at the start."""
    draw = CaseDraw(entry, rng, exact, square)
    drawn = KINDS[kind].draw(draw)
    if REGISTRY[entry].injected is not None:
        on = np.arange(drawn["K"].shape[1]) > 1  # two tokens stand before the invocation
        on = np.broadcast_to(exactly(on) if exact else on * 1.0, drawn["K"].shape)
        drawn |= {"on": on, "K": on * drawn["K"]}
    return LayerCase(kind, entry, s=draw.s, alpha=draw.alpha, r=draw.r, **drawn)


def answers(case: LayerCase, f: Any = None) -> tuple[Array, Any, list[dict[str, Array]]]:
    """y, dx, and the parameters' gradients by name for each matrix."""
    y, back = case.forward(f)
    dx, *dP = back(case.dy)
    return y, dx, [dict(zip(case.variant.parts, d, strict=True)) for d in dP]
