"""Qwen3: a Llama whose queries and keys are normalised head by head before they are turned."""

from dataclasses import dataclass
from typing import Any

from minilora.spec import ops
from minilora.spec.architectures.decoder import decoder
from minilora.spec.architectures.heads import normalise_heads
from minilora.spec.blocks import Op, normalise
from minilora.spec.lora import Params, TrainableSpec, Weights, project
from minilora.spec.models import Batch, Kernels, Llama, Shapes
from minilora.spec.ops import Array, Back


@dataclass(frozen=True)
class Qwen3(Llama):
    """A Qwen3: every block has two norms more, ``norm_q`` and ``norm_k`` of ``head_dim``."""

    def shapes(self) -> Shapes:  # noqa: D102
        inner = [f"layers.{i}.{at}" for i in range(self.layers) for at in ("norm_q", "norm_k")]
        return super().shapes() | {f"{at}.weight": (self.head_dim, 1) for at in inner}


def qwen3_block(
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

    In the attention q and k are norm_q(q h) and norm_k(k h), each head by itself, then turned.

    Shapes: x (d, b*t), mask (b, t, t) -> y (d, b*t); tables as rope_tables gives them.
    Source: Yang et al. 2025, "Qwen3 Technical Report", section 2; the norms of q and k, Dehghani et
    al. 2023, section 2.1.
    """
    b, norm = len(mask), ops.rmsnorm
    h, back_norm1 = normalise(norm, x, at + "norm1", W, c.eps, tuning)
    q, back_q = project(h, at + "q", W, tuning)
    k, back_k = project(h, at + "k", W, tuning)
    v, back_v = project(h, at + "v", W, tuning)
    q, back_norm_q = normalise_heads(norm, q, c.heads, at + "norm_q", W, c.eps, tuning)
    k, back_norm_k = normalise_heads(norm, k, c.kv_heads, at + "norm_k", W, c.eps, tuning)
    q, back_rope_q = ops.rope(ops.split_heads(q, b, c.heads), *tables)
    k, back_rope_k = ops.rope(ops.split_heads(k, b, c.kv_heads), *tables)
    a, back_attention = attend(q, k, ops.split_heads(v, b, c.kv_heads), mask)
    o, back_o = project(ops.join_heads(a), at + "o", W, tuning)
    x = x + o

    h, back_norm2 = normalise(norm, x, at + "norm2", W, c.eps, tuning)
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
        dq, g_norm_q = back_norm_q(ops.join_heads(back_rope_q(dq)))
        dk, g_norm_k = back_norm_k(ops.join_heads(back_rope_k(dk)))
        dh_v, g_v = back_v(ops.join_heads(dv))
        dh_k, g_k = back_k(dk)
        dh_q, g_q = back_q(dq)
        dh, g_norm1 = back_norm1(dh_q + dh_k + dh_v)
        g_attention = g_norm1 | g_q | g_k | g_v | g_norm_q | g_norm_k | g_o
        return dx + dh, g_attention | g_norm2 | g_gate | g_up | g_down

    return x + m, back


def qwen3(
    batch: Batch, W: Params, c: Qwen3, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """The logits of a Qwen3: `decoder` with this block.

    Shapes: ids (b, t) -> z (v, b*t).
    Source: that of :func:`qwen3_block`.
    """
    return decoder(batch, W, c, tuning, kernels, qwen3_block)
