"""DoRA: the rows of W + s B A rescaled to a trained magnitude, with their norm held or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.spec.lora import lora_linear, merge_weight
from minilora.spec.ops import Array, Back, dropout, linear, outer
from minilora.spec.variants.entry import (
    LORA_TENSORS,
    Column,
    Entry,
    ExtendedVariant,
    Peft,
)


def row_norm(V: Array) -> tuple[Array, Back]:
    """v = ‖V‖, the Euclidean norm of each row, and 1 for a row of zeros, which has no direction.

    With dv given:   dV = dv ∘ V / v.

    Why rows: a row here is an output feature, in y = W x. The paper takes ‖·‖_c, the norm of each
    column of a W (d, k), with m (1, k) (equations 2 to 5). Its W is drawn as (in, out), so that a
    column is an output feature: its first author says so (nbasyl/DoRA, issue 1), and its code
    norms a weight (out, in) by ``torch.linalg.norm(weight, dim=1)``, as PEFT does. Norms of the
    columns of a W (out, in), to which the letters alone lead, are another function: LyCORIS with
    ``wd_on_out=False``.

    Shapes: V (m, n) -> v (m, 1).
    Source: Liu et al. 2024, "DoRA", equations 2 and 5, with its W transposed.
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
        return dx, outer(du, h), outer(dz, s * u), dg / v, -g * dg / v

    return y, back


def rescaled_lora_linear(
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
    """y = g ∘ (W x + s B A (K ∘ x)) + b, g = m / v: dropout acts on the input of B A alone.

    Without dropout it is `rescaled_linear`. With z = W x + s B A (K ∘ x), dz = g ∘ dy and dx, dA,
    dB those of `lora_linear` for dz:
    dm = dg / v,   dv = -g ∘ dg / v,   dg = the sum over tokens of dy ∘ z.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), magnitude (m, 1), v (m, 1), s (),
    K (n, t) -> y (m, t).
    Source: mlx-lm ``tuner/dora.py``, torchtune ``modules/peft/dora.py``.
    """
    g = magnitude / v
    z, back_lora = lora_linear(x, W, None, A, B, s, K)
    y = g * z if b is None else g * z + b

    def back(dy: Array) -> tuple[Array, ...]:
        dg = (dy * z).sum(1, keepdims=True)
        return *back_lora(g * dy), dg / v, -g * dg / v

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
    *,
    rescaled: Callable[..., tuple[Array, Back]] = rescaled_linear,
) -> tuple[Array, Back]:
    """y = W x + b + (m ∘ V / ‖V‖ - W) (K ∘ x), V = W + s B A, the norm held constant in ``back``.

    With dy given:   dx, dA, dB, dm of `rescaled_linear`, and nothing flows through ‖V‖.

    ``rescaled=rescaled_lora_linear`` is the other convention of dropout.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), magnitude (m, 1), s (), K (n, t) ->
    y (m, t).
    Source: Liu et al. 2024, "DoRA", equation 5 and section 4.3; so PEFT, MLX and torchtune.
    """
    v, _ = row_norm(merge_weight(W, A, B, s))
    y, back_rescaled = rescaled(x, W, b, A, B, magnitude, v, s, K)

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
    *,
    rescaled: Callable[..., tuple[Array, Back]] = rescaled_linear,
) -> tuple[Array, Back]:
    """y = W x + b + (m ∘ V / ‖V‖ - W) (K ∘ x), V = W + s B A, the norm differentiated too.

    With dV the gradient through the norm, dv ∘ V / ‖V‖, dv that of `rescaled_linear`:
    dA and dB gain s Bᵀ dV and s dV Aᵀ, so that each row of the whole dV is orthogonal to V's.

    ``rescaled=rescaled_lora_linear`` is the other convention of dropout.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), magnitude (m, 1), s (), K (n, t) ->
    y (m, t).
    Source: Liu et al. 2024, "DoRA", equations 5 and 6; so LyCORIS and adapters.
    """
    v, back_norm = row_norm(merge_weight(W, A, B, s))
    y, back_rescaled = rescaled(x, W, b, A, B, magnitude, v, s, K)

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
    return rescaled_rows(V, magnitude, row_norm(V)[0]), b


def rescaled_rows(V: Array, magnitude: Array, v: Array) -> Array:
    """m ∘ V / v: the rows of V, of norms v, rescaled to m.

    Shapes: V (m, n), magnitude (m, 1), v (m, 1) -> W' (m, n).
    """
    return magnitude / v * V


def _magnitude(V: Array) -> Array:
    """‖V‖ of each row, and 0 for a row of zeros."""
    norm: Array = row_norm(V)[0] * V.any(1, keepdims=True)
    return norm


_DORA_TENSORS = LORA_TENSORS | {"magnitude": "lora_magnitude_vector"}


DORA = ExtendedVariant(
    ("A", "B", "magnitude"),
    dora_linear,
    merge_dora,
    additive=False,
    columns={"magnitude": Column("m", _magnitude)},
    peft=Peft(setting="use_dora", tensors=_DORA_TENSORS),
)


DORA_FULL = ExtendedVariant(
    ("A", "B", "magnitude"),
    dora_full_linear,
    merge_dora,
    additive=False,
    columns={"magnitude": Column("m", _magnitude)},
    peft=Peft(tensors=_DORA_TENSORS),
)


_DORA_BREAKS = {
    "zero-B": "rows are rescaled to the magnitude, which may be another than the base's",
    "rank": "rescaling a row changes all of it",
    "concatenation": (
        "the norm of a sum is no sum of norms: each adapter rescales the base on its own"
    ),
}


ENTRIES = {
    "dora": Entry(
        "Rows of W + s B A are rescaled to a trained magnitude; their norm is held constant.",
        "Liu et al. 2024, equation 5, section 4.3",
        DORA,
        trained=("A", "B", "magnitude"),
        breaks=_DORA_BREAKS,
        constant_norm=True,
    ),
    "dora-full": Entry(
        "DoRA with the norm differentiated.",
        "Liu et al. 2024, equation 6",
        DORA_FULL,
        trained=("A", "B", "magnitude"),
        breaks=_DORA_BREAKS,
        written_as="dora",
    ),
}
