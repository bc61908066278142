"""Right layers of every kind, written unlike the specification: the change formed as a weight."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from scipy.special import erf

from minilora.verify.mutants.references.helpers import HALVES, Array, refuse, wide

KINDS = ("linear", "conv", "embedding", "fused", "experts", "attention", "encoder")
PADS: dict[str, Any] = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}


def pairs(layer: Mapping[str, Any], adapter: Mapping[str, Any]) -> Any:
    """Of a fused layer's adapted projections: their rows, and those of A and of B."""
    found, row, a, b = [], 0, 0, 0
    for size, on in zip(layer["rows"], adapter["enable"], strict=True):
        if on:
            found.append((slice(row, row + size), slice(a, a + adapter["r"]), slice(b, b + size)))
            a, b = a + adapter["r"], b + size
        row += size
    return found


def widened(value: Any) -> Any:
    """The arrays of a dict in float32 at least."""
    if isinstance(value, dict):
        return {name: wide(array) for name, array in value.items()}
    return wide(value) if isinstance(value, np.ndarray) else value


def of_rows(kind: str, V: Array) -> Any:
    """A weight as a matrix with a row for each output."""
    return V.T if kind == "embedding" else V.reshape(len(V), -1)


def column_of(kind: str, g: Array, V: Array) -> Any:
    """A number for each output, to multiply a weight with."""
    return g.reshape((1, -1) if kind == "embedding" else (-1,) + (1,) * (V.ndim - 1))


def shift_of(kind: str, b: Any, x: Array, index: Any) -> Any:
    """The bias as it is added to the output."""
    if b is None:
        return 0
    if kind == "experts":
        return b[index]
    return b.reshape((-1,) + (1,) * (x.ndim - 2 if kind == "conv" else 0))


def change_of(layer: Any, adapter: Any, A: Array, B: Array) -> Any:
    """B A in the layout of the weight."""
    W = layer["W"]
    if layer["kind"] == "fused":
        change = np.zeros(W.shape, np.result_type(A, B))
        for rows, a, b in pairs(layer, adapter):
            change[rows] = B[b] @ A[a]
        return change
    if layer["kind"] == "embedding":
        return (B @ A).T
    # product
    return (B @ A).reshape(W.shape)


def factor_gradients(layer: Any, adapter: Any, A: Array, B: Array, d: Array) -> Any:
    """dA and dB of the gradient by B A, which has the layout of the weight."""
    if layer["kind"] == "fused":
        parts = pairs(layer, adapter)
        dA = np.concatenate([B[b].T @ d[rows] for rows, a, b in parts])
        return dA, np.concatenate([d[rows] @ A[a].T for rows, a, b in parts])
    if layer["kind"] == "embedding":
        d = d.T
    d = d.reshape(*B.shape[:-1], A.shape[-1])
    # factors
    return B.swapaxes(-1, -2) @ d, d @ A.swapaxes(-1, -2)


class Window:
    """A convolution's padding and its windows: the inputs that each entry of a kernel meets."""

    def __init__(self, layer: Mapping[str, Any], shape: Any) -> None:
        kernel, self.groups = layer["W"].shape[2:], layer["groups"]
        stride, dilation, sizes = layer["stride"], layer["dilation"], layer["padding"]
        pad_mode = layer["padding_mode"]
        # window
        self.space, self.cells = shape[2:], int(np.prod(shape[2:]))
        places = np.arange(self.cells).reshape(self.space)
        around = [(size, size) for size in sizes]
        fill: Any = {"constant_values": -1} if pad_mode == "zeros" else {}
        padded = np.pad(places, around, PADS[pad_mode], **fill)
        moves = list(zip(padded.shape, kernel, stride, dilation, strict=True))
        out = [(n - d * (k - 1) - 1) // step + 1 for n, k, step, d in moves]
        self.at = []
        for offset in product(*map(range, kernel)):
            starts = [o * d for o, d in zip(offset, dilation, strict=True)]
            cut = tuple(
                slice(o, o + step * (size - 1) + 1, step)
                for o, step, size in zip(starts, stride, out, strict=True)
            )
            self.at.append(padded[cut].ravel())
        self.out = tuple(out)

    def split(self, W: Array) -> Any:
        """The kernels by group and offset: (k, g, m / g, c / g)."""
        flat = W.reshape(self.groups, len(W) // self.groups, W.shape[1], -1)
        return np.moveaxis(flat, -1, 0)

    def seen(self, x: Array) -> Any:
        """The inputs (k, b, g, c / g, places); 0 where there is a zero of the padding."""
        flat = x.reshape(len(x), self.groups, -1, self.cells)
        return np.stack([np.where(at < 0, 0, flat[..., at]) for at in self.at])

    def forward(self, x: Array, W: Array) -> Any:
        """(b, m, …)."""
        y = np.einsum("kbgcp,kgmc->bgmp", self.seen(x), self.split(W))
        return y.reshape(len(x), len(W), *self.out).astype(np.result_type(x, W))

    def backward(self, x: Array, W: Array, dy: Array) -> Any:
        """dx and dW."""
        d = dy.reshape(len(dy), self.groups, -1, int(np.prod(self.out)))
        dW = np.einsum("bgmp,kbgcp->gmck", d, self.seen(x)).reshape(W.shape)
        seen = np.einsum("bgmp,kgmc->kpbgc", d, self.split(W))
        dx = np.zeros((self.cells + 1, len(x), self.groups, x.shape[1] // self.groups), x.dtype)
        for at, part in zip(self.at, seen, strict=True):
            np.add.at(dx, at, part)  # the last row is that of the padding's zeros
        return np.moveaxis(dx[:-1], 0, -1).reshape(x.shape), dW.astype(x.dtype)


def apply(layer: Any, x: Array, W: Array, index: Any) -> Any:
    """What the weight does to x, without a bias."""
    kind = layer["kind"]
    if kind == "conv":
        return Window(layer, x.shape).forward(x, W)
    if kind == "embedding":
        looked_up = W[x]
        # looked up
        return looked_up * W.dtype.type(layer.get("embed_scale", 1))
    if kind == "experts":
        # experts
        return np.stack([W[e] @ row for e, row in zip(index, x, strict=True)])
    return x @ W.T


def transposed(layer: Any, x: Array, W: Array, dy: Array, index: Any) -> Any:
    """dx and dW of `apply`."""
    kind = layer["kind"]
    if kind == "conv":
        return Window(layer, x.shape).backward(x, W, dy)
    if kind == "embedding":
        dy = dy * W.dtype.type(layer.get("embed_scale", 1))
        # scaled
        dW = np.zeros_like(W)
        is_padding = x == layer.get("padding_idx", -1)
        np.add.at(dW, x, np.where(is_padding[..., None], 0, dy))
        return None, dW
    if kind == "experts":
        dW = np.zeros_like(W)
        for e, row, d in zip(index, x, dy, strict=True):
            dW[e] += np.outer(d, row)
        return np.stack([d @ W[e] for e, d in zip(index, dy, strict=True)]), dW
    flat = dy.reshape(-1, dy.shape[-1])
    return dy @ W, flat.T @ x.reshape(-1, x.shape[-1])


def attend(x: Array, W: Array, b: Any, heads: int) -> Any:
    """Self-attention of x (b, t, d) without its output's projection, and back -> dx, dW."""
    batch, tokens, d = x.shape
    qkv = x @ W.T + (0 if b is None else b)
    q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    z = q @ k.swapaxes(-1, -2) / (d // heads) ** 0.5
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y = (p @ v).transpose(0, 2, 1, 3).reshape(x.shape)

    def back(dy: Array) -> Any:
        do = dy.reshape(batch, tokens, heads, -1).transpose(0, 2, 1, 3)
        dp = do @ v.swapaxes(-1, -2)
        dz = p * (dp - (dp * p).sum(-1, keepdims=True)) / (d // heads) ** 0.5
        parts = np.stack([dz @ k, dz.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ do])
        dqkv = parts.transpose(1, 3, 0, 2, 4).reshape(batch, tokens, -1)
        return dqkv @ W, np.einsum("btm,btn->mn", dqkv, x)

    return y, back


def normed(x: Array, w: Array, b: Array) -> Any:
    """Layer normalization, and back -> dx."""
    centred = x - x.mean(-1, keepdims=True)
    rho = ((centred**2).mean(-1, keepdims=True) + 1e-5) ** -0.5
    h = centred * rho

    def back(dy: Array) -> Any:
        dh = dy * w
        return rho * (dh - dh.mean(-1, keepdims=True) - h * (dh * h).mean(-1, keepdims=True))

    return h * w + b, back


def encode(layer: Any, x: Array, W: Array, b: Array) -> Any:
    """A post-norm encoder's layer with GELU, and back -> dx, dW, db of linear1."""
    w = layer["weights"]
    out, up = w["self_attn.out_proj.weight"], w["linear2.weight"]
    attended, back_attend = attend(
        x, w["self_attn.in_proj_weight"], w["self_attn.in_proj_bias"], layer["heads"]
    )
    x1, back1 = normed(
        x + attended @ out.T + w["self_attn.out_proj.bias"], w["norm1.weight"], w["norm1.bias"]
    )
    z = x1 @ W.T + b
    below = 0.5 * (1 + erf(z / np.sqrt(2)))
    y, back2 = normed(
        x1 + (z * below) @ up.T + w["linear2.bias"], w["norm2.weight"], w["norm2.bias"]
    )

    def back(dy: Array) -> Any:
        dx2 = back2(dy)
        dz = (dx2 @ up) * (below + z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi))
        dx1 = back1(dx2 + dz @ W)
        dx, _ = back_attend(dx1 @ out)
        return dx1 + dx, np.einsum("btm,btn->mn", dz, x1), dz.sum((0, 1))

    return y, back


class Modules:
    """A layer of any kind; in groups a convolution's adapter has the shape of its weight."""

    name = "reference"
    dtypes: ClassVar = ("float64", "float32", *HALVES)
    precision: ClassVar = {h: {"storage": h, "accumulation": "float32"} for h in HALVES}

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}
        """What mutants keep from call to call; a right implementation keeps nothing."""
        self.rng = np.random.default_rng(0)

    def module(
        self,
        layer: Mapping[str, Any],
        adapter: Mapping[str, Any],
        x: Array,
        *,
        mode: str,
        dy: Any = None,
        index: Any = None,
    ) -> dict[str, Array]:
        """y, the gradients for dy, and merged the weight."""
        dtype = layer["W"].dtype
        answer = self.answer(layer, adapter, wide(x), mode, wide(dy), index)
        return {name: array.astype(dtype) for name, array in answer.items()}

    def answer(self, layer: Any, adapter: Any, x: Any, mode: str, dy: Any, index: Any) -> Any:
        """The answer, in float32 at least."""
        training, merging, kind = mode == "train", mode == "merged", layer["kind"]
        fan_in_fan_out = layer.get("fan_in_fan_out", False)
        known = {"A", "B", "alpha", "r", "p", "enable", "out"}
        known |= {"use_rslora", "use_dora", "magnitude", "lora_bias"}
        refuse({name: adapter[name] for name in adapter.keys() - known}, False, None)
        if kind not in KINDS:
            raise NotImplementedError(f"no layer of kind {kind}")
        W, A, B = wide(layer["W"]), wide(adapter["A"]), wide(adapter["B"])
        b, m = wide(layer.get("bias")), wide(adapter.get("magnitude"))
        c = wide(adapter.get("lora_bias"))
        alpha, r, p, rslora = (adapter.get(name, 0) for name in ("alpha", "r", "p", "use_rslora"))
        # arrays
        s = alpha * r**-0.5 if rslora else alpha / r
        # scale
        change = s * change_of(layer, adapter, A, B)
        # change
        V = W + change
        if m is not None:
            norm = (of_rows(kind, V) ** 2).sum(1) ** 0.5
            # norm
            g = column_of(kind, m / norm, V)
            V = V * g
        # weight
        b = 0 * c if b is None and c is not None else b
        b_merged = b if c is None else b + s * c
        # bias
        if kind in ("attention", "encoder"):
            layer, adapter = ({k: widened(v) for k, v in d.items()} for d in (layer, adapter))
            return self.whole(layer, adapter, x, dy, (V, b_merged, W, A, B, s, m, c, mode))
        given = SimpleNamespace(**locals())
        shift = shift_of(kind, b_merged, x, index)
        if merging:
            y = apply(layer, x, V, index) + shift
            # merged
            held = {"y": y, "W": V}
            return held if b is None else held | {"bias": b_merged}
        K = np.ones(x.shape, W.dtype)
        if training and p:
            K = (self.rng.random(x.shape) >= p) / W.dtype.type(1 - p)
        # mask
        h = x if kind == "embedding" else x * K
        base, branch = apply(layer, x, W, index), apply(layer, h, V - W, index)
        # branch
        y = base + branch + shift
        # whole output
        return {"y": y} | ({} if dy is None else self.back(given, dy, h, K))

    def back(self, given: Any, dy: Any, h: Any, K: Any) -> Any:
        """The gradients."""
        layer, adapter, x, index, kind = (
            given.layer, given.adapter, given.x, given.index, given.kind,
        )  # fmt: skip
        W, V, A, B, s, m, c = given.W, given.V, given.A, given.B, given.s, given.m, given.c
        training = given.training
        dx, _ = transposed(layer, x, W, dy, index)
        dx_branch, dV = transposed(layer, h, V - W, dy, index)
        if dx is not None:
            dx = dx + K * dx_branch
        # through the branch
        answer = {} if dx is None else {"dx": dx}
        if m is not None:
            answer["dmagnitude"] = (of_rows(kind, dV) * of_rows(kind, V)).sum(1) / m
            dV = dV * given.g
        if c is not None:
            axes = tuple(i for i in range(dy.ndim) if i != (1 if kind == "conv" else dy.ndim - 1))
            answer["dlora_bias"] = s * dy.sum(axes)
        # gradients
        dA, dB = factor_gradients(layer, adapter, A, B, s * dV)
        # answers
        return answer | {"dA": dA, "dB": dB}

    def whole(self, layer: Any, adapter: Any, x: Any, dy: Any, given: Any) -> Any:
        """Attention, and an encoder's layer, with the merged weights."""
        V, b, W, A, B, s, m, c, mode = given  # noqa: RUF059
        # given
        if layer["kind"] == "encoder":
            y, back = encode(layer, x, V, b)
            if dy is None:
                return {"y": y}
            dx, dV, db = back(dy)
            answer = {"y": y, "dx": dx}
            if m is not None:
                answer["dmagnitude"] = (dV * V).sum(1) / m
                dV = dV * (m / ((W + s * B @ A) ** 2).sum(1) ** 0.5)[:, None]
            if c is not None:
                answer["dlora_bias"] = s * db
            return answer | {"dA": s * (B.T @ dV), "dB": s * (dV @ A.T)}
        out, of_out = layer["out"], adapter.get("out")
        change = 0 if of_out is None else s * of_out["B"] @ of_out["A"]
        V_out = out["W"] + change
        # attention
        mixed, back_attend = attend(x, V, b, layer["heads"])
        y = mixed @ V_out.T + out.get("bias", 0)
        if dy is None:
            return {"y": y}
        dx, dV = back_attend(dy @ V_out)
        d_out = np.einsum("btm,btn->mn", dy, mixed)
        answer = {"y": y, "dx": dx, "dA": s * (B.T @ dV), "dB": s * (dV @ A.T)}
        # attended
        if of_out is None:
            return answer
        # of the output
        answer |= {"out.dA": s * (of_out["B"].T @ d_out), "out.dB": s * (d_out @ of_out["A"].T)}
        return answer
