"""Building a layer of PyTorch by a call, and finding its parts in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from typing import Any

import numpy as np

from minilora.verify.skeletons.calls import Call, modules
from minilora.verify.skeletons.guess import ALPHA, SHAPES, M, N, Place, R, T, values
from minilora.verify.skeletons.names import MODEL, only

RANKS = range(1, 129)
"""The ranks that a layer may have by itself."""


@dataclass
class Built:
    """A layer in float64. ``is_in_place``: the call changed a model and gave none."""

    layer: Any
    is_in_place: bool
    r: int

    def places(self) -> dict[str, Place]:
        """The place of each part: what has its shape, or the transposed one."""
        sizes = {"m": M, "n": N, "r": self.r}
        found = {}
        for part, axes in SHAPES.items():
            shape = tuple(sizes[axis] for axis in axes)
            if place := only(part, _fitting(self.layer, shape)):
                found[part] = place
        return found

    def fill(self, places: Mapping[str, Place], parts: Mapping[str, np.ndarray]) -> None:
        """Write the parts."""
        import torch

        own = tensors(self.layer)
        with torch.no_grad():
            for part, (name, turned) in places.items():
                own[name].copy_(torch.from_numpy(parts[part].T if turned else parts[part]))

    def answer(self, x: np.ndarray) -> np.ndarray | None:
        """What its forward makes of an array; None where it raises, or gives no array."""
        import torch

        self.layer.eval()
        try:
            with torch.no_grad():
                y = self.layer(torch.from_numpy(x.copy()))
            return np.asarray(y.numpy())
        except Exception:
            return None


def build(call: Call, r: int = R, alpha: float = ALPHA) -> Built:
    """The layer that a call makes, with a bias where it can have one."""
    import torch

    given = {"m": M, "n": N, "r": r, "alpha": alpha, "p": 0.0, "bias": (), "use_rslora": False}
    names = namespace(call) | given
    model = eval(MODEL, names)
    inner = {name: "model" if value == MODEL else value for name, value in call.given.items()}
    made = eval(str(replace(call, given=inner)), names | {"model": model})
    is_in_place = "model" in inner.values() and not isinstance(made, torch.nn.Module)
    made = model if is_in_place else made
    if not isinstance(made, torch.nn.Module):
        raise TypeError(f"it gives {type(made).__name__}, expected a torch.nn.Module")
    built = Built(made.to(torch.float64), is_in_place, r)
    if not has_factors(built):
        built.r = next((k for k in RANKS if has_factors(Built(built.layer, is_in_place, k))), r)
    return built


def has_factors(built: Built) -> bool:
    """Whether A and B are found at its rank."""
    return built.r not in (M, N) and {"A", "B"} <= built.places().keys()


def form(built: Built, places: Mapping[str, Place]) -> str:
    """What its forward takes and gives, as in Guess; "" if that is none of these."""
    parts = values(built.r)
    built.fill(places, parts | {"B": np.zeros_like(parts["B"])})
    y = built.answer(parts["x"])
    if y is not None and y.shape == (T, M):
        if "W" in places:
            return "layer"
        return "" if y.any() else "branch"  # what stays is of a W that was not found
    changed = built.answer(parts["W"])
    same = changed is not None and np.array_equal(changed, parts["W"])
    return "weight" if same and "W" not in places else ""


def lines(call: Call, is_in_place: bool) -> tuple[str, ...]:
    """The lines of Python that make ``layer``."""
    if not is_in_place:
        return (f"layer = {call}",)
    inner = {name: "layer" if value == MODEL else value for name, value in call.given.items()}
    return f"layer = {MODEL}", str(replace(call, given=inner))


def namespace(call: Call) -> dict[str, Any]:
    """What the text of a call needs, but its arguments."""
    import torch

    roots = {module.partition(".")[0] for module in modules(str(call))}
    return {"torch": torch} | {root: import_module(root) for root in roots}


def tensors(layer: Any) -> dict[str, Any]:
    """A module's parameters and buffers by name."""
    return dict(chain(layer.named_parameters(), layer.named_buffers()))


def _fitting(layer: Any, shape: tuple[int, ...]) -> Iterator[Place]:
    for name, tensor in tensors(layer).items():
        if tuple(tensor.shape) in (shape, shape[::-1]):
            yield name, tuple(tensor.shape) != shape
