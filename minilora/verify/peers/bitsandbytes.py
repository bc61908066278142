"""The Linear4bit of bitsandbytes, NF4, as a frozen weight with PEFT's adapters on it.

What is checked is all but the rounding to four bits: the branch, the gradients through the weight
that is unpacked, and merging, which packs it anew. NF4 holds 0 and ± the largest of each block
exactly. So every entry of W stands alone in a block, its first, and the features of x in the places
of these; between them are zeros, in A too, and nothing is added to a sum but 0 · 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import bitsandbytes
import numpy as np
import peft
import torch

from minilora.verify.peers._peft import Layer
from minilora.verify.peers._torch import PRECISION, to_numpy, to_torch

BLOCK = 64

_ONE_TOKEN = (
    "the gradient of a bias is the sum over dy's first axis (autograd/_functions.py): of one token "
    "without a batch a number, which autograd refuses; of a batch of sequences rounded before the "
    "sum over the rest"
)


_BIAS = f"{_ONE_TOKEN}; and DoRA of PEFT forms it as three sums, each rounded (tuners/lora/dora.py)"


class Bitsandbytes(Layer):
    """A layer whose frozen weight is unpacked from four bits, in blocks of `BLOCK`."""

    name = "bitsandbytes"
    in_4bit = True
    version = f"{bitsandbytes.__version__} (peft {peft.__version__}, torch {torch.__version__})"
    dtypes = ("float32", "bfloat16", "float16")
    precision: ClassVar = {dtype: PRECISION[dtype] for dtype in dtypes}
    conventions: ClassVar = {"dora_norm": "detached"}
    known: ClassVar = {
        "variants.dora.unbatched*": "DoRA of PEFT views its factor as (1, m), so that a vector's "
        "output is a row (tuners/lora/dora.py)",
        "linear.vjp.bias:*": _ONE_TOKEN,
        "linear.vjp.all:*": _ONE_TOKEN,
        "linear.gradcheck:*": _ONE_TOKEN,
        "variants.lora-bias.vjp*:bfloat16": _ONE_TOKEN,
        "variants.lora-bias.vjp*:float16": _ONE_TOKEN,
        "variants.dora.vjp*:bfloat16": _BIAS,
        "variants.dora.vjp*:float16": _BIAS,
    }

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

    def _mode(self, model: Any, training: bool) -> None:
        """Training or evaluation; the frozen layer, which has no dropout, in training.

        In evaluation it is packed anew on some processors, and rounds to bfloat16 from then on.
        """
        model.train(training)
        model.get_submodule("base_model.model.0").get_base_layer().train()


def implementation() -> object:
    """The peer that `minilora verify bitsandbytes` checks."""
    return Bitsandbytes()
