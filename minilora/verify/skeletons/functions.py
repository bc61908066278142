"""Looking at a function of PyTorch or JAX that computes a layer from its arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np

from minilora.verify.skeletons.build import namespace
from minilora.verify.skeletons.calls import Call, calls, modules
from minilora.verify.skeletons.guess import ALPHA, Guess, M, R, T, factor, values
from minilora.verify.skeletons.names import ARGUMENTS, ARRAYS
from minilora.verify.skeletons.scale import Measured, scale_of

SCALARS = ("r", "alpha", "alpha / r", "p", "use_rslora")
KNOWN = {**ARRAYS, **{value: ARGUMENTS[value] for value in SCALARS}}
NO_BIAS = "0 * W[:, 0] if bias is None else bias"
TRIED = ("x", "W", "A", "B", "r", "alpha")

Convert = Callable[[np.ndarray], Any]
"""From NumPy to arrays of the library."""


def convert_of(kind: str) -> Convert:
    """The arrays of PyTorch or JAX, in float64."""
    if kind == "torch":
        import torch

        return lambda array: torch.from_numpy(array.copy())
    import jax

    jax.config.update("jax_enable_x64", True)
    return lambda array: jax.numpy.asarray(array)


def look_at_function(function: Any, module: str, name: str, kind: str) -> Guess | None:
    """How the function is called, if it computes y, or what the adapter adds to it."""
    convert = convert_of(kind)
    target = f"{module}.{name}"
    try:
        found = list(calls(function, target, KNOWN, TRIED))
    except (TypeError, ValueError):  # it has no signature
        return None
    for call in found:
        if call.unknown or not all(call.gives(part) for part in ("x", "A", "B")):
            continue
        for laid in _layouts(call):
            y = _answer(laid, R, convert)
            if y is not None and y.shape == (T, M):
                return _whole(_without_bias(laid, convert), convert)
    return None


def _layouts(call: Call) -> Iterator[Call]:
    """The call with W, A and B as they are and transposed."""
    own = [name for name, value in call.given.items() if value in ("W", "A", "B")]
    for turns in product(("", ".T"), repeat=len(own)):
        yield call.giving(
            {name: call.given[name] + turn for name, turn in zip(own, turns, strict=True)}
        )


def _without_bias(call: Call, convert: Convert) -> Call:
    """The call as it can also be made without a bias: of None, or of zeros."""
    if not call.gives("bias") or _answer(call, R, convert, {"bias": None}) is not None:
        return call
    zeros = {name: NO_BIAS for name, value in call.given.items() if value == "bias"}
    return call.giving(zeros)


def _whole(call: Call, convert: Convert) -> Guess:
    measured = _measured(convert)
    fixed: dict[str, Any] = {}
    said = []
    if call.gives("W") and not call.gives("bias"):
        fixed["bias"] = False
    call, found, says = scale_of(call, R, measured)
    fixed |= found
    said += says
    said += [f"{name} is given {call.given[name]}" for name in call.tried if name not in str(said)]
    base = "" if call.gives("W") else "x @ W.T + (0 if bias is None else bias) + "
    start = Guess((f"{base}{call}",), tuple(modules(str(call))), form="function")
    return replace(start, fixed=fixed, has_rslora=call.gives("use_rslora"), said=tuple(said))


def _measured(convert: Convert) -> Measured:
    def measured(call: Call, r: int) -> float | None:
        y, parts = _answer(call, r, convert), values(r)
        if y is None:
            return None
        if call.gives("W"):
            y = y - parts["x"] @ parts["W"].T - (parts["bias"] if call.gives("bias") else 0)
        return factor(y, parts, parts["x"])

    return measured


def _answer(
    call: Call, r: int, convert: Convert, others: Mapping[str, Any] = MappingProxyType({})
) -> np.ndarray | None:
    """What the function gives; None where it raises."""
    arrays: Mapping[str, Any] = {name: convert(value) for name, value in values(r).items()}
    names = {"r": r, "alpha": ALPHA, "p": 0.0, "use_rslora": False, **arrays, **others}
    try:
        return np.asarray(eval(str(call), namespace(call) | names))
    except Exception:
        return None
