"""Arrays to tensors and back, and a given dropout mask, for all peers on PyTorch."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same values and dtype in memory of its own."""
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:  # unknown to torch.from_numpy: hand over the bits
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """An array of the same values and dtype in memory of its own."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
    return np.asarray(tensor)


def fill(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Set a library's parameter. Raises ValueError where torch would broadcast or cast silently."""
    if (parameter.shape, parameter.dtype) != (values.shape, values.dtype):
        raise ValueError(
            f"found {values.dtype} of shape {tuple(values.shape)}, expected {parameter.dtype} of "
            f"shape {tuple(parameter.shape)}"
        )
    with torch.no_grad():
        parameter.copy_(values)


def gradients(
    y: torch.Tensor, of: Mapping[str, torch.Tensor], dy: np.ndarray
) -> dict[str, torch.Tensor]:
    """The gradient of ⟨dy, y⟩ for each tensor, under its name, by autograd.

    0 where it has none: y does not depend on the tensor, as where it was detached, or the library
    has it not trained (``requires_grad``), which no peer may mend.
    """
    trained = {name: tensor for name, tensor in of.items() if tensor.requires_grad}
    found = {name: torch.zeros_like(tensor) for name, tensor in of.items()}
    if trained and y.requires_grad:
        tensors = list(trained.values())
        given = torch.autograd.grad(
            y, tensors, to_torch(dy), allow_unused=True, materialize_grads=True
        )
        found |= dict(zip(trained, given, strict=True))
    return found


def arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The tensors as arrays, under their names."""
    return {name: to_numpy(tensor) for name, tensor in tensors.items()}


def plain_number(value: float) -> float | int:
    """An integral alpha as the integer that a user would write, a fractional one as it is."""
    return int(value) if value == int(value) else value


class GivenMask(torch.nn.Module):
    """x·keep/(1 − p), rounded as torch.nn.Dropout rounds it, in place of a library's dropout.

    Raises ValueError where `replaced`, the library's own module, was not set up with this p.
    """

    def __init__(self, keep: np.ndarray, p: float, replaced: Callable[..., Any]) -> None:
        super().__init__()
        configured = getattr(replaced, "p", 0.0)  # both libraries put an identity for p = 0
        if configured != p:
            raise ValueError(f"the library set up dropout with p = {configured}, expected {p}")
        self.keep, self.p = torch.from_numpy(np.array(keep, dtype=bool)), p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.keep.to(x.dtype).div_(1 - self.p) if self.training else x
