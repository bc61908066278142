"""The specification's models, composed for speed and little memory."""

from functools import lru_cache, partial
from typing import Any

import numpy as np

from minilora.spec import ops
from minilora.spec.blocks import Op
from minilora.spec.lora import Params, TrainableSpec, project
from minilora.spec.models import Batch, Config, Kernels, logits, shifted_labels
from minilora.spec.ops import Array, Back
from minilora.training.attention import attention
from minilora.training.checkpointing import lowest_block, stack
from minilora.training.chunked_head import head_loss


def rope_tables(positions: Array, d: int, theta: float, dtype: Any) -> tuple[Array, Array]:
    """`ops.rope_tables`, remembered for the positions for which each step asks again.

    Where all rows are one array, the tables have one row.

    Shapes: positions (b, t) -> cos (b or 1, 1, d/2, t), sin (b or 1, 1, d/2, t).
    """
    rows = positions[:1] if positions.strides[0] == 0 else positions
    return _tables(rows.tobytes(), rows.shape, rows.dtype, d, theta, dtype)


@lru_cache(maxsize=2)
def _tables(
    entries: bytes, shape: tuple[int, int], kind: Any, d: int, theta: float, dtype: Any
) -> tuple[Array, Array]:
    positions = np.frombuffer(entries, kind).reshape(shape)
    tables = ops.rope_tables(positions, d, theta, dtype)
    for table in tables:
        table.setflags(write=False)  # it is every caller's
    return tables


def forward_kernels(c: Config, head: Op = project) -> Kernels:
    """For a forward alone: no activation outlives its block."""
    return Kernels(attention, partial(stack, constant=c.layers), head, rope_tables)


def loss(
    batch: Batch,
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    count: int | None = None,
    checkpointed: bool = False,
    prefix: tuple[int, Array] | None = None,
) -> tuple[Array, Back]:
    """`models.loss`, with what nobody needs neither formed nor kept; ``back`` runs once.

    ``W`` is as `checkpointing.prepared` gives it, ``prefix`` as `checkpointing.stack` takes it.

    Shapes: -> L (); ``count`` as in `ops.cross_entropy`.
    Errors: those of `models.loss`.
    """
    labels = shifted_labels(batch, c)

    def head(x: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
        return head_loss(x, at, W, tuning, labels, count)

    constant = lowest_block(c.layers, c.causal, tuning.trained)
    blocks = partial(stack, constant=constant, checkpointed=checkpointed, prefix=prefix)
    return logits(batch, W, c, tuning, Kernels(attention, blocks, head, rope_tables))
