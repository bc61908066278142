"""One mutant, and a family of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """One way to read the equations wrongly.

    ``formula`` is what is computed instead, in the notation y = x Wᵀ + b + s H Bᵀ, H = (K∘x) Aᵀ,
    G = ∂L/∂y, dH = s G B, t tokens. ``seen`` names public reports of it. ``make`` gives an
    implementation that reads so, and ``caught_by`` is the check that shows it best. An
    ``equivalent`` only looks wrong: it is the same function, written differently, and has to pass.
    """

    id: str
    family: str
    level: str
    formula: str
    seen: tuple[str, ...]
    make: Callable[[], object]
    caught_by: str = ""
    equivalent: bool = False


def family(name: str, caught_by: str, *entries: tuple[Any, ...]) -> tuple[Mutant, ...]:
    """Mutants (name, formula, make, where it was seen …) that one check shows best."""
    level = caught_by.partition(".")[0]
    return tuple(
        Mutant(f"{name.lower()}-{own}", name, level, formula, tuple(seen), make, caught_by)
        for own, formula, make, *seen in entries
    )


def equivalents(level: str, *entries: tuple[Any, ...]) -> tuple[Mutant, ...]:
    """The same function in other ways (name, formula, make): right, and hence to pass."""
    return tuple(
        Mutant(f"same-{level}-{own}", "SAME", level, formula, (), make, equivalent=True)
        for own, formula, make in entries
    )
