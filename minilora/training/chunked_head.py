"""The loss of a large vocabulary, whose logits are never there as a whole."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.io.lazy_weights import Table, as_table
from minilora.spec.lora import (
    Params,
    TrainableSpec,
    Weights,
    adapter_of,
    project,
    sum_gradients,
    weight_of,
)
from minilora.spec.ops import IGNORED, Array, Back, cross_entropy

LOGITS, COLUMNS = 2**18, 128
"""So many logits are formed at a time, or those of so many tokens where these are more."""

LARGE = 6 * 2**20
"""From so many logits on, the head's weight is read by blocks of rows."""


def head_loss(
    x: Array, at: str, W: Params, tuning: TrainableSpec, labels: Array, count: int | None = None
) -> tuple[Array, Back]:
    """L = the mean cross-entropy of z = W x over the labels that count, W the projection's ``at``.

    Where there would be more than `LOGITS`, only the columns whose label counts are formed, some of
    them at a time, and each time the gradient in the same pass. Where there would be `LARGE`, W is
    read by blocks of rows.

    Shapes: x (n, t), labels (t,) -> L ().
    Errors: those of `ops.cross_entropy`.
    """
    E = W[weight_of(at, W)]
    additive = adapter_of(at, W, tuning)[0].additive  # what rescales W needs it dense
    W = _with_head(E, additive and len(E) * labels.size > LARGE, at, W)
    most = max(COLUMNS, LOGITS // len(E))
    chunked = labels.size * len(E) > LOGITS
    columns: Any = np.flatnonzero(labels != IGNORED) if chunked else slice(None)
    n = columns.size if chunked and count is None else count
    K = tuning.dropout_scale.get(at)

    def loss_of(chunk: Any) -> tuple[Array, Array, Weights]:
        spec = tuning if K is None else replace(tuning, dropout_scale={at: K[:, chunk]})
        z, back_z = project(x[:, chunk], at, W, spec)
        L, back_L = cross_entropy(z, labels[chunk], n)
        del z  # the gradient takes its place
        return L, *(back_z(back_L(1.0)) if tuning.trained else (np.zeros_like(x[:, chunk]), {}))

    L, dx, gradients = _in_chunks(loss_of, columns, most, x) if chunked else loss_of(columns)

    def back(dL: Array) -> tuple[Array, Weights]:
        return dL * dx, {name: dL * g for name, g in gradients.items()}

    return L, back


def _in_chunks(
    loss_of: Callable[[Array], tuple[Array, Array, Weights]], columns: Array, most: int, x: Array
) -> tuple[Array, Array, Weights]:
    """L, dx and the gradients of at most so many columns of x at a time, added up."""
    chunks = np.array_split(columns, -(-columns.size // most) or 1)
    losses, dxs, gradients = zip(*map(loss_of, chunks), strict=True)
    dx = np.zeros_like(x, dtype=dxs[0].dtype)
    dx[:, columns] = np.concatenate(dxs, axis=1)
    return sum(losses[1:], losses[0]), dx, sum_gradients(*gradients)


def _with_head(E: Any, by_rows: bool, at: str, W: Params) -> Params:
    """W, in which the weight E of the projection ``at`` is dense, or read by blocks of rows."""
    if not by_rows and not isinstance(E, Table):
        return W
    weight, others = weight_of(at, W), (name for name in W if name.startswith(f"{at}."))
    parts: dict[str, Any] = {name: W[name] for name in others if name != weight}
    return parts | {weight: as_table(E) if by_rows else np.asarray(E)}
