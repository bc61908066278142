"""The mutants of the catalogue that explain answers, wholly or in part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import STRUCTURE, Check, Diagnosis
from minilora.verify.diagnosis.fit import Fit, agreeing, fit, sigma_of

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant

from minilora.verify.diagnosis.answers import Answers, agree, deviates, explains, sigma_of_both

Array = np.ndarray


@dataclass(frozen=True)
class Candidate:
    """A mutant that gives the implementation's answers, and the rms z of the residual.

    ``gradients`` says whose they are, where they are not the mutant's.
    """

    mutant: Mutant
    residual: float
    gradients: str = ""

    def named(self, separating: str = "") -> Diagnosis:
        """The diagnosis in words."""
        m = self.mutant
        words = f"{m.formula}." + (f" Seen in {', '.join(m.seen)}." if m.seen else "")
        words += f" The gradients are those of {self.gradients} forward." if self.gradients else ""
        return Diagnosis(m.id, words, self.residual, separating)


def mutants_for(level: str, check: Check, keep_state: bool = False) -> list[Mutant]:
    """The level's mutants that are no equivalents, and none of another variant than the check's.

    Those that keep a state answer single cases by chance; what keeps one is told otherwise, unless
    they are asked for: their faults are no chance.
    """
    from minilora.verify.mutants import MUTANTS  # costs time only where something is wrong

    return [
        m
        for m in MUTANTS
        if m.level == level
        and not m.equivalent
        and (keep_state or m.family != "STATE")
        and not _of_another_variant(m, check)
    ]


def _of_another_variant(m: Mutant, check: Check) -> bool:
    """Whether both are of a variant, LEVEL.VARIANT.…, and not of the same."""
    own, asked = (_variant(id) for id in (m.caught_by, check.id))
    return bool(own and asked) and own != asked


def _variant(id: str) -> str:
    """The variant in the id of a check of the level variants."""
    level, variant, *_ = id.split(".")
    return variant if level == "variants" else ""


WHOSE = ("", "this", "the right")
"""Whose forward's gradients the forms of a mistake have: its table's, its own, or the right one."""


def forms(m: Mutant, check: Check, holds_norm: bool = True) -> list[Mutant]:
    """What a mistake may look like to a check: itself, and with other gradients (`WHOSE`).

    One of the layer alone is also one of sessions, which are made of such layers.
    """
    from minilora.verify.mutants.derived import differentiated, forward_only, in_sessions, of_layer
    from minilora.verify.mutants.derived_modules import (
        differentiated_module,
        of_modules,
        right_gradients,
    )

    if of_modules(m) and check.id.endswith(".gradients"):
        return [m, differentiated_module(m, holds_norm), right_gradients(m)]
    if not of_layer(m):
        return [m]
    if "session" in check.needs:
        return [in_sessions(m)]
    if "lora_linear_vjp" in check.needs:
        return [m, differentiated(m, holds_norm), forward_only(m)]
    return [m]


def explanation(
    theirs: Iterable[Answers],
    shapes: Sequence[Mutant],
    ours_of: Callable[[Mutant], Iterable[Answers]],
) -> Candidate | None:
    """The first of a mistake's forms that explains these answers."""
    for form, whose in zip(shapes, WHOSE, strict=False):
        if whose and not _agree_forward(theirs, ours_of(shapes[0])):
            return None  # the gradients take a forward for each entry
        ours = ours_of(form)
        residual = explains(theirs, ours)
        if residual is not None and matched_filter(theirs, ours).agrees(1.0):
            return Candidate(form, residual, whose)
    return None


def whole(explaining: list[Candidate]) -> list[Candidate]:
    """Without what is part of two mistakes at once that explain the same."""
    from minilora.verify.mutants.derived import AND

    parts = {part for c in explaining if AND in c.mutant.id for part in c.mutant.id.split(AND)}
    return [c for c in explaining if c.mutant.id not in parts]


def _agree_forward(theirs: Iterable[Answers], ours: Iterable[Answers]) -> bool:
    """Whether all outputs agree, and there are some."""
    pairs = [
        (comparison, our_case.get(name))
        for their_case, our_case in zip(theirs, ours, strict=True)
        for name, comparison in their_case.items()
        if name.startswith("y")
    ]
    return bool(pairs) and all(b is not None and agree(a, b) is not None for a, b in pairs)


def candidates(
    mutants: Iterable[Mutant],
    theirs: Iterable[Answers],
    ours_of: Callable[[Mutant], Iterable[Answers]],
    forms_of: Callable[[Mutant], Sequence[Mutant]] = lambda m: (m,),
) -> list[Candidate]:
    """The mutants that explain these answers, the nearest first."""
    found = (explanation(theirs, forms_of(m), ours_of) for m in mutants)
    explaining = [candidate for candidate in found if candidate is not None]
    return sorted(explaining, key=lambda candidate: candidate.residual)


def matched_filter(theirs: Iterable[Answers], ours: Iterable[Answers]) -> Fit:
    """The matched filter c = ⟨e, d⟩ / ⟨d, d⟩ over all arrays of all cases, each element over its σ.

    e is the implementation's deviation, d the mutant's: c is 1 where the implementation is that
    mutant, and 0 where it is correct. It sums what no single element shows.
    """
    e, d = _whitened(theirs, ours)
    c, _ = fit(e, d, 0 * e, np.ones_like(e))
    # A factor that is rounded once moves all elements alike, which the standard error leaves out.
    dtypes = {str(comparison.got.dtype) for answer in theirs for comparison in answer.values()}
    once = max((unit_roundoff(d) for d in dtypes if d in DTYPES), default=0.0)
    return Fit(c.value, c.error + once)


def _whitened(theirs: Iterable[Answers], ours: Iterable[Answers]) -> tuple[Array, Array]:
    """Both deviations from the correct answer, over σ, in all arrays of all cases."""
    deviations: tuple[list[Array], list[Array]] = ([np.zeros(1)], [np.zeros(1)])
    for their_case, our_case in zip(theirs, ours, strict=True):
        for array in their_case.keys() & our_case.keys():
            pair = their_case[array], our_case[array]
            if pair[0].sigma is None and not any(map(deviates, pair)):
                continue  # of answers that have bits of their own, each is as it should be
            has_sigma = all(comparison.sigma is not None for comparison in pair)
            sigma = sigma_of_both(*pair) if has_sigma else sigma_of(pair[0])
            sigma, want = np.maximum(sigma, 1e-300), np.asarray(pair[0].want, float)
            for collected, comparison in zip(deviations, pair, strict=True):
                collected.append(((np.asarray(comparison.got, float) - want) / sigma).ravel())
    e, d = map(np.concatenate, deviations)
    return e, d


def part_of(
    mutants: Iterable[Mutant],
    theirs: Iterable[Answers],
    ours_of: Callable[[Mutant], Iterable[Answers]],
    is_refuted: Callable[[Mutant], bool],
) -> Diagnosis | None:
    """The mutant of which a part c, the same in all cases, is the whole deviation."""
    for m in mutants:
        ours = ours_of(m)
        if not all(a.keys() <= b.keys() for a, b in zip(theirs, ours, strict=True)):
            continue
        c = matched_filter(theirs, ours)
        if not (0 < c.value < 1 and c.value > 8 * c.error):
            continue
        e, d = _whitened(theirs, ours)
        if agreeing(e - c.value * d) and not is_refuted(m):
            sentence = f"The deviation is {c} times that of {m.id} ({m.formula}), in every case."
            return Diagnosis(f"{STRUCTURE}part", sentence, 0.0)
    return None
