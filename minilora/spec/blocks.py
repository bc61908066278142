"""The blocks of three architectures, each written out in full: its forward, then its lines upwards.

``back(dy)`` gives dx and a dict with the gradients of what is trained. A name that ``back`` uses
is assigned once. ``at`` is the block's prefix, such as ``layers.0.``; ``W`` holds all parameters;
``c`` is the model's configuration; a batch lies as b sequences of t columns each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minilora.spec.layers import adapted_embedding
from minilora.spec.lora import Params, TrainableSpec, Weights, adapter_of, frozen_weight, project
from minilora.spec.ops import (
    Array,
    Back,
    attention,
    by_queries,
    embedding,
    gelu,
    gelu_tanh,
    join_heads,
    layernorm,
    rmsnorm,
    rope,
    silu,
    split_heads,
)


def embed(ids: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
    """The embedding named ``at``; ``back(dy)`` gives the gradients of what is trained of it."""
    weight = f"{at}.weight"
    variant, names = adapter_of(at, W, tuning)
    base, back_embedding = embedding(ids, W[weight])
    if names:
        factors, s = [W[name] for name in names], tuning.scale[at]
        table = frozen_weight(variant, weight, W)
        y, back_y = adapted_embedding(variant.linear, ids, table, factors, s)
    else:
        y, back_y = base, lambda dy: ()

    def back(dy: Array) -> Weights:
        gradients = dict(zip(names, back_y(dy), strict=True))
        if weight in tuning.trained:
            gradients[weight] = back_embedding(dy)
        return tuning.trained_only(gradients.items())

    return y, back


def normalise(
    op: Callable[..., tuple[Array, Back]],
    x: Array,
    at: str,
    W: Params,
    c: Any,
    tuning: TrainableSpec,
) -> tuple[Array, Back]:
    """The norm named ``at``, by ``op``: rmsnorm with its weight, layernorm with weight and bias.

    Where it is frozen and dy is the number 0, of which there is nothing below, so is dx.
    """
    names = [name for name in (f"{at}.weight", f"{at}.bias") if name in W]
    y, back_op = op(x, *(W[name] for name in names), c.eps)
    frozen = tuning.trained.isdisjoint(names)

    def back(dy: Array) -> tuple[Array, Weights]:
        if frozen and not np.ndim(dy):
            return dy, {}
        dx, *gradients = back_op(dy, frozen)
        return dx, {} if frozen else tuning.trained_only(zip(names, gradients, strict=True))

    return y, back


class Past:
    """The keys and values of the tokens so far, by block, which a later token's attention sees too.

    It grows as the model runs over further tokens of the same b sequences; ``real`` (b, s) is true
    at those that are no padding. What has run with it has no ``back``.
    """

    def __init__(self) -> None:
        self.real: Array | None = None
        self.held: dict[str, tuple[Array, Array]] = {}
        self.length: dict[str, int] = {}

    def seen(self, real: Array) -> Array:
        """What is real of all tokens, once the t new ones are among them.

        Shapes: real (b, t) -> real (b, s).
        """
        self.real = real if self.real is None else np.concatenate([self.real, real], axis=1)
        return self.real

    def extend(self, at: str, k: Array, v: Array) -> tuple[Array, Array]:
        """All keys and values of the block, the new ones at the end.

        They lie in twice the room that they need, so that a token's cost is not that of a copy.

        Shapes: k (b, g, d, t), v (b, g, d, t) -> k (b, g, d, s), v (b, g, d, s).
        """
        start = self.length.get(at, 0)
        end = start + k.shape[-1]
        if start == 0 or end > self.held[at][0].shape[-1]:
            old = self.held.get(at, (k[..., :0], v[..., :0]))
            room = [np.empty((*new.shape[:-1], 2 * end), new.dtype) for new in (k, v)]
            for place, before in zip(room, old, strict=True):
                place[..., :start] = before[..., :start]
            self.held[at] = room[0], room[1]
        for place, new in zip(self.held[at], (k, v), strict=True):
            place[..., start:end] = new
        self.length[at] = end
        keys, values = (place[..., :end] for place in self.held[at])
        return keys, values


def so_far(past: Past | None, at: str, k: Array, v: Array) -> tuple[Array, Array]:
    """The keys and values that attention sees: the new ones, and those of the past, if any."""
    return (k, v) if past is None else past.extend(at, k, v)


def llama_block(
    x: Array,
    at: str,
    W: Params,
    c: Any,
    tuning: TrainableSpec,
    tables: tuple[Array, Array],
    mask: Array,
    past: Past | None = None,
) -> tuple[Array, Back]:
    """y = x' + down(silu(gate h') ∘ up h'), h' = norm2(x'), x' = x + o(attention of norm1(x)).

    Beside a ``past``, of s - t tokens, the mask is (b, s, t).

    Shapes: x (d, b*t), mask (b, t, t) -> y (d, b*t); tables as rope_tables gives them.
    Source: Touvron et al. 2023, section 2.2; Qwen2 adds biases to q, k and v.
    """
    b = len(mask)
    h, back_norm1 = normalise(rmsnorm, x, at + "norm1", W, c, tuning)
    q, back_q = project(h, at + "q", W, tuning)
    k, back_k = project(h, at + "k", W, tuning)
    v, back_v = project(h, at + "v", W, tuning)
    q, back_rope_q = rope(split_heads(q, b, c.heads), *tables)
    k, back_rope_k = rope(split_heads(k, b, c.kv_heads), *tables)
    k, v = so_far(past, at, k, split_heads(v, b, c.kv_heads))
    a, back_attention = by_queries(attention, q, k, v, mask)
    o, back_o = project(join_heads(a), at + "o", W, tuning)
    x = x + o

    h, back_norm2 = normalise(rmsnorm, x, at + "norm2", W, c, tuning)
    gate, back_gate = project(h, at + "gate", W, tuning)
    up, back_up = project(h, at + "up", W, tuning)
    act, back_silu = silu(gate)
    m, back_down = project(act * up, at + "down", W, tuning)

    def back(dy: Array) -> tuple[Array, Weights]:
        dm, g_down = back_down(dy)
        dh_up, g_up = back_up(dm * act)
        dh_gate, g_gate = back_gate(back_silu(dm * up))
        dx, g_norm2 = back_norm2(dh_up + dh_gate)
        dx = dy + dx

        da, g_o = back_o(dx)
        dq, dk, dv = back_attention(split_heads(da, b, c.heads))
        dh_v, g_v = back_v(join_heads(dv))
        dh_k, g_k = back_k(join_heads(back_rope_k(dk)))
        dh_q, g_q = back_q(join_heads(back_rope_q(dq)))
        dh, g_norm1 = back_norm1(dh_q + dh_k + dh_v)
        gradients = g_norm1 | g_q | g_k | g_v | g_o | g_norm2 | g_gate | g_up | g_down
        return dx + dh, gradients

    return x + m, back


def gpt2_block(
    x: Array,
    at: str,
    W: Params,
    c: Any,
    tuning: TrainableSpec,
    mask: Array,
    past: Past | None = None,
) -> tuple[Array, Back]:
    """y = x' + down(gelu(up norm2(x'))), x' = x + o(attention of qkv(norm1(x))).

    Beside a ``past``, of s - t tokens, the mask is (b, s, t).

    Shapes: x (d, b*t), mask (b, t, t) -> y (d, b*t).
    Source: Radford et al. 2019, section 2.3; q, k and v are one weight (3 d, d).
    """
    b = len(mask)
    h, back_norm1 = normalise(layernorm, x, at + "norm1", W, c, tuning)
    qkv, back_qkv = project(h, at + "qkv", W, tuning)
    q, k, v = (split_heads(part, b, c.heads) for part in qkv.reshape(3, *x.shape))
    k, v = so_far(past, at, k, v)
    a, back_attention = by_queries(attention, q, k, v, mask)
    o, back_o = project(join_heads(a), at + "o", W, tuning)
    x = x + o

    h, back_norm2 = normalise(layernorm, x, at + "norm2", W, c, tuning)
    up, back_up = project(h, at + "up", W, tuning)
    act, back_gelu = gelu_tanh(up)
    m, back_down = project(act, at + "down", W, tuning)

    def back(dy: Array) -> tuple[Array, Weights]:
        dact, g_down = back_down(dy)
        dh, g_up = back_up(back_gelu(dact))
        dx, g_norm2 = back_norm2(dh)
        dx = dy + dx

        da, g_o = back_o(dx)
        dqkv = [join_heads(d) for d in back_attention(split_heads(da, b, c.heads))]
        dh, g_qkv = back_qkv(np.concatenate(dqkv))
        dh, g_norm1 = back_norm1(dh)
        return dx + dh, g_norm1 | g_qkv | g_o | g_norm2 | g_up | g_down

    return x + m, back


def bert_block(
    x: Array, at: str, W: Params, c: Any, tuning: TrainableSpec, mask: Array
) -> tuple[Array, Back]:
    """y = norm2(x' + down(gelu(up x'))), x' = norm1(x + o(attention of x)).

    Shapes: x (d, b*t), mask (b, t, t) -> y (d, b*t).
    Source: Devlin et al. 2018, section 3; the norms after the sums as in Vaswani et al. 2017.
    """
    b = len(mask)
    q, back_q = project(x, at + "q", W, tuning)
    k, back_k = project(x, at + "k", W, tuning)
    v, back_v = project(x, at + "v", W, tuning)
    q, k, v = (split_heads(part, b, c.heads) for part in (q, k, v))
    a, back_attention = by_queries(attention, q, k, v, mask)
    o, back_o = project(join_heads(a), at + "o", W, tuning)
    x, back_norm1 = normalise(layernorm, x + o, at + "norm1", W, c, tuning)

    up, back_up = project(x, at + "up", W, tuning)
    act, back_gelu = gelu(up)
    m, back_down = project(act, at + "down", W, tuning)
    y, back_norm2 = normalise(layernorm, x + m, at + "norm2", W, c, tuning)

    def back(dy: Array) -> tuple[Array, Weights]:
        dm, g_norm2 = back_norm2(dy)
        dact, g_down = back_down(dm)
        dx, g_up = back_up(back_gelu(dact))
        do, g_norm1 = back_norm1(dm + dx)

        da, g_o = back_o(do)
        dq, dk, dv = back_attention(split_heads(da, b, c.heads))
        dx_v, g_v = back_v(join_heads(dv))
        dx_k, g_k = back_k(join_heads(dk))
        dx_q, g_q = back_q(join_heads(dq))
        gradients = g_q | g_k | g_v | g_o | g_norm1 | g_up | g_down | g_norm2
        return do + dx_q + dx_k + dx_v, gradients

    return y, back


def stack(
    x: Array,
    layers: int,
    block: Callable[[Array, str], Any],
    constant: int = 0,
    recompute: bool = False,
) -> tuple[Array, Back]:
    """Block upon block. ``back`` frees each block's activations as it passes, so it runs once.

    The first ``constant`` blocks are those in and below which nothing is trained: nothing is kept
    of them, and where there are any, dx is 0. With ``recompute`` a block's input alone is kept, and
    ``back`` runs its forward again, to the same bits.

    Shapes: x (d, b*t) -> y (d, b*t).
    Errors: RuntimeError at a second run, whose activations are gone.
    """
    backs: list[Back] = [_constant] if constant else []

    def upwards(x: Array, i: int) -> Any:
        at = f"layers.{i}."
        y, back_block = block(x, at)
        if i >= constant:
            backs.append(partial(_again, block, x, at) if recompute else back_block)
        return y

    for i in range(layers):
        x = upwards(x, i)  # whose frame, and so what block i needs no more, is gone by the next

    def back(dy: Array) -> tuple[Array, Weights]:
        if not backs:
            raise RuntimeError("back has run and freed the activations; run the forward again")
        gradients: Weights = {}
        while backs:
            dy, block_gradients = backs.pop()(dy)
            gradients |= block_gradients
        return dy, gradients

    return x, back


def _constant(dy: Array) -> tuple[Array, Weights]:
    return np.zeros_like(dy), {}


def _again(block: Callable[[Array, str], Any], x: Array, at: str, dy: Array) -> Any:
    _, back_block = block(x, at)
    return back_block(dy)
