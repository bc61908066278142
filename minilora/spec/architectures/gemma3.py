"""Gemma 3's text model: norms before and after, and windows of attention in most blocks."""

from dataclasses import dataclass
from typing import Any

from minilora.spec import ops
from minilora.spec.architectures.heads import normalise_heads
from minilora.spec.blocks import Op, embed, normalise
from minilora.spec.lora import Params, TrainableSpec, Weights, project, sum_gradients
from minilora.spec.models import Batch, Kernels, Llama, Shapes
from minilora.spec.ops import Array, Back


@dataclass(frozen=True)
class Gemma3(Llama):
    """A Gemma 3: its blocks with a ``window`` see so many tokens, with RoPE's base ``local_theta``.

    ``window`` has a number for each block, None where it sees all, with the base ``theta``. Scores
    are divided by the root of ``score_scale``.
    """

    window: tuple[int | None, ...] = ()
    local_theta: float = 10000.0
    score_scale: int = 256

    def shapes(self) -> Shapes:  # noqa: D102
        blocks = [f"layers.{i}." for i in range(self.layers)]
        inner = {
            f"{at}{n}.weight": (self.head_dim, 1) for at in blocks for n in ("norm_q", "norm_k")
        }
        outer = {f"{at}{n}.weight": (self.d, 1) for at in blocks for n in ("norm3", "norm4")}
        return super().shapes() | inner | outer


def gemma_norm(x: Array, w: Array, eps: float) -> tuple[Array, Back]:
    """`ops.rmsnorm` with the weight 1 + w.

    Shapes: x (n, t), w (n, 1) -> y (n, t).
    Source: Gemma Team 2025, "Gemma 3 Technical Report", and its code.
    """
    return ops.rmsnorm(x, 1 + w, eps)


def window_mask(mask: Array, positions: Array, window: int | None) -> Array:
    """The mask, in which a query sees the ``window`` last positions, its own among them.

    Shapes: mask (b, t, t), positions (b, t) -> mask (b, t, t), keys before queries.
    """
    if window is None:
        return mask
    near: Array = positions[:, None] - positions[:, :, None] < window
    return mask & near


def gemma3_block(
    x: Array,
    at: str,
    W: Params,
    c: Any,
    tuning: TrainableSpec,
    tables: Any,
    mask: Array,
    attend: Op,
) -> tuple[Array, Back]:
    """y = x' + norm4(down(gelu(gate h') ∘ up h')), h' = norm3(x'), x' = x + norm2(o(a)).

    a is the attention of norm1(x), with q and k normalised head by head and then turned.

    Shapes: x (d, b*t), mask (b, t, t) -> y (d, b*t); tables as rope_tables gives them.
    Source: Gemma Team 2025, "Gemma 3 Technical Report", section 2.
    """
    b, norm = len(mask), gemma_norm
    h, back_norm1 = normalise(norm, x, at + "norm1", W, c.eps, tuning)
    q, back_q = project(h, at + "q", W, tuning)
    k, back_k = project(h, at + "k", W, tuning)
    v, back_v = project(h, at + "v", W, tuning)
    q, back_norm_q = normalise_heads(norm, q, c.heads, at + "norm_q", W, c.eps, tuning)
    k, back_norm_k = normalise_heads(norm, k, c.kv_heads, at + "norm_k", W, c.eps, tuning)
    q, back_rope_q = ops.rope(ops.split_heads(q, b, c.heads), *tables)
    k, back_rope_k = ops.rope(ops.split_heads(k, b, c.kv_heads), *tables)
    sharpness = (c.head_dim / c.score_scale) ** 0.5  # attend divides by the root of head_dim
    a, back_attention = attend(q * sharpness, k, ops.split_heads(v, b, c.kv_heads), mask)
    o, back_o = project(ops.join_heads(a), at + "o", W, tuning)
    o, back_norm2 = normalise(norm, o, at + "norm2", W, c.eps, tuning)
    x = x + o

    h, back_norm3 = normalise(norm, x, at + "norm3", W, c.eps, tuning)
    gate, back_gate = project(h, at + "gate", W, tuning)
    up, back_up = project(h, at + "up", W, tuning)
    act, back_gelu = ops.gelu_tanh(gate)
    m, back_down = project(act * up, at + "down", W, tuning)
    m, back_norm4 = normalise(norm, m, at + "norm4", W, c.eps, tuning)

    def back(dy: Array) -> tuple[Array, Weights]:
        dm, g_norm4 = back_norm4(dy)
        dm, g_down = back_down(dm)
        dh_up, g_up = back_up(dm * act)
        dh_gate, g_gate = back_gate(back_gelu(dm * up))
        dx, g_norm3 = back_norm3(dh_up + dh_gate)
        dx = dy + dx

        do, g_norm2 = back_norm2(dx)
        da, g_o = back_o(do)
        dq, dk, dv = back_attention(ops.split_heads(da, b, c.heads))
        dq, g_norm_q = back_norm_q(ops.join_heads(back_rope_q(dq * sharpness)))
        dk, g_norm_k = back_norm_k(ops.join_heads(back_rope_k(dk)))
        dh_v, g_v = back_v(ops.join_heads(dv))
        dh_k, g_k = back_k(dk)
        dh_q, g_q = back_q(dq)
        dh, g_norm1 = back_norm1(dh_q + dh_k + dh_v)
        g_attention = g_norm1 | g_q | g_k | g_v | g_norm_q | g_norm_k | g_o | g_norm2
        return dx + dh, g_attention | g_norm3 | g_gate | g_up | g_down | g_norm4

    return x + m, back


def gemma3(
    batch: Batch, W: Params, c: Gemma3, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """z = head(norm(blocks(√d embed(ids)))), with windows and bases of RoPE block by block.

    Shapes: ids (b, t) -> z (v, b*t).
    Source: Gemma Team 2025, "Gemma 3 Technical Report", section 2.
    """
    tokens, back_embed = embed(batch.ids.ravel(), "embed", W, tuning)
    root = tokens.dtype.type(c.d**0.5) if tokens.dtype.kind == "f" else c.d**0.5
    positions, mask = batch.position_ids, ops.causal_mask(batch.real)
    kinds = {window: c.theta if window is None else c.local_theta for window in set(c.window)}
    masks = {window: window_mask(mask, positions, window) for window in kinds}
    turns = {
        window: kernels.rope_tables(positions, c.head_dim, theta, tokens.dtype)
        for window, theta in kinds.items()
    }

    def block(x: Array, at: str) -> tuple[Array, Back]:
        kind = c.window[int(at.split(".")[1])]
        return gemma3_block(x, at, W, c, tuning, turns[kind], masks[kind], kernels.attention)

    x, back_blocks = kernels.stack(tokens * root, c.layers, block)
    h, back_norm = normalise(gemma_norm, x, "norm", W, c.eps, tuning)
    z, back_head = kernels.head(h, "head", W, tuning)

    def back(dz: Array) -> Weights:
        dh, g_head = back_head(dz)
        dx, g_norm = back_norm(dh)
        dx, g_blocks = back_blocks(dx)
        return sum_gradients(back_embed(dx * root), g_blocks, g_norm, g_head)

    return z, back
