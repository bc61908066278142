"""Three architectures in full: Llama (and Qwen2), GPT-2, BERT with a classification head.

Each gives ``logits, back``, and :func:`loss` gives ``loss, back``: ``back(1.0)`` is a dict with the
gradient of all that the `TrainableSpec` names as trained. Logits lie (classes, b*t) or (classes,
b).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from minilora.io.lazy_weights import by_rows
from minilora.spec.blocks import Past, bert_block, embed, gpt2_block, llama_block, normalise, stack
from minilora.spec.lora import (
    Params,
    TrainableSpec,
    Weights,
    project,
    sum_gradients,
    to_dense,
    weight_of,
)
from minilora.spec.ops import (
    IGNORED,
    Array,
    Back,
    causal_mask,
    cross_entropy,
    layernorm,
    padding_mask,
    rmsnorm,
    rope_tables,
    tanh,
)

Shapes = dict[str, tuple[int, int]]
Head = Callable[[Array, str, Params, TrainableSpec], tuple[Array, Back]]
"""What stands at the end: the projection to logits, or the loss of them."""


@dataclass(frozen=True)
class Batch:
    """b sequences of t tokens, padded to one length.

    ``labels`` (b, t) are the tokens themselves, -100 where they do not count: the shift to the next
    token is the model's. For a classifier they are (b,). ``mask`` (b, t) is true at real tokens.
    ``positions`` (b, t) count from 0 at the first column unless given; ``types`` (b, t) are BERT's.
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


@dataclass(frozen=True)
class Config:
    """What every architecture has; ``linears`` and ``shapes`` say what it is made of."""

    vocab: int
    d: int
    layers: int
    heads: int
    ffn: int
    causal: ClassVar[bool] = True
    norm_bias: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("norm1", "norm2")

    def tables(self) -> dict[str, int]:
        """The embeddings' rows."""
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
        """All that can be adapted: the projections, then the tables as (d, v), and a tied head."""
        tables = {at: (self.d, n) for at, n in self.tables().items()}
        tied = {"head": (self.vocab, self.d)} if self.causal else {}
        return self.linears() | tables | tied

    def inputs(self, b: int, t: int) -> Shapes:
        """What each projection reads of b rows of t tokens, (features, columns).

        Those above the blocks of a classifier read one token of each row.
        """
        matrices = {at: n for at, (_, n) in self.matrices().items() if at not in self.tables()}
        every = {at for at in matrices if self.causal or at.startswith("layers.")}
        return {at: (n, b * t if at in every else b) for at, n in matrices.items()}

    def shapes(self) -> Shapes:
        """Every parameter."""
        shapes = {f"{at}.weight": (n, self.d) for at, n in self.tables().items()}
        for at, (m, n) in self.linears().items():
            shapes |= {f"{at}.weight": (m, n)} | (
                {f"{at}.bias": (m, 1)} if self.has_bias(at) else {}
            )
        norms = [f"layers.{i}.{at}" for i in range(self.layers) for at in self.norms]
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


def draw_weights(c: Config, rng: "np.random.Generator", std: float = 0.02) -> Weights:
    """Fresh weights in float64: matrices N(0, std²), norms' weights 1, biases 0."""

    def draw(name: str, shape: tuple[int, int]) -> Array:
        if shape[1] > 1:
            return std * rng.standard_normal(shape)
        return np.full(shape, 0.0 if name.endswith(".bias") else 1.0)

    return {name: draw(name, shape) for name, shape in c.shapes().items()}


@lru_cache(maxsize=1)
def _triangle(shape: tuple[int, int]) -> Array:
    """The causal mask of tokens that are all real, for which each step asks again."""
    mask = causal_mask(np.ones(shape, bool))
    mask.setflags(write=False)  # it is every caller's
    return mask


def mask_of(batch: Batch, past: Past | None) -> Array:
    """The causal mask of the batch's tokens, over those of the past too, all of which they follow.

    Shapes: ids (b, t) -> mask (b, s, t), keys before queries.
    """
    own = _triangle(batch.ids.shape) if batch.mask is None else causal_mask(batch.real)
    if past is None:
        return own
    t = batch.ids.shape[1]
    earlier = past.seen(batch.real)[:, :-t, None]
    return np.concatenate([earlier.repeat(t, axis=2), own], axis=1)


@lru_cache(maxsize=2)
def _tables(t: int, d: int, theta: float, dtype: Any) -> tuple[Array, Array]:
    """Those of the positions 0 … t - 1 in every row, for which each step asks again."""
    tables = rope_tables(np.arange(t)[None], d, theta, dtype)
    for table in tables:
        table.setflags(write=False)
    return tables


def llama(
    batch: Batch,
    W: Params,
    c: Llama,
    tuning: TrainableSpec,
    head: Head = project,
    past: Past | None = None,
) -> tuple[Array, Back]:
    """z = head(norm(blocks(embed(ids)))).

    Shapes: ids (b, t) -> z (v, b*t).
    Source: Touvron et al. 2023.
    """
    x, back_embed = embed(batch.ids.ravel(), "embed", W, tuning)
    of = c.head_dim, c.theta, x.dtype
    counted = batch.positions is None
    tables = _tables(batch.ids.shape[1], *of) if counted else rope_tables(batch.position_ids, *of)
    mask = mask_of(batch, past)
    x, back_blocks = stack(
        x,
        c.layers,
        lambda x, at: llama_block(x, at, W, c, tuning, tables, mask, past),
        *kept(c, tuning),
    )
    h, back_norm = normalise(rmsnorm, x, "norm", W, c, tuning)
    z, back_head = head(h, "head", W, tuning)

    def back(dz: Array) -> Weights:
        dh, g_head = back_head(dz)
        dx, g_norm = back_norm(dh)
        dx, g_blocks = back_blocks(dx)
        return sum_gradients(back_embed(dx), g_blocks, g_norm, g_head)

    return z, back


def gpt2(
    batch: Batch,
    W: Params,
    c: GPT2,
    tuning: TrainableSpec,
    head: Head = project,
    past: Past | None = None,
) -> tuple[Array, Back]:
    """z = embedᵀ(norm(blocks(embed(ids) + positions))), the embedding used as the head.

    Shapes: ids (b, t) -> z (v, b*t).
    Source: Radford et al. 2019.
    """
    tokens, back_embed = embed(batch.ids.ravel(), "embed", W, tuning)
    places, back_positions = embed(batch.position_ids.ravel(), "positions", W, tuning)
    mask = mask_of(batch, past)
    x, back_blocks = stack(
        tokens + places,
        c.layers,
        lambda x, at: gpt2_block(x, at, W, c, tuning, mask, past),
        *kept(c, tuning),
    )
    h, back_norm = normalise(layernorm, x, "norm", W, c, tuning)
    z, back_head = head(h, "head", W, tuning)

    def back(dz: Array) -> Weights:
        dh, g_head = back_head(dz)
        dx, g_norm = back_norm(dh)
        dx, g_blocks = back_blocks(dx)
        return sum_gradients(back_embed(dx), back_positions(dx), g_blocks, g_norm, g_head)

    return z, back


def bert(
    batch: Batch, W: Params, c: Bert, tuning: TrainableSpec, head: Head = project
) -> tuple[Array, Back]:
    """z = head(tanh(pooler(first token of blocks(norm(embed(ids) + positions + types))))).

    Shapes: ids (b, t) -> z (classes, b).
    Source: Devlin et al. 2018.
    """
    t = batch.ids.shape[1]
    types = np.zeros_like(batch.ids) if batch.types is None else batch.types
    tokens, back_embed = embed(batch.ids.ravel(), "embed", W, tuning)
    places, back_positions = embed(batch.position_ids.ravel(), "positions", W, tuning)
    kinds, back_types = embed(types.ravel(), "types", W, tuning)
    x, back_norm = normalise(layernorm, tokens + places + kinds, "norm", W, c, tuning)
    mask = padding_mask(batch.real)
    h, back_blocks = stack(
        x, c.layers, lambda x, at: bert_block(x, at, W, c, tuning, mask), *kept(c, tuning)
    )
    pooled, back_pooler = project(h[:, ::t], "pooler", W, tuning)
    act, back_tanh = tanh(pooled)
    z, back_head = head(act, "head", W, tuning)

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


def kept(c: Config, tuning: TrainableSpec) -> tuple[int, bool]:
    """How many blocks at the bottom have nothing trained in or below them; whether to recompute."""
    return _lowest(c.layers, c.causal, frozenset(tuning.trained)), tuning.recompute


def ties_head(c: Config) -> bool:
    """Whether the head has no weight of its own, and takes its embedding's."""
    return "head" not in c.linears()


_ABOVE = {True: ("norm", "head"), False: ("pooler", "head")}
"""The modules above the blocks, of a causal model or not; Bert's outer norm is below them."""


@lru_cache(maxsize=8)
def _lowest(layers: int, causal: bool, trained: frozenset[str]) -> int:
    lowest = layers
    for name in trained:
        at, number, *_ = name.split(".")
        if at not in _ABOVE[causal]:
            lowest = min(lowest, int(number) if at == "layers" else 0)
    return lowest


FIRST = ("q", "k", "v", "qkv")
"""The projections that read a block's input, through its first norm or as it is."""


@lru_cache(maxsize=8)
def constant(layers: int, causal: bool, trained: frozenset[str]) -> frozenset[str]:
    """The projections that read what depends on nothing trained: `FIRST` of the lowest block.

    Unless something below the blocks is trained, or the norm between.
    """
    first = f"layers.{_lowest(layers, causal, trained)}."
    outside = ("layers.", *(f"{at}." for at in _ABOVE[causal]))
    if any(not name.startswith(outside) or name.startswith(first + "norm1") for name in trained):
        return frozenset()
    return frozenset(first + at for at in FIRST)


FORWARD: dict[type[Config], Callable[..., tuple[Array, Back]]] = {
    Llama: llama,
    GPT2: gpt2,
    Bert: bert,
}


def logits(
    batch: Batch,
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    head: Head = project,
    past: Past | None = None,
) -> tuple[Array, Back]:
    """The logits of the model that ``c`` configures, or what else ``head`` makes in their place.

    With a ``past`` the batch holds the tokens that follow it: they see its keys and values, and
    ``batch.positions`` counts on. There is no ``back`` then: what came before is not held.

    Errors: ValueError if a token's id, position or type lies outside its table, for a mask of other
    numbers than 0 and 1 (what is added to scores is another thing), and for the past of a model
    that is not causal, whose earlier tokens would have to see the later ones.
    """
    rows = {"embed": "ids", "positions": "position_ids", "types": "types"}
    for at, n in c.tables().items():
        numbers = getattr(batch, rows[at])
        if numbers is not None and (numbers.min() < 0 or numbers.max() >= n):
            found = f"{numbers.min()} to {numbers.max()}"
            raise ValueError(f"rows of {at}: found {found}, expected 0 to {n - 1}")
    if batch.mask is not None and not ((batch.mask == 0) | (batch.mask == 1)).all():
        raise ValueError("mask: found other numbers; expected 1 for a token and 0 for padding")
    if past is None:
        own = replace(tuning, constant=constant(c.layers, c.causal, frozenset(tuning.trained)))
        return FORWARD[type(c)](batch, W, c, own, head)
    if not c.causal:
        raise ValueError(f"a {type(c).__name__} has no past: every token sees every other")
    z, _ = FORWARD[type(c)](batch, W, c, tuning, head, past)
    return z, _no_back


def _no_back(dz: Array) -> Weights:
    raise RuntimeError("a forward with a past has no back; run it over all tokens at once")


def shifted_labels(batch: Batch, c: Config) -> Array:
    """The label that each column of logits is to predict: for language models, the next token's.

    Shapes: labels (b, t) -> targets (b*t,), or labels (b,) -> targets (b,).
    Errors: ValueError without labels.
    """
    if batch.labels is None:
        raise ValueError("the batch has no labels; a loss needs them")
    if not c.causal:
        return batch.labels
    following = np.full_like(batch.labels, IGNORED)
    following[:, :-1] = batch.labels[:, 1:]
    return following.ravel()


LOGITS, COLUMNS = 2**18, 128
"""So many logits are formed at a time, or those of so many tokens where these are more."""

LARGE = 6 * 2**20
"""From so many logits on, the head's weight is read by blocks of rows."""


def head_loss(
    x: Array, at: str, W: Params, tuning: TrainableSpec, labels: Array, count: int | None = None
) -> tuple[Array, Back]:
    """L = the mean cross-entropy of z = W x over the labels that count, W the projection's ``at``.

    Where there would be more than `LOGITS`, only the columns whose label counts are formed, some of
    them at a time, and each time the gradient in the same pass: z is never there as a whole. Nor,
    where it is `LARGE`, is W.

    Shapes: x (n, t), labels (t,) -> L ().
    Errors: those of `ops.cross_entropy`.
    """
    E = W[weight_of(at, W)]
    held = _held(E, len(E) * labels.size > LARGE, at, W)
    most = max(COLUMNS, LOGITS // len(E))
    parted = labels.size > most
    columns: Any = np.flatnonzero(labels != IGNORED) if parted else slice(None)
    n = columns.size if parted and count is None else count
    K = tuning.dropout_scale.get(at)

    def of(part: Any) -> tuple[Array, Array, Weights]:
        own = tuning if K is None else replace(tuning, dropout_scale={at: K[:, part]})
        z, back_z = project(x[:, part], at, held, own)
        L, back_L = cross_entropy(z, labels[part], n)
        del z  # the gradient takes its place
        return L, *(back_z(back_L(1.0)) if tuning.trained else (np.zeros_like(x[:, part]), {}))

    L, dx, gradients = _in_parts(of, columns, most, x) if parted else of(columns)

    def back(dL: Array) -> tuple[Array, Weights]:
        return dL * dx, {name: dL * g for name, g in gradients.items()}

    return L, back


def _in_parts(
    of: Callable[[Array], tuple[Array, Array, Weights]], columns: Array, most: int, x: Array
) -> tuple[Array, Array, Weights]:
    """L, dx and what else ``of`` gives of at most so many columns of x, added up."""
    parts = np.array_split(columns, -(-columns.size // most) or 1)
    losses, dxs, gradients = zip(*map(of, parts), strict=True)
    dx = np.zeros_like(x, dtype=dxs[0].dtype)
    dx[:, columns] = np.concatenate(dxs, axis=1)
    return sum(losses[1:], losses[0]), dx, sum_gradients(*gradients)


def _held(E: Any, by_blocks: bool, at: str, W: Params) -> Params:
    """W, in which the weight E of the projection ``at`` is read as a whole or by blocks of rows."""
    if not by_blocks and not hasattr(E, "rows"):
        return W
    own: dict[str, Any] = {name: W[name] for name in W if name.startswith(f"{at}.")}
    return own | {weight_of(at, W): by_rows(E) if by_blocks else to_dense(E)}


def loss(
    batch: Batch, W: Params, c: Config, tuning: TrainableSpec, count: int | None = None
) -> tuple[Array, Back]:
    """The mean cross-entropy over the labels that count; language models predict the next token.

    Shapes: -> L (); ``count`` as in `ops.cross_entropy`.
    Errors: those of :func:`shifted_labels`, :func:`logits` and ``cross_entropy``.
    """
    labels = shifted_labels(batch, c)

    def head(x: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
        return head_loss(x, at, W, tuning, labels, count)

    return logits(batch, W, c, tuning, head)
