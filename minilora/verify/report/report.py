"""The report on one run: its results, exit status, text and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minilora import __version__
from minilora.forms.words import WIDTH, plain
from minilora.verify.report.causes import Cause, causes
from minilora.verify.report.document import cause_json, result_json
from minilora.verify.report.result import Result
from minilora.verify.report.text import painted, text_lines


@dataclass(frozen=True)
class Report:
    """The results of one run against one target."""

    name: str
    version: str
    dtypes: tuple[str, ...]
    conventions: Mapping[str, Any]
    fixed: Mapping[str, Any]
    profile: str
    seed: int
    results: tuple[Result, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    minilora: str = __version__

    def timing(self) -> str:
        """Where the time went: by level, in the target's calls and in minilora, and per case."""
        rows: list[tuple[str, ...]] = [
            ("level", "cases", "seconds", "in the target", "minilora, ms a case")
        ]
        rows += [self._times(level) for level in dict.fromkeys(r.level for r in self.results)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = (zip(row, widths, strict=True) for row in rows)
        return "\n".join("  ".join(f"{v:>{w}}" for v, w in row) for row in padded) + "\n"

    def _times(self, level: str) -> tuple[str, ...]:
        """The row of a level."""
        of_level = [result for result in self.results if result.level == level]
        cases, total, inside = (
            sum(getattr(result, name) for result in of_level)
            for name in ("cases", "seconds", "in_target")
        )
        per_case = f"{1000 * (total - inside) / cases:.2f}" if cases else "-"
        return level, str(cases), f"{total:.2f}", f"{inside:.2f}", per_case

    def count(self, status: str) -> int:
        """How many results have this status."""
        return sum(result.status == status for result in self.results)

    @property
    def ran(self) -> int:
        """How many results are not skipped: the others say nothing about the target."""
        return len(self.results) - self.count("skip")

    @property
    def causes(self) -> list[Cause]:
        """The probable causes of what fails, the one that explains most first."""
        return causes(self.results)

    @property
    def exit_status(self) -> int:
        """0 all hold, 1 a deviation or an error, 3 nothing ran, 130 interrupted."""
        if self.interrupted:
            return 130
        if self.count("fail") or self.count("error"):
            return 1
        return 0 if self.ran else 3

    def to_json(self) -> dict[str, Any]:
        """The report as one document of strict JSON: no NaN, no infinity, no NumPy.

        A z without bound (a difference where none is allowed) is null.
        """
        document: dict[str, Any] = plain(
            {
                "schema": 1,
                "minilora": self.minilora,
                "target": {
                    "name": self.name,
                    "version": self.version,
                    "dtypes": self.dtypes,
                    "conventions": self.conventions,
                    "fixed": self.fixed,
                },
                "profile": self.profile,
                "seed": self.seed,
                "summary": {
                    "passed": self.count("pass"),
                    "failed": self.count("fail"),
                    "loose": self.count("loose"),
                    "known": self.count("known"),
                    "skipped": self.count("skip"),
                    "errors": self.count("error"),
                    "ran": self.ran,
                    "total": len(self.results),
                    "interrupted": self.interrupted,
                    "exit_status": self.exit_status,
                    "seconds": round(self.seconds, 3),
                },
                "causes": [cause_json(cause) for cause in self.causes],
                "notes": self.notes,
                "results": [result_json(result, self.seed) for result in self.results],
            }
        )
        return document

    def json(self) -> str:
        """:meth:`to_json` as text."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        # A list of numbers in one line. No string holds a line break, so none is touched.
        numbers = re.compile(r"\[\n\s+((?:null|[-+.\deE]+)(?:,\n\s+(?:null|[-+.\deE]+))*)\n\s+\]")
        return numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"

    def text(self, verbose: bool = False, width: int = WIDTH, colours: bool = False) -> str:
        """The report for a terminal of so many columns, worst first.

        ``verbose`` gives each check its own line, and says all of each deviation; ``colours`` uses
        those of a terminal.
        """
        lines = text_lines(self, verbose, width)
        return "\n".join(map(painted, lines) if colours else lines) + "\n"
