"""minilora's answer to ``module``: the specification's layers, each kind by its own function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora.spec import ops
from minilora.spec.blocks import bert_block
from minilora.spec.layers import (
    Geometry,
    adapted_conv,
    adapted_embedding,
    adapted_experts,
    adapted_fused,
    conv,
    merge_conv,
)
from minilora.spec.lora import TrainableSpec, Variant
from minilora.spec.ops import linear

Array = np.ndarray
Back = Callable[[Array], dict[str, Any]]

EPS = 1e-5
"""Of the norms of PyTorch's TransformerEncoderLayer."""


@dataclass(frozen=True)
class Adapted:
    """A layer of the contract and its adapter, in a dtype that is computed in.

    ``parts`` are the variant's parameters beside A and B, as columns; ``K`` is dropout's multiplier
    in x's layout, None where nothing is dropped.
    """

    layer: Mapping[str, Any]
    adapter: Mapping[str, Any]
    x: Array
    variant: Variant
    parts: Mapping[str, Array]
    s: float
    index: Array | None = None
    K: Array | None = None

    @property
    def W(self) -> Any:
        """The layer's weight."""
        return self.layer["W"]

    @property
    def b(self) -> Any:
        """Its bias (m, 1), or None."""
        b = self.layer.get("bias")
        return None if b is None else b[..., None]

    def P(self, adapter: Mapping[str, Any] | None = None) -> tuple[Array, ...]:
        """The variant's parameters."""
        own = self.adapter if adapter is None else adapter
        return own["A"], own["B"], *self.parts.values()

    def named(self, dP: Any, prefix: str = "") -> dict[str, Array]:
        """Gradients by the contract's names."""
        dA, dB, *others = dP
        columns = zip(self.parts, others, strict=True)
        return {f"{prefix}dA": dA, f"{prefix}dB": dB} | {f"d{k}": v[:, 0] for k, v in columns}

    def columns(self) -> tuple[Array, Array | None]:
        """x and K as columns."""
        return columns(self.x), None if self.K is None else columns(self.K)


def columns(x: Array) -> Array:
    """(…, n) as (n, tokens)."""
    return x.reshape(-1, x.shape[-1]).T


def _rows(y: Array, x: Array) -> Array:
    return y.T.reshape(*x.shape[:-1], len(y))


def _linear(a: Adapted) -> tuple[Array, Back]:
    x, K = a.columns()
    y, back = a.variant.linear(x, a.W, a.b, *a.P(), a.s, K)

    def gradients(dy: Array) -> dict[str, Any]:
        dx, *dP = back(columns(dy))
        return {"dx": _rows(dx, a.x)} | a.named(dP)

    return _rows(y, a.x), gradients


def _base_linear(a: Adapted) -> Array:
    return _rows(linear(columns(a.x), a.W, a.b)[0], a.x)


def _geometry(a: Adapted) -> dict[str, Any]:
    layer = a.layer
    padding = tuple((size, size) for size in layer["padding"])
    sizes = tuple(a.W.shape[2:]), tuple(layer["stride"]), padding, tuple(layer["dilation"])
    return {"geometry": Geometry(*sizes, layer["padding_mode"]), "groups": layer["groups"]}


def _require_blocks(a: Adapted) -> None:
    """NotImplementedError where an adapter in groups does not read the channels of all of them."""
    if a.layer["groups"] > 1 and a.adapter["A"].shape[1] == a.W[0].size:
        raise NotImplementedError("minilora's adapters in groups are of conv_groups 'blocks'")


def _conv(a: Adapted) -> tuple[Array, Back]:
    _require_blocks(a)
    K = None if a.K is None else a.K.swapaxes(0, 1)
    x = a.x.swapaxes(0, 1)
    y, back = adapted_conv(a.variant.linear, x, a.W, a.b, a.P(), a.s, K, **_geometry(a))

    def gradients(dy: Array) -> dict[str, Any]:
        dx, *dP = back(dy.swapaxes(0, 1))
        return {"dx": dx.swapaxes(0, 1)} | a.named(dP)

    return y.swapaxes(0, 1), gradients


def _base_conv(a: Adapted) -> Array:
    how = _geometry(a)
    how["groups"] = a.x.shape[1] // a.W.shape[1]  # a merged weight has none
    y: Array = conv(a.x.swapaxes(0, 1), a.W, a.b, **how)[0]
    return y.swapaxes(0, 1)


def _embedding(a: Adapted) -> tuple[Array, Back]:
    """Rows within max_norm, as all that are asked for are, stay as they are."""
    ids, factor = a.x.reshape(-1), a.layer.get("embed_scale")
    y, back = adapted_embedding(a.variant.linear, ids, a.W, a.P(), a.s, factor)
    trained = (ids != a.layer.get("padding_idx", -1)).astype(a.W.dtype)

    def gradients(dy: Array) -> dict[str, Any]:
        return a.named(back(columns(dy) * trained))

    return y.T.reshape(*a.x.shape, -1), gradients


def _base_embedding(a: Adapted) -> Array:
    y: Array = a.W[a.x] * a.W.dtype.type(a.layer.get("embed_scale", 1.0))
    return y


def _fused_parts(a: Adapted) -> list[tuple[Array, ...] | None]:
    """The parameters of each projection, None where it is not adapted."""
    r, enable, of_A, of_B = a.adapter["r"], a.adapter["enable"], 0, 0
    parts: list[tuple[Array, ...] | None] = []
    for size, on in zip(a.layer["rows"], enable, strict=True):
        A, B = a.adapter["A"][of_A : of_A + r], a.adapter["B"][of_B : of_B + size]
        parts.append((A, B) if on else None)
        of_A, of_B = of_A + r * on, of_B + size * on
    return parts


def _fused(a: Adapted) -> tuple[Array, Back]:
    x, K = a.columns()
    rows = a.layer["rows"]
    y, back = adapted_fused(a.variant.linear, x, a.W, a.b, _fused_parts(a), rows, a.s, K)

    def gradients(dy: Array) -> dict[str, Any]:
        dx, *of_parts = back(columns(dy))
        dP = [np.concatenate(each) for each in zip(*of_parts, strict=True)]
        return {"dx": _rows(dx, a.x)} | a.named(dP)

    return _rows(y, a.x), gradients


def _experts(a: Adapted) -> tuple[Array, Back]:
    assert a.index is not None
    y, back = adapted_experts(a.variant.linear, a.x.T, a.W, a.b, a.P(), a.index, a.s)

    def gradients(dy: Array) -> dict[str, Any]:
        dx, *dP = back(dy.T)
        return {"dx": dx.T} | a.named(dP)

    return y.T, gradients


def _base_experts(a: Adapted) -> Array:
    assert a.index is not None
    y: Array = adapted_experts(linear, a.x.T, a.W, a.b, (), a.index, None, ())[0]
    return y.T


def _attention(a: Adapted) -> tuple[Array, Back]:
    batch, tokens, _ = a.x.shape
    out, of_out = a.layer["out"], a.adapter.get("out")
    bias = None if "bias" not in out else out["bias"][:, None]
    qkv, back_in = a.variant.linear(columns(a.x), a.W, a.b, *a.P(), a.s)
    q, k, v = (ops.split_heads(part, batch, a.layer["heads"]) for part in np.split(qkv, 3))
    mixed, back_mixed = ops.attention(q, k, v, np.ones((batch, tokens, tokens), bool))
    joined, parts = ops.join_heads(mixed), () if of_out is None else (*a.P(of_out), a.s)
    y, back_out = (a.variant.linear if parts else linear)(joined, out["W"], bias, *parts)

    def gradients(dy: Array) -> dict[str, Any]:
        dmixed, *dP_out = back_out(columns(dy)) if parts else (back_out(columns(dy)),)
        of_heads = back_mixed(ops.split_heads(dmixed, batch, a.layer["heads"]))
        dx, *dP = back_in(np.concatenate([*map(ops.join_heads, of_heads)]))
        return {"dx": _rows(dx, a.x)} | a.named(dP) | (a.named(dP_out, "out.") if parts else {})

    return _rows(y, a.x), gradients


_MODULES = {"self_attn.out_proj": "o", "linear2": "down", "norm1": "norm1", "norm2": "norm2"}


def _encoder(a: Adapted) -> tuple[Array, Back]:
    """BERT's block, whose names are others."""
    batch, tokens, _ = a.x.shape
    given = a.layer["weights"]
    W = {"up.weight": a.W, "up.bias": a.b}
    for theirs, own in _MODULES.items():
        W[f"{own}.bias"] = given[f"{theirs}.bias"][:, None]
        weight = given[f"{theirs}.weight"]
        W[f"{own}.weight"] = weight if weight.ndim > 1 else weight[:, None]
    for part in ("weight", "bias"):
        for own, array in zip("qkv", np.split(given[f"self_attn.in_proj_{part}"], 3), strict=True):
            W[f"{own}.{part}"] = array if part == "weight" else array[:, None]
    names = [f"up.{part}" for part in a.variant.parts] if a.adapter else []
    W |= dict(zip(names, a.P() if names else (), strict=True))
    tuning = TrainableSpec({"up": a.s}, {}, frozenset(names), {"up": a.variant})
    c = SimpleNamespace(heads=a.layer["heads"], eps=EPS)
    mask = np.ones((batch, tokens, tokens), bool)
    y, back = bert_block(columns(a.x), "", W, c, tuning, mask, ops.attention)

    def gradients(dy: Array) -> dict[str, Any]:
        dx, g = back(columns(dy))
        return {"dx": _rows(dx, a.x)} | a.named([g[name] for name in names])

    return _rows(y, a.x), gradients


ADAPTED: dict[str, Callable[[Adapted], tuple[Array, Back]]] = {
    "linear": _linear,
    "conv": _conv,
    "embedding": _embedding,
    "fused": _fused,
    "experts": _experts,
    "attention": _attention,
    "encoder": _encoder,
}
"""Each kind with its adapter: y, and what gives the gradients for dy."""


def merged_layer(a: Adapted) -> dict[str, Any]:
    """The layer with W' for W, and b' for the bias where it has one."""
    merge, layer = a.variant.merge, dict(a.layer)
    b: Any = a.b
    match layer["kind"]:
        case "conv":
            _require_blocks(a)
            W, b = merge_conv(a.variant, a.W, b, a.P(), a.s, layer["groups"])
        case "embedding":
            W = merge(a.W.T, None, *a.P(), a.s)[0].T
        case "experts":
            W = np.stack([merge(W, None, *P, a.s)[0] for W, *P in zip(a.W, *a.P(), strict=True)])
        case "fused":
            ends, parts = np.cumsum(layer["rows"])[:-1], _fused_parts(a)
            pairs = zip(np.split(a.W, ends), parts, strict=True)
            W = np.concatenate([W if P is None else merge(W, None, *P, a.s)[0] for W, P in pairs])
        case _:
            W, b = merge(a.W, b, *a.P(), a.s)
    layer["W"] = W
    if "out" in a.adapter:
        whole, _ = merge(layer["out"]["W"], None, *a.P(a.adapter["out"]), a.s)
        layer["out"] = {**layer["out"], "W": whole}
    return layer | ({} if b is None else {"bias": b[..., 0]})


def base_output(a: Adapted) -> Array:
    """y of the layer without its adapter."""
    own = {"conv": _base_conv, "embedding": _base_embedding, "experts": _base_experts}
    if a.layer["kind"] == "attention":
        bare = {"A": a.adapter["A"], "B": 0 * a.adapter["B"]}
        return _attention(replace(a, adapter=bare))[0]
    if a.layer["kind"] == "encoder":
        return _encoder(replace(a, adapter={}))[0]
    return own.get(a.layer["kind"], _base_linear)(a)
