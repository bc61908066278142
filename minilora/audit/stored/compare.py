"""Two files' changes of one module, compared through their factors: no m x n of them is formed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minilora.audit.floats import format_of
from minilora.audit.rounding import reach
from minilora.audit.stored.module import Held, OpenModule
from minilora.audit.stored.size import core
from minilora.spec.ops import Array

U = 2.0**-53


@dataclass(frozen=True, eq=False)
class Factored:
    """s B A as a file has it, and how far each entry of A and B may be from what was stored.

    Shapes: A, off_A (r, n); B, off_B (m, r); all in float64.
    """

    A: Array
    B: Array
    s: float
    off_A: Array
    off_B: Array

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.B), self.A.shape[1]

    @cached_property
    def norm(self) -> float:
        """‖s B A‖."""
        return abs(self.s) * float(np.linalg.norm(core(self.A, self.B)))

    @cached_property
    def off(self) -> float:
        """How far s B A may be from that of the numbers that A and B are roundings of.

        |(B + E)(A + D) - B A| ≤ |B| |D| + |E| |A| + |E| |D|, entry by entry.
        """
        A, B, D, E = abs(self.A), abs(self.B), self.off_A, self.off_B
        return abs(self.s) * (_norm(D, B) + _norm(A, E) + _norm(D, E))

    @property
    def transposed(self) -> Factored:
        """s (B A)ᵀ."""
        return Factored(self.B.T, self.A.T, self.s, self.off_B.T, self.off_A.T)

    def ordered(self, rows: Array) -> Factored:
        """With these rows of B, in this order."""
        return Factored(self.A, self.B[rows], self.s, self.off_A, self.off_B[rows])


def _norm(A: Array, B: Array) -> float:
    """‖B A‖ of factors that are not negative, by their Gram matrices, which add no signs."""
    return math.sqrt(float(np.sum((B.T @ B) * (A @ A.T))))


def factored(module: OpenModule, s: float) -> list[Factored]:
    """The module's matrices with the scale s, each with its roundings."""
    offs = [_off(module.parts[part]) for part in "AB"]
    pairs = module.pairs()
    gaps = module.split(*offs)
    return [
        Factored(np.asarray(A, np.float64), np.asarray(B, np.float64), s, D, E)
        for (A, B), (D, E) in zip(pairs, gaps, strict=True)
    ]


def _off(held: Held) -> Array:
    """How far each entry may be from the number that was stored: half a unit in the last place."""
    values = np.asarray(held.read(), np.float64)
    if held.spacing is not None:
        return reach(held.scheme or "", np.asarray(held.spacing(), np.float64), values)
    form = format_of(held.dtype)
    bound: Array = np.maximum(form.u * abs(values), form.eta / 2)
    return bound


@dataclass(frozen=True)
class Likeness:
    """How alike Y is to X: ``factor`` f, by which f X is nearest to Y, and how far it may be.

    ``difference``: ‖Y - X‖; ``rest``: ‖Y - f X‖; ``bound``: what roundings and the comparison
    itself may make of either; ``norm``: ‖X‖.
    """

    factor: float
    factor_error: float
    difference: float
    rest: float
    bound: float
    norm: float

    @property
    def is_same(self) -> bool:
        """Whether Y is X, as far as numbers that were rounded can say."""
        return self.difference <= self.bound

    @property
    def is_multiple(self) -> bool:
        """Whether Y is f X, and f is not 0."""
        return self.rest <= self.bound and abs(self.factor) > self.factor_error


def likeness(X: Sequence[Factored], Y: Sequence[Factored]) -> Likeness:
    """Y beside X, all their matrices together.

    ‖Y - f X‖ is that of one product of factors of the rank of both, so that nothing cancels but in
    numbers of the size of X and Y: its error is that of two QR decompositions, each at most
    γ = 8 k U times the norm, k the product of the sides (Higham 2002, theorem 19.4).
    """
    inner = sum(_inner(x, y) for x, y in zip(X, Y, strict=True))
    square = sum(x.norm**2 for x in X)
    f = inner / square if square else 0.0
    size = math.hypot(*(x.norm for x in X)), math.hypot(*(y.norm for y in Y))
    sides = max(max(x.shape) * (len(x.A) + len(y.A)) for x, y in zip(X, Y, strict=True))
    both = size[0] + size[1]
    own = 8 * sides * U * both
    roundings = sum(x.off * max(1.0, abs(f)) for x in X) + sum(y.off for y in Y)
    bound = own + roundings
    return Likeness(
        f,
        bound / size[0] if size[0] else math.inf,
        _apart(X, Y, 1.0),
        _apart(X, Y, f),
        bound,
        size[0],
    )


def _inner(x: Factored, y: Factored) -> float:
    """⟨X, Y⟩ = Σ (B₁ᵀ B₂) ∘ (A₁ A₂ᵀ), times both scales."""
    return x.s * y.s * float(np.sum((x.B.T @ y.B) * (x.A @ y.A.T)))


def _apart(X: Iterable[Factored], Y: Iterable[Factored], f: float) -> float:
    """‖Y - f X‖."""
    return math.hypot(
        *(
            float(
                np.linalg.norm(
                    core(np.concatenate([x.A, y.A]), np.hstack([-f * x.s * x.B, y.s * y.B]))
                )
            )
            for x, y in zip(X, Y, strict=True)
        )
    )
