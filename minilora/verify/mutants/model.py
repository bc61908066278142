"""Whole models, misread: the specification's own functions, one of them replaced or edited."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np

from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import read_adapter
from minilora.spec import blocks, lora, models, ops
from minilora.spec.models import GPT2, Batch, Bert, Config, Llama
from minilora.spec.ops import Array, Back
from minilora.verify.implementation import minilora_impl
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.mutants.references.helpers import digits
from minilora.verify.mutants.transition import equivalents, family

Edit = tuple[str, str]
"""A piece of a function's source, which stands there once, and what replaces it."""


def model(**changes: Callable[..., Any] | Edit) -> Callable[[], Minilora]:
    """`Minilora` with other functions of these names, wherever its model calls them, new or edited.

    The specification stays as it is: all its functions are made again over a namespace of their
    own, so that they call one another there.
    """

    def make() -> Minilora:
        space: dict[str, Any] = {}
        for module in (minilora_impl, ops, lora, blocks, models):
            for name, value in vars(module).items():
                f = inspect.unwrap(value)  # without what a cache remembers of the specification
                ours = isinstance(f, FunctionType) and f.__module__ == module.__name__
                space[name] = _over(space, f) if ours else space.get(name, value)
        space["ops"] = _Module(space)
        for name, change in changes.items():
            if isinstance(change, tuple):
                _edit(space, space[name], *change)
            else:
                space[name] = change
        for f in space.values():
            if isinstance(f, FunctionType) and f.__globals__ is space and f.__defaults__:
                f.__defaults__ = tuple(_of_space(space, value) for value in f.__defaults__)
        space["LORA"] = replace(lora.LORA, linear=space["lora_linear"])
        space["FORWARD"] = {Llama: space["llama"], GPT2: space["gpt2"], Bert: space["bert"]}
        wrong: Minilora = type(
            "Wrong", (Minilora,), {"model_loss": _over(space, Minilora.model_loss)}
        )()
        return wrong

    return make


class _Module:
    """A module whose functions are those of a namespace."""

    def __init__(self, space: dict[str, Any]) -> None:
        self._space = space

    def __getattr__(self, name: str) -> Any:
        return self._space[name]


def _of_space(space: dict[str, Any], default: Any) -> Any:
    """A default value of a function; kernels with the namespace's functions."""
    if not isinstance(default, models.Kernels):
        return default
    return models.Kernels(**{name: space[f.__name__] for name, f in vars(default).items()})


def _over(space: dict[str, Any], f: Any) -> Any:
    g = FunctionType(f.__code__, space, f.__name__, f.__defaults__, f.__closure__)
    g.__kwdefaults__ = f.__kwdefaults__
    return g


def _edit(space: dict[str, Any], f: Any, old: str, new: str) -> None:
    source = inspect.getsource(f)
    if source.count(old) != 1:
        raise ValueError(f"{f.__name__} holds {source.count(old)} times {old!r}, expected once")
    exec(source.replace(old, new), space)


NORM = (
    *family(
        "NORM",
        "model.llama",
        ("eps-1e-6", "ε = 1e-6", model(rmsnorm=("x) + eps", "x) + 1e-6"))),
        ("eps-1e-8", "ε = 1e-8", model(rmsnorm=("x) + eps", "x) + 1e-8"))),
        ("eps-0", "ε = 0", model(rmsnorm=("x) + eps", "x)"))),
        (
            "eps-outside",
            "x / (√mean(x²) + ε)",
            model(rmsnorm=("np.sqrt(_mean(x * x) + eps)", "(np.sqrt(_mean(x * x)) + eps)")),
        ),
        ("sum", "x / √(sum(x²) + ε)", model(rmsnorm=("_mean(x * x)", "(x * x).sum(0)"))),
        (
            "mean-subtracted",
            "LayerNorm for RMSNorm",
            model(rmsnorm=("rho = 1", "x = x - _mean(x)\n    rho = 1")),
        ),
        ("weight-plus-1", "(1 + w) ∘ h", model(rmsnorm=("return w * h", "return (1 + w) * h"))),
        ("weight-ignored", "h", model(rmsnorm=("return w * h", "return h"))),
        (
            "last-missing",
            "no norm before the head",
            model(
                llama=(
                    'h, back_norm = normalise(ops.rmsnorm, x, "norm", W, c.eps, tuning)',
                    "h, back_norm = x, lambda dh: (dh, {})",
                )
            ),
        ),
        (
            "first-for-second",
            "norm1 in the place of norm2",
            model(llama_block=('x, at + "norm2"', 'x, at + "norm1"')),
        ),
        (
            "root-constant",
            "dx = ρ dh: √(mean(x²) + ε) without gradient",
            model(rmsnorm=("rho * (dh - h * _mean(h * dh))", "rho * dh")),
        ),
        ("weight-not-in-back", "dh = dy for w ∘ dy", model(rmsnorm=("dh = w * dy", "dh = dy"))),
    ),
    *family(
        "NORM",
        "model.gpt2",
        (
            "n-1",
            "variance over n - 1",
            model(
                layernorm=(
                    "_mean(centred * centred)",
                    "(centred * centred).sum(0) / (len(x) - 1)",
                )
            ),
        ),
        ("bias-ignored", "w ∘ h", model(layernorm=("return w * h + b", "return w * h"))),
        ("mean-kept", "RMSNorm for LayerNorm", model(layernorm=("x - _mean(x)", "x"))),
        ("eps-1e-5", "ε = 1e-5", model(layernorm=("centred) + eps", "centred) + 1e-5"))),
        (
            "mean-constant",
            "dx without mean(dh)",
            model(layernorm=("dh - _mean(dh) - h", "dh - h")),
        ),
    ),
)


def _neighbours(x: Array, cos: Array, sin: Array) -> tuple[Array, Back]:
    """RoPE of pairs of neighbours."""
    d = x.shape[2]
    halves = np.arange(d).reshape(-1, 2).T.ravel()
    pairs = np.argsort(halves)
    y, back = ops.rope(x[:, :, halves], cos, sin)
    return y[:, :, pairs], lambda dy: back(dy[:, :, halves])[:, :, pairs]


ROPE = family(
    "ROPE",
    "model.llama",
    (
        "interleaved",
        "neighbours for halves",
        model(rope=_neighbours),
    ),
    ("theta", "θ = 10000", model(rope_tables=("= theta **", "= 1e4 **"))),
    ("theta-off-1-permille", "1.001 θ", model(rope_tables=("= theta **", "= (1.001 * theta) **"))),
    ("of-model", "θ^(-2i/d_model)", model(llama=("c.theta", "c.theta ** (c.head_dim / c.d)"))),
    (
        "backwards",
        "the angles negative",
        model(rope_tables=("return cos, sin", "return cos, -sin")),
    ),
    ("none", "no angles", model(rope_tables=("angles = positions", "angles = 0 * positions"))),
    (
        "q-alone",
        "k is not turned",
        model(
            llama_block=(
                "ops.rope(ops.split_heads(k, b, c.kv_heads), *tables)",
                "(ops.split_heads(k, b, c.kv_heads), lambda dk: dk)",
            )
        ),
    ),
    (
        "k-alone",
        "q is not turned",
        model(
            llama_block=(
                "ops.rope(ops.split_heads(q, b, c.heads), *tables)",
                "(ops.split_heads(q, b, c.heads), lambda dq: dq)",
            )
        ),
    ),
    (
        "v-too",
        "v is turned too",
        model(
            llama_block=(
                "k, ops.split_heads(v, b, c.kv_heads)",
                "k, ops.rope(ops.split_heads(v, b, c.kv_heads), *tables)[0]",
            )
        ),
    ),
    (
        "bfloat16",
        "angles in bfloat16",
        model(
            digits=digits,
            rope_tables=("* frequencies[", "* digits(frequencies, 8)["),
        ),
    ),
    (
        "not-turned-back",
        "dx = R dy for Rᵀ dy",
        model(rope=("turn(dy, -sin)", "turn(dy, sin)")),
    ),
    (
        "one-position",
        "k turned by the next position's angle",
        model(
            llama_block=(
                "ops.rope(ops.split_heads(k, b, c.kv_heads), *tables)",
                "ops.rope(ops.split_heads(k, b, c.kv_heads), *(np.roll(v, -1, 3) for v in tables))",
            )
        ),
    ),
)


def _reading(heads: Callable[[Array, int, int], Array], of_values: Any = None) -> Any:
    """Attention whose query head j of h reads the key/value head ``heads(j, h, g)``."""

    def attention(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Back]:
        h, g = q.shape[1], k.shape[1]
        at_k = heads(np.arange(h), h, g)
        at_v = (of_values or heads)(np.arange(h), h, g)
        o, back = ops.attention(q, k[:, at_k], v[:, at_v], mask)

        def summed(do: Array) -> tuple[Array, Array, Array]:
            dq, each_dk, each_dv = back(do)
            dk, dv = np.zeros_like(k), np.zeros_like(v)
            for j in range(h):
                dk[:, at_k[j]] += each_dk[:, j]
                dv[:, at_v[j]] += each_dv[:, j]
            return dq, dk, dv

        return o, summed

    return attention


def _repeated(j: Array, h: int, g: int) -> Array:
    return j * g // h


def _tiled(j: Array, h: int, g: int) -> Array:
    return j % g


MASKED = "np.copyto(z, -np.inf, where=~mask[:, None, None])"
WEIGHED = "p, back_softmax = softmax(z)"

ATTENTION = (
    *family(
        "ATTENTION",
        "model.llama",
        (
            "scale-of-model",
            "1/√(d h) for 1/√d",
            model(attention=("scale = d**-0.5", "scale = (d * h) ** -0.5")),
        ),
        ("scale-1", "kᵀ q", model(attention=("scale = d**-0.5", "scale = 1.0"))),
        ("scale-of-d", "kᵀ q / d", model(attention=("scale = d**-0.5", "scale = 1 / d"))),
        (
            "one-future-token",
            "query t sees key t + 1",
            model(causal_mask=("(s < t)", "(s < t + 2)")),
        ),
        ("no-mask", "every query sees every key", model(attention=(MASKED, "pass"))),
        (
            "strict",
            "query t does not see key t",
            model(
                causal_mask=(
                    "return (s < t) & real[:, :, None] | (s == t)",
                    "past = np.triu((s < t) & real[:, :, None], 1)\n"
                    "    return past | (s == t) & ~past.any(1)[:, None]",
                )
            ),
        ),
        (
            "masked-after",
            "mask ∘ softmax",
            model(
                attention=(
                    f"{MASKED}\n    {WEIGHED}",
                    f"{WEIGHED}\n    p = p * mask[:, None, None]",
                )
            ),
        ),
        (
            "times-mask",
            "softmax(mask ∘ z)",
            model(attention=(MASKED, "z = z * mask[:, None, None]")),
        ),
        ("fill-10", "-10 for -∞", model(attention=("-np.inf", "-10"))),
        (
            "over-queries",
            "softmax over the queries",
            model(attention=("softmax(z)", "softmax(z.mT)\n    p = p.mT")),
        ),
        (
            "heads-interleaved",
            "feature i belongs to head i mod h",
            model(
                split_heads=(
                    "x.reshape(h, x.shape[0] // h, b, -1).transpose(2, 0, 1, 3)",
                    "x.reshape(x.shape[0] // h, h, b, -1).transpose(2, 1, 0, 3)",
                )
            ),
        ),
        ("tiled", "query head j reads key/value head j mod g", model(attention=_reading(_tiled))),
        ("k-tiled", "the same for keys alone", model(attention=_reading(_tiled, _repeated))),
        (
            "first-kv-head",
            "all query heads read key/value head 0",
            model(attention=_reading(lambda j, h, g: 0 * j)),
        ),
        (
            "group-mean",
            "dk, dv the mean over a group's queries",
            model(
                attention=(
                    "(Q @ dz.mT).sum(2), (dO @ p.mT).sum(2)",
                    "(Q @ dz.mT).mean(2), (dO @ p.mT).mean(2)",
                )
            ),
        ),
        ("dq-not-scaled", "dq = k dz", model(attention=("(K @ dz * scale)", "(K @ dz)"))),
        (
            "softmax-diagonal",
            "dz = p ∘ dp",
            model(softmax=("p * (dp - (p * dp).sum(-2, keepdims=True))", "p * dp")),
        ),
    ),
    *family(
        "ATTENTION",
        "model.gpt2",
        (
            "padding-seen",
            "padding on the left is seen",
            model(causal_mask=("real[:, :, None]", "np.ones_like(real)[:, :, None]")),
        ),
    ),
    *family(
        "ATTENTION",
        "model.bert.padding",
        (
            "padding-seen-by-all",
            "padding is seen",
            model(padding_mask=("real[:, :, None]", "np.ones_like(real)[:, :, None]")),
        ),
    ),
)


def _relu(x: Array) -> tuple[Array, Back]:
    return x * (x > 0), lambda dy: dy * (x > 0)


def _quick_gelu(x: Array) -> tuple[Array, Back]:
    y, back = ops.silu(1.702 * x)
    return y / 1.702, back


BLOCK = (
    *family(
        "BLOCK",
        "model.llama",
        (
            "residual-of-norm",
            "norm1(x) + o for x + o",
            model(llama_block=("x = x + o\n", "x = h + o\n")),
        ),
        ("first-residual-missing", "o for x + o", model(llama_block=("x = x + o\n", "x = o\n"))),
        (
            "second-residual-missing",
            "down(…) alone",
            model(llama_block=("return x + m, back", "return m, back")),
        ),
        (
            "parallel",
            "norm2 of the block's input",
            model(llama_block=('rmsnorm, x, at + "norm2"', 'rmsnorm, x - o, at + "norm2"')),
        ),
        (
            "gate-for-up",
            "gate ∘ silu(up)",
            model(
                llama_block=(
                    "act, back_silu = ops.silu(gate)",
                    "gate, up = up, gate\n    act, back_silu = ops.silu(gate)",
                )
            ),
        ),
        ("gelu", "gelu for silu", model(silu=ops.gelu)),
        ("gelu-tanh", "gelu's tanh form for silu", model(silu=ops.gelu_tanh)),
        ("relu", "relu for silu", model(silu=_relu)),
        (
            "embedding-scaled",
            "the embedding times √d",
            model(llama=("tables = kernels", "x = x * c.d**0.5\n    tables = kernels")),
        ),
        (
            "head-tied",
            "the embedding as head",
            model(weight_of=("own in W else", 'at != "head" else')),
        ),
        ("layers-turned", "the last layer first", model(stack=("{i}.", "{layers - 1 - i}."))),
        (
            "residual-not-in-back",
            "dx without dy past the MLP",
            model(llama_block=("dx = dy + dx", "dx = 1 * dx")),
        ),
        (
            "gate-not-in-back",
            "d(gate ∘ up) = d up for gate ∘ d up",
            model(llama_block=("back_up(dm * act)", "back_up(dm)")),
        ),
        (
            "dk-for-dv",
            "v's gradient from k's",
            model(llama_block=("back_v(ops.join_heads(dv))", "back_v(ops.join_heads(dk))")),
        ),
    ),
    *family(
        "BLOCK",
        "model.gpt2",
        ("gelu-exact", "gelu by erf for its tanh form", model(gelu_tanh=ops.gelu)),
        ("gelu-quick", "x σ(1.702 x)", model(gelu_tanh=_quick_gelu)),
        (
            "qk-swapped",
            "k, q, v in the fused weight",
            model(gpt2_block=("q, k, v = (ops", "k, q, v = (ops")),
        ),
        (
            "qkv-interleaved",
            "q, k and v in every third row",
            model(
                gpt2_block=(
                    "qkv.reshape(3, *x.shape)",
                    "qkv.reshape(-1, 3, x.shape[1]).swapaxes(0, 1)",
                )
            ),
        ),
        (
            "no-positions",
            "no embedding of positions",
            model(gpt2=("tokens + positions,", "tokens,")),
        ),
        (
            "positions-of-real",
            "positions counted from the first real token",
            model(
                gpt2=(
                    "batch.position_ids.ravel()",
                    "np.maximum(batch.real.cumsum(1) - 1, 0).ravel()",
                )
            ),
        ),
        (
            "no-bias",
            "no biases beside adapters",
            model(project=("W.get(bias), *parts", "None, *parts")),
        ),
    ),
    *family(
        "BLOCK",
        "model.gpt2.padding",
        (
            "positions-from-the-end",
            "positions counted so that the last column has the last of all",
            model(
                gpt2=(
                    "batch.position_ids.ravel()",
                    "(batch.position_ids.ravel() - batch.ids.shape[1])"
                    " % len(W['positions.weight'])",
                )
            ),
        ),
    ),
    *family(
        "BLOCK",
        "model.bert",
        ("gelu-approximate", "gelu's tanh form for erf", model(gelu=ops.gelu_tanh)),
        (
            "no-types",
            "no embedding of token types",
            model(bert=("tokens + positions + types", "tokens + positions")),
        ),
        (
            "no-embedding-norm",
            "no norm of the embeddings",
            model(
                bert=(
                    "normalise(ops.layernorm, tokens + positions + types,"
                    ' "norm", W, c.eps, tuning)',
                    "(tokens + positions + types, lambda dx: (dx, {}))",
                )
            ),
        ),
        (
            "last-token-pooled",
            "the last token pooled",
            model(bert=('project(h[:, ::t], "pooler"', 'project(h[:, t - 1 :: t], "pooler"')),
        ),
        (
            "mean-pooled",
            "the mean over tokens pooled",
            model(
                bert=(
                    'project(h[:, ::t], "pooler"',
                    'project(h.reshape(len(h), -1, t).mean(2), "pooler"',
                )
            ),
        ),
        (
            "pooler-linear",
            "no tanh after the pooler",
            model(
                bert=(
                    "act, back_tanh = ops.tanh(pooled)",
                    "act, back_tanh = pooled, lambda dact: dact",
                )
            ),
        ),
        ("causal", "a causal mask", model(padding_mask=ops.causal_mask)),
    ),
)


def _mean_of_rows(batch: Batch, W: Any, c: Config, tuning: Any) -> tuple[Any, Back]:
    """The mean over sequences of each one's mean."""
    assert batch.labels is not None
    count = (models.shifted_labels(batch, c).reshape(len(batch.ids), -1) != ops.IGNORED).sum(1)
    rows = [
        models.loss(
            replace(batch, labels=np.where(np.arange(len(count)) == i, batch.labels.T, -100).T),
            *(W, c, tuning),
        )
        for i in np.flatnonzero(count)
    ]

    def back(dL: Any) -> Any:
        return lora.sum_gradients(*({n: g / len(rows) for n, g in b(dL).items()} for _, b in rows))

    return sum(L for L, _ in rows) / len(rows), back


LOSS = (
    *family(
        "LOSS",
        "model.llama",
        (
            "no-shift",
            "token t predicted at t",
            model(
                shifted_labels=(
                    "following[:, :-1] = batch.labels[:, 1:]",
                    "following[:] = batch.labels",
                )
            ),
        ),
        (
            "double-shift",
            "token t + 2 predicted at t",
            model(
                shifted_labels=("[:, :-1] = batch.labels[:, 1:]", "[:, :-2] = batch.labels[:, 2:]")
            ),
            "transformers 47394",
            "transformers 37830",
        ),
        (
            "shift-back",
            "token t - 1 predicted at t",
            model(
                shifted_labels=("[:, :-1] = batch.labels[:, 1:]", "[:, 1:] = batch.labels[:, :-1]")
            ),
        ),
        (
            "ignored-as-0",
            "ignored labels as class 0",
            model(
                shifted_labels=(
                    "return following.ravel()",
                    "return np.maximum(following, 0).ravel()",
                )
            ),
        ),
        ("sum", "the sum over labels", model(cross_entropy=("n = int(counted.sum())", "n = 1"))),
        (
            "by-batch",
            "divided by the number of sequences",
            model(loss=("labels, count)", "labels, len(batch.ids))")),
        ),
        (
            "log2",
            "log₂",
            model(
                cross_entropy=(
                    "* each).sum() / n",
                    "* each).sum() / n / np.log(z.real.dtype.type(2))",
                )
            ),
        ),
        (
            "smoothed",
            "a tenth of the label spread over all",
            model(cross_entropy=("c - z[at])", "c - (0.9 * z[at] + 0.1 * z.mean(0)))")),
        ),
        (
            "z-loss",
            "+ 1e-4 log² Σ exp z",
            model(
                cross_entropy=(
                    "L = ((",
                    "L = (1e-4 * (np.log(total) + c) ** 2 * counted).sum() / n + ((",
                )
            ),
        ),
        (
            "padding-trained",
            "labels at padding too",
            model(
                shifted_labels=(
                    "= batch.labels[:, 1:]",
                    "= np.where(batch.real, batch.labels, batch.ids)[:, 1:]",
                )
            ),
            "mlx-lm 1697",
        ),
        (
            "first-row",
            "the first sequence alone",
            model(
                shifted_labels=(
                    "return following.ravel()",
                    "following[1:] = ops.IGNORED\n    return following.ravel()",
                )
            ),
        ),
        ("mean-of-rows", "the mean over sequences of their means", model(loss=_mean_of_rows)),
        (
            "ignored-in-back",
            "ignored labels have gradients",
            model(cross_entropy=("share = each *", "share = np.ones_like(each) *")),
        ),
        ("softmax-alone", "dz = p / n", model(cross_entropy=("dz[at] -= share", "pass"))),
        (
            "back-not-divided",
            "dz = p - onehot",
            model(cross_entropy=("dL / n", "dL")),
        ),
    ),
    *family(
        "LOSS",
        "model.llama.padding",
        (
            "by-positions",
            "divided by all positions",
            model(cross_entropy=("n = int(counted.sum())", "n = labels.size")),
        ),
    ),
)


def _with(change: Callable[[str, Any], dict[str, Array]]) -> Any:
    """`project` with other factors at each site: a function of its name and the weights."""
    return lambda x, at, W, tuning: lora.project(
        x, at, W | change(at, W) if f"{at}.A" in W else W, tuning
    )


def _factors_of(other: Callable[[str], str], parts: str = "AB") -> Any:
    """`project` with the factors of another site."""
    return _with(lambda at, W: {f"{at}.{part}": W[f"{other(at)}.{part}"] for part in parts})


def _other_layer(at: str) -> str:
    swap = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return next((new + at.removeprefix(old) for old, new in swap.items() if old in at), at)


def _rows_of_B(first: float, last: float) -> Any:
    """`project` whose fused B is 0 in these parts of its rows."""

    def change(at: str, W: Any) -> dict[str, Array]:
        B = W[f"{at}.B"]
        part = np.arange(len(B)) / len(B)
        kept = ~((part >= first) & (part < last)) if at.endswith("qkv") else part >= 0
        return {f"{at}.B": B * kept[:, None]}

    return _with(change)


def _scaled(s: Callable[[str, float, int], float]) -> Any:
    """`read_adapter` with another scale, a function of (site, scale, rank)."""

    def read(path: Any, c: Config) -> Any:
        factors, tuning = read_adapter(path, c)
        scales = {at: s(at, v, len(factors[f"{at}.A"])) for at, v in tuning.scale.items()}
        return factors, replace(tuning, scale=scales)

    return read


ADAPTER = (
    *family(
        "ADAPTER",
        "model.llama",
        ("alpha", "s = α", model(read_adapter=_scaled(lambda at, s, r: s * r)), "mlx-vlm 841"),
        (
            "scale-1",
            "s = 1: α not saved",
            model(read_adapter=_scaled(lambda at, s, r: 1.0)),
            "mlx-examples 622",
        ),
        ("off-1-permille", "1.001 s", model(read_adapter=_scaled(lambda at, s, r: 1.001 * s))),
        (
            "o-skipped",
            "no adapter on o",
            model(read_adapter=_scaled(lambda at, s, r: 0.0 if at.endswith(".o") else s)),
        ),
        (
            "last-layer-skipped",
            "no adapter in the last layer",
            model(read_adapter=_scaled(lambda at, s, r: 0.0 if "layers.1." in at else s)),
        ),
        ("other-layer", "the adapter of the other layer", model(project=_factors_of(_other_layer))),
        (
            "k-on-v",
            "k's adapter on v",
            model(project=_factors_of(lambda at: at.replace(".v", ".k"))),
        ),
        (
            "A-shared",
            "q's A for k and v too",
            model(
                project=_factors_of(
                    lambda at: at[:-1] + "q" if at.endswith((".k", ".v")) else at, "A"
                )
            ),
        ),
        (
            "bfloat16",
            "A and B rounded to bfloat16",
            model(
                project=_with(
                    lambda at, W: {f"{at}.{part}": digits(W[f"{at}.{part}"], 8) for part in "AB"}
                )
            ),
        ),
        (
            "first-layer-frozen",
            "no gradient in the first layer",
            model(
                stack=(
                    "gradients |= block_gradients",
                    "above = back_block is not backs[0]\n"
                    "            gradients |= {n: g * above for n, g in block_gradients.items()}",
                )
            ),
            "transformers 26221",
            "microsoft/LoRA 120",
            "peft 1142",
        ),
        (
            "branch-detached",
            "dx = Wᵀ dy",
            model(lora_linear=("back_base(dy) + back_dropout(A.T @ du)", "back_base(dy)")),
        ),
        (
            "base-detached",
            "dx = K∘(Aᵀ du)",
            model(lora_linear=("back_base(dy) + back_dropout(A.T @ du)", "back_dropout(A.T @ du)")),
        ),
    ),
    *family(
        "ADAPTER",
        "model.llama.balance",
        ("dA-not-scaled", "dA / s", model(lora_linear=("outer(du, h)", "outer(du, h) / s"))),
    ),
    *family(
        "ADAPTER",
        "model.gpt2.balance",
        ("dB-halved", "dB / 2", model(lora_linear=("outer(dy, s * u)", "outer(dy, 0.5 * s * u)"))),
    ),
    *family(
        "ADAPTER",
        "model.bert.balance",
        (
            "dA-first-token",
            "dA of the first token of all",
            model(lora_linear=("outer(du, h)", "outer(du[:, :1], h[:, :1])")),
        ),
    ),
    *family(
        "ADAPTER",
        "model.gpt2",
        (
            "rslora-lost",
            "s = α/r with rsLoRA",
            model(read_adapter=_scaled(lambda at, s, r: s / r**0.5)),
            "TensorRT-LLM 1668",
        ),
        (
            "fused-k-skipped",
            "no adapter on k in a fused weight",
            model(project=_rows_of_B(1 / 3, 2 / 3)),
        ),
        (
            "fused-q-alone",
            "no adapter on k and v in a fused weight",
            model(project=_rows_of_B(1 / 3, 1)),
        ),
    ),
    *family(
        "ADAPTER",
        "model.bert",
        (
            "pooler-skipped",
            "no adapter outside the layers",
            model(read_adapter=_scaled(lambda at, s, r: s if "layers" in at else 0.0)),
        ),
    ),
)


def _read(change: Callable[[Any, Any], Any]) -> Any:
    """`read_model` with (configuration, weights) changed."""
    return lambda path: change(*read_model(path))


def _weights(change: Callable[[str, Array, Config], Array]) -> Any:
    """`read_model` with each weight changed, by (name, weight, configuration)."""
    return _read(lambda c, W: (c, {name: change(name, array, c) for name, array in W.items()}))


def _pairs_apart(name: str, W: Array, c: Any) -> Array:
    """Rows of q and k from halves to neighbours, as for interleaved RoPE."""
    if not (isinstance(c, Llama) and name.endswith((".q.weight", ".k.weight"))):
        return W
    return W.reshape(-1, 2, c.head_dim // 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)


FILES = (
    *family(
        "FILES",
        "model.llama.vector",
        (
            "bfloat16",
            "weights rounded to bfloat16",
            model(read_model=_weights(lambda name, W, c: digits(W, 8))),
        ),
        (
            "eps-default",
            "ε = 1e-6, not read from the file",
            model(read_model=_read(lambda c, W: (replace(c, eps=1e-6), W))),
        ),
        (
            "theta-default",
            "θ = 10000, not read from the file",
            model(
                read_model=_read(
                    lambda c, W: (replace(c, **{"theta": 1e4} if isinstance(c, Llama) else {}), W)
                )
            ),
        ),
        (
            "layers-turned",
            "the layers' weights swapped",
            model(read_model=_read(lambda c, W: (c, {name: W[_other_layer(name)] for name in W}))),
        ),
        (
            "rope-pairs",
            "W's rows as for interleaved RoPE, B's not",
            model(
                read_model=_weights(_pairs_apart),
                rope=_neighbours,
            ),
            "llama.cpp 21354",
        ),
    ),
    *family(
        "FILES",
        "model.gpt2.vector",
        (
            "conv1d-not-turned",
            "the square Conv1D weight of o not turned",
            model(
                read_model=_weights(
                    lambda name, W, c: (
                        W.T if isinstance(c, GPT2) and name.endswith(".o.weight") else W
                    )
                )
            ),
        ),
    ),
    *family(
        "FILES",
        "model.bert.vector",
        (
            "biases-lost",
            "biases of projections not read",
            model(
                read_model=_weights(
                    lambda name, W, c: 0 * W if name.endswith(".bias") and "norm" not in name else W
                )
            ),
        ),
    ),
)


class _Stored(np.ndarray):
    """Arrays in float32, rounded to a half precision after every operation but a sum."""

    half: Any = None

    def __array_finalize__(self, obj: Any) -> None:
        self.half = getattr(obj, "half", None)

    def _like(self, y: Any) -> Any:
        if not isinstance(y, np.ndarray | np.floating) or y.dtype != np.float32:
            return y
        array = np.asarray(y).view(_Stored)
        array.half = self.half
        return array

    def _stored(self, y: Any) -> Any:
        half = isinstance(y, np.ndarray | np.floating) and y.dtype == np.float32
        return self._like(y.astype(self.half).astype(np.float32)) if half else y

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = [_plain(each) for each in inputs]
        kwargs = {name: _plain(each) for name, each in kwargs.items()}
        y = getattr(ufunc, method)(*plain, **kwargs)
        return self._stored(y) if method == "__call__" else self._like(y)

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return self._stored(f(*_plain(args), **_plain(kwargs)))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_plain(each) for each in value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.view(np.ndarray) if isinstance(value, _Stored) else value


def _wide(array: Array) -> Array:
    """float16 and bfloat16 as `_Stored`."""
    if array.dtype in (np.float64, np.float32):
        return array
    wide = array.astype(np.float32).view(_Stored)
    wide.half = array.dtype
    return wide


SAME = equivalents(
    "model",
    ("rows", "as it is", model()),
    (
        "positions-from-1",
        "RoPE sees differences of positions alone",
        model(rope_tables=("positions * freq", "(1 + positions) * freq")),
    ),
    (
        "positions-of-real",
        "positions counted from the first real token, with RoPE",
        model(
            llama=(
                "rope_tables(batch.position_ids",
                "rope_tables(np.maximum(batch.real.cumsum(1) - 1, 0)",
            )
        ),
    ),
    ("fill-1e4", "-10000 for -∞", model(attention=("-np.inf", "-1e4"))),
    (
        "heads-repeated",
        "keys and values repeated for each query head",
        model(attention=_reading(_repeated)),
    ),
    (
        "no-maximum",
        "exp(z) without the maximum taken off",
        model(
            softmax=("z.real.max(-2, keepdims=True)", "0"),
            cross_entropy=("c = z.real.max(0)", "c = 0 * z[0].real"),
        ),
    ),
    ("silu-divided", "x / (1 + e⁻ˣ)", model(silu=("y = x * sigma", "y = x / (1 + np.exp(-x))"))),
    (
        "variance-of-squares",
        "mean(x²) - mean(x)²",
        model(layernorm=("_mean(centred * centred)", "(_mean(x * x) - _mean(x) ** 2)")),
    ),
    ("stored", "every array on the way rounded to a half precision", model(_wide=_wide)),
    (
        "merged",
        "(W + s B A) x",
        model(
            lora_linear=(
                "y = base + B @ (s * u)",
                "y = (W + s * B @ A) @ h if b is None else (W + s * B @ A) @ h + b",
            )
        ),
    ),
)

MUTANTS: tuple[Mutant, ...] = (
    *(NORM + ROPE + ATTENTION + BLOCK + LOSS + ADAPTER + FILES),
    *SAME,
)
