"""Recorded results for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minilora.forms.words import wrapped
from minilora.studies.results.summary import DEVIATES, Summary

WORDS = {
    "pass": "hold",
    "known": "known",
    "loose": "loose",
    "fail": "fail",
    "error": "in error",
    "skip": "not asked",
}
"""The statuses, as one counts them."""


def counted(counts: Counter[str]) -> str:
    """How many checks have each status, in words."""
    return ", ".join(f"{counts[status]} {word}" for status, word in WORDS.items() if counts[status])


def table(summaries: Sequence[Summary]) -> str:
    """A line for each run, and one for its levels with deviations."""
    lines = []
    for each in summaries:
        lines += wrapped(f"{each.target} {each.version} ({each.profile}): {counted(each.total)}")
        off = [
            f"{level} {' and '.join(f'{n} {s}' for s in DEVIATES if (n := counts[s]))}"
            for level in each.checks
            if any((counts := each.count(level))[status] for status in DEVIATES)
        ]
        lines += wrapped(f"deviates in {', '.join(off)}", 2) if off else []
    return "\n".join(lines) + "\n"
