"""Three architectures in full: Llama (and Qwen2), GPT-2, BERT with a classification head.

Each gives ``logits, back``, and :func:`loss` gives ``loss, back``: ``back(1.0)`` is a dict with the
gradient of each parameter that the `TrainableSpec` names as trained. Logits have shape (vocabulary,
b*t), of a classifier (classes, b).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minilora.spec import ops
from minilora.spec.blocks import Op, bert_block, embed, gpt2_block, llama_block, normalise, stack
from minilora.spec.lora import Params, TrainableSpec, Weights, project, sum_gradients
from minilora.spec.ops import Array, Back

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Kernels:
    """The functions that a model calls and that may be replaced by others with the same values.

    Training passes functions that are faster or need less memory: attention in blocks of queries,
    gradient checkpointing, cached RoPE tables. Generation passes attention with a KV cache.
    ``head`` may return a loss instead of logits.
    """

    attention: Op = ops.attention
    stack: Op = stack
    head: Op = project
    rope_tables: Callable[..., tuple[Array, Array]] = ops.rope_tables


@dataclass(frozen=True)
class Batch:
    """b sequences of t tokens, padded to one length.

    ``labels`` (b, t) are the tokens themselves, -100 where the loss ignores them; the model shifts
    them to the next token. For a classifier they are (b,). ``mask`` (b, t) is true at real tokens.
    ``positions`` (b, t) are 0 … t - 1 unless given; ``types`` (b, t) are BERT's token types.
    """

    ids: Array
    labels: Array | None = None
    mask: Array | None = None
    positions: Array | None = None
    types: Array | None = None

    @property
    def real(self) -> Array:
        """``mask``, or true everywhere."""
        return np.ones(self.ids.shape, bool) if self.mask is None else self.mask.astype(bool)

    @property
    def position_ids(self) -> Array:
        """``positions``, or 0 … t - 1 in every row."""
        counted = np.broadcast_to(np.arange(self.ids.shape[1]), self.ids.shape)
        return counted if self.positions is None else self.positions

    @property
    def type_ids(self) -> Array:
        """``types``, or 0 everywhere."""
        return np.zeros_like(self.ids) if self.types is None else self.types


@dataclass(frozen=True)
class Config:
    """What all architectures have; ``linears`` and ``shapes`` list a model's parameters."""

    vocab: int
    d: int
    layers: int
    heads: int
    ffn: int
    causal: ClassVar[bool] = True
    norm_bias: ClassVar[bool] = True

    def tables(self) -> dict[str, int]:
        """The number of rows of each embedding."""
        return {"embed": self.vocab}

    def block(self) -> Shapes:
        """The projections of one block, (out, in)."""
        raise NotImplementedError

    def extra_linears(self) -> Shapes:
        """The projections outside the blocks, (out, in)."""
        return {}

    def has_bias(self, at: str) -> bool:
        """Whether the projection has a bias."""
        return True

    def linears(self) -> Shapes:
        """Every projection, (out, in)."""
        parts = self.block().items()
        blocks = {f"layers.{i}.{at}": shape for i in range(self.layers) for at, shape in parts}
        return blocks | self.extra_linears()

    def matrices(self) -> Shapes:
        """All that can be adapted: the projections, the embeddings as (d, v), and a tied head."""
        tables = {at: (self.d, n) for at, n in self.tables().items()}
        tied = {"head": (self.vocab, self.d)} if self.causal else {}
        return self.linears() | tables | tied

    def shapes(self) -> Shapes:
        """The shape of every parameter."""
        shapes = {f"{at}.weight": (n, self.d) for at, n in self.tables().items()}
        for at, (m, n) in self.linears().items():
            shapes[f"{at}.weight"] = m, n
            if self.has_bias(at):
                shapes[f"{at}.bias"] = m, 1
        norms = [f"layers.{i}.{at}" for i in range(self.layers) for at in ("norm1", "norm2")]
        parts = ("weight", "bias") if self.norm_bias else ("weight",)
        return shapes | {f"{at}.{part}": (self.d, 1) for at in [*norms, "norm"] for part in parts}


@dataclass(frozen=True)
class Llama(Config):
    """A Llama, and with ``qkv_bias`` a Qwen2."""

    kv_heads: int
    head_dim: int
    eps: float = 1e-5
    theta: float = 10000.0
    tied: bool = False
    qkv_bias: bool = False
    norm_bias: ClassVar[bool] = False

    def block(self) -> Shapes:  # noqa: D102
        d, f = self.d, self.ffn
        h, g = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q": (h, d), "k": (g, d), "v": (g, d), "o": (d, h)}
        return attention | {"gate": (f, d), "up": (f, d), "down": (d, f)}

    def extra_linears(self) -> Shapes:  # noqa: D102
        return {} if self.tied else {"head": (self.vocab, self.d)}

    def has_bias(self, at: str) -> bool:  # noqa: D102
        return self.qkv_bias and at.endswith((".q", ".k", ".v"))


@dataclass(frozen=True)
class GPT2(Config):
    """A GPT-2; its head is the embedding."""

    positions: int
    eps: float = 1e-5

    def tables(self) -> dict[str, int]:  # noqa: D102
        return {"embed": self.vocab, "positions": self.positions}

    def block(self) -> Shapes:  # noqa: D102
        d, f = self.d, self.ffn
        return {"qkv": (3 * d, d), "o": (d, d), "up": (f, d), "down": (d, f)}


@dataclass(frozen=True)
class Bert(Config):
    """A BERT encoder with pooler and classification head."""

    positions: int
    types: int
    classes: int
    eps: float = 1e-12
    causal: ClassVar[bool] = False

    def tables(self) -> dict[str, int]:  # noqa: D102
        return {"embed": self.vocab, "positions": self.positions, "types": self.types}

    def block(self) -> Shapes:  # noqa: D102
        d, f = self.d, self.ffn
        return dict.fromkeys("qkvo", (d, d)) | {"up": (f, d), "down": (d, f)}

    def extra_linears(self) -> Shapes:  # noqa: D102
        return {"pooler": (self.d, self.d), "head": (self.classes, self.d)}


def llama(
    batch: Batch, W: Params, c: Llama, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """z = head(norm(blocks(embed(ids)))).

    Shapes: ids (b, t) -> z (v, b*t).
    Source: Touvron et al. 2023.
    """
    x, back_embed = embed(batch.ids.ravel(), "embed", W, tuning)
    tables = kernels.rope_tables(batch.position_ids, c.head_dim, c.theta, x.dtype)
    mask = ops.causal_mask(batch.real)

    def block(x: Array, at: str) -> tuple[Array, Back]:
        return llama_block(x, at, W, c, tuning, tables, mask, kernels.attention)

    x, back_blocks = kernels.stack(x, c.layers, block)
    h, back_norm = normalise(ops.rmsnorm, x, "norm", W, c.eps, tuning)
    z, back_head = kernels.head(h, "head", W, tuning)

    def back(dz: Array) -> Weights:
        dh, g_head = back_head(dz)
        dx, g_norm = back_norm(dh)
        dx, g_blocks = back_blocks(dx)
        return sum_gradients(back_embed(dx), g_blocks, g_norm, g_head)

    return z, back


def gpt2(
    batch: Batch, W: Params, c: GPT2, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """z = embedᵀ(norm(blocks(embed(ids) + positions))), the embedding used as the head.

    Shapes: ids (b, t) -> z (v, b*t).
    Source: Radford et al. 2019.
    """
    tokens, back_embed = embed(batch.ids.ravel(), "embed", W, tuning)
    positions, back_positions = embed(batch.position_ids.ravel(), "positions", W, tuning)
    mask = ops.causal_mask(batch.real)

    def block(x: Array, at: str) -> tuple[Array, Back]:
        return gpt2_block(x, at, W, c, tuning, mask, kernels.attention)

    x, back_blocks = kernels.stack(tokens + positions, c.layers, block)
    h, back_norm = normalise(ops.layernorm, x, "norm", W, c.eps, tuning)
    z, back_head = kernels.head(h, "head", W, tuning)

    def back(dz: Array) -> Weights:
        dh, g_head = back_head(dz)
        dx, g_norm = back_norm(dh)
        dx, g_blocks = back_blocks(dx)
        return sum_gradients(back_embed(dx), back_positions(dx), g_blocks, g_norm, g_head)

    return z, back


def bert(
    batch: Batch, W: Params, c: Bert, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """z = head(tanh(pooler(first token of blocks(norm(embed(ids) + positions + types))))).

    Shapes: ids (b, t) -> z (classes, b).
    Source: Devlin et al. 2018.
    """
    t = batch.ids.shape[1]
    tokens, back_embed = embed(batch.ids.ravel(), "embed", W, tuning)
    positions, back_positions = embed(batch.position_ids.ravel(), "positions", W, tuning)
    types, back_types = embed(batch.type_ids.ravel(), "types", W, tuning)
    x, back_norm = normalise(ops.layernorm, tokens + positions + types, "norm", W, c.eps, tuning)
    mask = ops.padding_mask(batch.real)

    def block(x: Array, at: str) -> tuple[Array, Back]:
        return bert_block(x, at, W, c, tuning, mask, kernels.attention)

    h, back_blocks = kernels.stack(x, c.layers, block)
    pooled, back_pooler = project(h[:, ::t], "pooler", W, tuning)
    act, back_tanh = ops.tanh(pooled)
    z, back_head = kernels.head(act, "head", W, tuning)

    def back(dz: Array) -> Weights:
        dact, g_head = back_head(dz)
        dfirst, g_pooler = back_pooler(back_tanh(dact))
        dh = np.zeros_like(h, dtype=np.result_type(h, dfirst))
        dh[:, ::t] = dfirst
        dx, g_blocks = back_blocks(dh)
        dx, g_norm = back_norm(dx)
        g_tables = back_embed(dx) | back_positions(dx) | back_types(dx)
        return sum_gradients(g_tables, g_norm, g_blocks, g_pooler, g_head)

    return z, back


FORWARD: dict[type[Config], Op] = {Llama: llama, GPT2: gpt2, Bert: bert}


def logits(
    batch: Batch, W: Params, c: Config, tuning: TrainableSpec, kernels: Kernels = Kernels()
) -> tuple[Array, Back]:
    """The logits of the model that ``c`` configures: column i*t + j is that of token j in row i of
    the batch; of a classifier, column i is that of row i.

    Shapes: ids (b, t) -> z (v, b*t), or ids (b, t) -> z (classes, b).
    Errors: ValueError if a token's id, position or type lies outside its embedding, and for a mask
    with other numbers than 0 and 1, such as one that is added to attention scores.
    """
    rows = {"embed": "ids", "positions": "position_ids", "types": "type_ids"}
    for at, n in c.tables().items():
        low, high = getattr(batch, rows[at]).min(), getattr(batch, rows[at]).max()
        if low < 0 or high >= n:
            raise ValueError(f"{rows[at]}: found {low} to {high}, expected 0 to {n - 1}")
    if batch.mask is not None and not ((batch.mask == 0) | (batch.mask == 1)).all():
        raise ValueError("mask: found other numbers; expected 1 for a token and 0 for padding")
    return FORWARD[type(c)](batch, W, c, tuning, kernels)


def shifted_labels(batch: Batch, c: Config) -> Array:
    """The label of each column of logits: for language models, that of the next token.

    Shapes: labels (b, t) -> targets (b*t,), or labels (b,) -> targets (b,).
    Errors: ValueError without labels.
    """
    if batch.labels is None:
        raise ValueError("the batch has no labels; a loss needs them")
    if not c.causal:
        return batch.labels
    following = np.full_like(batch.labels, ops.IGNORED)
    following[:, :-1] = batch.labels[:, 1:]
    return following.ravel()


def loss(
    batch: Batch, W: Params, c: Config, tuning: TrainableSpec, count: int | None = None
) -> tuple[Array, Back]:
    """The mean cross-entropy over the labels that count; language models predict the next token.

    Shapes: -> L ()
    ``count`` as in `ops.cross_entropy`.
    Errors: those of :func:`shifted_labels`, :func:`logits` and ``cross_entropy``.
    """
    labels = shifted_labels(batch, c)
    z, back_z = logits(batch, W, c, tuning)
    L, back_L = ops.cross_entropy(z, labels, count)
    return L, lambda dL: back_z(back_L(dL))
