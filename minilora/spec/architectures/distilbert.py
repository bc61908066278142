"""DistilBERT: a Bert without types and pooler, under a classifier of two layers."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minilora.spec import ops
from minilora.spec.blocks import bert_block, embed, normalise
from minilora.spec.lora import Params, TrainableSpec, Weights, project, sum_gradients
from minilora.spec.models import Batch, Config, Kernels, Shapes
from minilora.spec.ops import Array, Back


@dataclass(frozen=True)
class DistilBert(Config):
    """A DistilBERT encoder with its classification head; ``pooler`` is the head's first layer."""

    positions: int
    classes: int
    eps: float = 1e-12
    causal: ClassVar[bool] = False

    def tables(self) -> dict[str, int]:  # noqa: D102
        return {"embed": self.vocab, "positions": self.positions}

    def block(self) -> Shapes:  # noqa: D102
        d, f = self.d, self.ffn
        return dict.fromkeys("qkvo", (d, d)) | {"up": (f, d), "down": (d, f)}

    def extra_linears(self) -> Shapes:  # noqa: D102
        return {"pooler": (self.d, self.d), "head": (self.classes, self.d)}


def relu(x: Array) -> tuple[Array, Back]:
    """y = max(x, 0), by the sign of the real part.

    With dy given:   dx = dy where x > 0, else 0.

    Shapes: x (n, t) -> y (n, t).
    Source: Nair and Hinton 2010.
    """
    keep = x.real > 0
    return x * keep, lambda dy: dy * keep


def distilbert(
    batch: Batch, W: Params, c: DistilBert, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """z = head(relu(pooler(first token of blocks(norm(embed(ids) + positions))))).

    Shapes: ids (b, t) -> z (classes, b).
    Source: Sanh et al. 2019.
    """
    t = batch.ids.shape[1]
    tokens, back_embed = embed(batch.ids.ravel(), "embed", W, tuning)
    positions, back_positions = embed(batch.position_ids.ravel(), "positions", W, tuning)
    x, back_norm = normalise(ops.layernorm, tokens + positions, "norm", W, c.eps, tuning)
    mask = ops.padding_mask(batch.real)

    def block(x: Array, at: str) -> tuple[Array, Back]:
        return bert_block(x, at, W, c, tuning, mask, kernels.attention)

    h, back_blocks = kernels.stack(x, c.layers, block)
    pooled, back_pooler = project(h[:, ::t], "pooler", W, tuning)
    act, back_relu = relu(pooled)
    z, back_head = kernels.head(act, "head", W, tuning)

    def back(dz: Array) -> Weights:
        dact, g_head = back_head(dz)
        dfirst, g_pooler = back_pooler(back_relu(dact))
        dh = np.zeros_like(h, dtype=np.result_type(h, dfirst))
        dh[:, ::t] = dfirst
        dx, g_blocks = back_blocks(dh)
        dx, g_norm = back_norm(dx)
        g_tables = back_embed(dx) | back_positions(dx)
        return sum_gradients(g_tables, g_norm, g_blocks, g_pooler, g_head)

    return z, back
