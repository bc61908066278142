"""A level of checks: one value that says all that the rest of the kit has to know of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from minilora.verify.core.axes import Axis
from minilora.verify.core.combinations import Allowed, always

if TYPE_CHECKING:
    from minilora.verify.core.inputs import Layer
    from minilora.verify.core.types import Case, Check

FIRST_CASES = (1, 3, 5)
"""Odd cases are of the lane with sigma, where no order of operations is excluded."""

Draws = tuple[tuple[str, int], ...]
"""Cases that become vectors: the dtype that each is drawn in, and its number."""

VECTOR_SIZES: Draws = (
    *(("bfloat16", number) for number in (0, 3, 17)),
    *(("float32", number) for number in (4, 21)),
    ("float64", 9),
)
VECTOR_SHAPES: Draws = tuple(("float32", number) for number in (6, 8, 11, 13))
"""One token, a batch of one, two axes of batches, and sides and a rank beyond a kernel's tiles,
with as many tokens as features. The number 20 has a B that is nearly 0."""

LAW = "it compares answers with one another: the vectors of other checks state what each is"
"""Why there are no vectors of a check, where its level does not say otherwise."""


@dataclass(frozen=True)
class Level:
    """A level's name, its checks in their order, and how they are diagnosed, chosen and exported.

    Ids are given without the level's name: ``forward*`` for ``linear.forward.bias``; a * stands for
    anything.

    ``answers``: checks that compare answers themselves, which a mutant's answers may explain;
    ``laws``: of these, the ones that do not. ``relations``: checks that compare two answers of the
    implementation, of which either may be wrong; ``chance``: those in which it draws. ``cases``:
    the numbers that a diagnosis looks at first, None for all of the profile ci.
    ``has_exact_lane``: even numbers have no rounding.
    ``is_history``: a case is a sequence of steps, of which the first deviation tells. ``layer``:
    the layer of a case, where its equation is y = W x + b + s B A x.

    ``quick``: a regular expression of the checks that the profile quick has; ``quick_dtypes``:
    whether it has them in every dtype, with a case of each lane, and not in float32 alone.

    ``axes``: along which cases differ; ``is_possible``: which of their values may meet. Each pair
    is drawn in the profile ci, as ``minilora verify --coverage`` shows.

    ``vectors``: cases of each check that become vectors, by the first pattern that fits;
    ``no_vectors``: patterns of checks that no vector is made of, and why, * those that are left;
    ``exact``: checks whose cases are all without rounding.
    """

    name: str
    checks: tuple[Check, ...]
    answers: tuple[str, ...] = ("*",)
    laws: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()
    chance: tuple[str, ...] = ()
    cases: tuple[int, ...] | None = FIRST_CASES
    has_exact_lane: bool = True
    is_history: bool = False
    layer: Callable[[Case], Layer | None] = lambda case: None
    quick: str = ".*"
    quick_dtypes: bool = False
    axes: tuple[Axis, ...] = ()
    is_possible: Allowed = always
    vectors: Mapping[str, Draws] = field(default_factory=dict)
    no_vectors: Mapping[str, str] = field(default_factory=dict)
    exact: tuple[str, ...] = ()

    def short(self, check: str) -> str:
        """The id without the level's name."""
        return check.removeprefix(f"{self.name}.")

    def is_diagnosed(self, check: Check) -> bool:
        """Whether a mutant's answers may explain those to this check."""
        return self._is_in(check.id, self.answers) and not self._is_in(check.id, self.laws)

    def is_relation(self, check: Check) -> bool:
        """Whether this check compares two answers of the implementation."""
        return self._is_in(check.id, self.relations)

    def is_chance(self, check: Check) -> bool:
        """Whether the implementation draws in this check."""
        return self._is_in(check.id, self.chance)

    def count(self, check: Check, profile: str, dtype: str) -> int:
        """The number of cases that a check has in a profile for a dtype."""
        cases = check.cases(profile, dtype)
        if profile != "quick":
            return cases
        if not re.fullmatch(self.quick, self.short(check.id)):
            return 0
        if dtype != "float32":
            return min(cases, 2) if self.quick_dtypes else 0
        return cases

    def draws(self, check: str) -> Draws:
        """The cases of a check that become vectors."""
        name = self.short(check)
        fitting = (cases for pattern, cases in self.vectors.items() if fnmatchcase(name, pattern))
        excluded = tuple(pattern for pattern in self.no_vectors if pattern != "*")
        return () if self._is_in(check, excluded) else next(fitting, ())

    def without_vectors(self, check: str) -> str:
        """Why a check has no vectors; empty where it has."""
        name = self.short(check)
        if self.draws(check):
            return ""
        return next(
            (w for pattern, w in self.no_vectors.items() if fnmatchcase(name, pattern)), LAW
        )

    def is_exact(self, check: str, number: int) -> bool:
        """Whether a case has no rounding."""
        return self.short(check) in self.exact or (self.has_exact_lane and number % 2 == 0)

    def _is_in(self, check: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(self.short(check), pattern) for pattern in patterns)
