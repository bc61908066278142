"""How large the change of factors is, without the m times n of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minilora.spec.ops import Array


def core(A: Array, B: Array) -> Array:
    """A matrix with the singular values of B A, of r rows and columns at most.

    With B = Q R and Aᵀ = P S, both with orthonormal columns to the left, B A = Q (R Sᵀ) Pᵀ.

    Shapes: A (r, n), B (m, r) -> (min(m, r), min(n, r)).
    """
    R = _triangle(np.asarray(B, np.float64))
    S = _triangle(np.asarray(A, np.float64).T)
    product: Array = R @ S.T
    return product


def _triangle(M: Array) -> Array:
    """R of M = Q R."""
    R: Any = np.linalg.qr(M, mode="r")
    return np.asarray(R)


def singular_values(pairs: Sequence[tuple[Array, Array]]) -> Array:
    """The singular values of all B A together, the largest first."""
    values = [np.linalg.svd(core(A, B), compute_uv=False) for A, B in pairs]
    return np.sort(np.concatenate(values))[::-1]


def effective_rank(σ: Array) -> float:
    """exp(H) of the entropy H of σ / Σσ: r of r equal singular values, 1 of one; 0 of none.

    Source: Roy & Vetterli 2007, "The effective rank".
    """
    total = σ.sum()
    if not total > 0:
        return 0.0
    p = σ[σ > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))
