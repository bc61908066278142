"""Norms of heads: over the features of each head, with one weight for all heads."""

from minilora.spec.blocks import Op, normalise
from minilora.spec.lora import Params, TrainableSpec, Weights
from minilora.spec.ops import Array, Back


def heads_as_columns(x: Array, h: int) -> Array:
    """A column for each head of each token; `columns_as_heads` is its transpose.

    Shapes: x (h*d, t) -> y (d, h*t).
    """
    return x.reshape(h, -1, x.shape[1]).transpose(1, 0, 2).reshape(x.shape[0] // h, -1)


def columns_as_heads(x: Array, h: int) -> Array:
    """The transpose of :func:`heads_as_columns`.

    Shapes: x (d, h*t) -> y (h*d, t).
    """
    return x.reshape(x.shape[0], h, -1).transpose(1, 0, 2).reshape(h * x.shape[0], -1)


def normalise_heads(
    op: Op, x: Array, h: int, at: str, W: Params, eps: float, tuning: TrainableSpec
) -> tuple[Array, Back]:
    """`blocks.normalise` of each of the h heads by itself.

    Shapes: x (h*d, t) -> y (h*d, t).
    """
    y, back_norm = normalise(op, heads_as_columns(x, h), at, W, eps, tuning)

    def back(dy: Array) -> tuple[Array, Weights]:
        dx, gradients = back_norm(heads_as_columns(dy, h))
        return columns_as_heads(dx, h), gradients

    return columns_as_heads(y, h), back
