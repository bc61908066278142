"""A layer of any kind that loralib has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import loralib
import numpy as np
import torch

from minilora.verify.peers._torch import arrays, fill, gradients, plain_number, to_numpy, to_torch
from minilora.verify.peers.peer import refuse_settings

_SETTINGS = {"A", "B", "alpha", "r", "p", "enable"}


def _convolution(layer: Mapping[str, Any], how: dict[str, Any]) -> Any:
    """Of one size in all dimensions: with 1, the factors are a linear layer's."""
    m, c, *kernel = layer["W"].shape
    if {*kernel} != {1} or layer["groups"] > 1:
        raise NotImplementedError("loralib's factors of a kernel are those of another matrix")
    kinds: dict[int, Any] = {1: loralib.Conv1d, 2: loralib.Conv2d, 3: loralib.Conv3d}
    moves = {name: tuple(layer[name]) for name in ("stride", "padding", "dilation")}
    return kinds[len(kernel)](c, m, 1, padding_mode=layer["padding_mode"], **moves, **how)


def build(layer: Mapping[str, Any], adapter: Mapping[str, Any], merging: bool) -> Any:
    """The library's layer, filled; it merges in evaluation only where it is asked to."""
    refuse_settings("loralib", sorted(adapter.keys() - _SETTINGS))
    kind, W, bias = layer["kind"], layer["W"], "bias" in layer
    across = layer.get("fan_in_fan_out", False)
    how: dict[str, Any] = {
        "r": adapter["r"],
        "lora_alpha": plain_number(adapter["alpha"]),
        "merge_weights": merging,
        "dtype": to_torch(W).dtype,
    }
    built: Any
    if kind == "embedding":
        if "embed_scale" in layer:
            raise NotImplementedError("loralib has no embedding with a scale")
        own = ("padding_idx", "max_norm", "norm_type")
        settings = {name: layer[name] for name in own if name in layer}
        built = loralib.Embedding(*W.shape, **how, **settings)
    else:
        how |= {"lora_dropout": adapter.get("p", 0.0), "bias": bias}
        if kind == "conv":
            built = _convolution(layer, how)
        elif kind == "linear":
            built = loralib.Linear(*W.shape[::-1], fan_in_fan_out=across, **how)
        elif kind == "fused" and len({*layer["rows"]}) == 1:
            enabled = adapter["enable"]
            built = loralib.MergedLinear(
                *W.shape[::-1], enable_lora=enabled, fan_in_fan_out=across, **how
            )
        else:
            raise NotImplementedError(f"loralib has no layer of kind {kind}, or not of such parts")
    base = getattr(built, "conv", built)
    fill(base.weight, to_torch(W.T if across else W))
    if bias:
        fill(base.bias, to_torch(layer["bias"]))
    fill(built.lora_A, to_torch(adapter["A"]))
    fill(built.lora_B, to_torch(adapter["B"]))
    return built


def module(
    layer: Mapping[str, Any],
    adapter: Mapping[str, Any],
    x: np.ndarray,
    *,
    mode: str,
    dy: np.ndarray | None = None,
    index: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The library's answers; eval() merges."""
    built = build(layer, adapter, mode == "merged")
    built.train(mode == "train")
    given, held = to_torch(x), {}
    if mode == "merged":
        base = getattr(built, "conv", built)
        across = layer.get("fan_in_fan_out", False)
        held = {"W": to_numpy(base.weight.T if across else base.weight)}
        held |= {"bias": to_numpy(base.bias)} if "bias" in layer else {}
    if dy is None:
        with torch.no_grad():
            return held | {"y": to_numpy(built(given))}
    of = {"dx": given.requires_grad_()} if given.is_floating_point() else {}
    of |= {"dA": built.lora_A, "dB": built.lora_B}
    y = built(given)
    return arrays({"y": y} | gradients(y, of, dy))
