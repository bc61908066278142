"""VeRA: A and B frozen and shared by all modules, two vectors trained."""

from __future__ import annotations

from typing import Any

from minilora.spec.lora import merge_weight
from minilora.spec.ops import Array, Back, dropout, linear, outer
from minilora.spec.variants.entry import (
    DIAGONAL_BETWEEN,
    ONE_SCALE,
    Column,
    Entry,
    ExtendedVariant,
    Peft,
)


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
        return dx, outer(da, h), outer(dz, lambda_d * u), dlambda_d, dlambda_b

    return y, back


def merge_vera(
    W: Array, b: Array | None, A: Array, B: Array, lambda_d: Array, lambda_b: Array, s: Any
) -> tuple[Array, Array | None]:
    """W' = W + s (λ_b ∘ B) (λ_d ∘ A); b stays.

    Shapes: W (m, n), b (m, 1), A (r, n), B (m, r), lambda_d (r, 1), lambda_b (m, 1), s () ->
    W' (m, n), b' (m, 1).
    """
    return merge_weight(W, lambda_d * A, lambda_b * B, s), b


LAMBDA_D = 0.1
"""VeRA's λ_d at the start (Kopiczko, Blankevoort and Asano 2023, section 3.3)."""


VERA = ExtendedVariant(
    ("A", "B", "lambda_d", "lambda_b"),
    vera_linear,
    merge_vera,
    columns={"lambda_d": Column("r", LAMBDA_D), "lambda_b": Column("m")},
    factors=lambda A, B, lambda_d, lambda_b: (lambda_d * A, lambda_b * B, None),
    peft=Peft(
        peft_type="VERA",
        tensors={part: f"vera_{part}" for part in ("A", "B", "lambda_d", "lambda_b")},
        refuses=dict.fromkeys(
            ("embedding", "fused", "experts", "conv1", "conv2"),
            "PEFT's VeRA adapts weights (out, in) and (in, out) alone",
        ),
    ),
)


ENTRIES = {
    "vera": Entry(
        "A and B are frozen and shared; two vectors are trained.",
        "Kopiczko, Blankevoort and Asano 2023, equation 2",
        VERA,
        trained=("lambda_d", "lambda_b"),
        init="vera",
        scale=lambda lora_alpha, r, config_r, use_rslora: 1,
        breaks={
            "balance": DIAGONAL_BETWEEN,
            "basis-change": DIAGONAL_BETWEEN,
            "concatenation": "all of an adapter's rank shares one vector over the rows",
        },
        refuses=ONE_SCALE | {"rank_pattern": "it has one rank for all modules"},
        tables=False,
    ),
}
