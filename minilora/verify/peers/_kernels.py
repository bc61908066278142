"""What the peers of hand-written LoRA functions share: PEFT's layers, computed by these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import torch

from minilora.verify.peers._peft import LinearLayer
from minilora.verify.peers._peft_releases import lora_config, taken
from minilora.verify.peers._torch import arrays, fill, gradients, plain_number, to_numpy, to_torch
from minilora.verify.peers.implementations.peft_module import PeftModule
from minilora.verify.peers.peer import refuse_settings

Kernel = Callable[[Any, torch.Tensor], torch.Tensor]
"""A library's function of an adapted layer of PEFT's and x (batch, tokens, n)."""

LEFT = "layers with a bias are left to PEFT"

QKV = ("q_proj", "k_proj", "v_proj")


def install(layer: Any, kernel: Kernel) -> None:
    """Let a kernel be the layer's forward; within it the layer has its own."""
    own = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        with patch.object(layer, "forward", own):
            return in_batches(partial(kernel, layer), x)

    layer.forward = forward


def in_batches(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """f of x (…, n) as (batch, tokens, n), which all activations of a model are."""
    if x.ndim == 3 or not x.is_floating_point():
        return f(x)
    y = f(x.reshape(1, prod(x.shape[:-1]), x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


class KernelLayer(LinearLayer):
    """PEFT's linear layer with a kernel for its forward; ``biased``: also with a bias."""

    def __init__(self, name: str, kernel: Kernel, biased: bool = True) -> None:
        self.name, self.kernel, self.biased = name, kernel, biased

    def _adapted(
        self, W: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any
    ) -> tuple[Any, Any]:
        if settings.get("fan_in_fan_out"):
            raise NotImplementedError("no kernel for layers so stored")
        if settings.get("bias") is not None and not self.biased:
            raise NotImplementedError(LEFT)
        if settings.get("keep") is not None:  # which lies as x does within the kernel
            keep = settings["keep"]
            settings["keep"] = keep if keep.ndim == 3 else keep.reshape(1, -1, W.shape[1])
        # PEFT's default, which leaves adapters of the layer's own half precision to no one.
        self.autocast_adapters = A.dtype == np.float32
        model, layer = super()._adapted(W, A, B, **settings)
        install(layer, self.kernel)
        return model, layer


class Kernels:
    """The contract's methods over a library's functions."""

    def __init__(self, linear: KernelLayer, **kinds: Kernel) -> None:
        """``kinds``: of other layers, and ``fused``, of a model with q, k and perhaps v."""
        self._kinds: Mapping[str, Kernel] = {"linear": linear.kernel, **kinds}
        self._layer = linear

    def lora_linear(
        self, x: np.ndarray, W: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any
    ) -> np.ndarray:
        """y of the kernel. Without `keep` the layer is in evaluation mode: no dropout."""
        return self._layer.lora_linear(x, W, A, B, **settings)

    def lora_linear_vjp(
        self,
        x: np.ndarray,
        W: np.ndarray,
        A: np.ndarray,
        B: np.ndarray,
        dy: np.ndarray,
        **settings: Any,
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩ by its backward."""
        return self._layer.lora_linear_vjp(x, W, A, B, dy, **settings)

    def module(
        self,
        layer: Mapping[str, Any],
        adapter: Mapping[str, Any],
        x: np.ndarray,
        *,
        mode: str,
        dy: np.ndarray | None = None,
        index: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The kernel's answers."""
        kind = layer["kind"]
        if kind not in self._kinds or layer.get("fan_in_fan_out", False):
            raise NotImplementedError(f"no kernel for layers of kind {kind}, or not so stored")
        if "bias" in layer and not self._layer.biased:
            raise NotImplementedError(LEFT)
        kernel = self._kinds[kind]
        asked: Any
        if kind == "fused":
            asked = _Fused(layer, adapter, kernel)
        else:
            asked = PeftModule(layer, adapter, index)
            install(asked.adapted, kernel)
        asked.model.train(mode == "train")
        held = asked.merged() if mode == "merged" else {}
        answer: dict[str, np.ndarray] = asked.forward(x) if dy is None else asked.gradients(x, dy)
        return held | answer


class _Fused:
    """Projections of one weight as q, k and v (or q and k) of a model, which one function computes.

    The libraries have it where all of them are adapted.
    """

    def __init__(
        self, layer: Mapping[str, Any], adapter: Mapping[str, Any], kernel: Kernel
    ) -> None:
        if not all(adapter["enable"]):
            raise NotImplementedError("a kernel for q, k and v of which some are not adapted")
        refuse_settings(
            "the kernel", sorted(adapter.keys() - {"A", "B", "alpha", "r", "p", "enable"})
        )
        W, rows = layer["W"], layer["rows"]
        ends = np.cumsum(rows)[:-1]
        names, weights = QKV[: len(rows)], np.split(W, ends)
        base = torch.nn.Module()
        for name, weight in zip(names, weights, strict=True):
            linear = torch.nn.Linear(W.shape[1], len(weight), bias="bias" in layer)
            setattr(base, name, linear.to(to_torch(W).dtype))
        config = lora_config(
            r=adapter["r"],
            lora_alpha=plain_number(adapter["alpha"]),
            lora_dropout=adapter.get("p", 0.0),
            target_modules=list(names),
        )
        self.model: Any = peft.get_peft_model(
            base, config, **taken(peft.get_peft_model, autocast_adapter_dtype=False)
        )
        self.kernel, self.biased = kernel, "bias" in layer
        self.base = self.model.base_model.model
        self.layers = [getattr(self.base, name) for name in names]
        biases = np.split(layer["bias"], ends) if self.biased else [None] * len(rows)
        factors = (np.split(adapter["A"], len(rows)), np.split(adapter["B"], ends))
        for built, weight, bias, A, B in zip(self.layers, weights, biases, *factors, strict=True):
            fill(built.base_layer.weight, to_torch(weight))
            if bias is not None:
                fill(built.base_layer.bias, to_torch(bias))
            fill(built.lora_A["default"].weight, to_torch(A))
            fill(built.lora_B["default"].weight, to_torch(B))

    def _y(self, x: torch.Tensor) -> torch.Tensor:
        return in_batches(lambda x: torch.cat(tuple(self.kernel(self.base, x)), -1), x)

    def forward(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """y, without gradients."""
        with torch.no_grad():
            return {"y": to_numpy(self._y(to_torch(x)))}

    def gradients(self, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
        """y and the gradients."""
        of = {"dx": to_torch(x).requires_grad_()}
        for i, layer in enumerate(self.layers):
            of |= {f"dA{i}": layer.lora_A["default"].weight}
            of |= {f"dB{i}": layer.lora_B["default"].weight}
        y = self._y(of["dx"])
        found = arrays(gradients(y, of, dy))
        whole = {
            name: np.concatenate([found[f"{name}{i}"] for i in range(len(self.layers))])
            for name in ("dA", "dB")
        }
        return {"y": to_numpy(y), "dx": found["dx"]} | whole

    def merged(self) -> dict[str, np.ndarray]:
        """The weight and the bias after merge_adapter()."""
        self.model.merge_adapter()
        of = ("weight", "bias") if self.biased else ("weight",)
        held = {
            name: np.concatenate([to_numpy(getattr(at.base_layer, name)) for at in self.layers])
            for name in of
        }
        return {"W" if name == "weight" else name: array for name, array in held.items()}
