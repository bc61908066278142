"""What libraries and servers compute of an adapter's files, by the registry of findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minilora.audit.result import Entry, Figure
from minilora.findings import LIBRARIES
from minilora.findings.finding import OUTCOMES, Finding, Library, Stored
from minilora.findings.stored import StoredAdapter
from minilora.findings.versions import is_in_range
from minilora.io.errors import listed

VERDICTS = {
    "scaled": ("factor", "doubtful"),
    "dropped": ("wrong", "doubtful"),
    "other": ("wrong", "doubtful"),
    "refused": ("wrong", "told"),
    "may": ("undecided", "doubtful"),
    "use": ("told", "told"),
}
"""The verdicts of each outcome: for a library that was asked for, and for all others."""

READ = {
    "peft": "PEFT's folders",
    "mlx": "mlx-lm's folders",
    "gguf": "GGUF files",
    "kohya": "kohya's files",
    "loralib": "loralib's state dicts",
}


def known_libraries() -> list[str]:
    """The names of the libraries whose reading of adapters was studied."""
    return [name for name, library in LIBRARIES.items() if library.reads]


def library_of(name: str) -> tuple[Library, str]:
    """The library of a name such as ``sglang`` or ``vllm==0.33.0``, and the release.

    Errors: ValueError for a library that was not studied, and for what is no version.
    """
    bare, _, release = name.partition("==")
    found = {key.replace("-", ""): key for key in known_libraries()}
    key = found.get(bare.lower().replace("-", "").replace("_", "").replace(".", ""))
    if key is None:
        raise ValueError(f"{name}: expected one of {', '.join(known_libraries())}")
    if release:
        is_in_range(release, ">=0")  # ValueError for no version
    return LIBRARIES[key], release


def library_entries(adapter: StoredAdapter, named: Sequence[str] = ()) -> Iterator[Entry]:
    """What each library computes of the adapter; of those ``named`` a deviation is one.

    Without names, all libraries are asked that read the format.
    """
    asked = [library_of(name) for name in named]
    every = asked or [
        (LIBRARIES[name], "")
        for name in known_libraries()
        if adapter.format in LIBRARIES[name].reads
    ]
    for library, release in every:
        yield from _of_library(adapter, library, release, bool(asked))


Concern = tuple[Finding, Stored, list[str]]
"""A finding, what it means for files, and what of the adapter it concerns."""


def _of_library(
    adapter: StoredAdapter, library: Library, release: str, asked: bool
) -> Iterator[Entry]:
    subject = f"{library.title} {release or library.release}"
    if adapter.format not in library.reads:
        told = " or ".join(READ[form] for form in library.reads)
        text = f"it reads {told}, and this is none: minilora convert writes one"
        yield Entry(subject, "told", text, mistake="format")
        return
    concerns = _concerns(adapter, library)
    here = _counted([each for each in concerns if _applies(each[0], release)])
    for each in here:
        yield _entry(adapter, subject, each, asked)
    for finding, stored, _ in concerns:
        if not _applies(finding, release) and (release or finding.fixed_in):
            yield Entry(subject, "told", _elsewhere(finding, stored, release), mistake=finding.id)
    if all(stored.outcome == "use" for _, stored, _ in here):
        text = (
            f"computes the adapter as it is meant, as far as {_looked(library)} known findings say"
        )
        yield Entry(subject, "fine", text)


def _concerns(adapter: StoredAdapter, library: Library) -> list[Concern]:
    """The library's findings that concern the adapter."""
    return [
        (finding, finding.stored, found)
        for finding in library.findings
        if finding.stored is not None and (found := list(finding.stored.concerns(adapter)))
    ]


def _counted(concerns: list[Concern]) -> list[Concern]:
    """Of a library that refuses the adapter, that alone, and what is to be said of its use."""
    if not any(stored.outcome == "refused" for _, stored, _ in concerns):
        return concerns
    return [each for each in concerns if each[1].outcome in ("refused", "use")]


def _looked(library: Library) -> int:
    return sum(finding.stored is not None for finding in library.findings)


def _applies(finding: Finding, release: str) -> bool:
    """Whether the release has it; without a release, whether it is open."""
    if not release:
        return not finding.fixed_in
    return not finding.versions or is_in_range(release, finding.versions)


def _elsewhere(finding: Finding, stored: Stored, release: str) -> str:
    said = f"{stored.effect} in the releases {finding.versions}"
    if finding.fixed_in:
        return f"{said}; fixed in {finding.fixed_in}"
    return f"{said}, in which it was seen; of {release} nothing is known"


def _entry(adapter: StoredAdapter, subject: str, concern: Concern, asked: bool) -> Entry:
    finding, stored, found = concern
    figures: dict[str, Figure] = {"finding": finding.id, "count": len(found)}
    said = "" if stored.outcome == "use" else f"{OUTCOMES[stored.outcome]}: "
    text = f"{said}{stored.effect}"
    if stored.factor is not None:
        own = {module.name: module for module in adapter.adapted}
        factors = [stored.factor(adapter, own[name]) for name in found if name in own]
        least, greatest = min(factors), max(factors)
        figures |= {"factor": least, "largest_factor": greatest}
        share = f"{least:.4g}" if least == greatest else f"{least:.4g} to {greatest:.4g}"
        text = f"{stored.effect}: {share} of the intended effect"
    text += f" ({_concerned(adapter, found)}; finding {finding.id})"
    verdict = VERDICTS[stored.outcome][not asked]
    return Entry(subject, verdict, text, figures, finding.id)


def _concerned(adapter: StoredAdapter, found: list[str]) -> str:
    """What is concerned, in few words."""
    if len(found) > 1 and len(found) == len(adapter.modules):
        return f"all {len(found)} modules"
    return listed(found, 3)
