"""Mutants made of mutants: with the gradients of their own forward, of sessions, two at once."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from minilora.verify.mutants.lifecycle import SESSION
from minilora.verify.mutants.linear import LINEAR
from minilora.verify.mutants.mutant import Edits, Mutant, Reference
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.linear import Linear

STEP = 2.0**-100
"""Of a complex step: a power of two, so that whole numbers stay whole."""

MAX_ENTRIES = 600
"""So many entries of x, A and B are differentiated, one forward each."""

DIFFERENTIATED = ("x", "A", "B", "bias", "magnitude", "lora_bias")

AND = " + "
"""Between the ids of two mutants at once."""


class Signed(np.ndarray):
    """Complex numbers a + i h whose absolute value is ± themselves: |·| has a derivative here."""

    def __abs__(self) -> Any:
        return np.where(self.real < 0, -self, self)


class OfMutant:
    """A mutant of a layer, with other gradients."""

    def __init__(self, mutant: Any) -> None:
        self.mutant = mutant

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mutant, name)


class Differentiated(OfMutant):
    """A mutant of `Linear` as an autograd library has it: its gradients are its forward's.

    ∂⟨dy, y⟩/∂v = ⟨dy, Im y(v + i h)⟩ / h for each entry v: a complex step has no difference in it
    that could cancel. NotImplementedError for more than `MAX_ENTRIES` entries.
    """

    def lora_linear_vjp(
        self, x: Array, W: Array, A: Array, B: Array, dy: Array, **options: Any
    ) -> dict[str, Array]:
        """The forward's output, and its derivatives."""
        given = {"x": x, "W": W, "A": A, "B": B, **options}
        names = [name for name in DIFFERENTIATED if given.get(name) is not None]
        if sum(given[name].size for name in names) > MAX_ENTRIES:
            raise NotImplementedError("too many entries")
        before = deepcopy(self.mutant.memory)
        y = self.mutant.lora_linear(x, W, A, B, **options)
        after = self.mutant.memory
        wide = {k: _wide(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
        answer = {"y": y}
        for name in names:
            gradient = np.empty(wide[name].shape)
            for i in np.ndindex(gradient.shape):
                self.mutant.memory = deepcopy(before)
                gradient[i] = (_wide(dy) * self._moved(wide, name, i)).sum()
            answer[f"d{name}"] = gradient.astype(x.dtype)
        self.mutant.memory = after
        return answer

    def _moved(self, given: dict[str, Any], name: str, i: tuple[int, ...]) -> Any:
        """dy/dv for one entry v."""
        moved = given[name].astype(complex).view(Signed)
        moved[i] += 1j * STEP
        y = self.mutant.layer(**{**given, name: moved})["y"]
        return np.asarray(y).imag / STEP


class ForwardOnly(OfMutant):
    """A mutant of `Linear` whose gradients are those of the right forward."""

    def lora_linear_vjp(
        self, x: Array, W: Array, A: Array, B: Array, dy: Array, **options: Any
    ) -> dict[str, Array]:
        """The wrong output, and the right gradients."""
        right = Linear().lora_linear_vjp(x, W, A, B, dy, **options)
        return right | {"y": self.mutant.lora_linear(x, W, A, B, **options)}


def _wide(array: Array) -> Array:
    """In float64, but for masks."""
    return array if array.dtype.kind == "b" else array.astype(np.float64)


def of_layer(m: Mutant) -> bool:
    """Whether a mutant is an edit of the linear layer alone."""
    return m.reference is not None and m.reference.parts == (Linear,)


@cache
def differentiated(m: Mutant, holds_norm: bool) -> Mutant:
    """The mutant with the gradients of its forward; with DoRA's norm held constant in them."""
    assert m.reference is not None
    held = {"# held constant": "norm = np.real(norm)"} if holds_norm else {}
    make = m.reference.edited({**m.edits, **held})
    return replace(m, make=lambda: Differentiated(make()))


@cache
def forward_only(m: Mutant) -> Mutant:
    """The mutant with right gradients."""
    return replace(m, make=lambda: ForwardOnly(m.make()))


@cache
def in_sessions(m: Mutant) -> Mutant:
    """The same mistake of a layer whose adapters come and go."""
    assert m.reference is not None
    reference = Reference(SESSION.parts, {**SESSION.names, **m.reference.names})
    edits = {k if k.startswith("Linear: ") else f"Linear: {k}": v for k, v in m.edits.items()}
    return replace(m, make=reference.edited(edits))


def joined(a: Edits, b: Edits) -> dict[str, str] | None:
    """Both edits; at a place where both insert something, one after the other. None: they clash."""
    both = dict(a)
    for key, new in b.items():
        if key not in both:
            both[key] = new
        elif key.startswith("# "):
            both[key] = f"{both[key]}; {new}"
        else:
            return None
    return both


@cache
def pair(a: Mutant, b: Mutant) -> Mutant | None:
    """Both mistakes at once; None where they change the same text, or not the same layer."""
    if a.reference is None or b.reference is None or a.reference.parts != b.reference.parts:
        return None
    edits = joined(a.edits, b.edits)
    if edits is None:
        return None
    reference = Reference(
        a.reference.parts, {**a.reference.names, **b.reference.names}, a.reference.rebind
    )
    return Mutant(
        id=f"{a.id}{AND}{b.id}",
        family=a.family,
        level=a.level,
        formula=f"{a.formula}; and {b.formula}",
        seen=(),
        make=reference.edited(edits),
        caught_by=a.caught_by,
        reference=reference,
        edits=edits,
    )


FITTED: dict[str, Mutant] = {}
"""The mutants whose scale was fitted to answers, by their ids."""


def with_scale(words: str, scale: Callable[[float, float, int], float]) -> Mutant:
    """The mutant of a layer with a scale that no table has, a function of s, α and r."""
    id = f"scale-is-{words.replace(' ', '')}"
    reference = Reference(LINEAR.parts, {**LINEAR.names, "fitted": scale})
    edits = {"ds = s": "ds = s = fitted(s, alpha, r)"}
    make = reference.edited(edits)
    made = Mutant(id, "SCALE", "linear", f"s = {words}", (), make, "linear.forward", False,
                  reference, edits)  # fmt: skip
    return FITTED.setdefault(id, made)


def mutant_of(id: str) -> Mutant | None:
    """The mutant, or the two mutants, of this id."""
    from minilora.verify.mutants import MUTANTS

    known = {m.id: m for m in MUTANTS} | FITTED
    parts = [known.get(part) for part in id.split(AND)]
    found = parts[0]
    for other in parts[1:]:
        found = pair(found, other) if found is not None and other is not None else None
    return found
