"""VeRA's A and B, which all modules of an adapter share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.audit.adapters.factors import Factors, Found, lies_transposed
from minilora.audit.tensors import TensorStore
from minilora.io.errors import FormatError
from minilora.io.formats.peft.names import PROJECTIONS
from minilora.io.formats.peft.vera import vera_projections
from minilora.io.header import Place
from minilora.spec.initialization import shared_part
from minilora.spec.ops import Array


def with_projections(
    file: Path, found: Found, stored: Mapping[str, Place], base: TensorStore
) -> list[Factors]:
    """The modules' factors, each with its part of A and B: as saved, or as PEFT draws them.

    Errors: FormatError if a folder that is to hold them does not, or they are too small.
    """
    sizes = {f.module: _size(f, base) for f in found.factors}
    r = found.settings["r"]
    m = max((size[0] for size in sizes.values()), default=1)
    n = max((size[1] for size in sizes.values()), default=1)
    if found.settings["save_projection"]:
        missing = [name for name in PROJECTIONS.values() if name not in stored]
        if missing:
            remedy = "save_projection says that they are there: save the adapter again"
            raise FormatError(file, missing[0], "none", "the shared matrix", remedy)
        A, B = (_whole(stored[name]) for name in PROJECTIONS.values())
    else:
        A, B = vera_projections(found.settings["projection_prng_key"], r, m, n)
    if A.ndim != 2 or B.ndim != 2 or len(A) != r or B.shape[1] != r or len(B) < m or A.shape[1] < n:
        found_text, expected = (
            f"A {A.shape}, B {B.shape}",
            f"A ({r}, {n}) and B ({m}, {r}), or more",
        )
        raise FormatError(file, "vera_A", found_text, expected, "is it another model's?")
    return [_with_parts(f, A, B, *sizes[f.module]) for f in found.factors]


def _whole(place: Place) -> Array:
    return place.rows(0, place.shape[0] if place.shape else 1)


def _size(factors: Factors, base: TensorStore) -> tuple[int, int]:
    """m and n of the module's weight; (1, 1) of none."""
    tensor = base.weight_of(factors.module)
    rows = factors.shapes.get("lambda_b", (1,))
    if tensor is None or len(base[tensor].shape) < 2 or len(rows) != 1:
        return 1, 1
    shape = base[tensor].shape
    m, n = shape[0], math.prod(shape[1:])
    return (n, m) if lies_transposed(factors.module, rows[0], base, tensor) else (m, n)


def _with_parts(factors: Factors, A: Array, B: Array, m: int, n: int) -> Factors:
    own_A, own_B = shared_part(A, B, m, n)
    parts: dict[str, Any] = {**factors.parts, "A": lambda: own_A, "B": lambda: own_B}
    return replace(
        factors, parts=parts, shapes={**factors.shapes, "A": own_A.shape, "B": own_B.shape}
    )
