"""PyTorch's autograd on the plain formula: what a textbook has, and no library of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minilora.verify.peers._torch import DTYPES, PRECISION, to_numpy, to_torch


class Torch:
    """Every gradient is autograd's, through DoRA's norm as well."""

    name = "torch"
    version = str(torch.__version__)
    dtypes = DTYPES
    precision = PRECISION
    conventions: ClassVar = {"dora_norm": "differentiated"}

    def lora_linear(self, x: Any, W: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """y."""
        return to_numpy(_layer(**_tensors(x=x, W=W, A=A, B=B, **settings)))

    def lora_linear_vjp(
        self, x: Any, W: Any, A: Any, B: Any, dy: Any, **settings: Any
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩."""
        given = _tensors(x=x, W=W, A=A, B=B, **settings)
        names = ("x", "A", "B", "bias", "magnitude", "lora_bias")
        of = {f"d{name}": given[name].requires_grad_() for name in names if name in given}
        y = _layer(**given)
        gradients = torch.autograd.grad(y, list(of.values()), to_torch(dy))
        return {"y": to_numpy(y)} | {
            name: to_numpy(gradient) for name, gradient in zip(of, gradients, strict=True)
        }

    def merge(self, W: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """W + s B A, with DoRA its rows rescaled to the magnitude."""
        return to_numpy(_merged(**_tensors(W=W, A=A, B=B, **settings)))

    def unmerge(self, W_merged: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """W' - s B A."""
        if "magnitude" in settings:
            raise NotImplementedError("a rescaled row does not say what its norm was")
        return to_numpy(_merged(**_tensors(W=W_merged, A=A, B=-B, **settings)))

    def combine(
        self,
        adapters: Sequence[Mapping[str, Any]],
        weights: Sequence[float],
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> np.ndarray:
        """[w s B …] [A; …], or the best change of its rank, for which halves are not enough."""
        given = [_tensors(**adapter) for adapter in adapters]
        B = torch.cat([w * _scale(**g) * g["B"] for w, g in zip(weights, given, strict=True)], 1)
        change = B @ torch.cat([g["A"] for g in given])
        if combination_type == "svd":
            wide = change.to(torch.promote_types(change.dtype, torch.float32))
            U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
            change = ((U * S)[:, :svd_rank] @ Vh[:svd_rank]).to(change.dtype)
        return to_numpy(change)

    def multi_adapter(
        self, x: Any, W: Any, adapters: Sequence[Mapping[str, Any]], index: np.ndarray
    ) -> np.ndarray:
        """x Wᵀ, and to each adapter's rows its own branch."""
        x, W = to_torch(x), to_torch(W)
        y = x @ W.T
        for i, adapter in enumerate(adapters):
            given, rows = _tensors(**adapter), torch.from_numpy(index == i)
            y[rows] += _scale(**given) * (x[rows] @ given["A"].T @ given["B"].T)
        return to_numpy(y)


def implementation() -> object:
    """The peer that `minilora verify torch` checks."""
    return Torch()


def _tensors(**given: Any) -> dict[str, Any]:
    """Arrays as tensors, everything else as it is."""
    return {k: to_torch(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}


def _scale(*, alpha: float, r: int, use_rslora: bool = False, **_: Any) -> float:
    return float(alpha / r**0.5 if use_rslora else alpha / r)


def _refuse(unknown: Mapping[str, Any]) -> None:
    if unknown:
        raise NotImplementedError(f"the formula has no settings {', '.join(unknown)}")


def _layer(
    *,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    r: int,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    p: float = 0.0,
    use_rslora: bool = False,
    fan_in_fan_out: bool = False,
    use_dora: bool = False,
    magnitude: Tensor | None = None,
    lora_bias: Tensor | None = None,
    **unknown: Any,
) -> Tensor:
    """y = x Wᵀ + b + s ((x ∘ K) Aᵀ Bᵀ + c), with DoRA x Wᵀ + b + (x ∘ K) (m ∘ V / ‖V‖ - W)ᵀ."""
    _refuse(unknown)
    s = _scale(alpha=alpha, r=r, use_rslora=use_rslora)
    stored = W.T.contiguous().T if fan_in_fan_out else W
    h = x if keep is None else x * keep / (1 - p)
    branch = s * (h @ A.T @ B.T)
    if lora_bias is not None:
        branch = branch + s * lora_bias
    if use_dora:
        norm = torch.linalg.norm(stored + s * B @ A, dim=1)
        base = h @ stored.T
        branch = magnitude / norm * (base + branch) - base
    y = x @ stored.T + branch
    return y if bias is None else y + bias


def _merged(
    *,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    r: int,
    use_rslora: bool = False,
    fan_in_fan_out: bool = False,
    use_dora: bool = False,
    magnitude: Tensor | None = None,
    lora_bias: Tensor | None = None,
    **unknown: Any,
) -> Tensor:
    """W + s B A, with DoRA its rows rescaled; the bias c of B would be added to the layer's own."""
    _refuse(unknown)
    stored = W.T.contiguous().T if fan_in_fan_out else W
    merged = stored + _scale(alpha=alpha, r=r, use_rslora=use_rslora) * B @ A
    if magnitude is None:
        return merged
    return (magnitude / torch.linalg.norm(merged, dim=1))[:, None] * merged
