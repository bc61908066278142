"""The frozen prefix: what enters the lowest trained block, computed once for each sequence.

Below block k nothing is trained and nothing is dropped, so what enters it,

    x_k = block_{k-1}(... block_0(embed(ids))),

is the same in every epoch. It is computed sequence by sequence, whatever batch a sequence is in,
so that a kept x_k has the bits of one that is computed again.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

from minilora.spec.lora import Params, TrainableSpec
from minilora.spec.models import Batch, Config, Kernels, logits
from minilora.spec.ops import Array, Back
from minilora.training.attention import attention
from minilora.training.kernels import rope_tables


class Store(Protocol):
    """Where arrays are kept by a key; it may forget, and what it forgets is computed again."""

    def get(self, key: bytes) -> Array | None:
        """The array of the key, or None."""

    def put(self, key: bytes, array: Array) -> None:
        """Keep the array."""


@dataclass(frozen=True, eq=False)
class FrozenPrefix:
    """The blocks below ``depth``, and where what leaves them is kept, as ``kept_as``."""

    depth: int
    store: Store
    kept_as: np.dtype[Any] | None = None

    def of(self, batch: Batch, W: Params, c: Config, tuning: TrainableSpec) -> Array:
        """x that enters the block ``depth``, 0 at the padding on the right of a row.

        Shapes: -> x (d, b*t).
        Errors: those of `models.logits` and of the store.
        """
        b, t = batch.ids.shape
        frozen = replace(tuning, trained=frozenset(), dropout_scale={})
        rows = [self._row(_sequence(batch, i), W, c, frozen) for i in range(b)]
        x = np.zeros((c.d, b, t), np.result_type(*rows))
        for i, row in enumerate(rows):
            x[:, i, : row.shape[1]] = row
        return x.reshape(c.d, b * t)

    def _row(self, sequence: Batch, W: Params, c: Config, frozen: TrainableSpec) -> Array:
        key = _key(sequence)
        kept = self.store.get(key)
        dtype = W["norm.weight"].dtype
        if kept is None:
            x = self._computed(sequence, W, c, frozen)
            kept = x if self.kept_as is None else x.astype(self.kept_as)
            self.store.put(key, kept)
        return kept.astype(dtype, copy=False)

    def _computed(self, sequence: Batch, W: Params, c: Config, frozen: TrainableSpec) -> Array:
        found: list[Array] = []

        def lower(x: Array, layers: int, block: Any) -> tuple[Array, Back]:
            for i in range(self.depth):
                x, _ = block(x, f"layers.{i}.")
            found.append(x)
            return x, _none

        kernels = Kernels(attention, lower, lambda h, *_: (h, _none), rope_tables)
        logits(sequence, W, c, frozen, kernels)
        return found[0]


def _none(dy: Array) -> Any:
    """No gradient is asked for."""
    raise AssertionError("the frozen prefix has no backward")


def _sequence(batch: Batch, i: int) -> Batch:
    """Row i as a batch of its own, without the padding on its right; without labels."""
    real = np.flatnonzero(batch.real[i])
    n = int(real[-1]) + 1 if real.size else batch.ids.shape[1]
    arrays = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "labels"}
    parts = {name: a[i : i + 1, :n] for name, a in arrays.items() if a is not None}
    if "mask" in parts and parts["mask"].all():
        del parts["mask"]
    return Batch(**parts)


def _key(sequence: Batch) -> bytes:
    """What tells sequences apart: their ids, and their mask, positions and types if given."""
    arrays = sequence.ids, sequence.mask, sequence.positions, sequence.types
    return b"|".join(b"" if a is None else np.asarray(a, np.int64).tobytes() for a in arrays)
