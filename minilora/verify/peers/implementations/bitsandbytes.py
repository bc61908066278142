"""The Linear4bit of bitsandbytes, NF4, as a frozen weight with PEFT's adapters on it.

What is checked is all but the rounding to four bits: the branch, the gradients through the weight
that is unpacked, and merging, which packs it anew. NF4 holds 0 and ± the largest of each block
exactly. So every entry of W stands alone in a block, its first, and the features of x in the places
of these; between them are zeros, in A too, and nothing is added to a sum but 0 · 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes
import numpy as np
import torch
from peft.utils.integrations import dequantize_bnb_weight

from minilora.verify.peers._peft import Layer
from minilora.verify.peers._torch import to_numpy, to_torch
from minilora.verify.peers.bitsandbytes import PEER
from minilora.verify.peers.implementations.peft_session import PeftSession

BLOCK = 64


@PEER.describes
class Bitsandbytes(Layer):
    """A layer whose frozen weight is unpacked from four bits, in blocks of `BLOCK`."""

    in_4bit = True

    def _frozen(self, W: np.ndarray, biased: bool, fan_in_fan_out: bool) -> Any:
        if fan_in_fan_out:
            raise NotImplementedError("the bitsandbytes peer has no settings fan_in_fan_out")
        m, n = W.shape
        return bitsandbytes.nn.Linear4bit(
            n * BLOCK, m, bias=biased, compute_dtype=to_torch(W).dtype, quant_type="nf4"
        )

    def _hold(self, frozen: Any, W: np.ndarray) -> None:
        """In four bits, a block for each of its entries."""
        frozen.weight = bitsandbytes.nn.Params4bit(
            self._wide(W),
            requires_grad=False,
            blocksize=BLOCK,
            compress_statistics=False,
            quant_type="nf4",
        ).to("cpu")

    def _weight(self, layer: Any) -> np.ndarray:
        """The weight that the frozen layer stands for."""
        held = layer.get_base_layer().weight
        return to_numpy(
            self._narrow(bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state))
        )

    def _wide(self, array: np.ndarray) -> torch.Tensor:
        """The last axis with `BLOCK` - 1 zeros after each entry."""
        narrow = to_torch(array)
        wide = torch.zeros(*narrow.shape[:-1], narrow.shape[-1] * BLOCK, dtype=narrow.dtype)
        wide[..., ::BLOCK] = narrow
        return wide

    def _narrow(self, wide: torch.Tensor) -> torch.Tensor:
        return wide[..., ::BLOCK]

    def session(self, layer: Mapping[str, Any]) -> QuantizedSession:
        """A layer in four or eight bits, whose adapters come and go."""
        if layer["kind"] != "quantized" or layer["scheme"] not in ("nf4", "fp4", "int8"):
            raise NotImplementedError("the bitsandbytes peer has nf4, fp4 and int8")
        return QuantizedSession(layer)

    def _mode(self, model: Any, training: bool) -> None:
        """Training or evaluation; the frozen layer, which has no dropout, in training.

        In evaluation it is packed anew on some processors, and rounds to bfloat16 from then on.
        """
        model.train(training)
        model.get_submodule("base_model.model.0").get_base_layer().train()


class QuantizedSession(PeftSession):
    """A Linear4bit or a Linear8bitLt under PEFT's adapters, as a user has it."""

    def __init__(self, layer: Mapping[str, Any]) -> None:
        W, bias, scheme = to_torch(layer["W"]), layer.get("bias"), layer["scheme"]
        self._kind, self._dtype, (m, n) = "linear", W.dtype, W.shape
        if scheme == "int8":
            base: Any = bitsandbytes.nn.Linear8bitLt(n, m, bias is not None, has_fp16_weights=False)
            base.weight = bitsandbytes.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False)
        else:
            how = {"compute_dtype": W.dtype, "quant_type": scheme}
            base = bitsandbytes.nn.Linear4bit(n, m, bias is not None, **how)
            base.weight = bitsandbytes.nn.Params4bit(
                W, requires_grad=False, compress_statistics=False, quant_type=scheme
            )
        if bias is not None:
            base.bias = torch.nn.Parameter(to_torch(bias), requires_grad=False)
        self._base = base.to("cpu")
        self._model = torch.nn.Sequential(self._base)
        self._model.is_loaded_in_8bit = scheme == "int8"
        self._model.is_loaded_in_4bit = scheme != "int8"

    def _adjust(self) -> None:
        """The adapters in the dtype of the activations: of a weight in few bits PEFT sees none."""
        layer = self._module("0")
        for held in (layer.lora_A, layer.lora_B):
            held.to(self._dtype)

    def weight(self) -> np.ndarray:
        """What PEFT takes the weight for when it merges."""
        state = getattr(self._base, "state", None)
        whole: Any = dequantize_bnb_weight(self._base.weight, state=state)
        return to_numpy(whole.to(self._dtype))
