"""SmolLM3: a Llama in some of whose blocks queries and keys are not turned."""

from dataclasses import dataclass
from typing import Any

from minilora.spec.architectures.decoder import decoder
from minilora.spec.blocks import Op, llama_block
from minilora.spec.lora import Params, TrainableSpec
from minilora.spec.models import Batch, Kernels, Llama
from minilora.spec.ops import Array, Back

STILL = 1, 0
"""The cosine and sine of no angle."""


@dataclass(frozen=True)
class SmolLM3(Llama):
    """A SmolLM3; the blocks ``without_positions`` turn nothing."""

    without_positions: tuple[int, ...] = ()


def smollm3_block(
    x: Array,
    at: str,
    W: Params,
    c: Any,
    tuning: TrainableSpec,
    tables: Any,
    mask: Array,
    attend: Op,
) -> tuple[Array, Back]:
    """`blocks.llama_block`, in the blocks ``without_positions`` with no angle.

    Shapes: x (d, b*t), mask (b, t, t) -> y (d, b*t); tables as rope_tables gives them.
    Source: Bakouch et al. 2025, "SmolLM3"; Yang et al. 2025, "Rope to Nope and Back Again", 3.2.
    """
    turned = int(at.split(".")[1]) not in c.without_positions
    return llama_block(x, at, W, c, tuning, tables if turned else STILL, mask, attend)


def smollm3(
    batch: Batch, W: Params, c: SmolLM3, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """The logits of a SmolLM3: `decoder` with this block.

    Shapes: ids (b, t) -> z (v, b*t).
    Source: that of :func:`smollm3_block`.
    """
    return decoder(batch, W, c, tuning, kernels, smollm3_block)
