"""SGLang's reader of PEFT's adapters, and its LoRA operations in PyTorch. No engine is started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.torch_ops import lora_ops

from minilora.verify.peers._torch import to_numpy, to_torch
from minilora.verify.peers.peer import refuse_settings
from minilora.verify.peers.sglang import PEER


@PEER.describes
class Sglang:
    """Each call reads its files anew."""

    def multi_adapter(
        self,
        x: np.ndarray,
        W: np.ndarray,
        adapters: Sequence[Mapping[str, Any]],
        index: np.ndarray,
    ) -> np.ndarray:
        """The base's output and what both products add, each row a segment; none has rank 0."""
        ranks = [adapter["r"] for adapter in adapters]
        inputs = to_torch(x)
        A = torch.zeros((len(ranks) + 1, max(ranks), x.shape[1]), dtype=inputs.dtype)
        B = torch.zeros((len(ranks) + 1, len(W), max(ranks)), dtype=inputs.dtype)
        scales = []
        for i, adapter in enumerate(adapters):
            refuse_settings("SGLang", sorted(adapter.keys() - {"A", "B", "alpha", "r"}))
            A[i, : ranks[i]], B[i, :, : ranks[i]] = to_torch(adapter["A"]), to_torch(adapter["B"])
            scales.append(adapter["alpha"] / adapter["r"])  # as LoRAAdapter has it
        rows = torch.from_numpy(np.where(index < 0, len(ranks), index))
        about = (rows, torch.ones_like(rows), torch.tensor([*ranks, 0]))
        hidden = lora_ops.sgemm_lora_a_fwd(inputs, A, *about, torch.tensor([*scales, 0.0]).double())
        y = inputs @ to_torch(W).T
        return to_numpy(lora_ops.sgemm_lora_b_fwd(hidden, B, *about, torch.tensor([0, len(W)]), y))

    def deltas(self, model_dir: str | Path, adapter_dir: str | Path) -> dict[str, np.ndarray]:
        """s B A of what LoRAAdapter takes of the file, before it stacks q, k and v."""
        config = LoRAConfig(str(adapter_dir))
        if config.use_dora:  # which the LoRAManager refuses
            raise NotImplementedError("LoRA serving currently doesn't support DoRA adapters")
        base = json.loads((Path(model_dir) / "config.json").read_text())
        if base["model_type"] == "gpt2":
            raise NotImplementedError("its GPT-2 has no LoRA")
        layers = SimpleNamespace(num_hidden_layers=base["num_hidden_layers"])
        adapter = LoRAAdapter("adapter", config, layers, None, None)
        for name, tensor in load_file(Path(adapter_dir) / "adapter_model.safetensors").items():
            adapter._process_weight(name, tensor)
        taken = {name: w for layer in adapter.layers for name, w in layer.weights.items()}
        taken |= adapter.embedding_layers
        changes = {}
        for name, A in taken.items():
            if ".lora_A." in name or name.endswith(".lora_embedding_A"):
                B = taken[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
                change = adapter.scaling * (B @ A)
                at = name.removeprefix("base_model.model.").partition(".lora_")[0]
                changes[at] = to_numpy(change.T if "lora_embedding" in name else change)
        return changes
