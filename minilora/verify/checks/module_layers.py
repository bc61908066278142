"""The truth of level ``module``: one law of substitution for every kind of layer.

An adapted layer is its base with W' and b' for W and b, in the layout of the layer's own weight.
What the base is, the specification says. The matrices that a kind adapts are computed with a
`Product`: by substitution, or, as most implementations do, by a branch beside the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora.spec import ops
from minilora.spec.blocks import bert_block
from minilora.spec.layers import Geometry, block_diagonal, fuse, unfold
from minilora.spec.lora import TrainableSpec, Variant
from minilora.spec.ops import Back, OneHot
from minilora.verify.core.inputs import columns

Array = np.ndarray
Entries = Mapping[str, Any]
Number = Callable[[Array], Any]

EPS = 1e-5
"""Of the encoder's norms, as PyTorch has it."""


@dataclass(frozen=True)
class Matrix:
    """An adapted matrix W (m, n) with its bias (m, 1) or None, and the variant's parameters."""

    variant: Variant
    W: Any
    b: Any
    P: tuple[Any, ...]
    s: Any

    def substituted(self) -> tuple[Any, Any, Back]:
        """W', b' and back, which turns dW' and db' into the gradients of the parameters.

        The variant's own equation, on the columns of the unit matrix and on a column of zeros: the
        latter gives b', and the former W' beside it.
        """
        n = self.W.shape[1]
        units = np.eye(n, n + 1)
        y, back = self.variant.linear(units, self.W, self.b, *self.P, self.s)
        bias = y[:, n:]

        def gradients(dW: Any, db: Any) -> tuple[Any, ...]:
            dy = np.concatenate([dW, db - dW.sum(1, keepdims=True)], axis=1)
            _, *dP = back(dy)
            return tuple(dP)

        return y[:, :n] - bias, bias, gradients


Product = Callable[[Matrix, Any, int], tuple[Any, Back]]
"""f(matrix, x, groups) = W' x + b', and back(dy) -> dx and the gradients of the parameters."""


def by_substitution(matrix: Matrix, x: Any, groups: int = 1) -> tuple[Any, Back]:
    """(W', b') for (W, b): dW' = dy xᵀ and db' = dy 1, of the blocks where there are groups."""
    W, b, back_W = matrix.substituted()
    flat, back_blocks = block_diagonal(W, groups) if groups > 1 else (W, _same)
    y = flat @ x + b

    def back(dy: Any) -> tuple[Any, ...]:
        dP = back_W(back_blocks(dy @ x.T), dy.sum(1, keepdims=True))
        return None if isinstance(x, OneHot) else flat.T @ dy, dP

    return y, back


def _same(dW: Any) -> Any:
    return dW


def by_branch(matrix: Matrix, x: Any, groups: int = 1) -> tuple[Any, Back]:
    """The variant's equation as it is written, of a matrix without groups."""
    y, back = matrix.variant.linear(x, matrix.W, matrix.b, *matrix.P, matrix.s)

    def gradients(dy: Any) -> tuple[Any, ...]:
        dx, *dP = back(dy)
        return dx, tuple(dP)

    return y, gradients


@dataclass(frozen=True)
class Module:
    """A layer of the contract with its adapter and a variant, over some number system.

    ``column`` is the name of the adapter's own parameter beside A and B, if any. All arrays are in
    that system, in the contract's layout, but for ``x`` where it holds row numbers.
    """

    kind: str
    layer: Entries
    adapter: Entries
    x: Any
    variant: Variant
    column: str
    s: Any
    index: Array | None = None

    def matrix(self, W: Any, bias: Any, A: Any, B: Any) -> Matrix:
        """An adapted matrix; bias (m,) or None."""
        more = (self.adapter[self.column].reshape(-1, 1),) if self.column else ()
        b = None if bias is None else bias.reshape(-1, 1)
        return Matrix(self.variant, W, b, (A, B, *more), self.s)

    def only(self) -> Matrix:
        """The one matrix of a layer that has one."""
        a = self.adapter
        return self.matrix(self.layer["W"], self.layer.get("bias"), a["A"], a["B"])

    def named(self, dP: Sequence[Any], prefix: str = "") -> dict[str, Any]:
        """The gradients of a matrix's parameters by the contract's names."""
        named = {f"{prefix}dA": dP[0], f"{prefix}dB": dP[1]}
        return named | ({f"d{self.column}": dP[2][:, 0]} if self.column else {})


Answers = dict[str, Any]
Run = tuple[Any, Callable[[Any], Answers]]


def _linear(module: Module, f: Product) -> Run:
    y, back = f(module.only(), columns(module.x), 1)

    def gradients(dy: Any) -> Answers:
        dx, dP = back(columns(dy))
        return {"dx": dx.T.reshape(module.x.shape)} | module.named(dP)

    return y.T.reshape(*module.x.shape[:-1], len(y)), gradients


def geometry_of(layer: Entries) -> Geometry:
    """A convolution's geometry: PyTorch's layers pad both sides alike."""
    return Geometry(
        tuple(layer["W"].shape[2:]),
        tuple(layer["stride"]),
        tuple((size, size) for size in layer["padding"]),
        tuple(layer["dilation"]),
        layer["padding_mode"],
    )


def _conv_matrix(module: Module) -> tuple[Matrix, int, Back]:
    """The matrix of a convolution, its groups, and back for B's gradient.

    An adapter whose A reads all channels (PEFT's) has blocks in B, and its W' has no groups.
    """
    layer, A, B = module.layer, module.adapter["A"], module.adapter["B"]
    groups, W = layer["groups"], layer["W"].reshape(len(layer["W"]), -1)
    whole = A.shape[1] > W.shape[1]
    blocks = groups if whole else 1
    (W, _), (B, back_B) = block_diagonal(W, blocks), block_diagonal(B, blocks)
    return module.matrix(W, layer.get("bias"), A, B), 1 if whole else groups, back_B


def _conv(module: Module, f: Product) -> Run:
    geometry, x = geometry_of(module.layer), module.x.swapaxes(0, 1)
    patches, back_unfold = unfold(x, geometry)
    matrix, groups, back_B = _conv_matrix(module)
    y, back = f(matrix, patches, groups)
    shape = (len(y), x.shape[1], *geometry.places(x.shape[2:])[0])

    def gradients(dy: Any) -> Answers:
        dpatches, (dA, dB, *more) = back(dy.swapaxes(0, 1).reshape(len(y), -1))
        named = module.named((dA, back_B(dB), *more))
        return {"dx": back_unfold(dpatches).swapaxes(0, 1)} | named

    return y.reshape(shape).swapaxes(0, 1), gradients


def _embedding(module: Module, f: Product) -> Run:
    """A row without gradient at ``padding_idx``; no row is longer than ``max_norm``."""
    table, a, ids = module.layer["W"], module.adapter, module.x.reshape(-1)
    factor = module.layer.get("embed_scale", 1.0)
    y, back = f(module.matrix(table.T, None, a["A"], a["B"]), OneHot(ids, len(table)), 1)
    trained = (ids != module.layer.get("padding_idx", -1)) * 1.0

    def gradients(dy: Any) -> Answers:
        _, dP = back(columns(dy) * factor * trained)
        return module.named(dP)

    return (factor * y).T.reshape(*module.x.shape, table.shape[1]), gradients


def _parts(module: Module) -> list[tuple[slice, slice, slice]]:
    """Of each adapted projection of a fused weight: its rows, and those of A and of B."""
    a, parts, start, of_A, of_B = module.adapter, [], 0, 0, 0
    for size, on in zip(module.layer["rows"], a["enable"], strict=True):
        if on:
            A, B = slice(of_A, of_A + a["r"]), slice(of_B, of_B + size)
            parts.append((slice(start, start + size), A, B))
            of_A, of_B = A.stop, B.stop
        start += size
    return parts


def _fused_matrix(module: Module) -> Matrix:
    """A stacked, and B block-diagonal, with rows of 0 where no projection is adapted."""
    a, parts = module.adapter, _parts(module)
    A, blocks = fuse([(a["A"][i], a["B"][j]) for _, i, j in parts])
    B = np.zeros((len(module.layer["W"]), len(A)), blocks.dtype)
    for rows, _, own in parts:
        B[rows] = blocks[own]
    return module.matrix(module.layer["W"], module.layer.get("bias"), A, B)


def _fused(module: Module, f: Product) -> Run:
    y, back = f(_fused_matrix(module), columns(module.x), 1)

    def gradients(dy: Any) -> Answers:
        dx, (dA, dB) = back(columns(dy))
        blocks = [dB[rows, own_A] for rows, own_A, _ in _parts(module)]
        dx = dx.T.reshape(module.x.shape)
        return {"dx": dx} | module.named((dA, np.concatenate(blocks)))

    return y.T.reshape(*module.x.shape[:-1], len(y)), gradients


def _expert_matrices(module: Module) -> list[Matrix]:
    W, bias, a = module.layer["W"], module.layer.get("bias"), module.adapter
    biases = [None] * len(W) if bias is None else list(bias)
    return [module.matrix(*each) for each in zip(W, biases, a["A"], a["B"], strict=True)]


def _experts(module: Module, f: Product) -> Run:
    matrices, index, x = _expert_matrices(module), module.index, module.x.T
    tokens = [np.flatnonzero(index == e) for e in range(len(matrices))]
    runs = [f(matrix, x[:, at], 1) for matrix, at in zip(matrices, tokens, strict=True)]
    y = np.zeros((len(x.T), module.layer["W"].shape[1]), runs[0][0].dtype)
    for (of_expert, _), at in zip(runs, tokens, strict=True):
        y[at] = of_expert.T

    def gradients(dy: Any) -> Answers:
        dx, dPs = np.zeros(module.x.shape, y.dtype), []
        for (_, back), at in zip(runs, tokens, strict=True):
            of_expert, dP = back(dy[at].T)
            dx[at] = of_expert.T
            dPs.append(dP)
        return {"dx": dx} | module.named([np.stack(d) for d in zip(*dPs, strict=True)])

    return y, gradients


def _out(module: Module, x: Any, f: Product) -> tuple[Any, Back]:
    """The output's projection, adapted or not."""
    out, a = module.layer["out"], module.adapter.get("out")
    bias = out.get("bias")
    if a is not None:
        return f(module.matrix(out["W"], bias, a["A"], a["B"]), x, 1)
    y, back = ops.linear(x, out["W"], None if bias is None else bias.reshape(-1, 1))

    def gradients(dy: Any) -> tuple[Any, ...]:
        return back(dy), ()

    return y, gradients


def _attention(module: Module, f: Product) -> Run:
    """Each token over all tokens of its sequence; q, k and v in one weight."""
    batch, tokens, d = module.x.shape
    heads = module.layer["heads"]
    qkv, back_in = f(module.only(), columns(module.x), 1)
    q, k, v = (ops.split_heads(qkv[i * d : (i + 1) * d], batch, heads) for i in range(3))
    mixed, back_attention = ops.attention(q, k, v, np.ones((batch, tokens, tokens), bool))
    y, back_out = _out(module, ops.join_heads(mixed), f)

    def gradients(dy: Any) -> Answers:
        dmixed, dP_out = back_out(columns(dy))
        parts = back_attention(ops.split_heads(dmixed, batch, heads))
        dx, dP = back_in(np.concatenate([ops.join_heads(part) for part in parts]))
        shaped = {"dx": dx.T.reshape(module.x.shape)}
        return shaped | module.named(dP) | (module.named(dP_out, "out.") if dP_out else {})

    return y.T.reshape(module.x.shape), gradients


FROZEN = ("self_attn.out_proj", "linear2", "norm1", "norm2")
"""The modules of an encoder's layer that are not adapted, beside the projection of q, k and v."""

_BLOCK = dict(zip(FROZEN, ("o", "down", "norm1", "norm2"), strict=True))


def _encoder(module: Module, f: Product) -> Run:
    """A block of BERT is a post-norm encoder's layer with GELU; ``linear1`` is adapted."""
    batch, tokens, d = module.x.shape
    weights, matrix = module.layer["weights"], module.only()
    W = {}
    for path, own in _BLOCK.items():
        for part in ("weight", "bias"):
            array = weights[f"{path}.{part}"]
            W[f"{own}.{part}"] = array if array.ndim > 1 else array.reshape(-1, 1)
    in_proj = weights["self_attn.in_proj_weight"], weights["self_attn.in_proj_bias"]
    for i, own in enumerate("qkv"):
        rows = slice(i * d, (i + 1) * d)
        W |= {f"{own}.weight": in_proj[0][rows], f"{own}.bias": in_proj[1][rows].reshape(-1, 1)}
    parts = [f"up.{part}" for part in matrix.variant.parts]
    back_W: Back | None = None
    if f is by_substitution:
        W["up.weight"], W["up.bias"], back_W = matrix.substituted()
        tuning = TrainableSpec(trained=frozenset({"up.weight", "up.bias"}))
    else:
        W |= {"up.weight": matrix.W, "up.bias": matrix.b} | dict(zip(parts, matrix.P, strict=True))
        tuning = TrainableSpec({"up": matrix.s}, {}, frozenset(parts), {"up": matrix.variant})
    config = SimpleNamespace(heads=module.layer["heads"], eps=EPS)
    mask = np.ones((batch, tokens, tokens), bool)
    x = columns(module.x)
    y, back = bert_block(x, "", W, config, tuning, mask, ops.attention)

    def gradients(dy: Any) -> Answers:
        dx, g = back(columns(dy))
        dP = back_W(g["up.weight"], g["up.bias"]) if back_W else [g[part] for part in parts]
        return {"dx": dx.T.reshape(module.x.shape)} | module.named(dP)

    return y.T.reshape(module.x.shape), gradients


LAYERS: dict[str, Callable[[Module, Product], Run]] = {
    "linear": _linear,
    "conv": _conv,
    "embedding": _embedding,
    "fused": _fused,
    "experts": _experts,
    "attention": _attention,
    "encoder": _encoder,
}
"""Each kind of layer: y, and what gives the gradients for dy, by their names in the contract."""


def merged(module: Module) -> Answers:
    """W' of the layer in its own layout, and its bias where it has one."""
    if module.kind == "experts":
        each = [matrix.substituted()[:2] for matrix in _expert_matrices(module)]
        W, bias = np.stack([W for W, _ in each]), np.stack([b[:, 0] for _, b in each])
    elif module.kind == "embedding":
        a = module.adapter
        table, _, _ = module.matrix(module.layer["W"].T, None, a["A"], a["B"]).substituted()
        return {"W": table.T}
    else:
        matrix = {"conv": lambda: _conv_matrix(module)[0], "fused": lambda: _fused_matrix(module)}
        W, b, _ = matrix.get(module.kind, module.only)().substituted()
        bias = b[:, 0]
        if module.kind == "conv":
            W = W.reshape(len(W), -1, *module.layer["W"].shape[2:])
    return {"W": W} | ({"bias": bias} if module.layer.get("bias") is not None else {})


def answers(module: Module, dy: Any = None, f: Product = by_substitution) -> Answers:
    """y, and the gradients for dy where it is given."""
    y, back = LAYERS[module.kind](module, f)
    return {"y": y} | ({} if dy is None else back(dy))
