"""What LoRA has become: each equation of a variant in full, and one registry of them all.

Most variants keep LoRA's equation and change its scale, its start, what is trained or on which
tokens it acts. The others stand here, each beside `lora_linear` line for line; what differs is
marked with ``≠``. Where several adapters of one projection act, their branches y - (W x + b) add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.spec.initialization import LAMBDA_D, STARTS
from minilora.spec.lora import LORA, Variant, lora_linear, merge_weight
from minilora.spec.ops import Array, Back, dropout, linear


def lora_bias_linear(
    x: Array,
    W: Array,
    b: Array | None,
    A: Array,
    B: Array,
    c: Array,
    s: Any,
    K: Array | None = None,
) -> tuple[Array, Back]:
    """y = W x + b + s (B A (K ∘ x) + c): LoRA whose B has a trained bias c.

    With dy given:   dx, dA, dB as in lora_linear,   dc = s dy 1.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), c (m, 1), s (), K (n, t) -> y (m, t).
    Source: ``lora_bias`` of PEFT, for factors extracted from fully trained models.
    """
    y, back_lora = lora_linear(x, W, b, A, B, s, K)
    y = y + s * c  # ≠

    def back(dy: Array) -> tuple[Array, ...]:
        return *back_lora(dy), s * dy.sum(1, keepdims=True)  # ≠

    return y, back


def merge_lora_bias(
    W: Array, b: Array | None, A: Array, B: Array, c: Array, s: Any
) -> tuple[Array, Array]:
    """W' = W + s B A, and b' = b + s c.

    Shapes: W (m, n), b (m, 1), A (r, n), B (m, r), c (m, 1), s () -> W' (m, n), b' (m, 1).
    """
    return merge_weight(W, A, B, s), s * c if b is None else b + s * c


def row_norm(V: Array) -> tuple[Array, Back]:
    """v = ‖V‖, the Euclidean norm of each row, and 1 for a row of zeros, which has no direction.

    With dv given:   dV = dv ∘ V / v.

    Shapes: V (m, n) -> v (m, 1).
    """
    norm = np.sqrt((V * V).sum(1, keepdims=True))
    v = norm + (norm == 0)

    def back(dv: Array) -> Array:
        dV: Array = dv * V / v
        return dV

    return v, back


def rescaled_linear(
    x: Array,
    W: Array,
    b: Array | None,
    A: Array,
    B: Array,
    magnitude: Array,
    v: Array,
    s: Any,
    K: Array | None = None,
) -> tuple[Array, Back]:
    """y = W x + b + (g ∘ (W + s B A) - W) (K ∘ x), g = m / v: rows of norm v rescaled to m.

    What dropout acts on is all that is not W x. With h = K ∘ x, w = W h, u = A h, dz = g ∘ dy and
    du = s Bᵀ dz:
    dx = Wᵀ dy + K ∘ (Wᵀ (dz - dy) + Aᵀ du),   dA = du hᵀ,   dB = s dz uᵀ,
    dm = dg / v,   dv = -g ∘ dg / v,   dg = the sum over tokens of dy ∘ (w + s B u).

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), magnitude (m, 1), v (m, 1), s (),
    K (n, t) -> y (m, t).
    Source: Liu et al. 2024, "DoRA", equation 5.
    """
    base, back_base = linear(x, W, b)
    h, back_dropout = dropout(x, K)
    u = A @ h
    w = W @ h
    g = magnitude / v
    branch = w + B @ (s * u)
    y = base + (g * branch - w)

    def back(dy: Array) -> tuple[Array, ...]:
        dz = g * dy
        du = s * (B.T @ dz)
        dg = (dy * branch).sum(1, keepdims=True)
        dx = back_base(dy) + back_dropout(W.T @ (dz - dy) + A.T @ du)
        return dx, (h @ du.T).T, dz @ (s * u).T, dg / v, -g * dg / v

    return y, back


def dora_linear(
    x: Array,
    W: Array,
    b: Array | None,
    A: Array,
    B: Array,
    magnitude: Array,
    s: Any,
    K: Array | None = None,
) -> tuple[Array, Back]:
    """y = W x + b + (m ∘ V / ‖V‖ - W) (K ∘ x), V = W + s B A, the norm held constant in ``back``.

    With dy given:   dx, dA, dB, dm of `rescaled_linear`, and nothing flows through ‖V‖.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), magnitude (m, 1), s (), K (n, t) ->
    y (m, t).
    Source: Liu et al. 2024, "DoRA", equation 5 and section 4.3; so PEFT, MLX and torchtune.
    """
    v, _ = row_norm(merge_weight(W, A, B, s))
    y, back_rescaled = rescaled_linear(x, W, b, A, B, magnitude, v, s, K)

    def back(dy: Array) -> tuple[Array, ...]:
        dx, dA, dB, dm, _ = back_rescaled(dy)
        return dx, dA, dB, dm

    return y, back


def dora_full_linear(
    x: Array,
    W: Array,
    b: Array | None,
    A: Array,
    B: Array,
    magnitude: Array,
    s: Any,
    K: Array | None = None,
) -> tuple[Array, Back]:
    """y = W x + b + (m ∘ V / ‖V‖ - W) (K ∘ x), V = W + s B A, the norm differentiated too.

    With dV the gradient through the norm, dv ∘ V / ‖V‖, dv that of `rescaled_linear`:
    dA and dB gain s Bᵀ dV and s dV Aᵀ, so that each row of the whole dV is orthogonal to V's.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), magnitude (m, 1), s (), K (n, t) ->
    y (m, t).
    Source: Liu et al. 2024, "DoRA", equations 5 and 6; so LyCORIS and adapters.
    """
    v, back_norm = row_norm(merge_weight(W, A, B, s))
    y, back_rescaled = rescaled_linear(x, W, b, A, B, magnitude, v, s, K)

    def back(dy: Array) -> tuple[Array, ...]:
        dx, dA, dB, dm, dv = back_rescaled(dy)
        dV = back_norm(dv)  # ≠
        return dx, dA + s * (B.T @ dV), dB + s * (dV @ A.T), dm  # ≠

    return y, back


def merge_dora(
    W: Array, b: Array | None, A: Array, B: Array, magnitude: Array, s: Any
) -> tuple[Array, Array | None]:
    """W' = m ∘ V / ‖V‖, V = W + s B A; b stays.

    Shapes: W (m, n), b (m, 1), A (r, n), B (m, r), magnitude (m, 1), s () -> W' (m, n), b' (m, 1).
    Source: Liu et al. 2024, "DoRA", equation 5.
    """
    V = merge_weight(W, A, B, s)
    return magnitude / row_norm(V)[0] * V, b


def vera_linear(
    x: Array,
    W: Array,
    b: Array | None,
    A: Array,
    B: Array,
    lambda_d: Array,
    lambda_b: Array,
    s: Any,
    K: Array | None = None,
) -> tuple[Array, Back]:
    """y = W x + b + s λ_b ∘ B (λ_d ∘ A (K ∘ x)), with A, B frozen, λ_d and λ_b trained.

    With h = K ∘ x, u = A h, z = B (λ_d ∘ u), dz = s λ_b ∘ dy and du = Bᵀ dz:
    dx = Wᵀ dy + K ∘ (Aᵀ (λ_d ∘ du)),   dA = (λ_d ∘ du) hᵀ,   dB = dz (λ_d ∘ u)ᵀ,
    dλ_d = the sum over tokens of u ∘ du,   dλ_b = s times the sum of z ∘ dy.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), lambda_d (r, 1), lambda_b (m, 1),
    s (), K (n, t) -> y (m, t).
    Source: Kopiczko, Blankevoort and Asano 2023, "VeRA", equation 2.
    """
    base, back_base = linear(x, W, b)
    h, back_dropout = dropout(x, K)
    u = A @ h
    z = B @ (lambda_d * u)  # ≠
    y = base + s * (lambda_b * z)  # ≠

    def back(dy: Array) -> tuple[Array, ...]:
        dz = s * (lambda_b * dy)  # ≠
        du = B.T @ dz
        da = lambda_d * du  # ≠
        dx = back_base(dy) + back_dropout(A.T @ da)
        dlambda_d = (u * du).sum(1, keepdims=True)
        dlambda_b = s * (z * dy).sum(1, keepdims=True)
        return dx, (h @ da.T).T, dz @ (lambda_d * u).T, dlambda_d, dlambda_b

    return y, back


def merge_vera(
    W: Array, b: Array | None, A: Array, B: Array, lambda_d: Array, lambda_b: Array, s: Any
) -> tuple[Array, Array | None]:
    """W' = W + s (λ_b ∘ B) (λ_d ∘ A); b stays.

    Shapes: W (m, n), b (m, 1), A (r, n), B (m, r), lambda_d (r, 1), lambda_b (m, 1), s () ->
    W' (m, n), b' (m, 1).
    """
    return merge_weight(W, lambda_d * A, lambda_b * B, s), b


def adalora_linear(
    x: Array,
    W: Array,
    b: Array | None,
    A: Array,
    B: Array,
    E: Array,
    s: Any,
    K: Array | None = None,
) -> tuple[Array, Back]:
    """y = W x + b + s B (E ∘ A (K ∘ x)), B and A kept near orthogonal, E the singular values.

    With h = K ∘ x, u = A h, du = E ∘ da and da = s Bᵀ dy:
    dx = Wᵀ dy + K ∘ (Aᵀ du),   dA = du hᵀ,   dB = s dy (E ∘ u)ᵀ,   dE = the sum of u ∘ da.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), E (r, 1), s (), K (n, t) -> y (m, t).
    Source: Zhang et al. 2023, "AdaLoRA", equation 3, whose P, Λ, Q are B, E, A here.
    """
    base, back_base = linear(x, W, b)
    h, back_dropout = dropout(x, K)
    u = A @ h
    y = base + B @ (s * (E * u))  # ≠

    def back(dy: Array) -> tuple[Array, ...]:
        da = s * (B.T @ dy)
        du = E * da  # ≠
        dE = (u * da).sum(1, keepdims=True)
        dx = back_base(dy) + back_dropout(A.T @ du)
        return dx, (h @ du.T).T, dy @ (s * (E * u)).T, dE

    return y, back


def merge_adalora(
    W: Array, b: Array | None, A: Array, B: Array, E: Array, s: Any
) -> tuple[Array, Array | None]:
    """W' = W + s B (E ∘ A); b stays.

    Shapes: W (m, n), b (m, 1), A (r, n), B (m, r), E (r, 1), s () -> W' (m, n), b' (m, 1).
    """
    return merge_weight(W, E * A, B, s), b


def invocation(ids: Array, tokens: Array) -> Array:
    """on = 1 from the last place on where a row of ids has the invocation's tokens, 0 before it.

    It multiplies x in the branch, as K does. A row without the invocation is 0 throughout. What a
    token before the invocation computes is the base model's, and so is its key and value: a cache
    that the base model has filled serves.

    Shapes: ids (b, t), tokens (k,) -> on (b, t).
    Errors: ValueError without tokens.
    Source: Greenewald et al. 2025, "Activated LoRA", section 3.
    """
    k, t = len(tokens), ids.shape[1]
    if k < 1:
        raise ValueError("no invocation tokens: expected at least one")
    found = np.zeros(ids.shape, bool)
    for i in range(t - k + 1):
        found[:, i] = (ids[:, i : i + k] == tokens).all(1)
    last = np.where(found.any(1), t - 1 - found[:, ::-1].argmax(1), t)
    on: Array = np.arange(t) >= last[:, None]
    return on


def part_shapes(variant: Variant, r: int, m: int, n: int) -> dict[str, tuple[int, int]]:
    """The shape of each of the variant's parameters.

    A is (r, n), B (m, r); c, magnitude and lambda_b are (m, 1); lambda_d and E are (r, 1).
    """
    columns = {"c": m, "magnitude": m, "lambda_b": m, "lambda_d": r, "E": r}
    factors = {"A": (r, n), "B": (m, r)}
    return {part: factors.get(part) or (columns[part], 1) for part in variant.parts}


def start(
    variant: Variant, init: str, rng: np.random.Generator, W: Array, r: int, s: Any
) -> tuple[Array, tuple[Array, ...]]:
    """The frozen base, and the variant's parameters before the first step, in W's dtype.

    ``init`` is one of `initialization.STARTS`. The magnitude starts as the norm of W's rows,
    0 for a row of zeros; λ_d at `LAMBDA_D`, the bias c, λ_b and the singular values E at 0.

    Shapes: W (m, n), r (), s () -> base (m, n), and the parameters as in `part_shapes`.
    Errors: ValueError as the start has it.
    """
    base, A, B = STARTS[init](rng, W, r, s)
    values = {name: np.zeros(shape) for name, shape in part_shapes(variant, r, *W.shape).items()}
    values |= {"A": A.astype(W.dtype), "B": B.astype(W.dtype)}
    if "magnitude" in values:
        V = merge_weight(base, values["A"], values["B"], s)
        values["magnitude"] = row_norm(V)[0] * V.any(1, keepdims=True)
    if "lambda_d" in values:
        values["lambda_d"] = values["lambda_d"] + LAMBDA_D
    return base, tuple(values[part].astype(W.dtype) for part in variant.parts)


LAWS = {
    "merged": "W' x + b' is the output, and dx the merged layer's.",
    "starts": "With fresh parameters the output is the base's.",
    "kept": "The base's weight stays as it is, from the start on.",
    "zero": "With B = 0 the output is the base's.",
    "balance": "Bᵀ dB = dA Aᵀ.",
    "basis": "A → R A, B → B R⁻¹ changes neither y nor dx.",
    "scale": "s → c s, B → B / c changes neither y, dx nor dA; dB becomes c dB.",
    "rank": "The rank of W' - W is at most r.",
    "adds": "Two adapters are one of the summed rank: A stacked, B side by side.",
    "one": "An adapter combined alone at weight 1 is itself.",
    "masks": "The mean over all dropout masks is the output without dropout.",
    "tokens": "Each token's output and dx are its own, and the parameters' gradients add up.",
}
"""The laws that LoRA keeps, a sentence each; an `Entry` says which its variant breaks, and why."""

_CHANGES_BASE = "the adapter is taken out of the base's weight, which becomes the residual"
_BETWEEN = "a diagonal matrix stands between A and B; only its own scalings pass through"


@dataclass(frozen=True)
class Entry:
    """A variant in the registry.

    ``differs``: what it changes of LoRA, in a sentence; ``source``: the paper or the library;
    ``variant``: its equation; ``trained``: which of the variant's parts are; ``init``: how they
    start; ``rslora``: whether s = α/√r; ``breaks``: each law of `LAWS` that it does not keep, with
    the reason.
    """

    differs: str
    source: str
    variant: Variant = LORA
    trained: tuple[str, ...] = ("A", "B")
    init: str = "kaiming"
    rslora: bool = False
    breaks: Mapping[str, str] = field(default_factory=dict)


LORA_BIAS = Variant(("A", "B", "c"), lora_bias_linear, merge_lora_bias)
DORA = Variant(("A", "B", "magnitude"), dora_linear, merge_dora, additive=False)
DORA_FULL = Variant(("A", "B", "magnitude"), dora_full_linear, merge_dora, additive=False)
VERA = Variant(("A", "B", "lambda_d", "lambda_b"), vera_linear, merge_vera)
ADALORA = Variant(("A", "B", "E"), adalora_linear, merge_adalora)

_DORA_BREAKS = {
    "zero": "rows are rescaled to the magnitude, which may be another than the base's",
    "rank": "rescaling a row changes all of it",
    "adds": "the norm of a sum is no sum of norms: each adapter rescales the base on its own",
}

REGISTRY: dict[str, Entry] = {
    "lora": Entry("LoRA itself.", "Hu et al. 2021, equation 3"),
    "gaussian": Entry("A starts normal, not uniform.", "PEFT", init="gaussian"),
    "rslora": Entry("s = α/√r.", "Kalajdzievski 2023, theorem 3.2", rslora=True),
    "lora+": Entry("B has a greater learning rate.", "Hayou, Ghosh and Yu 2024, section 4"),
    "lora-fa": Entry(
        "A stays as it was drawn; its input need not be kept.",
        "Zhang et al. 2023, section 3",
        trained=("B",),
    ),
    "lora-bias": Entry(
        "B has a trained bias.",
        "PEFT",
        LORA_BIAS,
        ("A", "B", "c"),
        breaks={
            "zero": "the bias c remains",
            "scale": "c would have to be divided too",
        },
    ),
    "dora": Entry(
        "Rows of W + s B A are rescaled to a trained magnitude; their norm is held constant.",
        "Liu et al. 2024, equation 5, section 4.3",
        DORA,
        ("A", "B", "magnitude"),
        breaks=_DORA_BREAKS,
    ),
    "dora-full": Entry(
        "DoRA with the norm differentiated.",
        "Liu et al. 2024, equation 6",
        DORA_FULL,
        ("A", "B", "magnitude"),
        breaks=_DORA_BREAKS,
    ),
    "pissa": Entry(
        "The adapter starts as the greatest singular values of W.",
        "Meng, Wang and Zhang 2024, equations 2 to 4",
        init="pissa",
        breaks={"kept": _CHANGES_BASE},
    ),
    "olora": Entry(
        "The adapter starts as the first columns of W's QR factors.",
        "Büyükakyüz 2024, algorithm 1",
        init="olora",
        breaks={"kept": _CHANGES_BASE},
    ),
    "orthogonal": Entry(
        "A and B start in orthogonal halves of the rank.", "PEFT", init="orthogonal"
    ),
    "loftq": Entry(
        "The base is quantised, and the adapter starts as what that lost.",
        "Li et al. 2023, algorithm 1",
        init="loftq",
        breaks={
            "kept": "the base becomes a quantised weight",
            "starts": "rank r does not hold all that quantising lost: the start is near, not equal",
        },
    ),
    "vera": Entry(
        "A and B are frozen and shared; two vectors are trained.",
        "Kopiczko, Blankevoort and Asano 2023, equation 2",
        VERA,
        ("lambda_d", "lambda_b"),
        init="vera",
        breaks={
            "balance": _BETWEEN,
            "basis": _BETWEEN,
            "adds": "all of an adapter's rank shares one vector over the rows",
        },
    ),
    "adalora": Entry(
        "Singular values stand between B and A, kept near orthogonal and pruned by a budget.",
        "Zhang et al. 2023, equation 3",
        ADALORA,
        ("A", "B", "E"),
        init="adalora",
        breaks={"balance": _BETWEEN, "basis": _BETWEEN},
    ),
    "alora": Entry(
        "The branch acts from an invocation's tokens on: its input is 0 before.",
        "Greenewald et al. 2025, section 3",
        breaks={"merged": "it acts on some tokens only, and a weight acts on all"},
    ),
}
"""Every variant by its name."""
