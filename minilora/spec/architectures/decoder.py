"""What Llama's relatives share: blocks of one kind between an embedding and a head."""

from collections.abc import Callable

from minilora.spec import ops
from minilora.spec.blocks import Op, embed, normalise
from minilora.spec.lora import Params, TrainableSpec, Weights, sum_gradients
from minilora.spec.models import Batch, Kernels, Llama
from minilora.spec.ops import Array, Back


def decoder(
    batch: Batch,
    W: Params,
    c: Llama,
    tuning: TrainableSpec,
    kernels: Kernels,
    block: Op,
    rope_tables: Callable[..., tuple[Array, Array]] | None = None,
) -> tuple[Array, Back]:
    """z = head(norm(blocks(embed(ids)))), as `models.llama`, with another block.

    ``rope_tables`` has the arguments of `ops.rope_tables`.

    Shapes: ids (b, t) -> z (v, b*t).
    """
    x, back_embed = embed(batch.ids.ravel(), "embed", W, tuning)
    tables_of = kernels.rope_tables if rope_tables is None else rope_tables
    tables = tables_of(batch.position_ids, c.head_dim, c.theta, x.dtype)
    mask = ops.causal_mask(batch.real)

    def run(x: Array, at: str) -> tuple[Array, Back]:
        return block(x, at, W, c, tuning, tables, mask, kernels.attention)

    x, back_blocks = kernels.stack(x, c.layers, run)
    h, back_norm = normalise(ops.rmsnorm, x, "norm", W, c.eps, tuning)
    z, back_head = kernels.head(h, "head", W, tuning)

    def back(dz: Array) -> Weights:
        dh, g_head = back_head(dz)
        dx, g_norm = back_norm(dh)
        dx, g_blocks = back_blocks(dx)
        return sum_gradients(back_embed(dx), g_blocks, g_norm, g_head)

    return z, back
