"""A mutant: a wrong implementation, made by editing the source text of a right one."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
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


@cache
def source_of(part: Any) -> str:
    """The source text of a part, which takes longer to find than to execute."""
    return inspect.getsource(part)


@dataclass(frozen=True)
class Mutant:
    """One way to compute LoRA wrongly.

    ``formula`` is what is computed instead, in the notation y = x Wᵀ + b + s H Bᵀ, H = (K∘x) Aᵀ,
    G = ∂L/∂y, dH = s G B, t tokens. ``seen`` names public reports of it. ``make`` gives an
    implementation that reads so, and ``caught_by`` is the check that shows it best. An
    ``equivalent`` only looks wrong: it is the same function, written differently, and has to pass.
    ``reference`` and ``edits`` are what it was made of.
    """

    id: str
    family: str
    level: str
    formula: str
    seen: tuple[str, ...]
    make: Callable[[], Any]
    caught_by: str = ""
    equivalent: bool = False
    reference: Reference | None = field(default=None, compare=False, repr=False)
    edits: Edits = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Reference:
    """A right implementation: classes and functions, the last of which makes it.

    ``names`` are further names that edits may use, beside those of the parts' modules. ``rebind``
    is called with the namespace in which the edited parts stand.
    """

    parts: tuple[Any, ...]
    names: Mapping[str, Any] = field(default_factory=dict)
    rebind: Callable[[dict[str, Any]], None] | None = None

    def edited(self, edits: Edits) -> Callable[[], Any]:
        """What makes the edited implementation; ValueError where a text does not stand there once.

        The source is edited, and executed when it is first made.
        """

        @cache
        def executed() -> Any:
            space = dict(vars(helpers))
            for module in dict.fromkeys(part.__module__ for part in self.parts):
                space |= vars(sys.modules[module])
            space |= self.names
            texts = self._edited(edits)
            for part in self.parts:
                if isinstance(part, FunctionType) and part.__name__ not in texts:
                    space[part.__name__] = _within(space, part)
                else:
                    text = texts.get(part.__name__) or source_of(part)
                    exec(textwrap.dedent(text), space)
            if self.rebind:
                self.rebind(space)
            return space[self.parts[-1].__name__]

        return lambda: executed()()

    def _edited(self, edits: Edits) -> dict[str, str]:
        """The texts of the parts that are edited."""
        texts: dict[str, str] = {}
        parts = {part.__name__: part for part in self.parts}
        for key, new in edits.items():
            name, _, old = key.partition(": ")
            names, old = ([name], old) if name in parts else (list(parts), key)
            sources = {name: texts.get(name) or source_of(parts[name]) for name in names}
            if (count := sum(text.count(old) for text in sources.values())) != 1:
                raise ValueError(f"{old!r} stands {count} times in {', '.join(names)}, not once")
            texts |= {name: t.replace(old, new) for name, t in sources.items() if old in t}
        return texts


def _within(space: dict[str, Any], f: FunctionType) -> FunctionType:
    """The function, with the names that it uses looked up in another namespace."""
    g = FunctionType(f.__code__, space, f.__name__, f.__defaults__, f.__closure__)
    g.__kwdefaults__ = f.__kwdefaults__
    return g


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
            reference=reference,
            edits=edits,
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
