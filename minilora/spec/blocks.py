"""The blocks of three architectures, each in full: the forward, then its backward in reverse order.

``back(dy)`` gives dx and a dict with the gradients of the trained parameters. A name that ``back``
uses is assigned once. ``at`` is the block's prefix, such as ``layers.0.``; ``W`` holds all
parameters; ``c`` is the model's configuration; a batch is b sequences of t columns, side by side;
``attend`` is `ops.attention`, or a function that returns the same values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.spec import ops
from minilora.spec.lora import Params, TrainableSpec, Weights, adapter_of, project
from minilora.spec.ops import Array, Back

Op = Callable[..., tuple[Array, Back]]


def embed(ids: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
    """The embedding named ``at``; ``back(dy)`` gives the gradients of its trained parameters.

    Its adapter acts on Eᵀ as a projection of one-hot columns, which have no gradient.

    Shapes: ids (t,) -> y (d, t).
    """
    weight = f"{at}.weight"
    variant, names = adapter_of(at, W, tuning)
    base, back_base = ops.embedding(ids, W[weight])
    if names:
        x, parts = ops.OneHot(ids, len(W[weight])), [W[name] for name in names]
        y, back_y = variant.linear(x, W[weight].T, None, *parts, tuning.scale[at])
    else:
        y, back_y = base, lambda dy: (None,)

    def back(dy: Array) -> Weights:
        gradients = dict(zip(names, back_y(dy)[1:], strict=True))
        if weight in tuning.trained:
            gradients[weight] = back_base(dy)
        return tuning.trained_only(gradients.items())

    return y, back


def normalise(
    op: Op, x: Array, at: str, W: Params, eps: float, tuning: TrainableSpec
) -> tuple[Array, Back]:
    """The norm named ``at``. ``op``: `ops.rmsnorm`, with a weight, or `ops.layernorm`, with a bias.

    x and y are (d, t).
    """
    names = [name for name in (f"{at}.weight", f"{at}.bias") if name in W]
    y, back_op = op(x, *(W[name] for name in names), eps)
    frozen = tuning.trained.isdisjoint(names)

    def back(dy: Array) -> tuple[Array, Weights]:
        dx, *gradients = back_op(dy, frozen)
        return dx, {} if frozen else tuning.trained_only(zip(names, gradients, strict=True))

    return y, back


def llama_block(
    x: Array,
    at: str,
    W: Params,
    c: Any,
    tuning: TrainableSpec,
    tables: Any,
    mask: Array,
    attend: Op,
) -> tuple[Array, Back]:
    """y = x' + down(silu(gate h') ∘ up h'), h' = norm2(x'), x' = x + o(attention of norm1(x)).

    Shapes: x (d, b*t), mask (b, t, t) -> y (d, b*t); tables as rope_tables gives them.
    Source: Touvron et al. 2023, section 2.2; Qwen2 adds biases to q, k and v.
    """
    b = len(mask)
    h, back_norm1 = normalise(ops.rmsnorm, x, at + "norm1", W, c.eps, tuning)
    q, back_q = project(h, at + "q", W, tuning)
    k, back_k = project(h, at + "k", W, tuning)
    v, back_v = project(h, at + "v", W, tuning)
    q, back_rope_q = ops.rope(ops.split_heads(q, b, c.heads), *tables)
    k, back_rope_k = ops.rope(ops.split_heads(k, b, c.kv_heads), *tables)
    a, back_attention = attend(q, k, ops.split_heads(v, b, c.kv_heads), mask)
    o, back_o = project(ops.join_heads(a), at + "o", W, tuning)
    x = x + o

    h, back_norm2 = normalise(ops.rmsnorm, x, at + "norm2", W, c.eps, tuning)
    gate, back_gate = project(h, at + "gate", W, tuning)
    up, back_up = project(h, at + "up", W, tuning)
    act, back_silu = ops.silu(gate)
    m, back_down = project(act * up, at + "down", W, tuning)

    def back(dy: Array) -> tuple[Array, Weights]:
        dm, g_down = back_down(dy)
        dh_up, g_up = back_up(dm * act)
        dh_gate, g_gate = back_gate(back_silu(dm * up))
        dx, g_norm2 = back_norm2(dh_up + dh_gate)
        dx = dy + dx

        da, g_o = back_o(dx)
        dq, dk, dv = back_attention(ops.split_heads(da, b, c.heads))
        dh_v, g_v = back_v(ops.join_heads(dv))
        dh_k, g_k = back_k(ops.join_heads(back_rope_k(dk)))
        dh_q, g_q = back_q(ops.join_heads(back_rope_q(dq)))
        dh, g_norm1 = back_norm1(dh_q + dh_k + dh_v)
        return dx + dh, g_norm1 | g_q | g_k | g_v | g_o | g_norm2 | g_gate | g_up | g_down

    return x + m, back


def gpt2_block(
    x: Array, at: str, W: Params, c: Any, tuning: TrainableSpec, mask: Array, attend: Op
) -> tuple[Array, Back]:
    """y = x' + down(gelu(up norm2(x'))), x' = x + o(attention of qkv(norm1(x))).

    Shapes: x (d, b*t), mask (b, t, t) -> y (d, b*t).
    Source: Radford et al. 2019, section 2.3; q, k and v are one weight (3 d, d).
    """
    b = len(mask)
    h, back_norm1 = normalise(ops.layernorm, x, at + "norm1", W, c.eps, tuning)
    qkv, back_qkv = project(h, at + "qkv", W, tuning)
    q, k, v = (ops.split_heads(part, b, c.heads) for part in qkv.reshape(3, *x.shape))
    a, back_attention = attend(q, k, v, mask)
    o, back_o = project(ops.join_heads(a), at + "o", W, tuning)
    x = x + o

    h, back_norm2 = normalise(ops.layernorm, x, at + "norm2", W, c.eps, tuning)
    up, back_up = project(h, at + "up", W, tuning)
    act, back_gelu = ops.gelu_tanh(up)
    m, back_down = project(act, at + "down", W, tuning)

    def back(dy: Array) -> tuple[Array, Weights]:
        dact, g_down = back_down(dy)
        dh, g_up = back_up(back_gelu(dact))
        dx, g_norm2 = back_norm2(dh)
        dx = dy + dx

        da, g_o = back_o(dx)
        dqkv = [ops.join_heads(d) for d in back_attention(ops.split_heads(da, b, c.heads))]
        dh, g_qkv = back_qkv(np.concatenate(dqkv))
        dh, g_norm1 = back_norm1(dh)
        return dx + dh, g_norm1 | g_qkv | g_o | g_norm2 | g_up | g_down

    return x + m, back


def bert_block(
    x: Array, at: str, W: Params, c: Any, tuning: TrainableSpec, mask: Array, attend: Op
) -> tuple[Array, Back]:
    """y = norm2(x' + down(gelu(up x'))), x' = norm1(x + o(attention of x)).

    Shapes: x (d, b*t), mask (b, t, t) -> y (d, b*t).
    Source: Devlin et al. 2018, section 3; the norms after the sums as in Vaswani et al. 2017.
    """
    b = len(mask)
    q, back_q = project(x, at + "q", W, tuning)
    k, back_k = project(x, at + "k", W, tuning)
    v, back_v = project(x, at + "v", W, tuning)
    q, k, v = (ops.split_heads(part, b, c.heads) for part in (q, k, v))
    a, back_attention = attend(q, k, v, mask)
    o, back_o = project(ops.join_heads(a), at + "o", W, tuning)
    x, back_norm1 = normalise(ops.layernorm, x + o, at + "norm1", W, c.eps, tuning)

    up, back_up = project(x, at + "up", W, tuning)
    act, back_gelu = ops.gelu(up)
    m, back_down = project(act, at + "down", W, tuning)
    y, back_norm2 = normalise(ops.layernorm, x + m, at + "norm2", W, c.eps, tuning)

    def back(dy: Array) -> tuple[Array, Weights]:
        dm, g_norm2 = back_norm2(dy)
        dact, g_down = back_down(dm)
        dx, g_up = back_up(back_gelu(dact))
        do, g_norm1 = back_norm1(dm + dx)

        da, g_o = back_o(do)
        dq, dk, dv = back_attention(ops.split_heads(da, b, c.heads))
        dx_v, g_v = back_v(ops.join_heads(dv))
        dx_k, g_k = back_k(ops.join_heads(dk))
        dx_q, g_q = back_q(ops.join_heads(dq))
        return do + dx_q + dx_k + dx_v, g_q | g_k | g_v | g_o | g_norm1 | g_up | g_down | g_norm2

    return y, back


def stack(x: Array, layers: int, block: Callable[[Array, str], Any]) -> tuple[Array, Back]:
    """The blocks in order: ``block(x, at)`` computes one, and ``back`` goes through all in reverse.

    Shapes: x (d, b*t) -> y (d, b*t).
    """
    backs = []
    for i in range(layers):
        x, back_block = block(x, f"layers.{i}.")
        backs.append(back_block)

    def back(dy: Array) -> tuple[Array, Weights]:
        gradients: Weights = {}
        for back_block in reversed(backs):
            dy, block_gradients = back_block(dy)
            gradients |= block_gradients
        return dy, gradients

    return x, back
