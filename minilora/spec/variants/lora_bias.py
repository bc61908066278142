"""LoRA whose B has a trained bias."""

from __future__ import annotations

from typing import Any

from minilora.spec.lora import lora_linear, merge_weight
from minilora.spec.ops import Array, Back
from minilora.spec.variants.entry import (
    LORA_TENSORS,
    Column,
    Entry,
    ExtendedVariant,
    Peft,
)


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


LORA_BIAS = ExtendedVariant(
    ("A", "B", "c"),
    lora_bias_linear,
    merge_lora_bias,
    columns={"c": Column("m")},
    factors=lambda A, B, c: (A, B, c),
    peft=Peft(
        setting="lora_bias",
        tensors=LORA_TENSORS | {"c": "lora_B.bias"},
        takes_init=False,
        refuses={"embedding": "PEFT refuses lora_bias on an embedding"},
    ),
)


ENTRIES = {
    "lora-bias": Entry(
        "B has a trained bias.",
        "PEFT",
        LORA_BIAS,
        trained=("A", "B", "c"),
        breaks={
            "zero-B": "the bias c remains",
            "rescaling": "c would have to be divided too",
        },
        lacks={"embedding": "an embedding has no bias to merge it into; PEFT refuses it too"},
        tables=False,
    ),
}
