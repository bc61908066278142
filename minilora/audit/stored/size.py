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
    """The singular values of all B A together, the largest first; those below √u of it as noise.

    They are the roots of the eigenvalues of √G (Bᵀ B) √G with G = A Aᵀ, which takes products alone.
    """
    return np.sort(np.concatenate([_of(A, B) for A, B in pairs]))[::-1]


def _of(A: Array, B: Array) -> Array:
    """The singular values of one B A, in no order."""
    sizes = [float(np.abs(x).max(initial=0)) or 1.0 for x in (A, B)]
    A, B = (np.asarray(x, np.float64) / size for x, size in zip((A, B), sizes, strict=True))
    λ, V = np.linalg.eigh(A @ A.T)
    root = V * np.sqrt(np.maximum(λ, 0))
    squares = np.linalg.eigvalsh(root.T @ (B.T @ B) @ root)
    found: Array = np.sqrt(np.maximum(squares, 0)) * (sizes[0] * sizes[1])
    return found


def effective_rank(σ: Array) -> float:
    """exp(H) of the entropy H of σ / Σσ: r of r equal singular values, 1 of one; 0 of none.

    Source: Roy & Vetterli 2007, "The effective rank".
    """
    total = σ.sum()
    if not total > 0:
        return 0.0
    p = σ[σ > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))
