"""A library's linear layer on PyTorch: the contract's methods over what builds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minilora.verify.peers._torch import fill, gradients, to_numpy, to_torch


@dataclass(frozen=True)
class Built:
    """A layer with its adapter: what computes y, its parameters, and what merges it.

    ``parameters`` are W, A, B and perhaps bias and magnitude, in the library's own layout;
    ``layouts`` turn such a tensor into the contract's layout, and the contract's into it.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    parameters: Mapping[str, torch.Tensor]
    merge: Callable[[], torch.Tensor]
    layouts: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]

    def tensor(self, name: str, array: np.ndarray) -> torch.Tensor:
        """An array of the contract in the library's layout."""
        return self.layouts.get(name, _same)(to_torch(array))

    def array(self, name: str, tensor: torch.Tensor) -> np.ndarray:
        """A tensor of the library in the contract's layout."""
        return to_numpy(self.layouts.get(name, _same)(tensor))


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class TorchLinear:
    """Each call builds the library's own layer anew, so no state is left between calls."""

    build: Callable[..., Built]
    """The library's layer for a weight of the shape and dtype of W, and settings by name."""

    def _filled(self, settings: Mapping[str, Any], **arrays: np.ndarray | None) -> Built:
        given = {name: array for name, array in arrays.items() if array is not None}
        built = self.build(given["W"], bias="bias" in given, **settings)
        for name, array in given.items():
            fill(built.parameters[name], built.tensor(name, array))
        return built

    def lora_linear(
        self,
        x: np.ndarray,
        W: np.ndarray,
        A: np.ndarray,
        B: np.ndarray,
        *,
        bias: np.ndarray | None = None,
        magnitude: np.ndarray | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """y."""
        built = self._filled(settings, W=W, A=A, B=B, bias=bias, magnitude=magnitude)
        with torch.no_grad():
            return to_numpy(built.forward(to_torch(x)))

    def lora_linear_vjp(
        self,
        x: np.ndarray,
        W: np.ndarray,
        A: np.ndarray,
        B: np.ndarray,
        dy: np.ndarray,
        *,
        bias: np.ndarray | None = None,
        magnitude: np.ndarray | None = None,
        **settings: Any,
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩ by autograd through the library's forward."""
        built = self._filled(settings, W=W, A=A, B=B, bias=bias, magnitude=magnitude)
        names = [name for name in built.parameters if name != "W"]
        of = {"x": to_torch(x)} | {name: built.parameters[name] for name in names}
        for name in ("x", "bias"):  # the base's bias is frozen; what is the adapter's is its own
            if name in of:
                of[name].requires_grad_()
        y = built.forward(of["x"])
        found = gradients(y, of, dy)
        return {"y": to_numpy(y)} | {f"d{name}": built.array(name, g) for name, g in found.items()}

    def merge(
        self,
        W: np.ndarray,
        A: np.ndarray,
        B: np.ndarray,
        *,
        bias: np.ndarray | None = None,
        magnitude: np.ndarray | None = None,
        **settings: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The weight that the library holds when it has merged, and the bias beside it."""
        built = self._filled(settings, W=W, A=A, B=B, bias=bias, magnitude=magnitude)
        with torch.no_grad():
            weight = built.array("W", built.merge())
        return weight if bias is None else (weight, to_numpy(built.parameters["bias"]))


def column_or_row(magnitude: torch.Tensor) -> torch.Tensor:
    """(m,) as (m, 1), and back."""
    return magnitude[:, None] if magnitude.ndim == 1 else magnitude[:, 0]
