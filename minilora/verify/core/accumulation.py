"""Layers whose sums are small, and whose partial sums need more digits than the storage has.

Along one long axis entries come in pairs that nearly cancel, in no order: Σ p q = Σ p d, with q and
d - q in the two places of a pair. All terms are whole numbers, so that an accumulation with the
digits of float32 rounds nothing, in any order, and answers compare by ==. One in half precision,
even of the sums of blocks, loses the digits that remain.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Skip
from minilora.verify.core.inputs import SCALES, Layer, columns, whole_numbers
from minilora.verify.core.types import Case

Array = np.ndarray

LONG, SHORT = 512, {"t": 3, "n": 5, "m": 4, "r": 2}
"""The length of the long axis, and of the others: tokens, n, m, r."""

SAME = {"n": "x", "r": "A", "t": "x", "m": "dy"}
"""The array that is equal in both places of a pair along each axis."""

OPPOSITE = {"n": "WA", "r": "B", "t": ("dy",), "m": "WB"}
"""Those that nearly cancel."""

SIDES = {"x": "tn", "W": "mn", "A": "rn", "B": "mr", "dy": "tm"}


def draw_cancelling(case: Case, axis: str) -> Layer:
    """A layer of whole numbers with the sums over this axis in pairs; s is a power of two.

    Every array that an implementation may store, and every sum along another axis, is a number of
    the dtype.
    """
    rng, dtype, fixed = case.rng(), DTYPES[case.dtype], case.fixed
    size = SHORT | {axis: LONG}
    large = int(0.75 * whole_numbers(case.dtype) ** 0.5)
    if axis == "r" and (fixed.ranks or isinstance(fixed.alpha, float | int)):
        raise Skip(f"no sum over many ranks has {fixed.words()}")
    free = 1.0 if fixed.alpha else None
    size["r"], only = (LONG, free) if axis == "r" else fixed.exact(size["r"])
    s = float(rng.choice(SCALES)) if only is None else only
    order = rng.permutation(LONG)
    one, other = order[: LONG // 2], order[LONG // 2 :]
    while True:
        arrays: dict[str, Any] = {}
        for name, sides in SIDES.items():
            shape = tuple(size[side] for side in sides)
            is_paired = name == SAME[axis] or name in OPPOSITE[axis]
            few = rng.integers(-1, 2, shape) * (rng.random(shape) < 0.5)
            array = rng.integers(-large, large + 1, shape) if is_paired else few
            if is_paired:
                place: Any = (slice(None),) * sides.index(axis)
                kept = array[(*place, one)]
                rest = few[(*place, one)] * (rng.random(kept.shape) < 0.04)
                array[(*place, other)] = kept if name == SAME[axis] else rest - kept
            arrays[name] = array.astype(np.float64)
        layer = Layer(**arrays, alpha=s * size["r"], r=size["r"], bias=few_of(rng, size["m"]))
        if _fits(layer, axis, case.dtype):
            kinds = {name: array.astype(dtype) for name, array in arrays.items()}
            bias = None if layer.bias is None else layer.bias.astype(dtype)
            return Layer(**vars(layer) | kinds | {"bias": bias})


def few_of(rng: Any, m: int) -> Array:
    """A small bias."""
    return np.asarray(rng.integers(-2, 3, m), np.float64)


def _fits(layer: Layer, axis: str, dtype: str) -> bool:
    """Whether nothing that may be stored is rounded, and no sum along another axis."""
    whole = whole_numbers(dtype) * min(layer.s, 1.0)
    x, dy = columns(layer.x), columns(layer.dy)
    W, A, B, s = layer.W, layer.A, layer.B, layer.s
    u, du = A @ x, B.T @ dy
    products = {
        "n": [(W, x), (A, x)],
        "r": [(B, u), (A.T, du), (B, A)],
        "t": [(dy, x.T), (du, x.T), (dy, u.T)],
        "m": [(W.T, dy), (B.T, dy)],
    }
    stored = [P @ Q for pairs in products.values() for P, Q in pairs]
    base, back = W @ x, W.T @ dy
    stored += [base + s * (B @ u), back + s * (A.T @ du), W + s * (B @ A), dy.sum(1)]
    sums = [
        np.abs(P) @ np.abs(Q)
        for along, pairs in products.items()
        for P, Q in (pairs if along != axis else ())
    ]
    greatest = max(1.0, s) * max(float(np.max(v)) for v in [*map(np.abs, stored), *sums])
    return greatest <= whole
