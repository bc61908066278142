"""What the families have that are not edits yet."""

from __future__ import annotations

from typing import Any

from minilora.verify.mutants.mutant import Mutant


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
