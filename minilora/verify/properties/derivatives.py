"""How far `back` is from the derivative of the forward lines, by a complex step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.spec.lora import merge_weight
from minilora.spec.ops import Array, Back
from minilora.spec.variants import REGISTRY, rescaled_linear, row_norm
from minilora.verify.properties.layer_kinds import LayerCase, answers


def constant_norm_linear(
    x: Any, W: Array, b: Array | None, A: Array, B: Array, magnitude: Array, s: Any, K: Any = None
) -> tuple[Array, Back]:
    """y = that of `dora_linear` as its ``back`` sees it: a complex step leaves the norm as it is.

    So the derivative of this is what DoRA's ``back`` gives, which that of `dora_linear` is not.
    """
    v, _ = row_norm(merge_weight(W, A.real, B.real, s))
    y, back = rescaled_linear(x, W, b, A, B, magnitude, v, s, K)
    return y, lambda dy: back(dy)[:-1]


STEP = 1e-30
"""The complex step: its square vanishes beside every number here, so that it adds no error."""


def derivative_error(case: LayerCase, rng: np.random.Generator) -> float:
    """How far the gradients of a float64 case are from its forward's derivative, relatively.

    Along a random direction v of each argument in turn, by a complex step: |⟨g, v⟩ - derivative|
    over Σ |g ∘ v|, the greatest. DoRA with the norm held is differentiated with the norm held.
    """
    constant_norm = REGISTRY[case.entry].constant_norm
    f = constant_norm_linear if constant_norm else case.variant.linear
    _, dx, dP = answers(case)
    worst = 0.0

    def error(gradient: Array, stepped: Callable[[Array], LayerCase]) -> float:
        v = rng.standard_normal(gradient.shape)
        derivative = (case.dy * stepped(STEP * 1j * v).forward(f)[0]).sum().imag / STEP
        terms = (gradient * v).ravel()
        size = float(abs(terms).sum())
        difference = float(abs(derivative - terms.sum()))
        return 0.0 if difference == 0 else difference / size if size else math.inf

    if dx is not None:
        worst = error(dx, lambda step: replace(case, x=case.x + step))
    for i, d in enumerate(dP):
        for j, name in enumerate(case.variant.parts):

            def stepped(step: Array, i: int = i, j: int = j) -> LayerCase:
                P = [list(part) for part in case.P]
                P[i][j] = P[i][j] + step
                return replace(case, P=tuple(map(tuple, P)))

            worst = max(worst, error(d[name], stepped))
    return worst
