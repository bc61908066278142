"""Which cases of which checks a verification tries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import UsageError, near
from minilora.verify.core.fixed import FREE, Fixed
from minilora.verify.core.types import Case, Check

PROFILES = ("quick", "ci", "nightly")


@dataclass(frozen=True)
class CheckPlan:
    """The cases of one check in one dtype."""

    check: Check
    dtype: str
    numbers: range
    seed: int
    fixed: Fixed = FREE

    def case(self, number: int) -> Case:
        """The case of this number."""
        return Case(self.check.id, self.dtype, number, self.seed, self.fixed)


def levels_of(checks: Sequence[Check]) -> list[str]:
    """The names of the levels, in the order of the checks."""
    return list(dict.fromkeys(check.level for check in checks))


def plan(
    checks: Sequence[Check],
    *,
    levels: Sequence[str] | None = None,
    profile: str = "ci",
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
    case: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[CheckPlan]:
    """The cases to try, in the order of the checks and of DTYPES. Raises UsageError.

    Without ``dtypes``, all are planned; a run keeps those that the implementation takes. With
    ``case``, that case alone is planned, whatever the levels, dtypes and profile. ``part`` (i, n)
    keeps the i-th of n parts of the cases of each check.
    """
    require_known("profile", profile, PROFILES)
    if seed < 0:
        raise UsageError(f"the seed is {seed}; expected 0 or more")
    levels, dtypes = (((v,) if isinstance(v, str) else v) for v in (levels, dtypes))
    require_all_known("level", levels or (), levels_of(checks))
    require_all_known("dtype", dtypes or (), list(DTYPES))
    if case is not None:
        return [_plan_of_case(checks, case, seed)]
    chosen = [check for check in checks if not levels or check.level in levels]
    return list(_plans(chosen, dtypes or list(DTYPES), profile, seed, part))


def _plans(
    checks: Sequence[Check], dtypes: Sequence[str], profile: str, seed: int, part: tuple[int, int]
) -> Iterator[CheckPlan]:
    for check in checks:
        for dtype in (dtype for dtype in DTYPES if dtype in dtypes):
            if numbers := _part(range(check.cases(profile, dtype)), *part):
                yield CheckPlan(check, dtype, numbers, seed)


def _part(numbers: range, i: int, n: int) -> range:
    """The i-th of n parts of equal length, but for one."""
    return numbers[len(numbers) * i // n : len(numbers) * (i + 1) // n]


def _plan_of_case(checks: Sequence[Check], case: str, seed: int) -> CheckPlan:
    parts = case.split(":")
    if len(parts) != 3 or not re.fullmatch("[0-9]{1,9}", parts[2]):
        raise UsageError(f"no case {case!r}; expected CHECK:DTYPE:NUMBER, as a report names it")
    by_id = {check.id: check for check in checks}
    require_known("check", parts[0], list(by_id))
    require_known("dtype", parts[1], list(DTYPES))
    number = int(parts[2])
    return CheckPlan(by_id[parts[0]], parts[1], range(number, number + 1), seed)


def require_all_known(kind: str, asked: Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for the first name that is none of those that are known."""
    for name in asked:
        require_known(kind, name, known)


def require_known(kind: str, asked: str, known: Sequence[str]) -> None:
    """Raises UsageError where a name is none of those that are known."""
    if asked not in known:
        few = len(known) < 20
        remedy = f"expected one of {', '.join(known)}" if few else "minilora verify --list has all"
        raise UsageError(f"no {kind} {asked!r}{near(asked, list(known))}; {remedy}")
