"""Reports beside each other, and as one table for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.report.report import Report
from minilora.verify.report.result import STATUSES, Result
from minilora.verify.report.words import fault_words, judgement_words


class Runs:
    """Reports beside each other: their labels, and their results by level, check and report."""

    def __init__(self, reports: Sequence[Report], sources: Sequence[str] = ()) -> None:
        self.reports, self.sources = tuple(reports), tuple(sources)
        labels = [f"{report.name} {report.version.partition(' ')[0]}".strip() for report in reports]
        often = Counter(labels)
        self.labels = [
            f"{label} #{i + 1}" if often[label] > 1 else label for i, label in enumerate(labels)
        ]
        self._found: dict[str, list[dict[str, Result]]] = {}
        for i, report in enumerate(reports):
            for result in report.results:
                row = self._found.setdefault(result.check, [{} for _ in reports])
                row[i][result.dtype] = result
        seen = {dtype for row in self._found.values() for found in row for dtype in found}
        self.dtypes = [dtype for dtype in DTYPES if dtype in seen]

    @property
    def differ(self) -> str:
        """In what the runs differ, except for their targets."""
        names = ("profile", "seed", "minilora")
        values = [(n, list(dict.fromkeys(getattr(r, n) for r in self.reports))) for n in names]
        return "; ".join(f"{n} ({', '.join(map(str, v))})" for n, v in values if len(v) > 1)

    def found(self, check: str, i: int) -> dict[str, Result]:
        """The results of a check in the i-th report, by dtype."""
        return self._found[check][i]

    def results(self, check: str) -> list[Result]:
        """The results of a check in all reports."""
        return [result for found in self._found[check] for result in found.values()]

    @property
    def checks(self) -> list[str]:
        """All checks, worst first."""
        return sorted(self._found, key=lambda check: min(r.severity for r in self.results(check)))

    @property
    def levels(self) -> dict[str, list[str]]:
        """The checks of each level, the level of the worst check first."""
        levels: dict[str, list[str]] = {}
        for check in self.checks:
            levels.setdefault(self.results(check)[0].level, []).append(check)
        return levels

    def score(self, checks: Sequence[str], i: int) -> tuple[str, str]:
        """The worst status among these checks in the i-th report, and how many of them pass.

        Where some were skipped, the others that pass are no pass of the level.
        """
        worst = [
            min(found.values(), key=lambda result: result.severity).status
            for check in checks
            if (found := self.found(check, i))
        ]
        if not worst:
            return "absent", "not run"
        counts = Counter(worst)
        others = [f"{counts[s]} {s}" for s in STATUSES if counts[s] and s != "pass"]
        passing = f"{counts['pass']} of {len(worst)} pass" if others else f"all {len(worst)} pass"
        deviates = [status for status in worst if status not in ("skip", "pass")]
        sign = (
            min(deviates, key=STATUSES.index)
            if deviates
            else "pass"
            if counts["pass"] == len(worst)
            else "skip"
        )
        return sign, ", ".join([passing, *others])


def headline(result: Result) -> str:
    """A deviation in one line."""
    worst = max(result.arrays, key=lambda judged: judged.excess, default=None)
    if worst is not None and worst.verdict != "pass":
        return f"{worst.array}: {judgement_words(worst)}"
    return "; ".join(fault_words(fault) for fault in result.faults)
