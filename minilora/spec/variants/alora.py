"""aLoRA: LoRA's equation, on the tokens from an invocation on."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.spec.lora import lora_linear
from minilora.spec.ops import Array, Back
from minilora.spec.variants.entry import (
    LORA_TENSORS,
    NO_TABLE,
    Entry,
    ExtendedVariant,
    Peft,
)


def invocation(ids: Array, tokens: Array) -> Array:
    """on = 1 from where a row of ids last has the invocation's tokens, 0 before it.

    It multiplies the adapter's input, as K does. It is 0 for a row without the invocation. Before
    the invocation the model is the base model, keys and values included: a KV cache that the base
    model has filled can be reused.

    Shapes: ids (b, t), tokens (k,) -> on (b, t).
    Errors: ValueError without tokens.
    Source: Greenewald et al. 2025, "Activated LoRA", section 3.
    """
    k, t = len(tokens), ids.shape[1]
    if k < 1:
        raise ValueError("no invocation tokens: expected at least one")
    begins = np.zeros(ids.shape, bool)
    for i in range(t - k + 1):
        begins[:, i] = (ids[:, i : i + k] == tokens).all(1)
    last = np.where(begins.any(1), t - 1 - begins[:, ::-1].argmax(1), t)
    on: Array = np.arange(t) >= last[:, None]
    return on


def alora_linear(
    x: Array, W: Array, b: Array | None, A: Array, B: Array, s: Any, K: Array | None = None
) -> tuple[Array, Back]:
    """LoRA's y, with K = 0 on the tokens before the invocation.

    The shapes are those of `lora_linear`.

    Errors: ValueError without K.
    """
    if K is None:
        raise ValueError(
            "aLoRA acts from its invocation on: give the batch's tuning, by with_invocation"
        )
    return lora_linear(x, W, b, A, B, s, K)


def merge_alora(*parts: Any) -> tuple[Array, Array | None]:
    """Refuse: a weight acts on all tokens.

    Errors: ValueError.
    """
    raise ValueError("aLoRA acts on some tokens only, and a weight on all: it has no merge")


ALORA = ExtendedVariant(
    ("A", "B"),
    alora_linear,
    merge_alora,
    peft=Peft(setting="alora_invocation_tokens", tensors=LORA_TENSORS, refuses=NO_TABLE),
)
"""LoRA's equation for aLoRA, which refuses to act where no batch's tokens are given."""


_NO_TEXT = "its columns are no tokens of a text: there is no invocation"


ENTRIES = {
    "alora": Entry(
        "The branch acts from an invocation's tokens on: its input is 0 before.",
        "Greenewald et al. 2025, section 3",
        injected=ALORA,
        breaks={"merge": "it acts on some tokens only, and a weight acts on all"},
        lacks={
            "embedding": "its input is a number, which has no part to switch off",
            "experts": "columns come in the order of their experts, not of the text",
            "conv1": _NO_TEXT,
            "conv2": _NO_TEXT,
        },
        untrained=(
            "it acts only after an invocation sequence, which training data does not mark: use "
            "lora, or train it with PEFT"
        ),
        tables=False,
    ),
}
