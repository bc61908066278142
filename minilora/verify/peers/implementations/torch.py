"""PyTorch's autograd on the plain formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from minilora.verify.peers import _formula
from minilora.verify.peers._modules import BIAS, WEIGHT, build
from minilora.verify.peers._torch import arrays, gradients, to_numpy, to_torch
from minilora.verify.peers.peer import refuse_settings
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
        return arrays({"y": y} | gradients(y, of, dy))

    def merge(self, W: Any, A: Any, B: Any, **settings: Any) -> Any:
        """W + s B A, with DoRA its rows rescaled to the magnitude; with a bias (W', b')."""
        merged = _formula.merged(_row_norms, **_tensors(W=W, A=A, B=B, **settings))
        return tuple(map(to_numpy, merged)) if isinstance(merged, tuple) else to_numpy(merged)

    def unmerge(self, W_merged: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """W' - s B A."""
        _formula.refuse_dora(settings)
        W: np.ndarray = self.merge(W_merged, A, -B, **settings)
        return W

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

    def module(
        self,
        layer: Mapping[str, Any],
        adapter: Mapping[str, Any],
        x: np.ndarray,
        *,
        mode: str,
        dy: np.ndarray | None = None,
        index: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """PyTorch's own module, called with the merged weight as a function of A and B."""
        refuse_settings("a merged weight", ["p"] if adapter.get("p") else [])
        if "lora_bias" in adapter and "bias" not in layer:
            layer = {**layer, "bias": np.zeros_like(adapter["lora_bias"])}
        base, given = build(layer, index), to_torch(x)
        tensors = _tensors(**{k: v for k, v in adapter.items() if k not in ("out", "enable", "p")})
        of: dict[str, Any] = {"dx": given} if given.is_floating_point() else {}
        of |= {f"d{name}": v for name, v in tensors.items() if isinstance(v, torch.Tensor)}
        out = {name: to_torch(array) for name, array in adapter.get("out", {}).items()}
        of |= {f"out.d{name}": tensor for name, tensor in out.items()}
        for tensor in of.values():
            tensor.requires_grad_()
        weights = _merged_tensors(layer, adapter, tensors, out)
        y = torch.func.functional_call(base.train(mode == "train"), weights, (given,))
        held = {}
        if mode == "merged" and not {*weights} & {"linear1.weight", "inner.in_proj_weight"}:
            W = weights["weight"]
            W = W.mT if layer.get("fan_in_fan_out", False) else W
            held = {"W": to_numpy(W)}
            if "bias" in layer:
                held["bias"] = to_numpy(weights.get("bias", base.get_parameter("bias")))
        if dy is None:
            return held | {"y": to_numpy(y)}
        return arrays({"y": y} | gradients(y, of, dy))


def _merged_tensors(
    layer: Mapping[str, Any],
    adapter: Mapping[str, Any],
    tensors: Mapping[str, Any],
    out: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """W' and b' of a module by their names in it, for W and b."""
    kind, s = layer["kind"], _formula.scale(**tensors)
    A, B = tensors["A"], tensors["B"]
    W = to_torch(layer["W"])
    if kind == "fused":
        change, of_A, of_B = [], 0, 0
        for size, on in zip(layer["rows"], adapter["enable"], strict=True):
            rows, ranks = slice(of_B, of_B + size), slice(of_A, of_A + adapter["r"])
            change.append(B[rows] @ A[ranks] if on else A.new_zeros(size, A.shape[1]))
            of_A, of_B = of_A + adapter["r"] * on, of_B + size * on
        V = W + s * torch.cat(change)
    elif kind == "embedding":
        V = (W.T + s * B @ A).T
    else:
        V = W + s * (B @ A).reshape(W.shape)
    if "magnitude" in tensors:
        rows = V.T if kind == "embedding" else V.flatten(1)
        rows = (tensors["magnitude"] / _row_norms(rows))[:, None] * rows
        V = rows.T if kind == "embedding" else rows.reshape(V.shape)
    merged = {WEIGHT.get(kind, "weight"): V.mT if layer.get("fan_in_fan_out", False) else V}
    if "lora_bias" in tensors:
        name = BIAS.get(kind, "bias")
        merged[name] = to_torch(layer["bias"]) + s * tensors["lora_bias"]
    if out:
        merged["inner.out_proj.weight"] = to_torch(layer["out"]["W"]) + s * out["B"] @ out["A"]
    return merged


def _row_norms(V: torch.Tensor) -> torch.Tensor:
    return torch.linalg.norm(V, dim=1)


def _tensors(*, fan_in_fan_out: bool = False, **arguments: Any) -> dict[str, Any]:
    """Arrays as tensors, the rest as it is; with fan_in_fan_out, W is stored (in, out)."""
    tensors = {k: to_torch(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    if fan_in_fan_out:
        tensors["W"] = tensors["W"].T.contiguous().T
    return tensors
