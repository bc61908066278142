"""AdaLoRA's equation: singular values between B and A. Its budget is `minilora.spec.adalora`."""

from __future__ import annotations

from typing import Any

from minilora.spec.adalora import adalora_scale
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
        return dx, outer(du, h), outer(dy, s * (E * u)), dE

    return y, back


def merge_adalora(
    W: Array, b: Array | None, A: Array, B: Array, E: Array, s: Any
) -> tuple[Array, Array | None]:
    """W' = W + s B (E ∘ A); b stays.

    Shapes: W (m, n), b (m, 1), A (r, n), B (m, r), E (r, 1), s () -> W' (m, n), b' (m, 1).
    """
    return merge_weight(W, E * A, B, s), b


ADALORA = ExtendedVariant(
    ("A", "B", "E"),
    adalora_linear,
    merge_adalora,
    columns={"E": Column("r")},
    factors=lambda A, B, E: (E * A, B, None),
    peft=Peft(
        peft_type="ADALORA",
        tensors={part: f"lora_{part}" for part in "ABE"},
        flat=True,
        refuses=dict.fromkeys(
            ("embedding", "fused", "experts", "conv1"),
            "PEFT's AdaLoRA adapts weights (out, in) and (in, out) and 2-D convolutions alone",
        ),
    ),
)


ENTRIES = {
    "adalora": Entry(
        "Singular values stand between B and A, kept near orthogonal and pruned by a budget.",
        "Zhang et al. 2023, equation 3",
        ADALORA,
        trained=("A", "B", "E"),
        init="adalora",
        scale=lambda lora_alpha, r, config_r, use_rslora: adalora_scale(lora_alpha, config_r),
        breaks={"balance": DIAGONAL_BETWEEN, "basis-change": DIAGONAL_BETWEEN},
        refuses=ONE_SCALE,
        tables=False,
        pruned=True,
    ),
}
