"""AdapterHub's adapters: its LoRALinear around a linear layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from adapters import LoRAConfig, ModelAdaptersConfig
from adapters.composition import Stack
from adapters.methods.lora import LoRALinear
from transformers.pytorch_utils import Conv1D

from minilora.verify.peers._torch import GivenMask, fill, plain_number, to_numpy, to_torch
from minilora.verify.peers._torch_linear import Built, TorchLinear, column_or_row
from minilora.verify.peers.adapters import PEER
from minilora.verify.peers.peer import refuse_settings


@PEER.describes
class Adapters(TorchLinear):
    """Without `keep` the layer is in evaluation."""

    def build(
        self,
        W: np.ndarray,
        *,
        alpha: float,
        r: int,
        bias: bool = False,
        keep: np.ndarray | None = None,
        p: float = 0.0,
        fan_in_fan_out: bool = False,
        use_dora: bool = False,
        **unknown: Any,
    ) -> Built:
        """The layer, as `adapters.init` puts it into a model."""
        refuse_settings(PEER.name, unknown)
        layer = _layer(W, alpha, r, p, bias, use_dora, fan_in_fan_out)
        lora = layer.loras["one"]
        layer.train(keep is not None)
        if keep is not None:
            lora.lora_dropout = GivenMask(keep, p, lora.lora_dropout)
        parameters = {"W": layer.weight, "A": lora.lora_A, "B": lora.lora_B}
        layouts = {"W": torch.t} if fan_in_fan_out else {}
        if bias:
            parameters["bias"] = layer.bias
        if use_dora:
            parameters["magnitude"] = lora.m.weight
            layouts["magnitude"] = column_or_row

        def merge() -> torch.Tensor:
            layer.merge_adapter("one")
            weight: torch.Tensor = layer.weight
            return weight

        return Built(layer, parameters, merge, layouts)

    def unmerge(
        self, W_merged: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any
    ) -> np.ndarray:
        """The weight after reset_adapter() of a layer that holds W_merged as merged."""
        built = self._filled(settings, W=W_merged, A=A, B=B)
        layer: Any = built.forward
        with torch.no_grad():
            layer.merge_adapter("one")
            fill(layer.weight, built.tensor("W", W_merged))
            layer.reset_adapter()
            return built.array("W", layer.weight)

    def init(
        self, W: np.ndarray, *, r: int, alpha: float, seed: int, **settings: Any
    ) -> dict[str, np.ndarray]:
        """A and B of a new layer, from torch's generator."""
        refuse_settings(PEER.name, settings)
        torch.manual_seed(seed)
        lora = _layer(W, alpha, r).loras["one"]
        return {"A": to_numpy(lora.lora_A), "B": to_numpy(lora.lora_B)}


def _layer(
    W: np.ndarray,
    alpha: float,
    r: int,
    p: float = 0.0,
    bias: bool = False,
    use_dora: bool = False,
    across: bool = False,
) -> Any:
    """LoRALinear.wrap of a linear layer with an adapter that is active."""
    m, n = W.shape
    base: Any = Conv1D(m, n) if across else torch.nn.Linear(n, m, bias=bias)
    dtype = to_torch(W).dtype
    config = ModelAdaptersConfig()
    layer = LoRALinear.wrap(
        base.to(dtype), "selfattn", SimpleNamespace(), config, fan_in_fan_out=across
    )
    if across and not bias:
        torch.nn.init.zeros_(layer.bias)
    fill(layer.weight, to_torch(W.T if across else W))
    config.add(
        "one",
        LoRAConfig(
            r=r,
            alpha=plain_number(alpha),
            dropout=p,
            use_dora=use_dora,
            dtype=str(dtype).removeprefix("torch."),
        ),
    )
    layer.add_adapter("one", 0)
    config.active_setup = Stack("one")
    return layer
