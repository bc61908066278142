"""Llama 3.1 and later: a Llama whose low frequencies of RoPE are slowed down."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from minilora.spec.lora import Params, TrainableSpec
from minilora.spec.models import Batch, Kernels, Llama, llama
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


def llama3(
    batch: Batch, W: Params, c: Llama3, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """`models.llama` with the frequencies that `RopeScaling.slowed` gives.

    Shapes: ids (b, t) -> z (v, b*t).
    Source: as there.
    """
    tables = partial(kernels.rope_tables, change=c.scaling.slowed)
    return llama(batch, W, c, tuning, replace(kernels, rope_tables=tables))
