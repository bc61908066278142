"""What has changed since an earlier report of the same target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from minilora.verify.report.report import Report
from minilora.verify.report.result import Result

WRONG = ("fail", "error")
"""The statuses of a deviation that nobody declared."""


@dataclass(frozen=True)
class Difference:
    """What a report has that an earlier one has not, and the other way round.

    Each is named ``check:dtype``. ``new``: deviations that the earlier report has not, be it that
    the check held, was known, was skipped or was not asked; ``other``: deviations of another cause
    than then, where both have a diagnosis; ``gone``: deviations that no longer occur; ``lost``:
    checks that held or deviated, and are skipped or not asked now.
    """

    new: tuple[str, ...]
    other: tuple[str, ...]
    gone: tuple[str, ...]
    lost: tuple[str, ...]

    @property
    def is_worse(self) -> bool:
        """Whether there is a deviation that the earlier report does not tell."""
        return bool(self.new or self.other)

    @property
    def text(self) -> str:
        """A line for each kind of change that there is."""
        lines = [
            f"{len(names)} {what}: {', '.join(names)}"
            for names, what in (
                (self.new, "new deviations"),
                (self.other, "deviations of another cause"),
                (self.gone, "deviations gone"),
                (self.lost, "checks no longer asked"),
            )
            if names
        ]
        return "\n".join(lines or ["nothing has changed"])


def against(report: Report, earlier: Report) -> Difference:
    """The changes since the earlier report."""
    now, then = _by_name(report), _by_name(earlier)

    def those(of: Mapping[str, Result], wanted: Callable[[str], bool]) -> tuple[str, ...]:
        return tuple(name for name in of if wanted(name))

    def is_wrong(results: Mapping[str, Result], name: str) -> bool:
        return name in results and results[name].status in WRONG

    def is_asked(results: Mapping[str, Result], name: str) -> bool:
        return name in results and results[name].status != "skip"

    def is_other(name: str) -> bool:
        if not (is_wrong(now, name) and is_wrong(then, name)):
            return False
        causes, earlier_causes = _causes(now[name]), _causes(then[name])
        return bool(causes and earlier_causes) and not causes & earlier_causes

    return Difference(
        new=those(now, lambda name: is_wrong(now, name) and not is_wrong(then, name)),
        other=those(now, is_other),
        gone=those(
            then,
            lambda name: is_wrong(then, name) and is_asked(now, name) and not is_wrong(now, name),
        ),
        lost=those(then, lambda name: is_asked(then, name) and not is_asked(now, name)),
    )


def _causes(result: Result) -> set[str]:
    return {diagnosis.id for diagnosis in result.diagnosis}


def _by_name(report: Report) -> dict[str, Result]:
    return {f"{result.check}:{result.dtype}": result for result in report.results}
