"""Mutants of whole models: edits of the specification's own functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from minilora.spec import blocks, lora, models, ops
from minilora.spec.models import GPT2, Batch, Bert, Config, Llama
from minilora.spec.ops import Array, Back
from minilora.verify.implementation import minilora_impl
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants


def functions(module: ModuleType) -> list[FunctionType]:
    """The functions that a module defines, without what a cache remembers of them."""
    values = [inspect.unwrap(value) for value in vars(module).values()]
    return [f for f in values if isinstance(f, FunctionType) and f.__module__ == module.__name__]


def rebind(space: dict[str, Any]) -> None:
    """What holds functions of the specification gets those of the namespace."""
    space["ops"] = SimpleNamespace(**space)
    space["LORA"] = replace(lora.LORA, linear=space["lora_linear"])
    space["FORWARD"] = {Llama: space["llama"], GPT2: space["gpt2"], Bert: space["bert"]}
    for f in space.values():
        if isinstance(f, FunctionType) and f.__globals__ is space and f.__defaults__:
            f.__defaults__ = tuple(_of_space(space, value) for value in f.__defaults__)


def _of_space(space: dict[str, Any], default: Any) -> Any:
    """A default value of a function; kernels with the namespace's functions."""
    if not isinstance(default, models.Kernels):
        return default
    return models.Kernels(**{name: space[f.__name__] for name, f in vars(default).items()})


def neighbours(x: Array, cos: Array, sin: Array) -> tuple[Array, Back]:
    """RoPE of pairs of neighbours."""
    halves = np.arange(x.shape[2]).reshape(-1, 2).T.ravel()
    pairs = np.argsort(halves)
    y, back = ops.rope(x[:, :, halves], cos, sin)
    return y[:, :, pairs], lambda dy: back(dy[:, :, halves])[:, :, pairs]


Heads = Callable[[Array, int, int], Array]


def reading(heads: Heads, of_values: Heads | None = None) -> Any:
    """Attention whose query head j of h reads the key/value head ``heads(j, h, g)``."""

    def attention(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Back]:
        h, g = q.shape[1], k.shape[1]
        at_k = heads(np.arange(h), h, g)
        at_v = (of_values or heads)(np.arange(h), h, g)
        o, back = ops.attention(q, k[:, at_k], v[:, at_v], mask)

        def summed(do: Array) -> tuple[Array, Array, Array]:
            dq, dk_of_head, dv_of_head = back(do)
            dk, dv = np.zeros_like(k), np.zeros_like(v)
            for j in range(h):
                dk[:, at_k[j]] += dk_of_head[:, j]
                dv[:, at_v[j]] += dv_of_head[:, j]
            return dq, dk, dv

        return o, summed

    return attention


def repeated(j: Array, h: int, g: int) -> Array:
    """Query heads in a row share a key/value head, as they should."""
    return j * g // h


def tiled(j: Array, h: int, g: int) -> Array:
    """Every g-th query head shares a key/value head."""
    return j % g


def relu(x: Array) -> tuple[Array, Back]:
    """max(x, 0)."""
    return x * (x > 0), lambda dy: dy * (x > 0)


def quick_gelu(x: Array) -> tuple[Array, Back]:
    """x σ(1.702 x)."""
    y, back = ops.silu(1.702 * x)
    return y / 1.702, back


def mean_of_rows(batch: Batch, W: Any, c: Config, tuning: Any) -> tuple[Any, Back]:
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


def factors_of(other: str, at: str, W: Any, parts: str = "AB") -> Any:
    """The weights, with another site's factors at an adapted one."""
    if f"{at}.A" not in W:
        return W
    return W | {f"{at}.{part}": W[f"{other}.{part}"] for part in parts}


def other_layer(name: str) -> str:
    """The name in the other of two layers."""
    swap = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return next((new + name.removeprefix(old) for old, new in swap.items() if old in name), name)


def rows_dropped(at: str, W: Any, first: float, last: float) -> Any:
    """The weights, with a fused B that is 0 in this part of its rows."""
    if f"{at}.A" not in W or not at.endswith("qkv"):
        return W
    B = W[f"{at}.B"]
    part = np.arange(len(B)) / len(B)
    return W | {f"{at}.B": B * ~((part >= first) & (part < last))[:, None]}


def scaled(adapter: tuple[Any, Any], s: Callable[[str, float, int], float]) -> tuple[Any, Any]:
    """An adapter with another scale, a function of (site, scale, rank)."""
    factors, spec = adapter
    scales = {at: s(at, v, len(factors[f"{at}.A"])) for at, v in spec.scale.items()}
    return factors, replace(spec, scale=scales)


def pairs_apart(name: str, W: Array, c: Any) -> Array:
    """Rows of q and k from halves to neighbours, as for interleaved RoPE."""
    if not (isinstance(c, Llama) and name.endswith((".q.weight", ".k.weight"))):
        return W
    return W.reshape(-1, 2, c.head_dim // 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)


class Stored(np.ndarray):
    """Arrays in float32, rounded to a half precision after every operation but a sum."""

    half: Any = None

    def __array_finalize__(self, obj: Any) -> None:
        self.half = getattr(obj, "half", None)

    def _like(self, y: Any) -> Any:
        if not isinstance(y, np.ndarray | np.floating) or y.dtype != np.float32:
            return y
        array = np.asarray(y).view(Stored)
        array.half = self.half
        return array

    def _rounded(self, y: Any) -> Any:
        half = isinstance(y, np.ndarray | np.floating) and y.dtype == np.float32
        return self._like(y.astype(self.half).astype(np.float32)) if half else y

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = [_unwrapped(part) for part in inputs]
        kwargs = {name: _unwrapped(part) for name, part in kwargs.items()}
        y = getattr(ufunc, method)(*plain, **kwargs)
        return self._rounded(y) if method == "__call__" else self._like(y)

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return self._rounded(f(*_unwrapped(args), **_unwrapped(kwargs)))


def _unwrapped(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_unwrapped(part) for part in value)
    if isinstance(value, dict):
        return {name: _unwrapped(part) for name, part in value.items()}
    return value.view(np.ndarray) if isinstance(value, Stored) else value


def stored(array: Array) -> Array:
    """float16 and bfloat16 as `Stored`."""
    if array.dtype in (np.float64, np.float32):
        return array
    wide = array.astype(np.float32).view(Stored)
    wide.half = array.dtype
    return wide


class Model(Minilora):
    """The specification's model; `model_loss` is looked up where the edited functions are."""

    def model_loss(self, *arguments: Any) -> Any:
        return model_loss(self, *arguments)


model_loss = Minilora.model_loss
MODULES = (minilora_impl, ops, lora, blocks, models)
SPECIFICATION = [f for module in MODULES for f in functions(module)]
MODEL = Reference((*SPECIFICATION, model_loss, Model), globals(), rebind)


# fmt: off
NORM: Table = {
    "model.llama": [
        ("eps-1e-6", "ε = 1e-6", {"rmsnorm: x) + eps": "x) + 1e-6"}),
        ("eps-1e-8", "ε = 1e-8", {"rmsnorm: x) + eps": "x) + 1e-8"}),
        ("eps-0", "ε = 0", {"rmsnorm: x) + eps": "x)"}),
        ("eps-outside", "x / (√mean(x²) + ε)",
         {"np.sqrt(_mean(x * x) + eps)": "(np.sqrt(_mean(x * x)) + eps)"}),
        ("sum", "x / √(sum(x²) + ε)", {"_mean(x * x)": "(x * x).sum(0)"}),
        ("mean-subtracted", "LayerNorm for RMSNorm",
         {"rmsnorm: rho = 1": "x = x - _mean(x)\n    rho = 1"}),
        ("weight-plus-1", "(1 + w) ∘ h", {"rmsnorm: w * h": "(1 + w) * h"}),
        ("weight-ignored", "no weight w", {"rmsnorm: w * h": "h"}),
        ("last-missing", "no norm before the head",
         {'normalise(ops.rmsnorm, x, "norm", W, c.eps, tuning)': "x, lambda dh: (dh, {})"}),
        ("first-for-second", "norm1's weight in norm2",
         {'llama_block: x, at + "norm2"': 'x, at + "norm1"'}),
        ("root-constant", "dx = ρ dh: ρ taken for a constant",
         {"rho * (dh - h * _mean(h * dh))": "rho * dh"}),
        ("weight-not-in-back", "dh = dy for w ∘ dy", {"rmsnorm: w * dy": "dy"}),
    ],
    "model.gpt2": [
        ("n-1", "variance over n - 1",
         {"_mean(centred * centred)": "(centred * centred).sum(0) / (len(x) - 1)"}),
        ("bias-ignored", "no bias b", {"w * h + b": "w * h"}),
        ("mean-kept", "RMSNorm for LayerNorm", {"x - _mean(x)": "x"}),
        ("eps-1e-5", "ε = 1e-5", {"centred) + eps": "centred) + 1e-5"}),
        ("mean-constant", "dx without mean(dh)", {"dh - _mean(dh) - h": "dh - h"}),
    ],
}
ROPE: Table = {
    "model.llama": [
        ("interleaved", "RoPE pairs neighbouring features instead of halves",
         {"half = x.shape[2] // 2": "return neighbours(x, cos, sin)"}),
        ("theta", "θ = 10000", {"= theta **": "= 1e4 **"}),
        ("theta-off-1-permille", "1.001 θ", {"= theta **": "= (1.001 * theta) **"}),
        ("of-model", "θ^(-2i/d_model) for θ^(-2i/d_head)",
         {"c.theta": "c.theta ** (c.head_dim / c.d)"}),
        ("backwards", "negative angles", {"return cos, sin": "return cos, -sin"}),
        ("none", "no RoPE", {"angles = positions": "angles = 0 * positions"}),
        ("q-alone", "RoPE on q alone",
         {"ops.rope(ops.split_heads(k, b, c.kv_heads), *tables)":
              "(ops.split_heads(k, b, c.kv_heads), lambda dk: dk)"}),
        ("k-alone", "RoPE on k alone",
         {"ops.rope(ops.split_heads(q, b, c.heads), *tables)":
              "(ops.split_heads(q, b, c.heads), lambda dq: dq)"}),
        ("v-too", "RoPE on v, too",
         {"k, ops.split_heads(v, b, c.kv_heads)":
              "k, ops.rope(ops.split_heads(v, b, c.kv_heads), *tables)[0]"}),
        ("bfloat16", "RoPE's frequencies rounded to bfloat16",
         {"* frequencies[": "* digits(frequencies, 8)["}),
        ("not-turned-back", "dx = R dy for Rᵀ dy", {"turn(dy, -sin)": "turn(dy, sin)"}),
        ("one-position", "k has the next position's angle",
         {"ops.rope(ops.split_heads(k, b, c.kv_heads), *tables)":
              "ops.rope(ops.split_heads(k, b, c.kv_heads), *(np.roll(v, -1, 3) for v in tables))"}),
    ],
}
ATTENTION: Table = {
    "model.batches": [
        ("unpadded-not-causal", "every query sees every key where there is no padding",
         {"return (s < t) & real[:, :, None] | (s == t)":
              "return (s < t) & real[:, :, None] | (s == t) | real.all()"}),
        ("window-32", "query t sees the keys from t - 31 on",
         {"return (s < t) & real[:, :, None] | (s == t)":
              "return (s < t) & (t < s + 32) & real[:, :, None] | (s == t)"}),
        ("one-row-not-masked", "padding on the left is seen in a batch of one row",
         {"causal_mask: real[:, :, None]": "(real | (len(real) == 1))[:, :, None]"}),
    ],
    "model.llama": [
        ("scale-of-model", "1/√(d h) for 1/√d", {"d**-0.5": "(d * h) ** -0.5"}),
        ("scale-1", "kᵀ q is not divided by √d", {"d**-0.5": "1.0"}),
        ("scale-of-d", "kᵀ q / d", {"d**-0.5": "1 / d"}),
        ("one-future-token", "query t sees key t + 1, too", {"(s < t)": "(s < t + 2)"}),
        ("no-mask", "every query sees every key",
         {"np.copyto(z, -np.inf, where=~mask[:, None, None])": "pass"}),
        ("strict", "query t does not see key t",
         {"return (s < t) & real[:, :, None] | (s == t)":
              "past = np.triu((s < t) & real[:, :, None], 1)\n    return past | (s == t) & "
              "~past.any(1)[:, None]"}),
        ("masked-after", "the mask is applied after the softmax",
         {"np.copyto(z, -np.inf, where=~mask[:, None, None])": "pass",
          "attention: softmax(z)": "softmax(z); p = p * mask[:, None, None]"}),
        ("times-mask", "scores are multiplied by the mask",
         {"np.copyto(z, -np.inf, where=~mask[:, None, None])": "z = z * mask[:, None, None]"}),
        ("fill-10", "masked scores are -10 instead of -∞", {"-np.inf": "-10"}),
        ("over-queries", "the softmax runs over queries instead of keys",
         {"attention: softmax(z)": "softmax(z.mT)\n    p = p.mT"}),
        ("heads-interleaved", "feature i belongs to head i mod h",
         {"x.reshape(h, x.shape[0] // h, b, -1).transpose(2, 0, 1, 3)":
              "x.reshape(x.shape[0] // h, h, b, -1).transpose(2, 1, 0, 3)"}),
        ("tiled", "query head j reads key/value head j mod g",
         {"b, h, d, t = q.shape": "return reading(tiled)(q, k, v, mask)"}),
        ("k-tiled", "the key of query head j is read from head j mod g",
         {"b, h, d, t = q.shape": "return reading(tiled, repeated)(q, k, v, mask)"}),
        ("first-kv-head", "all query heads read key/value head 0",
         {"b, h, d, t = q.shape": "return reading(lambda j, h, g: 0 * j)(q, k, v, mask)"}),
        ("group-mean", "dk, dv are the mean over a group's queries instead of the sum",
         {"(Q @ dz.mT).sum(2), (dO @ p.mT).sum(2)": "(Q @ dz.mT).mean(2), (dO @ p.mT).mean(2)"}),
        ("dq-not-scaled", "dq without 1/√d", {"(K @ dz * scale)": "(K @ dz)"}),
        ("softmax-diagonal", "the softmax's dz = p ∘ dp",
         {"p * (dp - (p * dp).sum(-2, keepdims=True))": "p * dp"}),
    ],
    "model.gpt2": [
        ("padding-seen", "padding on the left is seen",
         {"causal_mask: real[:, :, None]": "np.ones_like(real)[:, :, None]"}),
    ],
    "model.bert.padding": [
        ("padding-seen-by-all", "padding is seen",
         {"padding_mask: real[:, :, None]": "np.ones_like(real)[:, :, None]"}),
    ],
}
BLOCK: Table = {
    "model.llama": [
        ("residual-of-norm", "norm1(x) + o for x + o", {"llama_block: x + o\n": "h + o\n"}),
        ("first-residual-missing", "no residual around the attention",
         {"llama_block: x + o\n": "o\n"}),
        ("second-residual-missing", "no residual around the MLP",
         {"llama_block: x + m, back": "m, back"}),
        ("parallel", "the MLP reads the block's input",
         {'rmsnorm, x, at + "norm2"': 'rmsnorm, x - o, at + "norm2"'}),
        ("gate-for-up", "gate ∘ silu(up) for silu(gate) ∘ up",
         {"act, back_silu = ops.silu(gate)":
              "gate, up = up, gate\n    act, back_silu = ops.silu(gate)"}),
        ("gelu", "gelu for silu", {"ops.silu(gate)": "ops.gelu(gate)"}),
        ("gelu-tanh", "gelu's tanh form for silu", {"ops.silu(gate)": "ops.gelu_tanh(gate)"}),
        ("relu", "relu for silu", {"ops.silu(gate)": "relu(gate)"}),
        ("embedding-scaled", "the embedding times √d",
         {"tables = kernels": "x = x * c.d**0.5\n    tables = kernels"}),
        ("head-tied", "the embedding is used as the head", {"own in W else": 'at != "head" else'}),
        ("layers-turned", "the layers in reverse order", {"{i}.": "{layers - 1 - i}."}),
        ("residual-not-in-back", "dx without dy past the MLP", {"llama_block: dy + dx": "1 * dx"}),
        ("gate-not-in-back", "d(gate ∘ up) = d up for gate ∘ d up",
         {"back_up(dm * act)": "back_up(dm)"}),
        ("dk-for-dv", "v gets k's gradient",
         {"llama_block: back_v(ops.join_heads(dv))": "back_v(ops.join_heads(dk))"}),
    ],
    "model.gpt2": [
        ("gelu-exact", "gelu by erf for its tanh form", {"ops.gelu_tanh(up)": "ops.gelu(up)"}),
        ("gelu-quick", "gelu as x σ(1.702 x)", {"ops.gelu_tanh(up)": "quick_gelu(up)"}),
        ("qk-swapped", "the fused weight read as k, q, v",
         {"gpt2_block: q, k, v = (ops": "k, q, v = (ops"}),
        ("qkv-interleaved", "the fused weight read as q, k, v in every third row",
         {"qkv.reshape(3, *x.shape)": "qkv.reshape(-1, 3, x.shape[1]).swapaxes(0, 1)"}),
        ("no-positions", "no embedding of positions", {"tokens + positions,": "tokens,"}),
        ("positions-of-real", "positions counted from the first real token",
         {"gpt2: batch.position_ids.ravel()": "np.maximum(batch.real.cumsum(1) - 1, 0).ravel()"}),
        ("no-bias", "no biases beside adapters", {"W.get(bias), *parts": "None, *parts"}),
    ],
    "model.gpt2.padding": [
        ("positions-from-the-end", "positions counted from the end of the row",
         {"gpt2: batch.position_ids.ravel()":
              "(batch.position_ids.ravel() - batch.ids.shape[1]) % len(W['positions.weight'])"}),
    ],
    "model.bert": [
        ("gelu-approximate", "gelu's tanh form for erf", {"ops.gelu(up)": "ops.gelu_tanh(up)"}),
        ("no-types", "no embedding of token types",
         {"tokens + positions + types": "tokens + positions"}),
        ("no-embedding-norm", "no norm of the embeddings",
         {'normalise(ops.layernorm, tokens + positions + types, "norm", W, c.eps, tuning)':
              "(tokens + positions + types, lambda dx: (dx, {}))"}),
        ("last-token-pooled", "the last token is pooled instead of the first",
         {'project(h[:, ::t], "pooler"': 'project(h[:, t - 1 :: t], "pooler"'}),
        ("mean-pooled", "the mean over tokens is pooled instead of the first",
         {'project(h[:, ::t], "pooler"': 'project(h.reshape(len(h), -1, t).mean(2), "pooler"'}),
        ("pooler-linear", "no tanh after the pooler",
         {"ops.tanh(pooled)": "pooled, lambda dact: dact"}),
        ("causal", "a causal mask instead of a padding mask",
         {"ops.padding_mask(": "ops.causal_mask("}),
    ],
}
LOSS: Table = {
    "model.llama": [
        ("no-shift", "token t predicted at t",
         {"following[:, :-1] = batch.labels[:, 1:]": "following[:] = batch.labels"}),
        ("double-shift", "token t + 2 predicted at t",
         {"[:, :-1] = batch.labels[:, 1:]":
              "[:, :-2] = batch.labels[:, 2:]"}, "transformers 47394", "transformers 37830"),
        ("shift-back", "token t - 1 predicted at t",
         {"[:, :-1] = batch.labels[:, 1:]": "[:, 1:] = batch.labels[:, :-1]"}),
        ("ignored-as-0", "ignored labels taken for class 0",
         {"following.ravel()": "np.maximum(following, 0).ravel()"}),
        ("sum", "the sum over labels instead of the mean", {"int(counted.sum())": "1"}),
        ("by-batch", "divided by the number of sequences",
         {"labels, count)": "labels, len(batch.ids))"}),
        ("log2", "the base-2 logarithm",
         {"* each).sum() / n": "* each).sum() / n / np.log(z.real.dtype.type(2))"}),
        ("smoothed", "label smoothing of 0.1",
         {"c - z[at])": "c - (0.9 * z[at] + 0.1 * z.mean(0)))"}),
        ("z-loss", "a z-loss of 1e-4 is added",
         {"L = ((": "L = (1e-4 * (np.log(total) + c) ** 2 * counted).sum() / n + (("}),
        ("padding-trained", "labels at padding count",
         {"= batch.labels[:, 1:]":
              "= np.where(batch.real, batch.labels, batch.ids)[:, 1:]"}, "mlx-lm 1697"),
        ("first-row", "the first sequence alone",
         {"return following.ravel()": "following[1:] = ops.IGNORED\n    return following.ravel()"}),
        ("mean-of-rows", "the mean over sequences of their means",
         {"loss(given, wide, c, tuning)": "mean_of_rows(given, wide, c, tuning)"}),
        ("ignored-in-back", "ignored labels have gradients", {"each *": "np.ones_like(each) *"}),
        ("softmax-alone", "dz = p / n: the label's -1 is missing", {"dz[at] -= share": "pass"}),
        ("back-not-divided", "dz is not divided by the number of labels", {"dL / n": "dL"}),
    ],
    "model.llama.padding": [
        ("by-positions", "divided by all positions", {"int(counted.sum())": "labels.size"}),
    ],
}
ADAPTER: Table = {
    "model.llama": [
        ("alpha", "s = α",
         {"read_adapter(adapter_dir, c)":
              "scaled(read_adapter(adapter_dir, c), lambda at, s, r: s * r)"}, "mlx-vlm 841"),
        ("scale-1", "s = 1: α not saved",
         {"read_adapter(adapter_dir, c)":
              "scaled(read_adapter(adapter_dir, c), lambda at, s, r: 1.0)"}, "mlx-examples 622"),
        ("off-1-permille", "1.001 s",
         {"read_adapter(adapter_dir, c)":
              "scaled(read_adapter(adapter_dir, c), lambda at, s, r: 1.001 * s)"}),
        ("o-skipped", "no adapter on o",
         {"read_adapter(adapter_dir, c)":
              'scaled(read_adapter(adapter_dir, c), lambda at, s, r: 0.0 if at.endswith(".o") '
              "else s)"}),
        ("last-layer-skipped", "no adapter in the last layer",
         {"read_adapter(adapter_dir, c)":
              'scaled(read_adapter(adapter_dir, c), lambda at, s, r: 0.0 if "layers.1." in at '
              "else s)"}),
        ("other-layer", "each layer has the other one's adapter",
         {"weight, bias = weight_of":
              "W = factors_of(other_layer(at), at, W); weight, bias = weight_of"}),
        ("k-on-v", "k's adapter on v",
         {"weight, bias = weight_of":
              'W = factors_of(at.replace(".v", ".k"), at, W); weight, bias = weight_of'}),
        ("A-shared", "q's A for k and v too",
         {"weight, bias = weight_of":
              'W = factors_of(at[:-1] + "q" if at.endswith((".k", ".v")) else at, at, W, "A"); '
              "weight, bias = weight_of"}),
        ("bfloat16", "A and B rounded to bfloat16",
         {"weight, bias = weight_of":
              'W = W | {n: digits(W[n], 8) for n in (f"{at}.A", f"{at}.B") if n in W}; weight, '
              "bias = weight_of"}),
        ("first-layer-frozen", "no gradient in the first layer",
         {"gradients |= block_gradients":
              "above = back_block is not backs[0]\n            gradients |= {n: g * above for n, "
              "g in block_gradients.items()}"},
         "transformers 26221", "microsoft/LoRA 120", "peft 1142"),
        ("branch-detached", "dx = Wᵀ dy: no gradient through the branch",
         {"back_base(dy) + back_dropout(A.T @ du)": "back_base(dy)"}),
        ("base-detached", "dx = K∘(Aᵀ du): no gradient through the base",
         {"back_base(dy) + back_dropout(A.T @ du)": "back_dropout(A.T @ du)"}),
    ],
    "model.llama.balance": [
        ("dA-not-scaled", "dA / s", {"outer(du, h)": "outer(du, h) / s"}),
    ],
    "model.gpt2.balance": [
        ("dB-halved", "dB / 2", {"outer(dy, s * u)": "outer(dy, 0.5 * s * u)"}),
    ],
    "model.bert.balance": [
        ("dA-first-token", "dA of the first token alone",
         {"outer(du, h)": "outer(du[:, :1], h[:, :1])"}),
    ],
    "model.gpt2": [
        ("rslora-lost", "s = α/r with rsLoRA",
         {"read_adapter(adapter_dir, c)":
              "scaled(read_adapter(adapter_dir, c), lambda at, s, r: s / r**0.5)"},
         "TensorRT-LLM 1668"),
        ("fused-k-skipped", "no adapter on k in a fused weight",
         {"weight, bias = weight_of":
              "W = rows_dropped(at, W, 1 / 3, 2 / 3); weight, bias = weight_of"}),
        ("fused-q-alone", "no adapter on k and v in a fused weight",
         {"weight, bias = weight_of":
              "W = rows_dropped(at, W, 1 / 3, 1); weight, bias = weight_of"}),
    ],
    "model.bert": [
        ("pooler-skipped", "no adapter outside the layers",
         {"read_adapter(adapter_dir, c)":
              'scaled(read_adapter(adapter_dir, c), lambda at, s, r: s if "layers" in at else '
              "0.0)"}),
    ],
}
FILES: Table = {
    "model.adapters": [
        ("adapter-remembered", "the first adapter of a model's folder in every later call",
         {"model_loss: read_adapter(adapter_dir, c)":
              "vars(self).setdefault(str(model_dir), read_adapter(adapter_dir, c))"}),
    ],
    "model.llama.vector": [
        ("bfloat16", "weights rounded to bfloat16",
         {"model_loss: read_model(model_dir)":
              "read_model(model_dir); W = {name: digits(w, 8) for name, w in W.items()}"}),
        ("eps-default", "ε = 1e-6, not read from the file",
         {"model_loss: read_model(model_dir)": "read_model(model_dir); c = replace(c, eps=1e-6)"}),
        ("theta-default", "θ = 10000, not read from the file",
         {"model_loss: read_model(model_dir)":
              "read_model(model_dir); c = replace(c, theta=1e4) if isinstance(c, Llama) else c"}),
        ("layers-turned", "the layers' weights exchanged",
         {"model_loss: read_model(model_dir)":
              "read_model(model_dir); W = {name: W[other_layer(name)] for name in W}"}),
        ("rope-pairs", "W's rows permuted for interleaved RoPE, B's not",
         {"model_loss: read_model(model_dir)":
              "read_model(model_dir); W = {name: pairs_apart(name, w, c) for name, w in W.items()}",
          "half = x.shape[2] // 2": "return neighbours(x, cos, sin)"}, "llama.cpp 21354"),
    ],
    "model.gpt2.vector": [
        ("conv1d-not-turned", "the square Conv1D weight of o is not transposed",
         {"model_loss: read_model(model_dir)":
              "read_model(model_dir); W = {name: w.T if isinstance(c, GPT2) and "
              'name.endswith(".o.weight") else w for name, w in W.items()}'}),
    ],
    "model.bert.vector": [
        ("biases-lost", "biases of projections are not read",
         {"model_loss: read_model(model_dir)":
              'read_model(model_dir); W = {name: 0 * w if name.endswith(".bias") and "norm" not '
              "in name else w for name, w in W.items()}"}),
    ],
}
SAME: Same = [
    ("rows", "the reference", {}),
    ("positions-from-1", "RoPE sees differences of positions alone",
     {"positions * freq": "(1 + positions) * freq"}),
    ("positions-of-real", "positions counted from the first real token, with RoPE",
     {"rope_tables(batch.position_ids": "rope_tables(np.maximum(batch.real.cumsum(1) - 1, 0)"}),
    ("fill-1e4", "-10000 for -∞", {"-np.inf": "-1e4"}),
    ("heads-repeated", "keys and values repeated for each query head",
     {"b, h, d, t = q.shape": "return reading(repeated)(q, k, v, mask)"}),
    ("no-maximum", "exp(z) without subtracting the maximum",
     {"z.real.max(-2, keepdims=True)": "0", "z.real.max(0)": "0 * z[0].real"}),
    ("silu-divided", "x / (1 + e⁻ˣ)", {"x * sigma": "x / (1 + np.exp(-x))"}),
    ("variance-of-squares", "mean(x²) - mean(x)²",
     {"_mean(centred * centred)": "(_mean(x * x) - _mean(x) ** 2)"}),
    ("stored", "every array on the way rounded to a half precision",
     {"model_loss: widened(array)": "stored(array)"}),
    ("merged", "(W + s B A) x",
     {"base + B @ (s * u)": "(W + s * B @ A) @ h if b is None else (W + s * B @ A) @ h + b"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(MODEL, "NORM", NORM),
    *mutants(MODEL, "ROPE", ROPE),
    *mutants(MODEL, "ATTENTION", ATTENTION),
    *mutants(MODEL, "BLOCK", BLOCK),
    *mutants(MODEL, "LOSS", LOSS),
    *mutants(MODEL, "ADAPTER", ADAPTER),
    *mutants(MODEL, "FILES", FILES),
    *equivalents(MODEL, "model", SAME),
)
