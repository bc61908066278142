"""litgpt: its LoRALinear."""

from typing import Any

import numpy as np
import torch
from litgpt.lora import LoRALinear

from minilora.verify.peers._torch import GivenMask, plain_number, to_numpy, to_torch
from minilora.verify.peers._torch_linear import Built, TorchLinear
from minilora.verify.peers.litgpt import PEER
from minilora.verify.peers.peer import refuse_settings


@PEER.describes
class Litgpt(TorchLinear):
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
        **unknown: Any,
    ) -> Built:
        """The layer."""
        refuse_settings(PEER.name, unknown)
        layer = _layer(W, r=r, alpha=alpha, p=p, bias=bias)
        if keep is None:
            layer.eval()
        else:
            layer.lora_dropout = GivenMask(keep, p, layer.lora_dropout)
        parameters = {"W": layer.linear.weight, "A": layer.lora_A, "B": layer.lora_B}
        if bias:
            parameters["bias"] = layer.linear.bias

        def merge() -> torch.Tensor:
            layer.merge()
            return layer.linear.weight

        return Built(layer, parameters, merge, {})

    def init(
        self, W: np.ndarray, *, r: int, alpha: float, seed: int, **unknown: Any
    ) -> dict[str, np.ndarray]:
        """A and B of a new layer, from torch's generator."""
        refuse_settings(PEER.name, unknown)
        torch.manual_seed(seed)
        layer = _layer(W, r=r, alpha=alpha, p=0.0, bias=False)
        return {"A": to_numpy(layer.lora_A), "B": to_numpy(layer.lora_B)}


def _layer(W: np.ndarray, *, r: int, alpha: float, p: float, bias: bool) -> Any:
    m, n = W.shape
    layer = LoRALinear(n, m, r=r, lora_alpha=plain_number(alpha), lora_dropout=p, bias=bias)
    return layer.to(to_torch(W).dtype)
