"""The layers of the method ``module`` as PyTorch's own modules, without an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from minilora.verify.peers._torch import fill, to_torch


class ScaledEmbedding(torch.nn.Embedding):
    """y = embed_scale · table[ids], as Gemma's, with its attribute's name."""

    def __init__(self, *sizes: int, embed_scale: float, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, times the scale."""
        y: torch.Tensor = super().forward(ids) * self.embed_scale.to(self.weight.dtype)
        return y


class Experts(torch.nn.Module):
    """One weight (e, m, n), or (e, n, m) where it is transposed, and a bias for each expert."""

    def __init__(self, shape: tuple[int, ...], is_transposed: bool, bias: bool) -> None:
        super().__init__()
        e, m, n = shape
        self.is_transposed = is_transposed
        self.weight = torch.nn.Parameter(torch.empty((e, n, m) if is_transposed else shape))
        self.bias = torch.nn.Parameter(torch.empty(e, m)) if bias else None
        self.index = torch.zeros(0, dtype=torch.long)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each row through the expert that `index` names."""
        W = self.weight.mT if self.is_transposed else self.weight
        y = (W[self.index] @ x[..., None])[..., 0]
        return y if self.bias is None else y + self.bias[self.index]


class Attention(torch.nn.Module):
    """Self-attention by torch.nn.MultiheadAttention, which reads its weights itself."""

    def __init__(self, d: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.inner = torch.nn.MultiheadAttention(d, heads, bias=bias, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, without the weights of attention."""
        y: torch.Tensor = self.inner(x, x, x, need_weights=False)[0]
        return y


def _convolution(layer: Mapping[str, Any], bias: bool) -> Any:
    m, c, *kernel = layer["W"].shape
    kinds: dict[int, Any] = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
    moves = {name: tuple(layer[name]) for name in ("stride", "padding", "dilation")}
    more = {name: layer[name] for name in ("groups", "padding_mode")}
    return kinds[len(kernel)](c * layer["groups"], m, tuple(kernel), bias=bias, **moves, **more)


def _embedding(layer: Mapping[str, Any]) -> Any:
    settings = {name: layer[name] for name in ("padding_idx", "max_norm") if name in layer}
    settings |= {"norm_type": layer["norm_type"]} if "norm_type" in layer else {}
    if "embed_scale" in layer:
        return ScaledEmbedding(*layer["W"].shape, embed_scale=layer["embed_scale"], **settings)
    return torch.nn.Embedding(*layer["W"].shape, **settings)


def build(layer: Mapping[str, Any], index: np.ndarray | None = None) -> Any:
    """The module of a layer, filled."""
    kind, W, bias = layer["kind"], layer["W"], "bias" in layer
    across = layer.get("fan_in_fan_out", False)
    dtype = to_torch(W).dtype
    module: Any
    match kind:
        case "linear" | "fused":
            m, n = W.shape
            module = Conv1D(m, n) if across else torch.nn.Linear(n, m, bias=bias)
        case "conv":
            module = _convolution(layer, bias)
        case "embedding":
            module = _embedding(layer)
        case "experts":
            module = Experts(W.shape, across, bias)
            module.index = to_torch(np.asarray(index))
        case "attention":
            module = Attention(W.shape[1], layer["heads"], bias)
        case "encoder":
            m, n = W.shape
            module = torch.nn.TransformerEncoderLayer(
                n, layer["heads"], m, dropout=0.0, activation="gelu", batch_first=True
            )
        case _:
            raise NotImplementedError(f"no module of kind {kind}")
    module.to(dtype)
    for name, array in tensors_of(layer).items():
        fill(module.get_parameter(name), to_torch(array))
    if isinstance(module, Conv1D) and not bias:
        torch.nn.init.zeros_(module.bias)
    return module


WEIGHT = {"attention": "inner.in_proj_weight", "encoder": "linear1.weight"}
BIAS = {"attention": "inner.in_proj_bias", "encoder": "linear1.bias"}
"""The names of the layer's weight and bias in its module, where they are not these words."""


def tensors_of(layer: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The module's parameters by their names, stored as the layer is to be."""
    kind, W = layer["kind"], layer["W"]
    stored = W.swapaxes(-1, -2) if layer.get("fan_in_fan_out", False) else W
    tensors: dict[str, np.ndarray] = {WEIGHT.get(kind, "weight"): stored}
    if "bias" in layer:
        tensors[BIAS.get(kind, "bias")] = layer["bias"]
    for name, array in layer.get("out", {}).items():
        tensors[f"inner.out_proj.{'weight' if name == 'W' else name}"] = array
    weights: Mapping[str, np.ndarray] = layer.get("weights", {})
    return {**tensors, **weights}
