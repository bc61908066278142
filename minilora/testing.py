"""Strategies for `hypothesis <https://hypothesis.works>`_ that draw inputs for tests of LoRA.

Some inputs hide errors: with alpha = r the scale is 1, with B = 0 nothing flows back to A, in a
square matrix a missing transpose raises nothing. So the sizes of a case all differ, or are all
equal; alpha / r is no whole number; B, biases and norms are not 0 or 1; the dropout rate is not ½;
there are fewer key/value heads than query heads; rows have unequal numbers of labels, and some
labels are ignored.

Hypothesis draws, and can shrink, sizes, switches and seeds; the entries of arrays come from a drawn
seed, except those of :func:`whole` and :func:`fractions`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora.spec import initialization, lora, models, ops, target_modules, variants
from minilora.spec import layers as layer_kinds
from minilora.spec.ops import IGNORED, Array, Back

RATES = (Fraction(1, 10), Fraction(1, 4), Fraction(3, 4))
"""Dropout rates; with ½ an inverted mask would have the right scale."""


def seeds() -> st.SearchStrategy[int]:
    """Seeds of a generator."""
    return st.integers(0, 2**32 - 1)


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Generators of random numbers, each from a drawn seed."""
    return seeds().map(np.random.default_rng)


def sizes(
    count: int, smallest: int = 1, greatest: int = 7, square: bool = True
) -> st.SearchStrategy[tuple[int, ...]]:
    """``count`` sizes, all distinct or, with ``square``, all equal."""
    size = st.integers(smallest, greatest)
    distinct = st.lists(size, min_size=count, max_size=count, unique=True).map(tuple)
    return st.one_of(distinct, size.map(lambda n: (n,) * count)) if square else distinct


def ranks(greatest: int = 4) -> st.SearchStrategy[int]:
    """Ranks from 1."""
    return st.integers(1, greatest)


def alphas(r: int) -> st.SearchStrategy[Fraction]:
    """Multiples of ½ that are no multiples of r: alpha is exact, and alpha / r is not whole."""
    halves = st.integers(1, 8 * r).filter(lambda k: k % (2 * r) != 0)
    return halves.map(lambda k: Fraction(k, 2))


def masks(shape: tuple[int, ...]) -> st.SearchStrategy[Array]:
    """Boolean masks."""
    return hnp.arrays(bool, shape)


def whole(shape: tuple[int, ...], greatest: int = 4) -> st.SearchStrategy[Array]:
    """Whole numbers as float64: small enough that every sum of products is exact in any order."""
    entries = st.integers(-greatest, greatest).map(float)
    return hnp.arrays(np.float64, shape, elements=entries)


def fractions(shape: tuple[int, ...]) -> st.SearchStrategy[Array]:
    """Exact rationals: object arrays of :class:`fractions.Fraction`."""
    return hnp.arrays(object, shape, elements=st.fractions(-9, 9, max_denominator=8))


def normal(shape: tuple[int, ...]) -> st.SearchStrategy[Array]:
    """Normal entries of mean 0."""
    return generators().map(lambda rng: rng.standard_normal(shape))


def multipliers(
    shape: tuple[int, ...],
    rates: tuple[Fraction, ...] = RATES,
    number: Callable[[Fraction], Any] = float,
) -> st.SearchStrategy[Array]:
    """Dropout multipliers K = keep / (1 - p), with p from ``rates``; each entry is a ``number``."""

    def times(keep: Array, p: Fraction) -> Array:
        entries = [number(kept / (1 - p)) for kept in keep.ravel().astype(int).tolist()]
        return np.array(entries, np.float64 if number is float else object).reshape(keep.shape)

    return st.builds(times, masks(shape), st.sampled_from(rates))


@dataclass(frozen=True)
class LinearCase:
    """The arguments of `minilora.lora_linear`, with dy, alpha and r."""

    x: Array
    W: Array
    b: Array | None
    A: Array
    B: Array
    s: Any
    K: Array | None
    dy: Array
    alpha: Fraction
    r: int

    @property
    def arguments(self) -> dict[str, Any]:
        """The function's arguments, by name."""
        return {name: getattr(self, name) for name in ("x", "W", "b", "A", "B", "s", "K")}


@st.composite
def layers(
    draw: st.DrawFn, lane: Literal["normal", "whole", "rational"] = "normal", square: bool = True
) -> LinearCase:
    """LoRA linears, with and without bias and dropout, in one of three lanes.

    "normal": float64, normal entries. "whole": float64, whole numbers, a scale that is a power of
    two and p = ¾, so that every order of summation gives the same, exact result. "rational":
    object arrays of fractions.
    """
    m, n, r, t = draw(sizes(4, greatest=6, square=square))
    entries = {"normal": normal, "whole": whole, "rational": fractions}[lane]
    number = Fraction if lane == "rational" else float
    powers = st.sampled_from((-2, -1, 1, 2)).map(lambda j: r * Fraction(2) ** j)
    alpha = draw(powers if lane == "whole" else alphas(r))
    rates = (Fraction(3, 4),) if lane == "whole" else RATES
    x, W, A, B, dy = (draw(entries(s)) for s in ((n, t), (m, n), (r, n), (m, r), (m, t)))
    b = draw(st.none() | entries((m, 1)))
    K = draw(st.none() | multipliers((n, t), rates, number))
    return LinearCase(x, W, b, A, B, number(alpha / r), K, dy, alpha, r)


@dataclass(frozen=True)
class Operation:
    """A primitive equation with arguments: ``y, back = f(**varying, **constant)``.

    ``back`` gives one gradient for each of ``varying``, in their order; ``dy`` is a cotangent.
    """

    f: Callable[..., tuple[Array, Back]]
    varying: dict[str, Array]
    constant: dict[str, Any] = field(default_factory=dict)
    dy: Array = field(default_factory=lambda: np.ones(()))

    def __call__(self, **varying: Array) -> tuple[Array, Back]:
        """y, back, with some of the arguments replaced."""
        return self.f(**(self.varying | varying), **self.constant)

    def gradients(self, back: Back, dy: Array) -> dict[str, Array]:
        """What ``back(dy)`` gives, by the arguments' names."""
        parts = back(dy)
        parts = parts if isinstance(parts, tuple) else (parts,)
        return dict(zip(self.varying, parts, strict=True))


def draw_operations(
    rng: np.random.Generator, b: int, m: int, n: int, r: int, t: int
) -> dict[str, Operation]:
    """Every primitive of `ops`, each linear of a variant, and how a kernel moves.

    The sizes go where the ``Shapes:`` lines have them; heads and their sizes follow from r and n.
    Rows that have a norm are longer by one: that of a single entry is a modulus, without curvature.
    """

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape)

    def one(f: Callable[..., tuple[Array, Back]], **constant: Any) -> Operation:
        return Operation(f, {"x": draw(n, t)}, constant)

    w, bias, eps = draw(n, 1) + 2, draw(n, 1), 0.3
    K = (rng.random((n, t)) < 0.75) / 0.75
    frozen = {"W": draw(m, n), "b": draw(m, 1)}
    factors = {"A": draw(r, n), "B": draw(m, r)}
    ids = rng.integers(0, m + 1, t)
    labels = np.where(rng.random(t) < 0.3, IGNORED, rng.integers(0, m + 1, t))
    labels[0] = m
    real = rng.random((b, t)) < 0.8
    places = rng.integers(0, 9, (b, t))
    cos, sin = ops.rope_tables(places, 2 * n, 100.0, np.float64)
    turn = {"cos": cos, "sin": sin}
    heads = {"q": draw(b, 2 * r, n, t), "k": draw(b, r, n, t), "v": draw(b, r, n, t)}

    drawn = {
        "linear": one(ops.linear, **frozen),
        "linear without bias": one(ops.linear, W=frozen["W"]),
        "dropout": one(ops.dropout, K=K),
        "no dropout": one(ops.dropout, K=None),
        "embedding": Operation(ops.embedding, {"E": draw(m + 1, n)}, {"ids": ids}),
        "rmsnorm": Operation(ops.rmsnorm, {"x": draw(n, t), "w": w}, {"eps": eps}),
        "layernorm": Operation(ops.layernorm, {"x": draw(n, t), "w": w, "b": bias}, {"eps": eps}),
        "tanh": one(ops.tanh),
        "silu": one(ops.silu),
        "gelu": one(ops.gelu),
        "gelu_tanh": one(ops.gelu_tanh),
        "rope": Operation(ops.rope, {"x": draw(b, r, 2 * n, t)}, turn),
        "softmax": Operation(ops.softmax, {"z": draw(b, m, t)}),
        "attention, causal": Operation(ops.attention, heads, {"mask": ops.causal_mask(real)}),
        "attention, padded": Operation(ops.attention, heads, {"mask": ops.padding_mask(real)}),
        "cross_entropy": Operation(ops.cross_entropy, {"z": draw(m + 1, t)}, {"labels": labels}),
        "cross_entropy, counted beforehand": Operation(
            ops.cross_entropy, {"z": draw(m + 1, t)}, {"labels": labels, "count": t + 2}
        ),
        "lora_linear": Operation(
            lora.lora_linear, {"x": draw(n, t)} | factors, frozen | {"s": 7 / 3, "K": K}
        ),
        "lora_linear without dropout": Operation(
            lora.lora_linear, {"x": draw(n, t)} | factors, {"W": frozen["W"], "b": None, "s": 0.7}
        ),
    }
    drawn |= _variant_operations(rng, m, n, r, t) | _layer_operations(rng, b, m, n, r, t)
    return {
        name: replace(op, dy=rng.standard_normal(np.shape(op()[0]))) for name, op in drawn.items()
    }


def _variant_operations(
    rng: np.random.Generator, m: int, n: int, r: int, t: int
) -> dict[str, Operation]:
    """The linears of the variants, and the norm of DoRA's rows."""

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape)

    def adapted(f: Callable[..., tuple[Array, Back]], n: int = n, **parts: Array) -> Operation:
        varying = {"x": draw(n, t), "A": draw(r, n), "B": draw(m, r)} | parts
        keep = (rng.random((n, t)) < 0.75) / 0.75
        return Operation(f, varying, {"W": draw(m, n), "b": draw(m, 1), "s": 7 / 3, "K": keep})

    return {
        "lora_bias_linear": adapted(variants.lora_bias_linear, c=draw(m, 1)),
        "row_norm": Operation(variants.row_norm, {"V": draw(m, n + 1)}),
        "rescaled_linear": adapted(
            variants.rescaled_linear, magnitude=draw(m, 1) + 2, v=abs(draw(m, 1)) + 0.5
        ),
        "rescaled_lora_linear": adapted(
            variants.rescaled_lora_linear, magnitude=draw(m, 1) + 2, v=abs(draw(m, 1)) + 0.5
        ),
        "dora_linear": adapted(variants.dora_linear, n + 1, magnitude=draw(m, 1) + 2),
        "dora_full_linear": adapted(variants.dora_full_linear, n + 1, magnitude=draw(m, 1) + 2),
        "vera_linear": adapted(variants.vera_linear, lambda_d=draw(r, 1), lambda_b=draw(m, 1)),
        "adalora_linear": adapted(variants.adalora_linear, E=draw(r, 1)),
    }


def _layer_operations(
    rng: np.random.Generator, b: int, m: int, n: int, r: int, t: int
) -> dict[str, Operation]:
    """How a kernel moves, a convolution, and a table of which some rows are trained."""

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape)

    moves = layer_kinds.Geometry((2, 1), (2, 1), ((1, 0), (0, 1)), (3, 1))
    return {
        "unfold": Operation(layer_kinds.unfold, {"x": draw(r, b, n + 3, t)}, {"geometry": moves}),
        "block_diagonal": Operation(
            layer_kinds.block_diagonal, {"W": draw(2 * m, n)}, {"groups": 2}
        ),
        "conv, in groups": Operation(
            layer_kinds.conv,
            {"x": draw(2, b, n + 3, t)},
            {"W": draw(2 * m, 1, 2, 1), "b": draw(2 * m, 1), "geometry": moves, "groups": 2},
        ),
        "with_tokens": Operation(
            layer_kinds.with_tokens,
            {"rows": draw((m + 1) // 2, n)},
            {"E": draw(m + 1, n), "ids": rng.permutation(m + 1)[: (m + 1) // 2]},
        ),
    }


OPERATIONS = tuple(draw_operations(np.random.default_rng(0), 1, 1, 1, 1, 1))
"""The names of the operations that :func:`draw_operations` draws."""


def operations(greatest: int = 5) -> st.SearchStrategy[dict[str, Operation]]:
    """Every primitive, by the names in :data:`OPERATIONS`; sizes all differ, or are all equal."""
    distinct = sizes(5, greatest=greatest, square=False)
    equal = st.integers(1, 3).map(lambda n: (n,) * 5)
    return st.builds(
        lambda rng, shape: draw_operations(rng, *shape), generators(), distinct | equal
    )


@st.composite
def configurations(
    draw: st.DrawFn,
    architectures: tuple[type[models.Config], ...] = (models.Llama, models.GPT2, models.Bert),
    greatest_layers: int = 2,
) -> models.Config:
    """Small configurations of the three architectures: sizes distinct, or all that can be equal.

    A Llama's query heads are twice or thrice its key/value heads, and tying and biases are drawn.
    """
    kind = draw(st.sampled_from(architectures))
    n_layers = draw(st.integers(1, greatest_layers))
    square = draw(st.booleans())
    eps = draw(st.sampled_from((1e-5, 0.3)))  # the second is near the mean square itself
    # With as many heads as each has features, their exchange would go unseen but in the square.
    distinct = st.sampled_from(((1, 3, 2), (2, 2, 2), (1, 2, 4)))
    kv_heads, group, head_dim = (1, 2, 2) if square else draw(distinct)
    heads = kv_heads * group
    if kind is models.Llama:
        width = heads * head_dim
        d, ffn, vocab = (width,) * 3 if square else draw(sizes(3, 3, 11, square=False))
        tied, qkv_bias = draw(st.booleans()), draw(st.booleans())
        theta = draw(st.sampled_from((100.0, 10000.0)))
        return models.Llama(
            vocab, d, n_layers, heads, ffn, kv_heads, head_dim, eps, theta, tied, qkv_bias
        )
    d = heads * head_dim
    others = st.integers(6, 12).filter(lambda k: k != d)
    ffn, vocab, positions = (
        (d, d, max(d, 6))
        if square
        else draw(st.lists(others, min_size=3, max_size=3, unique=True).map(tuple))
    )
    if kind is models.GPT2:
        return models.GPT2(vocab, d, n_layers, heads, ffn, positions, eps)
    return models.Bert(vocab, d, n_layers, heads, ffn, positions, types=2, classes=3, eps=eps)


@dataclass(frozen=True)
class ModelCase:
    """The arguments of ``loss(batch, W, config, tuning)``."""

    config: models.Config
    W: lora.Weights
    tuning: lora.TrainableSpec
    batch: models.Batch

    def loss(self, W: lora.Weights | None = None, count: int | None = None) -> tuple[Array, Back]:
        """The loss and its ``back``, at other weights if they are given."""
        W = self.W if W is None else W
        return models.loss(self.batch, W, self.config, self.tuning, count)

    def logits(self, W: lora.Weights | None = None) -> Array:
        """The logits, at other weights if they are given."""
        W = self.W if W is None else W
        return models.logits(self.batch, W, self.config, self.tuning)[0]


def draw_parameters(c: models.Config, rng: np.random.Generator) -> lora.Weights:
    """Weights of order one, with norms that are not 1 and biases that are not 0."""
    W = initialization.draw_weights(c, rng, std=0.4)
    return {name: w + 0.3 * rng.standard_normal(w.shape) for name, w in W.items()}


def draw_batch(
    c: models.Config, rng: np.random.Generator, b: int = 3, t: int = 5, padding: str = "both"
) -> models.Batch:
    """b rows of t tokens of unequal lengths; some labels are ignored, at least one is not.

    A row's first token is no label. ``padding``: "left" (positions count real tokens), "right",
    "both" or "none"; a classifier, which pools the first column, is padded on the right only.
    """
    ids = rng.integers(0, c.vocab, (b, t))
    length = rng.integers(2, t + 1, b)
    length[0] = t
    column = np.arange(t)
    right = column < length[:, None]
    left = column >= t - length[:, None]
    switch = {"left": True, "right": False, "both": np.arange(b)[:, None] % 2 == 0}
    real = np.ones((b, t), bool) if padding == "none" else np.where(switch[padding], left, right)
    if padding != "none" and not c.causal:
        real = right
    positions = np.maximum(real.cumsum(1) - 1, 0)
    counts = real & (positions > 0) & (rng.random((b, t)) < 0.7)
    labels = np.where(counts, ids, IGNORED)
    labels[0, 1] = ids[0, 1]
    if not c.causal:
        classes, _ = c.linears()["head"]
        labels = np.where(rng.random(b) < 0.3, IGNORED, rng.integers(0, classes, b))
        labels[0] = classes - 1
    n_types = c.tables().get("types")
    types = None if n_types is None else rng.integers(0, n_types, (b, t))
    return models.Batch(ids, labels, real, positions, types)


def draw_adapters(
    c: models.Config,
    W: lora.Weights,
    batch: models.Batch,
    rng: np.random.Generator,
    p: float = 0.25,
    train_base: bool = False,
) -> tuple[lora.Weights, lora.TrainableSpec]:
    """The weights with an adapter on every projection, of unequal ranks and with B ≠ 0.

    ``p`` is the rate of dropout, 0 for none; with ``train_base`` the base is trained too.
    """
    choice = target_modules.LoraConfig(
        r=2, lora_alpha=7 / 3, target_modules=".*", rank_pattern={"k|up|qkv": 3}
    )
    W, tuning = target_modules.inject(W, choice, c.linears(), rng)
    W |= {name: 0.5 * rng.standard_normal(w.shape) for name, w in W.items() if name.endswith(".B")}
    keep: Mapping[str, Array] = {}
    if p:
        read = initialization.input_shapes(c, *batch.ids.shape)
        keep = initialization.draw_dropout(rng, p, {at: read[at] for at in c.linears()}, float)
    trained = frozenset(W) if train_base else tuning.trained
    return W, replace(tuning, dropout_scale=keep, trained=trained)


def draw_model(
    c: models.Config,
    rng: np.random.Generator,
    b: int = 3,
    t: int = 5,
    padding: str = "both",
    p: float = 0.25,
    train_base: bool = False,
) -> ModelCase:
    """Weights, adapters on every projection, and a batch."""
    batch = draw_batch(c, rng, b, t, padding)
    W, tuning = draw_adapters(c, draw_parameters(c, rng), batch, rng, p, train_base)
    return ModelCase(c, W, tuning, batch)


def model_cases(
    architectures: tuple[type[models.Config], ...] = (models.Llama, models.GPT2, models.Bert),
    padding: tuple[str, ...] = ("left", "right", "both", "none"),
    p: tuple[float, ...] = (0.0, 0.25),
    train_base: bool = False,
) -> st.SearchStrategy[ModelCase]:
    """Models with adapters on every projection; paddings and rates of dropout as they are given."""
    return st.builds(
        draw_model,
        configurations(architectures),
        generators(),
        b=st.integers(1, 3),
        t=st.integers(2, 6),
        padding=st.sampled_from(padding),
        p=st.sampled_from(p),
        train_base=st.just(train_base),
    )


def stored_gradients(W: lora.Weights, steps: int) -> st.SearchStrategy[list[lora.Weights]]:
    """Gradients for so many steps of an optimizer, unequal in size from step to step."""

    def draw(rng: np.random.Generator) -> list[lora.Weights]:
        scales = 10.0 ** rng.uniform(-2, 1, steps)
        return [{n: g * rng.standard_normal(w.shape) for n, w in W.items()} for g in scales]

    return generators().map(draw)
