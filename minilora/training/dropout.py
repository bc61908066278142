"""The dropout masks of a step, which depend only on the seed, the step, the row and the module."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.spec.initialization import draw_dropout, input_shapes
from minilora.spec.lora import TrainableSpec
from minilora.spec.models import Batch, Config
from minilora.spec.ops import Array


@dataclass(frozen=True)
class Dropout(Mapping[str, Array]):
    """K of each module, drawn on each access with the same bits, and not kept.

    The mask of a sequence is seeded by (``seed``, ``step``, its row, the module's name): it does
    not depend on how a batch is divided, or on when the run was resumed. ``inputs``: each module's
    number of input features and of columns per row; ``rows``: those of the batch.
    """

    seed: int
    step: int
    p: float
    inputs: Mapping[str, tuple[int, int]]
    rows: range
    dtype: Any

    def __getitem__(self, at: str) -> Array:
        shape = {at: self.inputs[at]}
        seeds = ([self.seed, self.step, row, *at.encode()] for row in self.rows)
        rngs = map(np.random.default_rng, seeds)
        drawn = [draw_dropout(rng, self.p, shape, self.dtype)[at] for rng in rngs]
        return np.concatenate(drawn, axis=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def __contains__(self, at: object) -> bool:
        return at in self.inputs

    def of(self, rows: slice) -> "Dropout":
        """The masks of these rows."""
        return replace(self, rows=self.rows[rows])


def drawn_dropout(
    seed: int, step: int, p: float, batch: Batch, c: Config, tuning: TrainableSpec, dtype: Any
) -> Mapping[str, Array]:
    """``TrainableSpec.dropout_scale`` of a step: K of each adapted projection; empty if p is 0.

    Errors: ValueError unless 0 ≤ p < 1, and for a negative seed or step.
    """
    if not 0 <= p < 1 or min(seed, step) < 0:
        raise ValueError(
            f"dropout {p} with seed {seed} at step {step}: expected a rate from 0 and below 1, and "
            "a seed and a step from 0"
        )
    b, t = batch.ids.shape
    inputs = {at: shape for at, shape in input_shapes(c, 1, t).items() if at in tuning.scale}
    return Dropout(seed, step, p, inputs, range(b), dtype) if p else {}
