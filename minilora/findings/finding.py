"""What a finding says of a library, and what it means for an adapter in a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc

from minilora.findings.stored import StoredAdapter, StoredModule

_RELEASE = re.compile(r"\d+(\.\d+)+")

SEVERITIES: Mapping[str, str] = {
    "silent": "another function is computed, without an error",
    "fails": "an error, where the algebra has an answer",
    "training": "trained otherwise than was asked for",
    "rounding": "fewer digits than the dtype has",
    "choice": "a choice that another library makes otherwise",
    "nuisance": "no number is another one",
}
"""How grave a finding is, the worst first."""

OUTCOMES: Mapping[str, str] = {
    "scaled": "it applies these adapters by another factor",
    "dropped": "it leaves these out without a word",
    "other": "it computes another function of these",
    "may": "it may compute another function of these: the files do not tell",
    "refused": "it refuses the adapter",
    "use": "it deviates in a use of the adapter",
}
"""What a library does with an adapter that is stored."""


@dataclass(frozen=True)
class Stored:
    """What a finding means for an adapter in files.

    ``concerns``: the modules, tensors or settings of the adapter that it concerns, none where it
    does not apply; ``outcome``: a name of `OUTCOMES`; ``effect``: what the library does with them,
    in words; ``factor``: by which the library multiplies a module's change, where one number says
    it.
    """

    concerns: Callable[[StoredAdapter], Sequence[str]]
    outcome: str
    effect: str
    factor: Callable[[StoredAdapter, StoredModule], float] | None = None

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome {self.outcome!r}, expected one of {', '.join(OUTCOMES)}")


@dataclass(frozen=True)
class Finding:
    """A deviation of a library from the algebra. Texts are Markdown.

    ``id``: the library's name, a dot, and its own name. ``does``: what the library does, if the
    title does not say it all; ``right``: what is right, and why; ``consequence``: what it means for
    users, and what to do. ``severity``: a name of `SEVERITIES`. ``seen``: the release, or the
    commit, in which it was seen, ``since``: the first release of which its test says the same;
    ``versions``: a range of those that have it, these unless more is known; ``fixed_in``: the
    release that is right again, "" as long as none is known. ``also``: other distributions that do
    the same, and their releases. ``found_by``: a peer of ``minilora verify`` and those of its
    checks that find it, or ``not_asked``: why none does. ``cause``: what in the library makes it
    so, with its file, in one sentence; ``code``: where that is in the release: the file and the
    line, and the function; ``fix``: what would mend it, in one line; ``source``: where it was read,
    if no test here runs it. ``stored``: what it means for an adapter in files, where that depends
    on the adapter. Its script is in `minilora.findings.reproduce`.
    """

    id: str
    title: str
    severity: str
    right: str
    seen: str
    since: str = ""
    does: str = ""
    consequence: str = ""
    versions: str = ""
    fixed_in: str = ""
    also: Mapping[str, str] = field(default_factory=dict)
    found_by: tuple[str, ...] = ()
    not_asked: str = ""
    cause: str = ""
    code: str = ""
    fix: str = ""
    source: str = ""
    stored: Stored | None = None

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            expected = ", ".join(SEVERITIES)
            raise ValueError(f"{self.id}: severity {self.severity!r}, expected one of {expected}")
        for name in ("does", "right", "consequence"):
            object.__setattr__(self, name, cleandoc(getattr(self, name)))
        if not self.versions and _RELEASE.fullmatch(self.seen):
            versions = f">={self.since},<={self.seen}" if self.since else f"=={self.seen}"
            object.__setattr__(self, "versions", versions)

    @property
    def library(self) -> str:
        """The name of the library."""
        return self.id.rpartition(".")[0]

    @property
    def status(self) -> str:
        """Whether it is open, or since when it is fixed."""
        return f"fixed in {self.fixed_in}" if self.fixed_in else "open"

    @property
    def peer(self) -> str:
        """The peer of ``minilora verify`` whose checks find it, or ""."""
        return self.found_by[0] if self.found_by else ""

    @property
    def checks(self) -> tuple[str, ...]:
        """The checks of ``minilora verify`` that find it."""
        return self.found_by[1:]


@dataclass(frozen=True)
class Library:
    """A library, its title on the pages, the distribution that installs it, and its findings.

    ``distribution`` is "" for what no package index has. ``release`` is the one whose reading of
    stored adapters was studied, "" where none was; ``reads``: the formats that it reads;
    ``files``: the address of a line of its source, with {release}, {file} and {line}.
    """

    name: str
    title: str
    distribution: str
    findings: tuple[Finding, ...]
    release: str = ""
    reads: tuple[str, ...] = ()
    files: str = ""

    def link(self, finding: Finding) -> str:
        """The address of the line that makes a finding so; "" where it is not known."""
        place = finding.code.partition(" ")[0]
        file, _, line = place.partition(":")
        return self.files.format(release=finding.seen, file=file, line=line) if place else ""
