"""PyTorch's autograd on the plain formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from minilora.verify.peers import _formula
from minilora.verify.peers._torch import to_numpy, to_torch
from minilora.verify.peers.torch import PEER


@PEER.describes
class Torch:
    """Every gradient is autograd's, through DoRA's norm as well."""

    def lora_linear(self, x: Any, W: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """y."""
        return to_numpy(_formula.layer(_row_norms, **_tensors(x=x, W=W, A=A, B=B, **settings)))

    def lora_linear_vjp(
        self, x: Any, W: Any, A: Any, B: Any, dy: Any, **settings: Any
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩."""
        tensors = _tensors(x=x, W=W, A=A, B=B, **settings)
        names = ("x", "A", "B", "bias", "magnitude", "lora_bias")
        of = {f"d{name}": tensors[name].requires_grad_() for name in names if name in tensors}
        y = _formula.layer(_row_norms, **tensors)
        gradients = torch.autograd.grad(y, list(of.values()), to_torch(dy))
        return {"y": to_numpy(y)} | {
            name: to_numpy(gradient) for name, gradient in zip(of, gradients, strict=True)
        }

    def merge(self, W: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """W + s B A, with DoRA its rows rescaled to the magnitude."""
        return to_numpy(_formula.merged(_row_norms, **_tensors(W=W, A=A, B=B, **settings)))

    def unmerge(self, W_merged: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """W' - s B A."""
        _formula.refuse_dora(settings)
        return self.merge(W_merged, A, -B, **settings)

    def combine(
        self,
        adapters: Sequence[Mapping[str, Any]],
        weights: Sequence[float],
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> np.ndarray:
        """[w s B …] [A; …], or the best change of its rank."""
        pairs = zip(weights, [_tensors(**adapter) for adapter in adapters], strict=True)
        factors = [(g["A"], w * _formula.scale(**g) * g["B"]) for w, g in pairs]
        return to_numpy(_formula.combined(torch, torch.Tensor.to, factors, svd_rank))

    def multi_adapter(
        self, x: Any, W: Any, adapters: Sequence[Mapping[str, Any]], index: np.ndarray
    ) -> np.ndarray:
        """x Wᵀ, and to each adapter's rows its own branch."""
        x, W = to_torch(x), to_torch(W)
        y = x @ W.T
        for i, adapter in enumerate(adapters):
            factors, rows = _tensors(**adapter), torch.from_numpy(index == i)
            y[rows] += _formula.scale(**factors) * (x[rows] @ factors["A"].T @ factors["B"].T)
        return to_numpy(y)


def _row_norms(V: torch.Tensor) -> torch.Tensor:
    return torch.linalg.norm(V, dim=1)


def _tensors(*, fan_in_fan_out: bool = False, **arguments: Any) -> dict[str, Any]:
    """Arrays as tensors, the rest as it is; with fan_in_fan_out, W is stored (in, out)."""
    tensors = {k: to_torch(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    if fan_in_fan_out:
        tensors["W"] = tensors["W"].T.contiguous().T
    return tensors
