"""vLLM's reader of PEFT's adapters, and its LoRA kernels for the CPU. No engine is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors import safe_open
from vllm.lora import lora_model
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.peft_helper import PEFTHelper

from minilora.verify.peers._torch import to_numpy, to_torch
from minilora.verify.peers.peer import refuse_settings
from minilora.verify.peers.vllm import PEER


@PEER.describes
class Vllm:
    """Each call reads its files anew."""

    def multi_adapter(
        self,
        x: np.ndarray,
        W: np.ndarray,
        adapters: Sequence[Mapping[str, Any]],
        index: np.ndarray,
    ) -> np.ndarray:
        """The base's output and what shrink and expand add, as PunicaWrapperCPU puts them."""
        rank = max(adapter["r"] for adapter in adapters)
        pairs = [_layer(**adapter) for adapter in adapters]
        rows = torch.from_numpy(np.array(index))
        inputs = to_torch(x)
        y = inputs @ to_torch(W).T
        buffer = torch.zeros((len(x), rank), dtype=torch.promote_types(y.dtype, torch.float32))
        A = torch.stack([_filled(pair.lora_a, (rank, x.shape[1])) for pair in pairs])
        B = torch.stack([_filled(pair.lora_b, (len(W), rank)) for pair in pairs])
        lora_ops.bgmv_shrink(inputs, A, buffer, rows, 1.0)
        lora_ops.bgmv_expand(buffer, B, y, rows, add_inputs=True)
        return to_numpy(y)

    def deltas(self, model_dir: str | Path, adapter_dir: str | Path) -> dict[str, np.ndarray]:
        """B A of each module that LoRAModel reads, with the scale in B."""
        helper = PEFTHelper.from_local_dir(str(adapter_dir), None)
        if refused := helper._validate_features():
            raise NotImplementedError("; ".join(refused))
        if helper.bias != "none":  # validate_legal, which asks for an engine's settings, refuses it
            raise NotImplementedError("Adapter bias is not supported.")
        expected = {name.rpartition(".")[2] for name in _modules(model_dir)} | {"lm_head"}
        # Pinned memory is for the way to a GPU, which may not be there.
        with patch.object(lora_model, "PIN_MEMORY", False):
            model = lora_model.LoRAModel.from_local_checkpoint(
                str(adapter_dir), expected, helper, lora_model_id=1, device="cpu"
            )
        changes = {}
        for name, lora in model.loras.items():
            lora.optimize()
            change = lora.lora_b @ lora.lora_a
            is_table = name.endswith(("embed_tokens", "wte"))
            changes[name] = to_numpy(change.T if is_table else change)
        return changes


def _layer(
    *, A: np.ndarray, B: np.ndarray, alpha: float, r: int, use_rslora: bool = False, **unknown: Any
) -> LoRALayerWeights:
    """The factors of a module, with the scale that its reader computes in B."""
    refuse_settings("vLLM", unknown)
    helper = PEFTHelper(r=r, lora_alpha=alpha, target_modules=["0"], use_rslora=use_rslora)
    layer = LoRALayerWeights.from_config("0", helper)
    layer.lora_a, layer.lora_b = to_torch(A), to_torch(B)
    return layer.optimize()


def _filled(factor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The factor in a slot of the greatest rank, 0 beyond its own."""
    slot = torch.zeros(shape, dtype=factor.dtype)
    slot[: factor.shape[0], : factor.shape[1]] = factor
    return slot


def _modules(model_dir: str | Path) -> set[str]:
    """The paths of the modules that have weights in a folder."""
    names: set[str] = set()
    for path in Path(model_dir).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118
    return names
