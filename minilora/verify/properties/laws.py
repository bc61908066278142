"""The laws that LoRA keeps, each a function of a case over exact rationals, held with ``==``.

DoRA's too: its weight is drawn so that the norms of its rows are rational.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.lora import merge_weight
from minilora.spec.multi_adapter import combine
from minilora.spec.ops import Array
from minilora.spec.variants import REGISTRY, extended, row_norm, start
from minilora.verify.properties.exact_numbers import SqrtFraction, exactly, same
from minilora.verify.properties.layer_kinds import LayerCase, Part, answers

UNIT_ROUNDOFF = np.finfo(float).eps / 2


def _named(case: LayerCase) -> list[dict[str, Array]]:
    """Each matrix's parameters by name."""
    return [dict(zip(case.variant.parts, P, strict=True)) for P in case.P]


def _groups(case: LayerCase) -> list[tuple[slice, slice]]:
    """The ranks and the rows of B of each group of a convolution; of other layers, all of them."""
    groups = case.extra.get("groups", 1)

    def split(size: int) -> list[slice]:
        return [slice(j * size // groups, (j + 1) * size // groups) for j in range(groups)]

    return list(zip(split(case.r), split(len(case.P[0][1])), strict=True))


def merge(case: LayerCase) -> bool:
    """W' x + b' = y, and dx likewise."""
    case = case.without_dropout()
    y, dx, _ = answers(case)
    y_merged, back = case.merged().base()
    return same(y_merged, y) and same(back(case.dy), dx)


def _untrained(case: LayerCase) -> tuple[LayerCase, LayerCase, bool]:
    """The base, the same layer with fresh parameters, and whether the base kept its weight.

    DoRA's magnitude needs a base of rational norms: W + s B A.
    """
    case = case.without_dropout()
    if "magnitude" in case.variant.parts:
        plain = replace(case, entry="lora", P=tuple(P[:2] for P in case.P))
        case = replace(plain.merged(), entry=case.entry, P=case.P)
    rng = np.random.default_rng(0)
    matrices = [(_fresh_matrix(case, rng, W), b) for W, b, _ in case.matrices()]
    fresh = case.with_matrices([(frozen, b) for (frozen, _, _), b in matrices])
    fresh = replace(fresh, P=tuple(P for (_, P, _), _ in matrices))
    return case, fresh, all(kept for (_, _, kept), _ in matrices)


def _fresh_matrix(case: LayerCase, rng: np.random.Generator, W: Array) -> tuple[Array, Part, bool]:
    """One matrix's frozen weight, its fresh parameters, and whether the weight is W itself.

    The fresh parameters are floats, taken as the rationals that they are. A residual is W - s B A,
    rounded at most r + 2 times, and is taken without its rounding; a weight that is not so near is
    no residual.
    """
    init = REGISTRY[case.entry].init
    init = "embedding" if case.kind == "embedding" and init == "kaiming" else init
    floats = W.astype(float)
    frozen, P = start(case.variant, init, rng, floats, case.r, float(case.s))
    named = dict(zip(case.variant.parts, map(exactly, P), strict=True))
    A, B = named["A"], named["B"]
    if frozen is not floats:
        k = (case.r + 2) * UNIT_ROUNDOFF
        residual = merge_weight(W, A, B, -case.s)
        bound = k / (1 - k) * merge_weight(abs(W), abs(A), abs(B), case.s).astype(float)
        W = residual if (abs(residual - frozen) <= bound).all() else exactly(frozen)
    if "magnitude" in named:
        named["magnitude"] = row_norm(merge_weight(W, A, B, case.s))[0]
    return W, tuple(named.values()), frozen is floats


def initial_output(case: LayerCase) -> bool:
    """Fresh parameters, on the frozen base that goes with them, give the untouched layer's y."""
    base, fresh, _ = _untrained(case)
    difference = fresh.forward()[0] - base.base()[0]
    if INITIALIZATIONS[REGISTRY[case.entry].init].rounded:
        return bool((abs(difference) <= _orthogonal_bound(fresh)).all())
    return same(difference, 0 * difference)


def _orthogonal_bound(case: LayerCase) -> Array:
    """How far rounding moves s B A x from 0, where A and B are of two halves of a basis.

    Householder's Q has |Qᵀ Q - I| ≤ γ(8 r²) (Higham 2002, theorem 19.4, with 8 for its small
    constant), so that s B A x is at most that times s |B| |A| |x|.
    """
    x = case.x if case.x.ndim == 1 else abs(case.x)
    moduli = replace(case, W=0 * case.W, x=x, P=tuple(tuple(map(abs, P)) for P in case.P))
    tables = {name: abs(table) for name, table in case.extra.items() if name == "table"}
    no_bias = None if case.b is None else 0 * case.b
    y, _ = replace(moduli, b=no_bias, extra=case.extra | tables).forward()
    k = 8 * case.r**2 * UNIT_ROUNDOFF
    bound: Array = k / (1 - k) * y.astype(float)
    return bound


def frozen_weight(case: LayerCase) -> bool:
    """The initialization leaves the base's weight as it is."""
    return _untrained(case)[2]


def zero_b(case: LayerCase) -> bool:
    """With B = 0, y is the base's."""
    case = case.without_dropout().with_parts(B=lambda B: 0 * B)
    return same(case.forward()[0], case.base()[0])


def balance(case: LayerCase) -> bool:
    """Bᵀ dB = dA Aᵀ, for each matrix."""
    pairs = zip(_named(case), answers(case)[2], strict=True)
    return all(
        same(P["B"][rows].T @ d["B"][rows], d["A"][ranks] @ P["A"][ranks].T)
        for P, d in pairs
        for ranks, rows in _groups(case)
    )


def _bases(case: LayerCase) -> tuple[Array, Array]:
    """R and its inverse, in rank space, a shear in each group."""
    R, inverse = (exactly(np.eye(case.r)) for _ in range(2))
    for ranks, _ in _groups(case):
        i, j = ranks.start, ranks.stop - 1
        factor = SqrtFraction(3, 2)
        if i == j:
            R[i, i], inverse[i, i] = factor, 1 / factor
        else:
            R[i, j], inverse[i, j] = factor, -factor
    return R, inverse


def basis_change(case: LayerCase) -> bool:
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


def rescaling(case: LayerCase) -> bool:
    """s → c s, B → B / c changes neither y, dx nor dA, and dB → c dB."""
    c = SqrtFraction(5, 3)
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


def rank(case: LayerCase) -> bool:
    """The rank of W' - W is at most r; the matrices could have more."""
    changes = [case.variant.merge(W, b, *P, case.s)[0] - W for W, b, P in case.matrices()]
    return all(_rank(change) <= case.r for change in changes)


def _concatenated(case: LayerCase, one: Part, two: Part) -> Part:
    """One adapter of both: A and columns of ranks stacked, B side by side, other columns added."""
    columns = extended(case.variant).columns
    parts = []
    for part, first, second in zip(case.variant.parts, one, two, strict=True):
        if part == "B":
            parts.append(np.concatenate([first, second], axis=1))
        elif part == "A" or columns[part].rows == "r":
            rows = [v[ranks] for ranks, _ in _groups(case) for v in (first, second)]
            parts.append(np.concatenate(rows))
        else:
            parts.append(first + second)
    return tuple(parts)


def concatenation(case: LayerCase) -> bool:
    """The branches of two adapters add up to that of one adapter of the summed rank."""
    case = case.without_dropout()
    other = case.with_parts(**{part: lambda v: v[::-1] * 2 for part in case.variant.parts})
    base = case.base()[0]
    parts = tuple(_concatenated(case, *pair) for pair in zip(case.P, other.P, strict=True))
    both = replace(case, P=parts, r=2 * case.r).forward()[0]
    return same(both - base, (case.forward()[0] - base) + (other.forward()[0] - base))


def single_combination(case: LayerCase) -> bool:
    """An adapter combined alone at weight 1 is itself."""
    case = case.without_dropout()
    parts = []
    for P in _named(case):
        A, B = combine([(P["A"], P["B"], case.s)], [1])
        scaled = {"A": A, "B": B} | {part: case.s * P[part] for part in {"c"} & P.keys()}
        parts.append(tuple((P | scaled).values()))
    return same(replace(case, P=tuple(parts), s=SqrtFraction(1)).forward()[0], case.forward()[0])


def dropout_mean(case: LayerCase) -> bool | None:
    """The mean of y over all masks of three numbers of the input is y without dropout."""
    if case.K is None:
        return None
    no_dropout = np.full(case.K.shape, SqrtFraction(1)) if case.on is None else case.on
    p, mean = SqrtFraction(1, 4), 0
    for keep in itertools.product((0, 1), repeat=3):
        K = no_dropout.copy()
        K.reshape(-1)[-3:] *= exactly(np.array(keep)) / (1 - p)
        weight = p ** (3 - sum(keep)) * (1 - p) ** sum(keep)
        mean = mean + SqrtFraction(weight) * replace(case, K=K).forward()[0]
    return same(mean, replace(case, K=no_dropout).forward()[0])


def _some_tokens(case: LayerCase, columns: slice) -> LayerCase:
    """The case with some of its tokens."""

    def cut(v: Array | None) -> Array | None:
        return None if v is None else v[:, columns]

    x = case.x[columns] if case.x.ndim == 1 else case.x[:, columns]
    index = {k: v[columns] for k, v in case.extra.items() if k == "index"}
    dy, extra = case.dy[:, columns], case.extra | index
    return replace(case, x=x, dy=dy, K=cut(case.K), on=cut(case.on), extra=extra)


def token_independence(case: LayerCase) -> bool:
    """A token's y and dx depend on it alone; the parameters' gradients are sums over tokens."""
    y, dx, dP = answers(case)
    parts = [answers(_some_tokens(case, columns)) for columns in (slice(1), slice(1, None))]
    sums = [
        {name: d1[name] + d2[name] for name in d1}
        for d1, d2 in zip(*(part[2] for part in parts), strict=True)
    ]
    return (
        same(np.concatenate([part[0] for part in parts], axis=1), y)
        and (dx is None or same(np.concatenate([part[1] for part in parts], axis=1), dx))
        and all(same(s[name], d[name]) for s, d in zip(sums, dP, strict=True) for name in d)
    )


LAWS: dict[str, Callable[[LayerCase], bool | None]] = {
    "merge": merge,
    "initial-output": initial_output,
    "frozen-weight": frozen_weight,
    "zero-B": zero_b,
    "balance": balance,
    "basis-change": basis_change,
    "rescaling": rescaling,
    "rank": rank,
    "concatenation": concatenation,
    "single-combination": single_combination,
    "dropout-mean": dropout_mean,
    "token-independence": token_independence,
}
"""The laws of `variants.LAWS`: whether a case keeps it, None where it does not apply."""


def holds(law: str, case: LayerCase) -> bool | None:
    """Whether the exact case keeps the law; False where a root is irrational."""
    try:
        return LAWS[law](case)
    except ArithmeticError:
        return False
