"""What an audit found: one entry for each thing looked at, and the report of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Figure = float | int | str | bool | None

SEVERITIES = ("deviation", "undecided", "warning", "note", "ok")
"""Worst first. A deviation is exit status 1, else what is undecided is 4, all else 0."""

VERDICTS: Mapping[str, tuple[str, str]] = {
    # of a tensor that the adapter changes
    "exact": ("ok", "has the bits of a right merge"),
    "within": ("ok", "differs from a right merge by no more than its roundings"),
    "rounded-away": ("warning", "the stored numbers are too coarse for the adapter's change"),
    "factor": ("deviation", "the adapter is applied by another factor"),
    "not-applied": ("deviation", "the adapter is not applied: the tensor has the base's bits"),
    "other-adapter": ("deviation", "another adapter is applied"),
    "transposed": ("deviation", "the adapter's change is applied transposed"),
    "other-module": ("deviation", "the change of another module is applied"),
    "norm-not-applied": ("deviation", "DoRA's magnitude is not applied"),
    "bias-unscaled": ("deviation", "the adapter's bias is applied without its scale"),
    "partly": ("deviation", "a part of the tensor lacks the adapter's change"),
    "permuted": ("deviation", "the change is applied to rows or columns in another order"),
    "known-mistake": ("deviation", "another merge than the right one, which a known mistake makes"),
    "coarser": ("warning", "a right merge, rounded more coarsely than its dtype"),
    "mismatch": (
        "deviation",
        "it is not the base with the adapter, and no known mistake explains it",
    ),
    "undecided": ("undecided", "it cannot be decided from the files"),
    # of a tensor that no adapter touches
    "unchanged": ("ok", "has the base's bits, and no adapter changes it"),
    "changed": ("deviation", "no adapter changes it, but it differs from the base's"),
    # of a tensor, where nothing but the base is known
    "low-rank": ("note", "differs from the base's by a change of low rank"),
    "full-rank": ("note", "differs from the base's by a change that is of no low rank"),
    # of any tensor
    "corrupt": ("deviation", "it holds NaN or infinity, or is cut off"),
    "missing": ("deviation", "it is missing"),
    "extra": ("deviation", "the base has no such tensor"),
    # of anything else: configurations, adapters, servers
    "fine": ("ok", "as it should be"),
    "told": ("note", "worth knowing"),
    "doubtful": ("warning", "probably not what is meant"),
    "wrong": ("deviation", "wrong"),
}
"""Each verdict's severity, and what it says in general. A name is the same in every audit."""


@dataclass(frozen=True)
class Entry:
    """The verdict on one thing.

    ``subject``: the name of the tensor, the setting, the library or the prompt; ``verdict``: a name
    of `VERDICTS`; ``text``: what was found, in one sentence with its figures, and where it deviates
    what explains it; ``figures``: numbers by name, such as ``factor``, ``factor_error``,
    ``survived`` (the share of the change's norm that rounding left), ``rounding`` (the way of
    rounding that has these bits), ``layer``, ``module``, ``rank``; ``mistake``: the name of the
    known mistake that explains a deviation; ``severity``: that of the verdict unless given.
    """

    subject: str
    verdict: str
    text: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    mistake: str = ""
    severity: str = ""

    def __post_init__(self) -> None:
        if not self.severity:
            object.__setattr__(self, "severity", VERDICTS[self.verdict][0])


@dataclass(frozen=True)
class Report:
    """What an audit found.

    ``audit``: merged, find, adapter, converted or served; ``inputs``: what was given, by the name
    of the option; ``entries``: all that was looked at; ``cause``: the probable cause of what
    deviates, in one sentence that says how much of it it explains, "" where nothing deviates;
    ``remedy``: what to do about it; ``seconds`` and ``bytes_read``: of the audit.
    """

    audit: str
    inputs: Mapping[str, str | list[str]]
    entries: tuple[Entry, ...]
    cause: str = ""
    remedy: str = ""
    seconds: float = 0.0
    bytes_read: int = 0

    @property
    def worst_first(self) -> list[Entry]:
        """The entries by severity, each severity's in their order."""
        return sorted(self.entries, key=lambda entry: SEVERITIES.index(entry.severity))

    @property
    def exit_status(self) -> int:
        """1 with a deviation, 4 if something cannot be decided or nothing was found, else 0."""
        found = {entry.severity for entry in self.entries}
        return 1 if "deviation" in found else 4 if "undecided" in found or not found else 0
