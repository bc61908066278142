"""Llama 3.1 and later: a Llama whose low frequencies of RoPE are slowed down."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.spec import ops
from minilora.spec.architectures.decoder import decoder
from minilora.spec.blocks import llama_block
from minilora.spec.lora import Params, TrainableSpec
from minilora.spec.models import Batch, Kernels, Llama
from minilora.spec.ops import Array, Back


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are slowed down: by ``factor`` where fewer than ``low`` turns fit.

    ``length``: the tokens that the model was first trained with.
    """

    factor: float
    low: float
    high: float
    length: int

    def slowed(self, frequencies: Array) -> Array:
        """ω' = ω ((1 - m) / factor + m), m = (turns - low) / (high - low), kept within 0 and 1.

        turns = length ω / 2π: how often a pair turns within the length of the first training. A
        pair that turns more than ``high`` times keeps its frequency, one below ``low`` is slowed
        by the whole factor.

        Shapes: ω (d/2,) -> ω' (d/2,).
        Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.2, and its code.
        """
        turns = frequencies * (self.length / (2 * np.pi))
        m = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        slowed: Array = frequencies * ((1 - m) / self.factor + m)
        return slowed


@dataclass(frozen=True)
class Llama3(Llama):
    """A Llama with RoPE's scaling."""

    scaling: RopeScaling = RopeScaling(1.0, 1.0, 4.0, 8192)


def frequencies(d: int, theta: float, dtype: Any = np.float64) -> Array:
    """ω = θ^(-2i/d), i = 0 … d/2 - 1: what a position turns each pair by.

    Shapes: -> ω (d/2,).
    """
    omega: Array = theta ** -(np.arange(0, d, 2, dtype=dtype) / d)
    return omega


def llama3(
    batch: Batch, W: Params, c: Llama3, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """`models.llama` with the frequencies that `RopeScaling.slowed` gives.

    Shapes: ids (b, t) -> z (v, b*t).
    Source: as there.
    """

    def tables(positions: Array, d: int, theta: float, dtype: Any) -> tuple[Array, Array]:
        wide = np.result_type(dtype, np.float64) if np.dtype(dtype).kind == "f" else np.float64
        slowed = c.scaling.slowed(frequencies(d, theta, wide))
        angles = positions * slowed[:, None, None]
        return ops.rope_tables(angles, 2, theta, dtype)  # one pair, which turns by 1

    return decoder(batch, W, c, tuning, kernels, llama_block, tables)
