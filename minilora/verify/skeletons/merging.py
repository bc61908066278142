"""The method or function of a library that merges a layer's adapter, found by trying them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minilora.verify.skeletons.build import build, namespace, tensors
from minilora.verify.skeletons.calls import Call, modules
from minilora.verify.skeletons.guess import M, Merge, N, Place, values
from minilora.verify.skeletons.names import MERGES, UNMERGES

EVALUATION = "layer.eval()"
"""What merges where a layer is merged in evaluation."""


def merging(call: Call, places: Mapping[str, Place]) -> tuple[Merge | None, list[str]]:
    """How the library merges; or None, and what its methods raise that are named so."""
    import torch

    said = []
    for expression in _expressions(call):
        layer, names = _filled(call, places)
        try:
            given = eval(expression, names)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            said.append(f"{expression} raises {why}")
            continue
        holder = "merged" if isinstance(given, torch.Tensor | torch.nn.Module) else "layer"
        held = given if holder == "merged" else layer
        own = {"": held} if isinstance(held, torch.Tensor) else tensors(held)
        place = _place(own, places)
        if place and (expression != EVALUATION or _has_changed(layer, place)):
            return Merge(expression, holder, place, _bias(own, places)), []
    return None, said


def unmerging(call: Call, places: Mapping[str, Place], merge: Merge) -> str:
    """The method that takes out of W what merging has put into it; "" for none."""
    if merge.holder != "layer" or merge.place != places.get("W"):
        return ""
    for name in UNMERGES:
        layer, names = _filled(call, places)
        if not callable(getattr(layer, name, None)):
            continue
        try:
            eval(merge.expression, names)
            getattr(layer, name)()
        except Exception:
            continue
        return name
    return ""


def _expressions(call: Call) -> Iterator[str]:
    """What the library has by a name that means merging; ``base`` is a linear layer with W."""
    layer, names = _filled(call, {})
    for name in MERGES:
        if callable(getattr(layer, name, None)):
            yield f"layer.{name}()"
            yield f"layer.{name}(base)"
    found = modules(str(call))
    for at in dict.fromkeys([*found, *(module.partition(".")[0] for module in found)]):
        for name in MERGES:
            if callable(getattr(eval(at, names), name, None)):
                yield f"{at}.{name}(layer)"
    yield EVALUATION


def _filled(call: Call, places: Mapping[str, Place]) -> tuple[Any, dict[str, Any]]:
    """A new layer with random parts, and the names of what an expression may use."""
    import torch

    built = build(call)
    parts = values(built.r)
    built.fill(places, parts)
    built.layer.train()
    base = torch.nn.Linear(N, M).to(torch.float64)
    base.weight.data = torch.from_numpy(parts["W"])
    return built.layer, namespace(call) | {"layer": built.layer, "base": base}


def _place(own: Mapping[str, Any], places: Mapping[str, Place]) -> Place | None:
    """Where the merged weight lies."""
    fits = [
        (name, tuple(tensor.shape) == (N, M))
        for name, tensor in own.items()
        if tuple(tensor.shape) in ((M, N), (N, M))
    ]
    if places.get("W") in fits:
        return places["W"]
    return fits[0] if len(fits) == 1 else None


def _bias(own: Mapping[str, Any], places: Mapping[str, Place]) -> str:
    """Where the bias lies; "" where that is not clear."""
    fits = [name for name, tensor in own.items() if tuple(tensor.shape) == (M,)]
    before = places.get("bias", ("", False))[0]
    if before in fits:
        return before
    return fits[0] if len(fits) == 1 else ""


def _has_changed(layer: Any, place: Place) -> bool:
    name, turned = place
    weight = tensors(layer)[name].detach().numpy()
    return not np.array_equal(weight.T if turned else weight, values()["W"])
