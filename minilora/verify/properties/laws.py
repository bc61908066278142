"""Every variant on every kind of layer: cases to draw, and the laws that must hold of them.

A case runs over any number system. Over `Exact` rationals a law holds with ``==``, DoRA's too: the
weight is drawn so that the norms of its rows are rational.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from numbers import Rational
from typing import Any

import numpy as np

from minilora.spec.layers import (
    Geometry,
    adapted_conv,
    adapted_embedding,
    adapted_experts,
    adapted_fused,
    blocks_apart,
    conv,
)
from minilora.spec.lora import LORA, Variant, combine, merge_weight
from minilora.spec.ops import Array, Back, embedding, linear
from minilora.spec.variants import (
    LORA_BIAS,
    REGISTRY,
    part_shapes,
    rescaled_linear,
    row_norm,
    start,
)

Part = tuple[Array, ...]

UNIT_ROUNDOFF = np.finfo(float).eps / 2


class Exact(Fraction):
    """A rational number with a square root, where that is rational."""

    __slots__ = ()

    def sqrt(self) -> "Exact":
        """The root; ArithmeticError if it is irrational."""
        root = Exact(math.isqrt(self.numerator), math.isqrt(self.denominator))
        if root * root != self:
            raise ArithmeticError(f"the root of {self} is irrational")
        return root


def _closed(name: str) -> None:
    operate = getattr(Fraction, name)

    def method(self: Exact, *other: Any) -> Any:
        value = operate(self, *other)
        if type(value) is Fraction:  # in lowest terms: a constructor would divide again
            value.__class__ = Exact
        return value

    setattr(Exact, name, method)


for _name in ("add", "sub", "mul", "truediv"):
    _closed(f"__{_name}__")
    _closed(f"__r{_name}__")
_closed("__neg__")


def _exactly(array: Array) -> Array:
    entries: Array = np.frompyfunc(lambda v: Exact(Fraction(v)), 1, 1)(array.astype(object))
    return entries


@dataclass(frozen=True)
class Case:
    """A layer of a kind, adapted, with a cotangent: all that its forward and backward take.

    ``W`` lies as the kind stores it; ``P`` has a tuple of the variant's parameters for each matrix
    that is adapted. ``x`` are numbers, or a table's row numbers. ``on`` is the multiplier that
    stays outside training: activated LoRA's, 0 before the invocation.
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

    def still(self) -> "Case":
        """The case outside training: nothing is dropped."""
        return replace(self, K=self.on)

    def forward(self, f: Any = None) -> tuple[Array, Back]:
        """y, back; back(dy) gives dx (None where x are row numbers) and, per matrix, its parts'."""
        return KINDS[self.kind].forward(self, f or self.variant.linear)

    def base(self) -> tuple[Array, Back]:
        """y, back of the layer without its adapter; back(dy) gives dx or None."""
        return KINDS[self.kind].base(self)

    def matrices(self) -> list[tuple[Array, Array | None, Part]]:
        """Each adapted matrix (m, n) with its bias and its parameters."""
        return KINDS[self.kind].take(self)

    def with_matrices(self, new: list[tuple[Array, Array | None]]) -> "Case":
        """The case with other matrices and biases in their places."""
        return KINDS[self.kind].put(self, new)

    def merged(self) -> "Case":
        """The case whose base is the merged weight."""
        return self.with_matrices(
            [self.variant.merge(W, b, *P, self.s) for W, b, P in self.matrices()]
        )

    def with_parts(self, **change: Callable[[Array], Array]) -> "Case":
        """The case with some of its parameters changed, by their names, in each matrix."""

        def new(part: Part) -> Part:
            named = zip(self.variant.parts, part, strict=True)
            return tuple(change[name](p) if name in change else p for name, p in named)

        return replace(self, P=tuple(map(new, self.P)))


@dataclass(frozen=True)
class Draw:
    """What a kind draws its arrays from: entries of a number system, and adapted matrices."""

    entry: str
    rng: np.random.Generator
    exact: bool
    square: bool

    def __call__(self, *shape: int) -> Array:
        """Entries of mean 0: normal, or halves of odd numbers, none of them 0."""
        if not self.exact:
            return self.rng.standard_normal(shape)
        if shape[1:] == (1,):  # no two equal: a diagonal matrix that is no multiple of I
            return _exactly((2 * self.rng.permutation(24)[: shape[0], None] - 23) / 2)
        return _exactly((2 * self.rng.integers(-4, 4, shape) + 1) / 2)

    def multiplier(self, *shape: int) -> Array:
        """K at p = ¼."""
        keep = self.rng.random(shape) >= 1 / 4
        return _exactly(keep) * Exact(4, 3) if self.exact else keep / 0.75

    @property
    def sizes(self) -> tuple[int, int]:
        """m, n of a matrix, both above the rank."""
        return (self.r + 2, self.r + 2) if self.square else (self.r + 1, self.r + 3)

    @property
    def alpha(self) -> Any:
        """7/2: with r = 2 the scale is 7/4, for rsLoRA r = 4 and s = 7/4."""
        return Exact(7, 2) if self.exact else 3.5

    @property
    def r(self) -> int:
        """The rank, whose root is rational."""
        return 4 if REGISTRY[self.entry].rslora else 2

    @property
    def s(self) -> Any:
        """The scale."""
        return self.alpha / (2 if REGISTRY[self.entry].rslora else self.r)

    def adapted(self, m: int, n: int, free: Array | None = None) -> tuple[Array, Part]:
        """A matrix W, and parameters that are nowhere special.

        Over rationals the rows of W + s B A have rational norms, where the variant needs that:
        (2 a, ‖a‖² - 1) / (‖a‖² + 1) is a unit vector for every a.
        """
        shapes = part_shapes(REGISTRY[self.entry].variant, self.r, m, n)
        P = {part: self(*shape) for part, shape in shapes.items()}
        W = self(m, n) if free is None else free
        if self.exact and "magnitude" in P:
            a = self(m, n - 1)
            square = (a * a).sum(1, keepdims=True)
            unit = np.concatenate([2 * a, square - 1], axis=1) / (square + 1)
            W = merge_weight(unit * self(m, 1), P["A"], P["B"], -self.s)
        return W, tuple(P.values())


@dataclass(frozen=True)
class Kind:
    """A kind of layer: what it is, how it is drawn and run, and where its matrices lie in it.

    ``lacks`` names variants that do not go with it, and why.
    """

    says: str
    draw: Callable[[Draw], dict[str, Any]]
    forward: Callable[[Case, Any], tuple[Array, Back]]
    base: Callable[[Case], tuple[Array, Back]]
    take: Callable[[Case], list[tuple[Array, Array | None, Part]]]
    put: Callable[[Case, list[tuple[Array, Array | None]]], Case]
    lacks: dict[str, str] = field(default_factory=dict)


def _plainly(case: Case, f: Any) -> tuple[Array, Back]:
    y, back = f(case.x, case.W, case.b, *case.P[0], case.s, case.K)

    def back_parts(dy: Array) -> tuple[Any, ...]:
        dx, *dP = back(dy)
        return dx, tuple(dP)

    return y, back_parts


def _put(case: Case, new: list[tuple[Array, Array | None]], **changed: Any) -> Case:
    ((W, b),) = new
    return replace(case, W=W, b=b, extra=case.extra | changed)


def _transposed(case: Case) -> Case:
    return replace(case, W=case.W.T)


def _put_transposed(case: Case, new: list[tuple[Array, Array | None]]) -> Case:
    return _transposed(_put(case, new))


def _embedding(case: Case, f: Any) -> tuple[Array, Back]:
    y, back = adapted_embedding(f, case.x, case.W, case.P[0], case.s, case.extra["factor"])
    return y, lambda dy: (None, back(dy))


def _embedding_base(case: Case) -> tuple[Array, Back]:
    return case.extra["factor"] * embedding(case.x, case.W)[0], lambda dy: None


def _tied(case: Case, f: Any) -> tuple[Array, Back]:
    """The head over what its own table gives for the row numbers, or the table that it left."""
    h, _ = embedding(case.x, case.extra.get("table", case.W))
    y, back = f(h, case.W, case.b, *case.P[0], case.s, case.K)
    return y, lambda dy: (None, tuple(back(dy)[1:]))


def _tied_base(case: Case) -> tuple[Array, Back]:
    h, _ = embedding(case.x, case.extra.get("table", case.W))
    return linear(h, case.W, case.b)[0], lambda dy: None


def _put_tied(case: Case, new: list[tuple[Array, Array | None]]) -> Case:
    """The tie ends: the embedding keeps what it had."""
    return _put(case, new, table=case.extra.get("table", case.W))


def _fused(case: Case, f: Any) -> tuple[Array, Back]:
    q, v = case.P
    rows = case.extra["rows"]
    return adapted_fused(f, case.x, case.W, case.b, (q, None, v), rows, case.s, case.K)


def _ends(case: Case) -> tuple[slice, slice]:
    q, k, _ = case.extra["rows"]
    return slice(q), slice(q + k, None)


def _take_fused(case: Case) -> list[tuple[Array, Array | None, Part]]:
    biases = [None if case.b is None else case.b[rows] for rows in _ends(case)]
    weights = [case.W[rows] for rows in _ends(case)]
    return list(zip(weights, biases, case.P, strict=True))


def _put_fused(case: Case, new: list[tuple[Array, Array | None]]) -> Case:
    W, b = case.W.copy(), None if case.b is None else case.b.copy()
    for rows, (Wi, bi) in zip(_ends(case), new, strict=True):
        W[rows] = Wi
        if b is not None and bi is not None:
            b[rows] = bi
    return replace(case, W=W, b=b)


def _experts(case: Case, f: Any) -> tuple[Array, Back]:
    stacked = [np.stack(parts) for parts in zip(*case.P, strict=True)]
    y, back = adapted_experts(f, case.x, case.W, case.b, stacked, case.extra["index"], case.s)

    def back_parts(dy: Array) -> tuple[Any, ...]:
        dx, *dP = back(dy)
        return dx, *(tuple(d[e] for d in dP) for e in range(len(case.P)))

    return y, back_parts


def _experts_base(case: Case) -> tuple[Array, Back]:
    y, back = adapted_experts(linear, case.x, case.W, case.b, (), case.extra["index"], None, ())
    return y, lambda dy: back(dy)[0]


def _take_experts(case: Case) -> list[tuple[Array, Array | None, Part]]:
    biases = [None] * len(case.W) if case.b is None else list(case.b)
    return list(zip(case.W, biases, case.P, strict=True))


def _put_experts(case: Case, new: list[tuple[Array, Array | None]]) -> Case:
    W, b = zip(*new, strict=True)
    return replace(case, W=np.stack(W), b=None if case.b is None else np.stack(b))


def _conv(case: Case, f: Any) -> tuple[Array, Back]:
    y, back = adapted_conv(f, case.x, case.W, case.b, case.P[0], case.s, case.K, **case.extra)

    def back_parts(dy: Array) -> tuple[Any, ...]:
        dx, *dP = back(dy)
        return dx, tuple(dP)

    return y, back_parts


def _take_conv(case: Case) -> list[tuple[Array, Array | None, Part]]:
    groups = case.extra["groups"]
    W, _ = blocks_apart(case.W.reshape(len(case.W), -1), groups)
    A, B, *others = case.P[0]
    return [(W, case.b, (A, blocks_apart(B, groups)[0], *others))]


def _put_conv(case: Case, new: list[tuple[Array, Array | None]]) -> Case:
    """Out of its groups, if it was in some: the adapter has entries everywhere."""
    ((W, b),) = new
    W = W.reshape(len(W), -1, *case.extra["geometry"].kernel)
    (_, _, P) = _take_conv(case)[0]
    return replace(case, W=W, b=b, P=(P,), extra=case.extra | {"groups": 1})


def _draw_linear(draw: Draw) -> dict[str, Any]:
    m, n = draw.sizes
    W, P = draw.adapted(m, n)
    K = draw.multiplier(n, 4)
    return {"x": draw(n, 4), "W": W, "b": draw(m, 1), "P": (P,), "K": K, "dy": draw(m, 4)}


def _draw_transposed(draw: Draw) -> dict[str, Any]:
    drawn = _draw_linear(draw)
    return drawn | {"W": drawn["W"].T}


def _draw_embedding(draw: Draw) -> dict[str, Any]:
    d, v = draw.sizes
    W, P = draw.adapted(d, v)
    ids = draw.rng.integers(0, v, 6)  # more columns than rows: some number comes twice
    factor = {"factor": Exact(3, 2) if draw.exact else 1.5}
    return {"x": ids, "W": W.T, "b": None, "P": (P,), "K": None, "dy": draw(d, 6), "extra": factor}


def _draw_tied(draw: Draw) -> dict[str, Any]:
    v, d = draw.sizes
    W, P = draw.adapted(v, d)
    ids = draw.rng.integers(0, v, 4)
    K = draw.multiplier(d, 4)
    return {"x": ids, "W": W, "b": None, "P": (P,), "K": K, "dy": draw(v, 4)}


def _draw_fused(draw: Draw) -> dict[str, Any]:
    m, n = draw.sizes
    rows = (m, m, m) if draw.square else (2 * m, m, m)
    (q, Pq), (v, Pv) = (draw.adapted(m, n) for m in (rows[0], rows[2]))
    W = np.concatenate([q, draw(rows[1], n), v])
    drawn = {"x": draw(n, 4), "W": W, "b": draw(len(W), 1), "P": (Pq, Pv)}
    return drawn | {"K": draw.multiplier(n, 4), "dy": draw(len(W), 4), "extra": {"rows": rows}}


def _draw_experts(draw: Draw) -> dict[str, Any]:
    m, n = draw.sizes
    W, P = zip(*(draw.adapted(m, n) for _ in range(3)), strict=True)
    index = np.array([2, 0, 2, 0, 2])  # one expert has no columns
    drawn = {"x": draw(n, 5), "W": np.stack(W), "b": draw(3, m, 1), "P": P, "K": None}
    return drawn | {"dy": draw(m, 5), "extra": {"index": index}}


def _draw_conv(dimensions: int, draw: Draw) -> dict[str, Any]:
    c, m, rng = 2, draw.r + 2, draw.rng
    kernel = (3, 2)[:dimensions]
    mode = ("zeros", "reflect", "replicate", "circular")[rng.integers(4)]
    stride, dilation = ((2, 1), (1, 2)) if rng.random() < 0.5 else ((1, 2), (2, 1))
    padding = ((1, 0), (1, 1))[:dimensions]
    geometry = Geometry(kernel, stride[:dimensions], padding, dilation[:dimensions], mode)
    # In groups the rest of a row is 0 - s B A, of no rational norm, and each has a component alone.
    groups = 2 if REGISTRY[draw.entry].variant in (LORA, LORA_BIAS) else 1
    size = math.prod(kernel)
    W, (A, B, *others) = draw.adapted(m, c // groups * size)
    if groups > 1:
        A, B = draw(draw.r, c * size), B[:, : draw.r // groups]
    x = draw(c, 2, *(5, 4)[:dimensions])
    y, _ = geometry.places(x.shape[2:])
    drawn = {"x": x, "W": W.reshape(m, -1, *kernel), "b": draw(m, 1), "P": ((A, B, *others),)}
    extra = {"geometry": geometry, "groups": groups}
    return drawn | {"K": draw.multiplier(*x.shape), "dy": draw(m, 2, *y), "extra": extra}


_ONE_BY_ONE = "its columns are no tokens of a text: there is no invocation"
_CONV = (_conv, lambda case: conv(case.x, case.W, case.b, **case.extra), _take_conv, _put_conv)

KINDS: dict[str, Kind] = {
    "linear": Kind(
        "a weight (out, in)",
        _draw_linear,
        _plainly,
        lambda case: linear(case.x, case.W, case.b),
        lambda case: [(case.W, case.b, case.P[0])],
        _put,
    ),
    "transposed": Kind(
        "a weight stored (in, out), as GPT-2's Conv1D has it",
        _draw_transposed,
        lambda case, f: _plainly(_transposed(case), f),
        lambda case: linear(case.x, case.W.T, case.b),
        lambda case: [(case.W.T, case.b, case.P[0])],
        _put_transposed,
    ),
    "fused": Kind(
        "Q, K and V in one weight, Q and V adapted, of unequal rows as grouped heads have them",
        _draw_fused,
        _fused,
        lambda case: linear(case.x, case.W, case.b),
        _take_fused,
        _put_fused,
    ),
    "embedding": Kind(
        "a table with a factor, as Gemma's",
        _draw_embedding,
        _embedding,
        _embedding_base,
        lambda case: [(case.W.T, None, case.P[0])],
        _put_transposed,
        {
            "lora-bias": "an embedding has no bias to merge it into; PEFT refuses it too",
            "alora": "its input is a number, which has no part to switch off",
        },
    ),
    "tied": Kind(
        "a head whose weight is the embedding's, the head adapted",
        _draw_tied,
        _tied,
        _tied_base,
        lambda case: [(case.W, case.b, case.P[0])],
        _put_tied,
    ),
    "experts": Kind(
        "one weight per expert; each column goes through one",
        _draw_experts,
        _experts,
        _experts_base,
        _take_experts,
        _put_experts,
        {"alora": "columns come in the order of their experts, not of the text"},
    ),
    "conv1": Kind(
        "a 1-D convolution, with stride, dilation, padding and groups",
        partial(_draw_conv, 1),
        *_CONV,
        {"alora": _ONE_BY_ONE},
    ),
    "conv2": Kind(
        "a 2-D convolution, with stride, dilation, padding and groups",
        partial(_draw_conv, 2),
        *_CONV,
        {"alora": _ONE_BY_ONE},
    ),
}
"""Every kind of layer by its name."""


def draw_case(
    entry: str, kind: str, rng: np.random.Generator, exact: bool = True, square: bool = False
) -> Case:
    """A case with bias, dropout, scale 7/4, magnitudes away from their start, B away from 0."""
    draw = Draw(entry, rng, exact, square)
    drawn = KINDS[kind].draw(draw)
    if entry == "alora":
        on = np.arange(drawn["K"].shape[1]) > 1  # two tokens stand before the invocation
        on = np.broadcast_to(_exactly(on) if exact else on * 1.0, drawn["K"].shape)
        drawn |= {"on": on, "K": on * drawn["K"]}
    return Case(kind, entry, s=draw.s, alpha=draw.alpha, r=draw.r, **drawn)


def same(found: Any, wanted: Any) -> bool:
    """Equal entries and shapes, all exact: a float that crept in is no rational number."""
    if found is None or wanted is None:
        return found is wanted
    found, wanted = np.asarray(found), np.asarray(wanted)
    exact = all(isinstance(v, Rational) for v in (*found.ravel(), *wanted.ravel()))
    return exact and found.shape == wanted.shape and bool((found == wanted).all())


def answers(case: Case, f: Any = None) -> tuple[Array, Any, list[dict[str, Array]]]:
    """y, dx, and the parameters' gradients by name for each matrix."""
    y, back = case.forward(f)
    dx, *dP = back(case.dy)
    return y, dx, [dict(zip(case.variant.parts, d, strict=True)) for d in dP]


def _named(case: Case) -> list[dict[str, Array]]:
    return [dict(zip(case.variant.parts, P, strict=True)) for P in case.P]


def _groups(case: Case) -> Iterator[tuple[slice, slice]]:
    """The components and the rows of B of each group, of a convolution, and of the rest all."""
    groups = case.extra.get("groups", 1)
    m, r = len(case.P[0][1]), case.r
    for j in range(groups):
        yield (
            slice(j * r // groups, (j + 1) * r // groups),
            slice(j * m // groups, (j + 1) * m // groups),
        )


def merged(case: Case) -> bool:
    """W' x + b' = y, and dx likewise."""
    case = case.still()
    y, dx, _ = answers(case)
    y_merged, back = case.merged().base()
    return same(y_merged, y) and same(back(case.dy), dx)


def _fresh(case: Case) -> tuple[Case, Case, bool]:
    """The base, the same layer with fresh parameters, and whether its base kept its weight.

    The fresh parameters are floats, taken as the rationals that they are. A residual is W - s B A,
    rounded at most r + 2 times, and then taken without its rounding; a base that is not so near is
    none. DoRA's magnitude needs a base of rational norms: W + s B A.
    """
    entry, rng = REGISTRY[case.entry], np.random.default_rng(0)
    case = case.still()
    if "magnitude" in case.variant.parts:
        plain = replace(case, entry="lora", P=tuple(P[:2] for P in case.P))
        case = replace(plain.merged(), entry=case.entry, P=case.P)
    init = "embedding" if case.kind == "embedding" and entry.init == "kaiming" else entry.init
    bases, parts, kept = [], [], True
    for W, b, _ in case.matrices():
        floats = W.astype(float)
        frozen, P = start(case.variant, init, rng, floats, case.r, float(case.s))
        kept &= frozen is floats
        named = dict(zip(case.variant.parts, map(_exactly, P), strict=True))
        if frozen is not floats:
            A, B, k = named["A"], named["B"], (case.r + 2) * UNIT_ROUNDOFF
            residual = merge_weight(W, A, B, -case.s)
            bound = k / (1 - k) * merge_weight(abs(W), abs(A), abs(B), case.s).astype(float)
            W = residual if (abs(residual - frozen) <= bound).all() else _exactly(frozen)
        if "magnitude" in named:
            named["magnitude"] = row_norm(merge_weight(W, named["A"], named["B"], case.s))[0]
        bases.append((W, b))
        parts.append(tuple(named.values()))
    return case, replace(case.with_matrices(bases), P=tuple(parts)), kept


def starts(case: Case) -> bool:
    """Fresh parameters, on the frozen base that goes with them, give the untouched layer's y."""
    base, fresh, _ = _fresh(case)
    difference = fresh.forward()[0] - base.base()[0]
    if REGISTRY[case.entry].init != "orthogonal":
        return same(difference, 0 * difference)
    # Two halves of a basis from floats: Householder's Q has |Qᵀ Q - I| ≤ γ(8 r²) (Higham 2002,
    # theorem 19.4, with 8 for its small constant), so that s B A x is so much of s |B| |A| |x|.
    x = fresh.x if fresh.x.ndim == 1 else abs(fresh.x)
    moduli = replace(fresh, W=0 * fresh.W, x=x, P=tuple(tuple(map(abs, P)) for P in fresh.P))
    k = 8 * case.r**2 * UNIT_ROUNDOFF
    tables = {name: abs(v) for name, v in fresh.extra.items() if name == "table"}
    no_bias = None if fresh.b is None else 0 * fresh.b
    plain = replace(moduli, b=no_bias, extra=fresh.extra | tables)
    return bool((abs(difference) <= k / (1 - k) * plain.forward()[0].astype(float)).all())


def kept(case: Case) -> bool:
    """A start leaves the base's weight as it is."""
    return _fresh(case)[2]


def zero(case: Case) -> bool:
    """With B = 0, y is the base's."""
    case = case.still().with_parts(B=lambda B: 0 * B)
    return same(case.forward()[0], case.base()[0])


def balance(case: Case) -> bool:
    """Bᵀ dB = dA Aᵀ, for each matrix."""
    pairs = zip(_named(case), answers(case)[2], strict=True)
    return all(
        same(P["B"][rows].T @ d["B"][rows], d["A"][own] @ P["A"][own].T)
        for P, d in pairs
        for own, rows in _groups(case)
    )


def _bases(case: Case) -> tuple[Array, Array]:
    """R and its inverse, in rank space, a shear in each group."""
    R, inverse = (_exactly(np.eye(case.r)) for _ in range(2))
    for own, _ in _groups(case):
        i, j = own.start, own.stop - 1
        factor = Exact(3, 2)
        if i == j:
            R[i, i], inverse[i, i] = factor, 1 / factor
        else:
            R[i, j], inverse[i, j] = factor, -factor
    return R, inverse


def basis(case: Case) -> bool:
    """A → R A, B → B R⁻¹ changes neither y nor dx, and dA → R⁻ᵀ dA, dB → dB Rᵀ."""
    R, inverse = _bases(case)
    groups = case.extra.get("groups", 1)
    k = case.r // groups
    small = slice(0, k)  # B's columns lie as one group's: all groups have the same shear

    def turned(B: Array) -> Array:
        product: Array = B @ inverse[small, small]
        return product

    y, dx, dP = answers(case)
    y2, dx2, dP2 = answers(case.with_parts(A=lambda A: R @ A, B=turned))
    return (
        same(y2, y)
        and same(dx2, dx)
        and all(
            same(new["A"], inverse.T @ old["A"]) and same(new["B"], old["B"] @ R[small, small].T)
            for old, new in zip(dP, dP2, strict=True)
        )
    )


def scale(case: Case) -> bool:
    """s → c s, B → B / c changes neither y, dx nor dA, and dB → c dB."""
    c = Exact(5, 3)
    y, dx, dP = answers(case)
    moved = replace(case.with_parts(B=lambda B: B / c), s=c * case.s)
    y2, dx2, dP2 = answers(moved)
    return (
        same(y2, y)
        and same(dx2, dx)
        and all(
            same(new["A"], old["A"]) and same(new["B"], c * old["B"])
            for old, new in zip(dP, dP2, strict=True)
        )
    )


def _rank(M: Array) -> int:
    """The rank of a matrix of rationals, by elimination."""
    M, rank = M.copy(), 0
    for column in range(M.shape[1]):
        pivots = np.flatnonzero(M[rank:, column])
        if pivots.size:
            M[[rank, rank + pivots[0]]] = M[[rank + pivots[0], rank]]
            below = M[rank + 1 :, column : column + 1] / M[rank, column]
            M[rank + 1 :] = M[rank + 1 :] - below * M[rank]
            rank += 1
            if rank == len(M):
                break
    return rank


def rank(case: Case) -> bool:
    """The rank of W' - W is at most r; the matrices could have more."""
    changes = [case.variant.merge(W, b, *P, case.s)[0] - W for W, b, P in case.matrices()]
    return all(_rank(change) <= case.r for change in changes)


def _joined(case: Case, one: Part, two: Part) -> Part:
    """One adapter of both: A and what stands beside it stacked, B side by side, biases added."""
    pairs = dict(zip(case.variant.parts, zip(one, two, strict=True), strict=True))
    joined = {"B": np.concatenate(pairs["B"], axis=1)}
    for part in {"A", "E", "lambda_d"} & pairs.keys():
        rows = [v[own] for own, _ in _groups(case) for v in pairs[part]]
        joined[part] = np.concatenate(rows)
    joined |= {part: np.add(*pairs[part]) for part in {"c"} & pairs.keys()}
    return tuple(joined.get(part, pairs[part][0]) for part in pairs)


def adds(case: Case) -> bool:
    """The branches of two adapters add up to that of one whose rank is the sum of theirs."""
    case = case.still()
    other = case.with_parts(**{part: lambda v: v[::-1] * 2 for part in case.variant.parts})
    base = case.base()[0]
    parts = tuple(_joined(case, *pair) for pair in zip(case.P, other.P, strict=True))
    both = replace(case, P=parts, r=2 * case.r).forward()[0]
    return same(both - base, (case.forward()[0] - base) + (other.forward()[0] - base))


def one(case: Case) -> bool:
    """An adapter combined alone at weight 1 is itself."""
    case = case.still()
    parts = []
    for P in _named(case):
        A, B = combine([(P["A"], P["B"], case.s)], [1])
        scaled = {"A": A, "B": B} | {part: case.s * P[part] for part in {"c"} & P.keys()}
        parts.append(tuple((P | scaled).values()))
    return same(replace(case, P=tuple(parts), s=Exact(1)).forward()[0], case.forward()[0])


def masks(case: Case) -> bool | None:
    """The mean of y over all masks of three numbers of the input is y without dropout."""
    if case.K is None:
        return None
    still = np.full(case.K.shape, Exact(1)) if case.on is None else case.on
    p, mean = Exact(1, 4), 0
    for keep in itertools.product((0, 1), repeat=3):
        K = still.copy()
        K.reshape(-1)[-3:] *= _exactly(np.array(keep)) / (1 - p)
        weight = p ** (3 - sum(keep)) * (1 - p) ** sum(keep)
        mean = mean + Exact(weight) * replace(case, K=K).forward()[0]
    return same(mean, replace(case, K=still).forward()[0])


def _some(case: Case, columns: slice) -> Case:
    """The case with some of its tokens."""

    def cut(v: Array | None) -> Array | None:
        return None if v is None else v[:, columns]

    x = case.x[columns] if case.x.ndim == 1 else case.x[:, columns]
    index = {k: v[columns] for k, v in case.extra.items() if k == "index"}
    dy, extra = case.dy[:, columns], case.extra | index
    return replace(case, x=x, dy=dy, K=cut(case.K), on=cut(case.on), extra=extra)


def tokens(case: Case) -> bool:
    """Each token's y and dx are its own, and the parameters' gradients are the sum of theirs."""
    y, dx, dP = answers(case)
    parts = [answers(_some(case, columns)) for columns in (slice(1), slice(1, None))]
    sums = [
        {name: d1[name] + d2[name] for name in d1}
        for d1, d2 in zip(*(part[2] for part in parts), strict=True)
    ]
    return (
        same(np.concatenate([part[0] for part in parts], axis=1), y)
        and (dx is None or same(np.concatenate([part[1] for part in parts], axis=1), dx))
        and all(same(s[name], d[name]) for s, d in zip(sums, dP, strict=True) for name in d)
    )


LAWS: dict[str, Callable[[Case], bool | None]] = {
    "merged": merged,
    "starts": starts,
    "kept": kept,
    "zero": zero,
    "balance": balance,
    "basis": basis,
    "scale": scale,
    "rank": rank,
    "adds": adds,
    "one": one,
    "masks": masks,
    "tokens": tokens,
}
"""The laws of `variants.LAWS`: whether an exact case keeps it; None, if it says
nothing of the kind."""


def holds(law: str, case: Case) -> bool | None:
    """Whether the exact case keeps the law; not, where it leads out of the rationals."""
    try:
        return LAWS[law](case)
    except ArithmeticError:
        return False


def norm_held(
    x: Any, W: Array, b: Array | None, A: Array, B: Array, magnitude: Array, s: Any, K: Any = None
) -> tuple[Array, Back]:
    """y = that of `dora_linear` as its ``back`` sees it: a complex step leaves the norm as it is.

    So the derivative of this is what DoRA's ``back`` gives, which that of `dora_linear` is not.
    """
    v, _ = row_norm(merge_weight(W, A.real, B.real, s))
    y, back = rescaled_linear(x, W, b, A, B, magnitude, v, s, K)
    return y, lambda dy: back(dy)[:-1]


HELD: dict[str, Callable[..., tuple[Array, Back]]] = {"dora": norm_held}
"""The variants whose ``back`` is not the derivative of their own forward, and of what it is."""

STEP = 1e-30
"""The complex step: its square vanishes beside every number here, so that it adds no error."""


def derivative_error(case: Case, rng: np.random.Generator) -> float:
    """How far the gradients of a float64 case are from its forward's derivative, relatively.

    Along a random direction v of each argument in turn, by a complex step: |⟨g, v⟩ - derivative|
    over Σ |g ∘ v|, the greatest. DoRA with the norm held is differentiated with the norm held.
    """
    f = HELD.get(case.entry, case.variant.linear)
    _, dx, dP = answers(case)
    worst = 0.0

    def error(gradient: Array, stepped: Callable[[Array], Case]) -> float:
        v = rng.standard_normal(gradient.shape)
        derivative = (case.dy * stepped(STEP * 1j * v).forward(f)[0]).sum().imag / STEP
        terms = (gradient * v).ravel()
        size = float(abs(terms).sum())
        difference = float(abs(derivative - terms.sum()))
        return 0.0 if difference == 0 else difference / size if size else math.inf

    if dx is not None:
        worst = error(dx, lambda step: replace(case, x=case.x + step))
    for i, d in enumerate(dP):
        for j, name in enumerate(case.variant.parts):

            def stepped(step: Array, i: int = i, j: int = j) -> Case:
                P = [list(part) for part in case.P]
                P[i][j] = P[i][j] + step
                return replace(case, P=tuple(map(tuple, P)))

            worst = max(worst, error(d[name], stepped))
    return worst
