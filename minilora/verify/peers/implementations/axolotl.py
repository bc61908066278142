"""axolotl's hand-written LoRA functions (kernels/lora.py), in the place of PEFT's forwards."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.kernels import lora

from minilora.verify.peers._kernels import KernelLayer, Kernels
from minilora.verify.peers.axolotl import PEER


def _qkv(attention: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v, or q and k where there is no v."""
    if hasattr(attention, "v_proj"):
        return tuple(lora.apply_lora_qkv(attention, x))
    return tuple(lora.apply_lora_qk(attention, x))[:2]


@PEER.describes
class Axolotl(Kernels):
    """On the CPU, where the functions are as on a GPU, but for the activations' Triton kernels."""

    def __init__(self) -> None:
        linear = KernelLayer(PEER.name, lora.apply_lora_linear)
        super().__init__(linear, embedding=lora.apply_lora_embedding, fused=_qkv)
