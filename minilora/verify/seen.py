"""What was seen of a known deviation, and whether a case shows that and nothing else.

A declared deviation excuses the answers that it describes. Another deviation of the same check is
none of it, and an error only where the entry names that very error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault, Skip, near, tidy
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import CLOSED_FORM, Case, Check, Comparison
from minilora.verify.diagnosis.answers import Direct, agree

End = Skip | Fault | None

FORMS = {
    "mutant": "the id of a wrong implementation in the catalogue that gives the same answers, or "
    "'ID + ID' of two at once",
    "factor": "the number by which the arrays that deviate are the correct ones multiplied",
    "rounded_to": "the narrower dtype within whose rounding the deviation is",
    "after": "the steps of a session after which the first wrong answer comes",
    "arrays": "the names of the arrays that deviate, a * for anything",
    "error": "the kind and the beginning of the error, a * for anything",
}
"""The keys of what was seen. ``arrays`` may stand beside ``factor`` and ``rounded_to``."""

EXPECTED = f"expected {{KEY: …}} or a list of such, KEY one of {', '.join(FORMS)}"

NARROWER = ("float32", "bfloat16", "float16")
_STEP = re.compile(r"(\w+)\([^()]*\)(?: refused)?$")
_MAX_DECLARED = 40


@dataclass(frozen=True)
class Asked:
    """A case of a check as it was answered: the comparisons, and how it ended."""

    check: Check
    case: Case
    comparisons: Sequence[Comparison]
    end: End

    @property
    def deviating(self) -> list[Comparison]:
        """Those that do not pass."""
        return [c for c in self.comparisons if c.judge().verdict != "pass"]

    def of(self, implementation: object) -> Asked:
        """The same case, put to a wrong implementation of the catalogue."""
        comparisons: list[Comparison] = []
        end: End = None
        try:
            # What comes before an error stays.
            comparisons.extend(self.check.run(Direct(implementation), self.case))
        except (Skip, Fault) as stopped:
            end = stopped
        return replace(self, comparisons=comparisons, end=end)


@dataclass(frozen=True)
class Seen:
    """One thing that was seen: the form, its value, and the arrays that it is said of."""

    form: str
    value: Any
    arrays: tuple[str, ...] = ("*",)

    def explains_end(self, asked: Asked) -> bool:
        """Whether the error that ended a case is this."""
        if not isinstance(asked.end, Fault) or asked.end.kind == "internal":
            return False
        if self.form == "mutant":
            ours = asked.of(_mutant(self.value).make()).end
            return isinstance(ours, Fault) and ours.kind == asked.end.kind
        return self.form == "error" and any(_fits(str(asked.end), p) for p in self.value)

    def explains_values(self, asked: Asked) -> bool:
        """Whether all that deviates in a case is this."""
        of_form: Mapping[str, Callable[[Asked], bool]] = {
            "mutant": self._is_mutant,
            "factor": self._is_factor,
            "rounded_to": self._is_rounded,
            "after": self._is_after,
            "arrays": self._is_of_arrays,
        }
        return self.form in of_form and of_form[self.form](asked)

    def _is_of_arrays(self, asked: Asked) -> bool:
        return all(any(_fits(c.array, p) for p in self.arrays) for c in asked.deviating)

    def _is_factor(self, asked: Asked) -> bool:
        return self._is_of_arrays(asked) and all(_times(c, self.value) for c in asked.deviating)

    def _is_rounded(self, asked: Asked) -> bool:
        wider = unit_roundoff(self.value) / unit_roundoff(asked.case.dtype)
        return self._is_of_arrays(asked) and all(_within(c, wider) for c in asked.deviating)

    def _is_after(self, asked: Asked) -> bool:
        """A wrong state stays wrong: the first wrong answer tells."""
        return step_of(asked.deviating[0].array) in self.value

    def _is_mutant(self, asked: Asked) -> bool:
        with np.errstate(all="ignore"):  # what is wrong may be wrong beyond all bounds
            ours = asked.of(_mutant(self.value).make())
            if len(ours.comparisons) < len(asked.comparisons):
                return False
            pairs = zip(asked.comparisons, ours.comparisons, strict=False)
            return all(
                a.array == b.array and _same(a, b, asked.check.is_relation) for a, b in pairs
            )


def step_of(array: str) -> str:
    """The last step of a session that an array's name tells, or nothing."""
    step = _STEP.search(array)
    return step[1] if step else ""


def _fits(text: str, pattern: str) -> bool:
    """Whether a text is a pattern's, in which * alone stands for anything."""
    return fnmatchcase(text, re.sub(r"[\[?]", r"[\g<0>]", pattern))


def _mutant(name: str) -> Any:
    from minilora.verify.mutants.derived import mutant_of  # costs time where something deviates

    return mutant_of(name)


def _same(theirs: Comparison, ours: Comparison, is_relation: bool) -> bool:
    """Whether two implementations gave the same: of a relation, both of its answers."""
    if np.shape(theirs.got) != np.shape(ours.got):
        return False
    same = _agrees(theirs, ours)
    if is_relation and same:
        same = _agrees(replace(theirs, got=theirs.want), replace(ours, got=ours.want))
    return same


def _agrees(theirs: Comparison, ours: Comparison) -> bool:
    if agree(theirs, ours) is not None:
        return True
    if theirs.sigma is not None:
        return False
    # Exact inputs: the correct answer rounds nothing, but a wrong one may, in its last digits.
    ours_got = np.asarray(ours.got).astype(np.longdouble)
    dtype = next((d for d, kind in DTYPES.items() if np.asarray(theirs.got).dtype == kind), "")
    if not dtype:
        return False
    last = unit_roundoff(dtype) * np.abs(ours_got).max()
    again = replace(theirs, want=ours_got, sigma=np.asarray(last), limits=CLOSED_FORM)
    return again.judge().verdict == "pass"


def _times(comparison: Comparison, factor: float) -> bool:
    """Whether an answer is a multiple of the correct one, within its rounding."""
    sigma = comparison.sigma
    wanted = np.asarray(comparison.want).astype(np.longdouble) * factor
    scaled = None if sigma is None else np.asarray(sigma) * max(1.0, abs(factor))
    return replace(comparison, want=wanted, sigma=scaled).judge().verdict == "pass"


def _within(comparison: Comparison, wider: float) -> bool:
    """Whether an answer would pass with so many times the unit roundoff, which σ grows with."""
    if comparison.sigma is None:
        size = np.abs(np.asarray(comparison.want).astype(np.longdouble)).max()
        dtype = str(np.asarray(comparison.got).dtype)
        sigma = np.asarray(unit_roundoff(dtype) * size)
        comparison = replace(comparison, sigma=sigma, limits=CLOSED_FORM)
    again = replace(comparison, sigma=np.asarray(comparison.sigma) * wider)
    return again.judge().verdict == "pass"


def explained(seen: Sequence[Seen], asked: Asked) -> bool:
    """Whether what was seen is all that is wrong with a case: its values, and its error."""
    if isinstance(asked.end, Fault) and not any(s.explains_end(asked) for s in seen):
        return False
    return not asked.deviating or any(s.explains_values(asked) for s in seen)


def read_seen(value: Any) -> tuple[Seen, ...]:
    """What was seen, of its form in JSON. Raises ValueError."""
    entries = value if isinstance(value, list | tuple) else [value]
    if not 0 < len(entries) <= _MAX_DECLARED:
        raise ValueError(f"'seen' has {len(entries)} entries, {EXPECTED}")
    return tuple(seen for entry in entries for seen in _one(entry))


def _one(entry: Any) -> Iterator[Seen]:
    if not isinstance(entry, Mapping) or not entry:
        raise ValueError(f"'seen' is {tidy(entry, 80)}, {EXPECTED}")
    if unknown := [key for key in entry if key not in FORMS]:
        raise ValueError(
            f"'seen' has {unknown[0]!r}{near(str(unknown[0]), list(FORMS))}, {EXPECTED}"
        )
    arrays = _names(entry["arrays"], "arrays") if "arrays" in entry else ("*",)
    if "arrays" in entry and all(set(name) <= {"*"} for name in arrays):
        raise ValueError("'arrays' names all; name those that deviate")
    others = [key for key in entry if key != "arrays"]
    if len(others) > 1 or (
        others and arrays != ("*",) and others[0] not in ("factor", "rounded_to")
    ):
        raise ValueError(f"'seen' has {' and '.join(entry)} together; expected one of them")
    for form in others or ["arrays"]:
        yield Seen(form, _READ[form](entry[form]), arrays)


def _names(value: Any, form: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(map(_is_name, names)):
        raise ValueError(f"{form!r} is {tidy(value, 80)}, expected a name or a list of names")
    return tuple(names)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name)


def _errors(value: Any) -> tuple[str, ...]:
    patterns = _names(value, "error")
    for pattern in patterns:
        kind, colon, message = pattern.partition(": ")
        if not colon or "*" in kind or not message.strip("*"):
            raise ValueError(
                f"'error' is {pattern!r}, expected 'KIND: MESSAGE' as a report has it, such as "
                "'raises: KeyError*'"
            )
    return patterns


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"'factor' is {tidy(value, 80)}, expected a number")
    return float(value)


def _narrower(value: Any) -> str:
    if value not in NARROWER:
        raise ValueError(f"'rounded_to' is {value!r}, expected one of {', '.join(NARROWER)}")
    return str(value)


def _id(value: Any) -> str:
    from minilora.verify.mutants import MUTANTS
    from minilora.verify.mutants.derived import AND, mutant_of

    ids = [m.id for m in MUTANTS if not m.equivalent]
    for part in str(value).split(AND):
        if part not in ids:
            raise ValueError(f"'mutant' is {value!r}{near(part, ids)}, expected an id of one")
    if mutant_of(str(value)) is None:
        raise ValueError(f"'mutant' is {value!r}: these cannot be made at once; name one of them")
    return str(value)


_READ: Mapping[str, Callable[[Any], Any]] = {
    "mutant": _id,
    "factor": _number,
    "rounded_to": _narrower,
    "after": lambda value: _names(value, "after"),
    "arrays": lambda value: _names(value, "arrays"),
    "error": _errors,
}
