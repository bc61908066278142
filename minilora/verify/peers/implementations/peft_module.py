"""A layer of any kind in a PeftModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import peft
import torch

from minilora.verify.peers._modules import build
from minilora.verify.peers._peft_releases import lora_config, magnitude_of, taken
from minilora.verify.peers._torch import arrays, fill, gradients, plain_number, to_numpy, to_torch
from minilora.verify.peers.peer import refuse_settings

_TARGETS = {"attention": "0.inner", "encoder": "0.linear1"}
_SETTINGS = {
    "A", "B", "alpha", "r", "p", "out", "use_rslora", "use_dora", "magnitude", "lora_bias",
}  # fmt: skip


class PeftModule:
    """One layer in a model of its own, adapted by get_peft_model."""

    def __init__(
        self, layer: Mapping[str, Any], adapter: Mapping[str, Any], index: np.ndarray | None
    ) -> None:
        self.kind, self.layer, self.adapter = layer["kind"], layer, adapter
        refuse_settings("the peft peer", sorted(adapter.keys() - _SETTINGS))
        at: dict[str, Any] = {"target_modules": [_TARGETS.get(self.kind, "0")]}
        if self.kind == "experts":
            at = {"target_modules": [], "target_parameters": ["0.weight"]}
        config = lora_config(
            r=adapter["r"],
            lora_alpha=plain_number(adapter["alpha"]),
            lora_dropout=adapter.get("p", 0.0),
            use_rslora=adapter.get("use_rslora", False),
            use_dora=adapter.get("use_dora", False),
            lora_bias="lora_bias" in adapter,
            fan_in_fan_out=self.kind == "linear" and layer.get("fan_in_fan_out", False),
            **at,
        )
        base = torch.nn.Sequential(build(layer, index))
        try:
            self.model: Any = peft.get_peft_model(
                base, config, **taken(peft.get_peft_model, autocast_adapter_dtype=False)
            )
        except ValueError as refused:
            raise NotImplementedError(f"the library refuses: {refused}") from refused
        path = "0" if self.kind == "experts" else _TARGETS.get(self.kind, "0")
        self.adapted = self.model.get_submodule(f"base_model.model.{path}")
        for name, (tensor, array) in self._tensors().items():
            if tensor.numel() != array.size:
                found, wanted = tuple(tensor.shape), array.shape
                raise ValueError(f"the library makes {name} {found} where it needs {wanted}")
            fill(tensor, to_torch(array.reshape(tensor.shape)))

    def _tensors(self) -> dict[str, tuple[torch.Tensor, np.ndarray]]:
        """The library's parameters by the names of their gradients, and what they hold."""
        layer, adapter = self.adapted, self.adapter
        A, B = adapter["A"], adapter["B"]
        if self.kind == "experts":  # the columns of B are sorted by the rank, then by the expert
            B = np.moveaxis(B, 0, -1)
        if self.kind == "embedding":
            factors = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        tensors = {"dA": (factors[0], A), "dB": (factors[1], B)}
        if "out" in adapter:
            out = layer.base_layer.out_proj
            for part, held in (("A", out.lora_A), ("B", out.lora_B)):
                tensors[f"out.d{part}"] = held["default"].weight, adapter["out"][part]
        if "magnitude" in adapter:
            magnitude = magnitude_of(layer, "default")
            tensors["dmagnitude"] = magnitude, adapter["magnitude"]
        if "lora_bias" in adapter:
            tensors["dlora_bias"] = layer.lora_B["default"].bias, adapter["lora_bias"]
        return tensors

    def _shaped(self, name: str, gradient: torch.Tensor) -> np.ndarray:
        """A gradient in the contract's shape."""
        array = to_numpy(gradient)
        if self.kind == "experts" and name == "dB":
            e, m, r = self.adapter["B"].shape
            return np.ascontiguousarray(np.moveaxis(array.reshape(m, r, e), -1, 0))
        own = self.adapter["out"] if name.startswith("out.") else self.adapter
        return array.reshape(own[name.removeprefix("out.")[1:]].shape)

    def forward(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """y, without gradients."""
        with torch.no_grad():
            return {"y": to_numpy(self.model(to_torch(x)))}

    def gradients(self, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
        """y and the gradients by autograd."""
        given, of = to_torch(x), {name: tensor for name, (tensor, _) in self._tensors().items()}
        whole = {"dx": given.requires_grad_()} if given.is_floating_point() else {}
        y = self.model(given)
        found = gradients(y, whole | of, dy)
        answer = arrays({"y": y} | {name: found[name] for name in whole})
        return answer | {name: self._shaped(name, found[name]) for name in of}

    def merged(self) -> dict[str, np.ndarray]:
        """The weight and the bias after merge_adapter()."""
        self.model.merge_adapter()
        if self.kind in ("attention", "encoder"):
            return {}
        base = self.adapted.get_base_layer()
        across = self.layer.get("fan_in_fan_out", False)
        W = to_numpy(base.weight.mT if across else base.weight)
        return {"W": W} | ({"bias": to_numpy(base.bias)} if "bias" in self.layer else {})


def module(
    layer: Mapping[str, Any],
    adapter: Mapping[str, Any],
    x: np.ndarray,
    *,
    mode: str,
    dy: np.ndarray | None = None,
    index: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The library's answers."""
    if layer["kind"] == "fused":
        raise NotImplementedError("the library adapts no parts of a fused projection")
    asked = PeftModule(layer, adapter, index)
    asked.model.train(mode == "train")
    held = asked.merged() if mode == "merged" else {}
    return held | (asked.forward(x) if dy is None else asked.gradients(x, dy))
