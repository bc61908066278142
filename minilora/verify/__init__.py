"""The oracle: checks another implementation of LoRA against the equations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minilora.verify.core.errors import Fault, LoadError, Skip, UsageError
from minilora.verify.core.types import Case, Check, Comparison, Limits
from minilora.verify.engine import Interrupted, Progress, run
from minilora.verify.implementation.contract import TIME_LIMIT
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.loading import load as load_target
from minilora.verify.loading import resolve
from minilora.verify.report.report import Report
from minilora.verify.report.result import Result

if TYPE_CHECKING:
    import pytest

__all__ = [
    "Case",
    "Check",
    "Comparison",
    "Fault",
    "GuardedImplementation",
    "Interrupted",
    "Limits",
    "LoadError",
    "Report",
    "Result",
    "Skip",
    "UsageError",
    "check",
    "load_target",
    "parametrize_with_checks",
]


def check(
    implementation: object,
    *,
    levels: Sequence[str] | None = None,
    profile: str = "ci",
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
    case: str | None = None,
    known: Mapping[str, Any] | None = None,
    time_limit: float = TIME_LIMIT,
    progress: Progress | None = None,
) -> Report:
    """Checks an implementation and reports what holds and what does not.

    ``implementation`` is an object with some of the contract's methods (`contract.METHODS`), or a
    class or a factory without arguments that gives one. ``known`` maps ``check`` or
    ``check:dtype`` to the reason why a deviation is expected; ``time_limit`` is in seconds a call.

    Raises LoadError where the implementation cannot be used and UsageError where a level, dtype,
    profile or case does not exist.
    """
    from minilora.verify.checks.registry import CHECKS

    name = getattr(implementation, "__qualname__", type(implementation).__qualname__)
    return run(
        CHECKS,
        resolve(implementation, name),
        levels=levels,
        profile=profile,
        dtypes=dtypes,
        seed=seed,
        case=case,
        known=known,
        time_limit=time_limit,
        progress=progress,
    )


def parametrize_with_checks(
    implementations: Sequence[object],
    *,
    levels: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    profile: str = "ci",
    seed: int = 0,
    known: Mapping[str, Any] | None = None,
) -> pytest.MarkDecorator:
    """Turns one test of a project's own suite into one for each check, dtype and implementation.

    The test takes ``implementation`` and ``check``, and calls ``check(implementation)``: that
    fails with the report's text, skips what is not supported and expects what is ``known`` to
    fail. Implementations are those of `check`, or a TARGET of the command line.

    Raises LoadError and UsageError as `check` does. Needs pytest, which nothing else here imports.
    """
    from minilora.verify.pytest_suite import parametrized

    return parametrized(
        implementations, levels=levels, dtypes=dtypes, profile=profile, seed=seed, known=known
    )
