"""The keys and values of earlier tokens, which a later token's attention sees too."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minilora.spec.blocks import Op
from minilora.spec.lora import Params, TrainableSpec, project
from minilora.spec.models import Batch, Config, logits
from minilora.spec.ops import Array, Back
from minilora.training.attention import attention
from minilora.training.kernels import forward_kernels


class KVCache:
    """The keys and values of all tokens so far, a pair for each block.

    It grows as the model runs over further tokens of the same b sequences.
    """

    def __init__(self) -> None:
        self.real: Array | None = None
        self.held: list[tuple[Array, Array]] = []
        self.length: list[int] = []
        self.block = 0
        self.windows: Sequence[int | None] = ()

    def begin(self, real: Array, windows: Sequence[int | None] = ()) -> None:
        """Expect the next t tokens, of which ``real`` are no padding, from the first block on.

        ``windows``: how many tokens each block sees, None where all; by default all.

        Shapes: real (b, t).
        """
        self.windows = windows
        self.earlier = np.empty((len(real), 0), bool) if self.real is None else self.real
        self.real = np.concatenate([self.earlier, real], axis=1)
        self.block = 0

    def cut(self, n: int) -> None:
        """Keep the first n tokens alone."""
        if self.real is not None:
            self.real = self.real[:, :n]
        self.length = [n] * len(self.held)

    def append(self, block: int, k: Array, v: Array) -> tuple[Array, Array]:
        """All keys and values of the block, the new ones at the end.

        They lie in twice the room that they need, so that a token's cost is not that of a copy.

        Shapes: k (b, g, d, t), v (b, g, d, t) -> k (b, g, d, s), v (b, g, d, s).
        """
        if block == len(self.held):
            self.held.append((k[..., :0], v[..., :0]))
            self.length.append(0)
        start, end = self.length[block], self.length[block] + k.shape[-1]
        if end > self.held[block][0].shape[-1]:
            room = [np.empty((*new.shape[:-1], 2 * end), new.dtype) for new in (k, v)]
            for place, old in zip(room, self.held[block], strict=True):
                place[..., :start] = old[..., :start]
            self.held[block] = room[0], room[1]
        for place, new in zip(self.held[block], (k, v), strict=True):
            place[..., start:end] = new
        self.length[block] = end
        keys, values = (place[..., :end] for place in self.held[block])
        return keys, values

    def attention(self, q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Back]:
        """Attention of the new tokens over all: each sees the earlier ones that are no padding.

        Blocks attend in their order: each call is the next block's.

        Shapes: q (b, h, d, t), k (b, g, d, t), v (b, g, d, t), mask (b, t, t) -> o (b, h, d, t).
        """
        k, v = self.append(self.block, k, v)
        t, s = q.shape[-1], self.earlier.shape[1]
        seen = self.earlier[:, :, None].repeat(t, axis=2)
        window = self.windows[self.block] if self.windows else None
        if window is not None:
            seen &= s + np.arange(t) - np.arange(s)[:, None] < window
        self.block += 1
        return attention(q, k, v, np.concatenate([seen, mask], axis=1))


def next_logits(
    batch: Batch,
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    cache: KVCache,
    head: Op = project,
) -> Array:
    """The logits of the tokens that follow those in the cache, which then has them too.

    ``batch.positions`` count on from the earlier tokens.

    Shapes: ids (b, t) -> z (v, b*t), or what ``head`` leaves of it.
    Errors: ValueError for a model that is not causal, whose earlier tokens would have to see the
    later ones; those of `models.logits`.
    """
    if not c.causal:
        raise ValueError(f"a {type(c).__name__} has no cache: every token sees every other")
    cache.begin(batch.real, getattr(c, "window", ()))
    kernels = replace(forward_kernels(c, head), attention=cache.attention)
    return logits(batch, W, c, tuning, kernels)[0]
