"""unsloth's hand-written LoRA functions (kernels/fast_lora.py), in the place of PEFT's forwards.

Without a GPU `import unsloth` has PEFT's own, so that the kernels alone are imported here.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from minilora.verify.peers._kernels import KernelLayer, Kernels
from minilora.verify.peers.unsloth import PEER


def _kernels() -> Any:
    """kernels.fast_lora, without what the packages around it do when they are imported."""
    for name in ("unsloth", "unsloth_zoo", "unsloth.kernels"):
        path, _, inner = name.partition(".")
        if name not in sys.modules:
            spec = find_spec(path)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {path!r}", name=path)
            package = ModuleType(name)
            package.__spec__ = spec
            places = spec.submodule_search_locations or ()
            package.__path__ = [os.path.join(at, inner) for at in places]
            sys.modules[name] = package
    # It writes copies of some files, into the current folder unless told otherwise.
    with TemporaryDirectory(prefix="minilora-") as folder:
        told = {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_LOCATION": folder}
        with patch.dict(os.environ, told):
            return import_module("unsloth.kernels.fast_lora")


fast_lora = _kernels()


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = fast_lora.apply_lora_o(SimpleNamespace(o_proj=layer), x)
    return y


def _qkv(attention: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not hasattr(attention, "v_proj"):
        raise NotImplementedError("no kernel for q and k alone")
    return tuple(fast_lora.apply_lora_qkv(attention, x))


class _Layer(KernelLayer):
    """One whose kernel draws the mask of a torch.nn.Dropout itself; DoRA is left to PEFT."""

    def _adapted(
        self,
        W: np.ndarray,
        A: np.ndarray,
        B: np.ndarray,
        *,
        keep: np.ndarray | None = None,
        p: float = 0.0,
        **settings: Any,
    ) -> tuple[Any, Any]:
        if keep is None or settings.get("use_dora"):
            return super()._adapted(W, A, B, keep=keep, p=p, **settings)
        if not p:
            raise NotImplementedError("a mask without a rate: dropout of rate 0 drops nothing")
        model, layer = super()._adapted(W, A, B, p=p, **settings)
        model.train()
        forward, mask = layer.forward, torch.from_numpy(np.array(keep, dtype=bool))

        def given(drawn: torch.Tensor, probability: float) -> torch.Tensor:
            if drawn.numel() != mask.numel() or probability != 1 - p:
                raise ValueError(f"asked to keep {drawn.shape} with probability {probability}")
            return drawn.copy_(mask.reshape(drawn.shape))

        def masked(x: torch.Tensor) -> torch.Tensor:
            with patch.object(torch.Tensor, "bernoulli_", given):
                y: torch.Tensor = forward(x)
            return y

        layer.forward = masked
        return model, layer


@PEER.describes
class Unsloth(Kernels):
    """On the CPU, where the functions are as on a GPU, but for the activations' Triton kernels.

    unsloth leaves a layer with a bias to PEFT.
    """

    def __init__(self) -> None:
        super().__init__(_Layer(PEER.name, _linear, biased=False), fused=_qkv)
