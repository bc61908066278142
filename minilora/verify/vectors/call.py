"""What the true answers of a vector are made from: a call, and numbers that are cut.

Where floating point could decide how a number is cut, nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.verify.core.bigfloat import rounded
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.tolerance import Rounding
from minilora.verify.core.types import Limits
from minilora.verify.vectors.vector import Output

Array = np.ndarray

SIGMA_BITS = 8
"""The binary digits of a sigma."""

MARGIN = 2.0**-33
"""The least distance of a sigma's significand from a rounding boundary: far above what the order of
a sum changes, some 2⁻⁵⁰ of a sigma in closed form and 2⁻³⁹ of a sampled one."""

FINE = 2.0**-14
"""The unit roundoff with which sigmas of float32 and float64 are sampled, and then scaled. At their
own, float64's rounding of the sample itself would be as large."""


@dataclass(frozen=True)
class Call:
    """A call of a method, its lane and dtypes, the name that seeds the noise, and its files."""

    method: str
    arguments: dict[str, Any]
    lane: str
    dtypes: tuple[str, ...]
    name: str
    files: Mapping[str, bytes] = field(default_factory=dict)

    def sigma(self, of: Callable[[Precision], Any]) -> dict[str, Any]:
        """A sigma by precision, for each dtype; none in the exact lane."""
        return {d: of(Precision(d, d)) for d in self.dtypes if self.lane != "exact"}

    def output(
        self, want: Any, sigma: Mapping[str, Array], allowed: Limits, optional: bool = False
    ) -> Output:
        """An answer from exact numbers. In float64 the stored answer has been rounded, too."""
        nearest = rounded(want)
        if self.lane == "exact":
            return Output(nearest, {}, optional=optional)
        stored = Rounding(Precision("float64", "float64")).stored(nearest)
        with_storage = {
            d: np.sqrt(s**2 + stored) if d == "float64" else s for d, s in sigma.items()
        }
        return Output(
            nearest,
            {dtype: coarse(array) for dtype, array in with_storage.items()},
            allowed.max_z,
            round(allowed.rms(nearest.size), 4),
            optional,
        )


Answers = tuple[dict[str, Output], dict[str, dict[str, Output]]]
"""Outputs, and alternatives to some of them by convention."""


def coarse(sigma: Array) -> Array:
    """Rounded to `SIGMA_BITS` binary digits, as float32; a negligible one is 0.

    ArithmeticError where the last bits of the floating-point sigma decide which way.
    """
    kept = np.where(sigma < 2.0**-120, 0.0, sigma)
    _, exponent = np.frexp(kept)
    return cut(kept, exponent - SIGMA_BITS, MARGIN * kept).astype(np.float32)


def cut(array: Array, exponent: Any, noise: Array, boundary: float = 0.5) -> Array:
    """Each number as a multiple of 2 to the power of ``exponent``: up from this part of one.

    ArithmeticError where a change by ``noise`` could decide which.
    """
    scaled = np.ldexp(array, -exponent)
    beyond = scaled - np.floor(scaled) - boundary
    if (np.abs(beyond) < np.ldexp(noise, -exponent)).any():
        raise ArithmeticError("a digit may round differently on another machine: use another case")
    kept: Array = np.ldexp(np.floor(scaled) + (beyond > 0), exponent)
    return kept


def rounding_of(dtype: str) -> Rounding:
    """The rounding of a dtype; without one, the unit roundoff `FINE` and no underflow."""
    rounding = Rounding(Precision(dtype or "float32", dtype or "float32"))
    if not dtype:
        rounding.u = rounding.u_sum = FINE
        rounding.tiny = 0.0
    return rounding
