"""How a library's own LoRA layer is built and where its parameters lie, found by building one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

M, N, R, ALPHA = 5, 7, 3, 6
"""Sizes of the layer that is built: all different, so that shapes tell what a parameter is."""

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "n": ("in_features", "in_dim", "input_dim", "d_in", "n_in", "in_size", "input_size"),
    "m": ("out_features", "out_dim", "output_dim", "d_out", "n_out", "out_size", "output_size"),
    "r": ("r", "rank", "lora_rank", "lora_r", "lora_dim"),
    "alpha": ("lora_alpha", "alpha", "lora_scale_alpha"),
    "p": ("lora_dropout", "dropout", "dropout_p", "lora_dropout_p"),
    "bias is not None": ("bias", "use_bias"),
    "torch.nn.Linear(n, m, bias=bias is not None)": (
        *("base_layer", "linear", "layer", "base", "original", "module", "base_linear", "orig"),
    ),
}
"""What an argument of a constructor is given, by its name."""

MERGES = ("merge", "merge_weights", "merge_lora", "merge_adapter", "merge_and_unload", "fuse")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Guess:
    """How to build a layer, and where W, A, B and the bias lie.

    ``construct``: the call in Python; ``places``: the parameter of each, and whether it lies
    transposed; ``merge``: the method that merges; ``missing``: what could not be found out.
    """

    construct: str
    places: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    merge: str = ""
    missing: tuple[str, ...] = ()


def guess(layer: Any) -> Guess:
    """Look at a class of torch.nn.Module, and build one.

    Nothing but its constructor is called.
    """
    given, unknown = _arguments(layer)
    listed = ", ".join(f"{name}={value}" for name, value in given.items())
    call = f"Layer({listed})"
    if unknown:
        call = f"Layer({listed}, {', '.join(f'{name}=...' for name in unknown)})"
        return Guess(call, missing=tuple(f"the argument {name}" for name in unknown))
    try:
        shapes = _built(call, layer)
    except Exception as error:
        return Guess(call, missing=(f"{call} raises {type(error).__name__}: {error}",))
    places = dict(_places(shapes))
    missing = tuple(f"the parameter of {name}" for name in ("W", "A", "B") if name not in places)
    merge = next((name for name in MERGES if callable(getattr(layer, name, None))), "")
    return Guess(call, places, merge, missing)


def _arguments(layer: Any) -> tuple[dict[str, str], list[str]]:
    """What the constructor is given, and its required arguments that nothing is known of."""
    given, unknown = {}, []
    for parameter in inspect.signature(layer).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = next((v for v, names in ARGUMENTS.items() if parameter.name in names), None)
        if value is not None:
            given[parameter.name] = value
        elif parameter.default is parameter.empty:
            unknown.append(parameter.name)
    return given, unknown


def _built(call: str, layer: Any) -> Shapes:
    import torch

    names = {"Layer": layer, "torch": torch, "m": M, "n": N, "r": R, "alpha": ALPHA, "p": 0.0}
    made = eval(call, names | {"bias": ()})
    return {name: tuple(p.shape) for name, p in made.named_parameters()}


def _places(shapes: Shapes) -> Iterator[tuple[str, tuple[str, bool]]]:
    """The parameters of which just one has the shape, or its transpose."""
    for name, shape in (("W", (M, N)), ("A", (R, N)), ("B", (M, R)), ("bias", (M,))):
        fits = [
            (own, turned)
            for own, found in shapes.items()
            for turned in (False, True)
            if found == (shape[::-1] if turned else shape) and not (turned and name == "bias")
        ]
        if len(fits) == 1:
            yield name, fits[0]
