"""The command that shows what no case shows alone: it is tried before it is printed."""

from __future__ import annotations

from collections.abc import Sequence

from minilora.verify.commands import reproduce_all, reproduce_run
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.judging import passes
from minilora.verify.plan import CheckPlan


def shown_by(
    subject: GuardedImplementation,
    p: CheckPlan,
    plans: Sequence[CheckPlan],
    command: Sequence[str] | None,
    profile: str,
) -> str:
    """The command of the level in this dtype, if a new instance fails so too; else of all."""
    before = [
        other for other in plans if (other.check.level, other.dtype) == (p.check.level, p.dtype)
    ]
    fresh = subject.anew()
    if fresh is None or _fails(fresh, p, before):
        return reproduce_all(command, p, profile)
    return reproduce_run(command, p, profile)


def _fails(fresh: GuardedImplementation, p: CheckPlan, before: Sequence[CheckPlan]) -> bool:
    """Whether a check fails when all cases of these checks are asked in their order."""
    for other in before:
        if other.check.needs and not all(map(fresh.has, other.check.needs)):
            continue
        holds = [passes(other.check, fresh, other.case(number)) for number in other.numbers]
        if other == p:
            return not all(holds)
    return False
