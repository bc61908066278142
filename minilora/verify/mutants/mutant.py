"""A mutant: a wrong implementation, made by editing the source text of a right one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from minilora.verify.mutants.references import helpers

Edits = Mapping[str, str]
"""Text that stands in a reference once -> the text that replaces it.

``"name: text"`` looks for the text in the part of this name alone.
"""

Table = Mapping[str, Sequence[tuple[Any, ...]]]
"""The check that shows a mutant best -> (name, what it computes, edits, reports of it …)."""

Same = Sequence[tuple[str, str, Edits]]
"""The right function in other words: (name, what is written otherwise, edits)."""


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
    make: Callable[[], Any]
    caught_by: str = ""
    equivalent: bool = False


@dataclass(frozen=True)
class Reference:
    """A right implementation: classes and functions, the last of which makes it.

    ``names`` are further names that edits may use, beside those of the parts' modules.
    """

    parts: tuple[Any, ...]
    names: Mapping[str, Any] = field(default_factory=dict)

    def edited(self, edits: Edits) -> Callable[[], Any]:
        """What makes the edited implementation; ValueError where a text does not stand there once.

        The source is edited, and executed when it is first made.
        """

        @cache
        def executed() -> Any:
            space = dict(vars(helpers))
            for part in self.parts:
                space |= vars(sys.modules[part.__module__])
            space |= self.names
            for text in self._texts(edits).values():
                exec(text, space)
            return space[self.parts[-1].__name__]

        return lambda: executed()()

    def _texts(self, edits: Edits) -> dict[str, str]:
        texts = {part.__name__: inspect.getsource(part) for part in self.parts}
        for key, new in edits.items():
            name, _, old = key.partition(": ")
            names, old = ([name], old) if name in texts else (list(texts), key)
            count = sum(texts[name].count(old) for name in names)
            if count != 1:
                raise ValueError(f"{old!r} stands {count} times in {', '.join(names)}, not once")
            for name in names:
                texts[name] = texts[name].replace(old, new)
        return texts


def mutants(reference: Reference, family: str, table: Table) -> tuple[Mutant, ...]:
    """The mutants of a family, in which each id begins with the family's name."""
    return tuple(
        Mutant(
            id=f"{family.lower()}-{name}",
            family=family,
            level=check.partition(".")[0],
            formula=formula,
            seen=tuple(seen),
            make=reference.edited(edits),
            caught_by=check,
        )
        for check, entries in table.items()
        for name, formula, edits, *seen in entries
    )


def equivalents(reference: Reference, level: str, entries: Same) -> tuple[Mutant, ...]:
    """The same function in other ways (name, formula, edits): right, and hence to pass."""
    return tuple(
        Mutant(f"same-{level}-{name}", "SAME", level, formula, (), reference.edited(edits),
               equivalent=True)
        for name, formula, edits in entries
    )  # fmt: skip
