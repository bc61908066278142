"""Weighted least squares of one number, and what counts as agreement."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import MONTE_CARLO, Comparison

Array = np.ndarray


@dataclass(frozen=True)
class Fit:
    """A number that was fitted by weighted least squares, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        """The value with as many digits as its error leaves."""
        if self.error == 0:
            return f"{self.value:.9g}"
        places = max(1, min(12, round(-np.log10(self.error / max(abs(self.value), 1e-30))) + 1))
        return f"{self.value:.{places}g} ± {self.error:.1g}"

    def agrees(self, other: float) -> bool:
        """Whether another number lies within six standard errors, or the digits of a float64."""
        return abs(self.value - other) <= 6 * self.error + 1e-12 * abs(other)


def fit(got: Array, part: Array, rest: Array, sigma: Array) -> tuple[Fit, Array]:
    """The c of got = rest + c · part by weighted least squares, and z of the residual."""
    sigma = np.where(sigma > 0, sigma, np.finfo(float).tiny ** 0.25)  # its inverse has a square
    weight = (part / sigma) ** 2
    total = float(weight.sum())
    if total == 0:
        return Fit(0.0, np.inf), np.full(np.shape(got), np.inf)
    c = float(((got - rest) * part / sigma**2).sum()) / total
    return Fit(c, 1 / sqrt(total)), (got - rest - c * part) / sigma


def sigma_of(comparison: Comparison) -> Array:
    """σ of got - want; in the exact lane, half a unit in the last place of the greatest entry."""
    want = np.asarray(comparison.want, float)
    if comparison.sigma is not None:
        return np.broadcast_to(np.asarray(comparison.sigma, float), want.shape)
    return np.full(want.shape, unit_roundoff("float64") * max(float(np.abs(want).max()), 1e-30))


def agreeing(z: Array) -> bool:
    """Whether these z are no more than rounding."""
    rms = np.sqrt((z * z).mean())
    return bool(np.abs(z).max() <= MONTE_CARLO.max_z and rms <= MONTE_CARLO.rms(z.size))
