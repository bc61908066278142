"""Which argument scales the branch; where none does, what the scale is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minilora.verify.skeletons.build import build
from minilora.verify.skeletons.calls import Call
from minilora.verify.skeletons.guess import Place, R, factor, values

OTHER = 2 * R + 2
"""Another rank, which is no side of the layer."""

Measured = Callable[[Call, int], float | None]
"""The scale of the branch that a call at a rank gives."""


def of_layer(places: Mapping[str, Place], form: str) -> Measured:
    """Measure layers of PyTorch."""

    def measured(call: Call, r: int) -> float | None:
        try:
            built = build(call, r)
        except Exception:
            return None
        parts = values(built.r)
        built.fill(places, parts)
        x = np.eye(parts["W"].shape[1]) if form == "weight" else parts["x"]
        got = built.answer(parts["W"] if form == "weight" else x)
        if got is None:
            return None
        if form == "weight":
            return factor((got - parts["W"]).T, parts, x)
        if form == "layer":
            got = got - x @ parts["W"].T - (parts["bias"] if "bias" in places else 0)
        return factor(got, parts, x)

    return measured


def scale_of(call: Call, r: int, measured: Measured) -> tuple[Call, dict[str, Any], list[str]]:
    """The call with its scale, what no argument of it sets, and what to say of both."""
    if call.gives("alpha"):
        return call, {}, []
    call, says = scaled_by(call, r, measured)
    said = [says] if says else []
    if call.gives("alpha"):
        return call, {}, said
    value, says = alpha(call, r, measured)
    return call, {} if value is None else {"alpha": value}, [*said, says]


def scaled_by(call: Call, r: int, measured: Measured) -> tuple[Call, str]:
    """The call with its scale in the argument that acts as one, and what to say of it."""
    for name in dict.fromkeys((*call.tried, *call.free)):
        one, three = (measured(call.giving({name: value}), r) for value in ("2.0", "6.0"))
        if not one or three is None or not np.isclose(three, 3 * one):
            continue
        given = "alpha / r" if np.isclose(one, 2.0) else "alpha"
        return call.giving({name: given}), f"{name} is given {given}: the branch is scaled by it"
    return call, ""


def alpha(call: Call, r: int, measured: Measured) -> tuple[Any, str]:
    """The alpha that a scale stands for which no argument sets, and what to say of it.

    It is "r" where the scale is 1 at every rank; None where no scale was found.
    """
    scale = measured(call, r)
    if scale is None:
        return None, "no argument sets the scale, and what it is was not found out"
    other = measured(call, OTHER) if call.gives("r") else None
    is_one = np.isclose(scale, 1.0) and (other is None or np.isclose(other, 1.0))
    said = f"no argument sets the scale, which is {scale:g} at rank {r}"
    return "r" if is_one else float(f"{scale * r:.6g}"), said
