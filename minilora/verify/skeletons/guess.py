"""What is found out about a library's LoRA layer, and the sizes that it is built of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

T, M, N, R, ALPHA = 11, 5, 7, 3, 6.0
"""The sides of the layer that is tried: all different, so that a shape names its array."""

SHAPES: Mapping[str, tuple[str, ...]] = {
    "W": ("m", "n"),
    "A": ("r", "n"),
    "B": ("m", "r"),
    "bias": ("m",),
}

Place = tuple[str, bool]
"""The name of a parameter, and whether it lies transposed."""


class Merge(NamedTuple):
    """What merges.

    ``holder``: "merged", which is what the expression gives, or "layer"; ``place``: of the weight
    in it, "" where it is the weight itself; ``bias``: the name of the bias in it, "" for none.
    """

    expression: str
    holder: str
    place: Place
    bias: str = ""


@dataclass(frozen=True)
class Guess:
    """How to build a layer, or to call a function that computes one, and where its parts lie.

    ``build``: lines of Python that make ``layer``, or one expression of a function; ``modules``:
    what they import; ``places``: of W, A, B and bias; ``form``: "layer" where its forward gives y,
    "branch" where it gives what the adapter adds to y, "weight" where it is given W and gives
    W + ΔW, "function"; ``unmerge``: the method; ``fixed``: what the layer
    has one value of; ``has_rslora``: whether it takes ``use_rslora``; ``said``: what a reader
    should know; ``missing``: what could not be found out.
    """

    build: tuple[str, ...]
    modules: tuple[str, ...] = ()
    places: Mapping[str, Place] = field(default_factory=dict)
    form: str = "layer"
    merge: Merge | None = None
    unmerge: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    has_rslora: bool = False
    said: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def values(r: int = R) -> dict[str, np.ndarray]:
    """Random parts, and x."""
    draw = np.random.default_rng(0).standard_normal
    sizes = {"m": M, "n": N, "r": r}
    drawn = {part: draw(tuple(sizes[a] for a in axes)) for part, axes in SHAPES.items()}
    return drawn | {"x": draw((T, N))}


def factor(added: np.ndarray, parts: Mapping[str, np.ndarray], x: np.ndarray) -> float | None:
    """What x Aᵀ Bᵀ is multiplied by in what was added; None if that is no multiple of it."""
    branch = x @ parts["A"].T @ parts["B"].T
    if added.shape != branch.shape:
        return None
    found = float((added * branch).sum() / (branch * branch).sum())
    return found if np.allclose(added, found * branch, rtol=1e-4) else None
