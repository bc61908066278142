"""The Linear4bit of bitsandbytes, NF4, as a frozen weight with PEFT's adapters on it.

What is checked is all but the rounding to four bits: the branch, the gradients through the weight
that is unpacked, and merging, which packs it anew. NF4 holds 0 and ± the largest of each block
exactly. So every entry of W stands alone in a block, its first, and the features of x in the places
of these; between them are zeros, in A too, and nothing is added to a sum but 0 · 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import bitsandbytes
import numpy as np
import peft
import torch

from minilora.verify.peers._torch import (
    PRECISION,
    GivenMask,
    fill,
    plain_number,
    to_numpy,
    to_torch,
)

BLOCK = 64

_ONE_TOKEN = (
    "the gradient of a bias is the sum over dy's first axis (autograd/_functions.py): of one token "
    "without a batch a number, which autograd refuses; of a batch of sequences rounded before the "
    "sum over the rest"
)


_BIAS = f"{_ONE_TOKEN}; and DoRA of PEFT forms it as three sums, each rounded (tuners/lora/dora.py)"


class Bitsandbytes:
    """Each call builds the library's own layer anew, so no state is left between calls."""

    name = "bitsandbytes"
    version = f"{bitsandbytes.__version__} (peft {peft.__version__}, torch {torch.__version__})"
    dtypes = ("float32", "bfloat16", "float16")
    precision: ClassVar = {dtype: PRECISION[dtype] for dtype in dtypes}
    conventions: ClassVar = {"dora_norm": "detached"}
    known: ClassVar = {
        "variants.dora.vector*": "DoRA of PEFT views its factor as (1, m), so that a vector's "
        "output is a row (tuners/lora/dora.py)",
        "linear.vjp.bias:*": _ONE_TOKEN,
        "linear.vjp.all:*": _ONE_TOKEN,
        "linear.derivative:*": _ONE_TOKEN,
        "variants.lora-bias.vjp*:bfloat16": _ONE_TOKEN,
        "variants.lora-bias.vjp*:float16": _ONE_TOKEN,
        "variants.dora.vjp*:bfloat16": _BIAS,
        "variants.dora.vjp*:float16": _BIAS,
    }

    def lora_linear(
        self, x: np.ndarray, W: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any
    ) -> np.ndarray:
        """y of the adapted layer. Without `keep` the layer is in evaluation mode: no dropout."""
        model, _ = _adapted(W, A, B, **settings)
        with torch.no_grad():
            return to_numpy(model(_spread(x)))

    def lora_linear_vjp(
        self,
        x: np.ndarray,
        W: np.ndarray,
        A: np.ndarray,
        B: np.ndarray,
        dy: np.ndarray,
        **settings: Any,
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩ by autograd through the library's forward."""
        model, layer = _adapted(W, A, B, **settings)
        of = {
            "dx": _spread(x).requires_grad_(),
            "dA": layer.lora_A["default"].weight,
            "dB": layer.lora_B["default"].weight,
        }
        if "bias" in settings:
            of["dbias"] = layer.get_base_layer().bias
        if "magnitude" in settings:
            of["dmagnitude"] = layer.lora_magnitude_vector["default"].weight
        if "lora_bias" in settings:
            of["dlora_bias"] = layer.lora_B["default"].bias
        y = model(of["dx"])
        gradients = torch.autograd.grad(y, list(of.values()), to_torch(dy))
        found = dict(zip(of, gradients, strict=True))
        found |= {name: found[name][..., ::BLOCK] for name in ("dx", "dA")}
        return {"y": to_numpy(y)} | {name: to_numpy(g) for name, g in found.items()}

    def merge(self, W: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any) -> np.ndarray:
        """The weight after merge_adapter(), unpacked."""
        if "lora_bias" in settings:  # merging needs a bias to add it to
            settings["bias"] = np.zeros_like(settings["lora_bias"])
        model, layer = _adapted(W, A, B, **settings)
        model.merge_adapter()
        return _unpacked(layer)

    def unmerge(
        self, W_merged: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any
    ) -> np.ndarray:
        """The weight after unmerge_adapter() of a layer that holds W_merged as merged."""
        model, layer = _adapted(W_merged, A, B, **settings)
        held = layer.get_base_layer()
        model.merge_adapter()
        held.weight = _packed(W_merged)
        model.unmerge_adapter()
        return _unpacked(layer)

    def multi_adapter(
        self,
        x: np.ndarray,
        W: np.ndarray,
        adapters: Sequence[Mapping[str, Any]],
        index: np.ndarray,
    ) -> np.ndarray:
        """y of one batch whose rows name their adapters, "__base__" for none."""
        model = None
        for i, adapter in enumerate(adapters):
            model, _ = _adapted(W, **adapter, name=f"a{i}", model=model)
        names = ["__base__" if i < 0 else f"a{i}" for i in index]
        with torch.no_grad():
            return to_numpy(_without_packing(model, False)(_spread(x), adapter_names=names))


def implementation() -> object:
    """The peer that `minilora verify bitsandbytes` checks."""
    return Bitsandbytes()


def _spread(array: np.ndarray) -> torch.Tensor:
    """The last axis with `BLOCK` - 1 zeros after each entry."""
    narrow = to_torch(array)
    wide = torch.zeros(*narrow.shape[:-1], narrow.shape[-1] * BLOCK, dtype=narrow.dtype)
    wide[..., ::BLOCK] = narrow
    return wide


def _packed(W: np.ndarray) -> Any:
    """The weight in four bits, a block for each of its entries."""
    return bitsandbytes.nn.Params4bit(
        _spread(W),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=False,
        quant_type="nf4",
    ).to("cpu")


def _unpacked(layer: Any) -> np.ndarray:
    """The weight that the base layer stands for."""
    held = layer.get_base_layer().weight
    wide = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
    return to_numpy(wide[:, ::BLOCK])


def _adapted(
    W: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    *,
    alpha: float,
    r: int,
    bias: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    p: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    magnitude: np.ndarray | None = None,
    lora_bias: np.ndarray | None = None,
    name: str = "default",
    model: Any = None,
    **unknown: Any,
) -> tuple[Any, Any]:
    """The model of one adapted layer, or `model` with one more adapter on it, and that layer."""
    if refused := [key for key, value in unknown.items() if value is not False]:
        raise NotImplementedError(f"the bitsandbytes peer has no settings {', '.join(refused)}")
    m, n = W.shape
    config = peft.LoraConfig(
        r=r,
        lora_alpha=plain_number(alpha),
        lora_dropout=p,
        use_rslora=use_rslora,
        use_dora=use_dora,
        lora_bias=lora_bias is not None,
        target_modules=["0"],
        bias="none" if bias is None else "all",
    )
    if model is None:
        base = bitsandbytes.nn.Linear4bit(
            n * BLOCK, m, bias=bias is not None, compute_dtype=to_torch(W).dtype, quant_type="nf4"
        )
        base.weight = _packed(W)
        if bias is not None:
            base.bias = torch.nn.Parameter(to_torch(bias))
        whole = torch.nn.Sequential(base)
        whole.is_loaded_in_4bit = True  # as transformers says it of a model, for PEFT
        model = peft.get_peft_model(whole, config, adapter_name=name, autocast_adapter_dtype=False)
    else:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    layer = model.get_submodule("base_model.model.0")
    for held, given in ((layer.lora_A[name], _spread(A)), (layer.lora_B[name], to_torch(B))):
        held.to(given.dtype)
        fill(held.weight, given)
    if magnitude is not None:
        layer.lora_magnitude_vector[name].to(to_torch(magnitude).dtype)
        fill(layer.lora_magnitude_vector[name].weight, to_torch(magnitude))
    if lora_bias is not None:
        fill(layer.lora_B[name].bias, to_torch(lora_bias))
    if keep is not None:
        spread = _spread(keep).numpy()
        layer.lora_dropout[name] = GivenMask(spread, p, layer.lora_dropout[name])
    return _without_packing(model, keep is not None), layer


def _without_packing(model: Any, training: bool) -> Any:
    """The model in training or evaluation; the frozen layer, which has no dropout, in training.

    In evaluation it is packed anew on some processors, and rounds to bfloat16 from then on.
    """
    model.train(training)
    model.get_submodule("base_model.model.0").get_base_layer().train()
    return model
