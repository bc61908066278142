"""Keras: its Dense layer, with LoRA enabled by the method and by the constructor."""

import os
from typing import Any

import numpy as np
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras

from minilora.verify.peers import keras as by_method
from minilora.verify.peers import keras_constructor
from minilora.verify.peers._torch import plain_number
from minilora.verify.peers._torch_linear import Built, TorchLinear
from minilora.verify.peers.peer import refuse_settings


@by_method.PEER.describes
class Keras(TorchLinear):
    """`Dense(...)`, then `enable_lora(r, lora_alpha=alpha)`."""

    def build(
        self, W: np.ndarray, *, alpha: float, r: int, bias: bool = False, **unknown: Any
    ) -> Built:
        """The layer; its kernel is (in, out), as are A and B."""
        refuse_settings("Keras", unknown)
        m, n = W.shape
        layer = keras.layers.Dense(m, use_bias=bias, dtype=str(W.dtype))
        layer.build((None, n))
        layer.enable_lora(r, lora_alpha=plain_number(alpha))
        return _built(layer, bias)


@keras_constructor.PEER.describes
class KerasConstructor(TorchLinear):
    """`Dense(..., lora_rank=r, lora_alpha=alpha)`."""

    def build(
        self, W: np.ndarray, *, alpha: float, r: int, bias: bool = False, **unknown: Any
    ) -> Built:
        """The layer; its kernel is (in, out), as are A and B."""
        refuse_settings("Keras", unknown)
        m, n = W.shape
        how: dict[str, Any] = {"lora_rank": r, "lora_alpha": plain_number(alpha)}
        layer = keras.layers.Dense(m, use_bias=bias, dtype=str(W.dtype), **how)
        layer.build((None, n))
        return _built(layer, bias)


def _built(layer: Any, bias: bool) -> Built:
    parameters = {
        "W": layer._kernel.value,
        "A": layer.lora_kernel_a.value,
        "B": layer.lora_kernel_b.value,
    }
    if bias:
        parameters["bias"] = layer.bias.value
    layouts = dict.fromkeys("WAB", torch.Tensor.t)

    def merge() -> torch.Tensor:
        kernel: torch.Tensor = layer.kernel
        return kernel

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 1:
            refuse_settings("Keras", ["for x of one axis"])
        y: torch.Tensor = layer(x)
        return y

    return Built(forward, parameters, merge, layouts)
