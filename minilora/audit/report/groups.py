"""What was found, in groups: the entries of one verdict and one mistake are one finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minilora import __version__
from minilora.audit.report.places import places
from minilora.audit.result import SEVERITIES, VERDICTS, Entry, Report

THINGS = {
    "merged": "tensors",
    "find": "tensors",
    "converted": "modules",
    "adapter": "points",
    "served": "points",
}
"""What an audit looks at, in the plural."""

STATES = {"deviation": "WRONG", "undecided": "CANNOT BE DECIDED"}
"""A report in a word, by its worst severity; all else is right."""

SHOWN = {"factor": "factor", "survived": "survived", "share": "share of the norm", "rank": "rank"}
"""The figures that are told of a group, and what they are called."""

SHARES = ("survived", "share")


FEW = 5
"""So many places of a group are told."""


@dataclass(frozen=True)
class Group:
    """Entries with one severity, verdict and mistake."""

    severity: str
    verdict: str
    mistake: str
    entries: tuple[Entry, ...]

    @property
    def id(self) -> str:
        """The verdict, with the mistake if one explains it."""
        is_more = self.mistake not in ("", self.verdict)
        return f"{self.verdict}/{self.mistake}" if is_more else self.verdict

    @property
    def text(self) -> str:
        """What all entries say, or what the verdict says in general."""
        texts = {entry.text for entry in self.entries}
        return texts.pop() if len(texts) == 1 else VERDICTS[self.verdict][1]

    @property
    def example(self) -> Entry | None:
        """The first entry, if the entries say different things."""
        return self.entries[0] if len({entry.text for entry in self.entries}) > 1 else None

    @property
    def figures(self) -> list[str]:
        """The smallest and the largest of each figure that is told of a group.

        Of a wrong tensor it says nothing how much of a right change survived.
        """
        names = [name for name in SHOWN if (self.severity, name) != ("deviation", "survived")]
        return [said for name in names if (said := self._range(name))]

    def _range(self, name: str) -> str:
        found = [entry.figures.get(name) for entry in self.entries]
        numbers = [x for x in found if isinstance(x, int | float) and not isinstance(x, bool)]
        if not numbers:
            return ""
        said = list(dict.fromkeys(figure(name, x) for x in (min(numbers), max(numbers))))
        return f"{SHOWN[name]} {' to '.join(said)}"

    @property
    def places(self) -> list[str]:
        """The subjects in few words."""
        return places(self.entries)


def figure(name: str, value: float) -> str:
    """A figure in words: a share in percent."""
    return f"{100 * value:.3g}%" if name in SHARES else f"{value:.4g}"


def groups(entries: Sequence[Entry]) -> list[Group]:
    """The groups, worst first, and of one severity the largest."""
    found: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.severity, entry.verdict, entry.mistake), []).append(entry)
    every = [Group(*key, tuple(members)) for key, members in found.items()]
    return sorted(every, key=lambda g: (SEVERITIES.index(g.severity), -len(g.entries)))


def severity_of(report: Report) -> str:
    """The severity of the whole: deviation, undecided, warning if there is one, else ok."""
    found = {entry.severity for entry in report.entries}
    worst = [severity for severity in SEVERITIES if severity in found and severity != "note"]
    return worst[0] if worst else "ok" if found else "undecided"


def headline(report: Report) -> str:
    """The result in one line: ``WRONG: of 272 tensors 60 deviate``."""
    counts = Counter(entry.severity for entry in report.entries)
    total, things = len(report.entries), THINGS.get(report.audit, "points")
    told = {
        "deviation": "deviate",
        "undecided": "cannot be decided",
        "warning": "with a warning",
        "note": "to note",
    }
    state = STATES.get(severity_of(report), "answered" if report.audit == "find" else "right")
    if not total:
        return f"{state}: there is nothing to look at"
    said = [f"{counts[s]} {words}" for s, words in told.items() if counts[s]]
    if counts["deviation"] == 1:
        said[0] = "1 deviates"
    if not said:
        return f"{state}: all {total} {things}"
    return f"{state}: of {total} {things} {', '.join(said)}"


def causes(report: Report) -> list[tuple[str, str]]:
    """The lines that stand on top, each with its name: the cause, and what to do."""
    first = "ANSWER" if report.audit == "find" else "PROBABLE CAUSE"
    told = [(first, report.cause), ("WHAT TO DO", report.remedy)]
    return [(name, words) for name, words in told if words]


def right_line(report: Report) -> str:
    """What is right, in one line by verdicts and ways of rounding; a single thing in full."""
    said = []
    right = [entry for entry in report.entries if entry.severity == "ok"]
    if len(right) == 1 and right[0].verdict == "fine":
        return f"{right[0].subject}: {right[0].text}"
    for group in groups(right):
        ways = {str(e.figures["rounding"]) for e in group.entries if e.figures.get("rounding")}
        how = f" ({'; '.join(sorted(ways))})" if ways else ""
        if group.verdict == "fine":  # modules, libraries, adapters: which, and not only how many
            how = f": {', '.join(group.places)}"
        said.append(f"{len(group.entries)} {group.verdict}{how}")
    return "; ".join(said) if any(":" in words for words in said) else ", ".join(said)


def inputs(report: Report) -> list[tuple[str, str]]:
    """The names of what was given, and the values."""
    every = report.inputs.items()
    return [(k, ", ".join(v) if isinstance(v, list) else v) for k, v in every if v]


def facts(report: Report) -> str:
    """The version, the time and the bytes that were read."""
    read = f", {size(report.bytes_read)} read" if report.bytes_read else ""
    return f"minilora {__version__}, {report.seconds:.1f} s{read}"


def size(number: float) -> str:
    """A number of bytes in B, kB, MB, GB or TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
