"""What changed from one release of a library to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from minilora.studies.results.summary import DEVIATES, Summary


@dataclass(frozen=True)
class Change:
    """What a release has that the one before it has not: ids of checks.

    ``new``: they held and deviate; ``mended``: they deviated and hold; ``found``: they were not
    asked, for the release before lacks what they need, and deviate; ``gained``: the same, and they
    hold; ``lost``: they were asked, and are not.
    """

    before: Summary
    after: Summary
    new: tuple[str, ...]
    mended: tuple[str, ...]
    found: tuple[str, ...]
    gained: tuple[str, ...]
    lost: tuple[str, ...]


KINDS = {
    "new": "held before, deviate now",
    "mended": "deviated before, hold now",
    "found": "not asked before, deviate now",
    "gained": "not asked before, hold now",
    "lost": "asked before, not now",
}
"""The kinds of changes, in words."""


def releases(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """The runs of each target of which there are several releases, by release.

    They are those of one profile, for others draw other cases: of the one with most releases.
    """
    groups: dict[str, dict[str, list[Summary]]] = {}
    for each in summaries:
        groups.setdefault(each.target, {}).setdefault(each.profile, []).append(each)
    most = {target: max(groups[target].values(), key=len) for target in groups}
    return {
        target: sorted(runs, key=lambda run: run.release)
        for target, runs in most.items()
        if len(runs) > 1
    }


def common(runs: Sequence[Summary]) -> list[Summary]:
    """The runs with those checks alone that all of them know: profiles and releases differ."""
    known = [{check for checks in run.checks.values() for check in checks} for run in runs]
    shared = set.intersection(*known)

    def restricted(run: Summary) -> Summary:
        levels = {
            level: {check: letters for check, letters in checks.items() if check in shared}
            for level, checks in run.checks.items()
        }
        return replace(run, checks={level: checks for level, checks in levels.items() if checks})

    return [restricted(run) for run in runs]


def latest(summaries: Sequence[Summary]) -> list[Summary]:
    """The newest release of each target, in the profile that asks most."""
    newest: dict[str, Summary] = {}
    for each in sorted(summaries, key=lambda run: (run.release, run.total.total())):
        newest[each.target] = each
    return [newest[target] for target in sorted(newest)]


def changes(runs: Sequence[Summary]) -> list[Change]:
    """What changed from each release to the next; only of checks that both runs know."""
    return [_change(before, after) for before, after in pairwise(runs)]


def _change(before: Summary, after: Summary) -> Change:
    kinds: dict[str, list[str]] = {name: [] for name in KINDS}
    for check, was, now in _both(before, after):
        off, on = now in DEVIATES, now == "pass"
        if was == "skip" and now != "skip":
            kinds["found" if off else "gained"].append(check)
        elif now == "skip" and was != "skip":
            kinds["lost"].append(check)
        elif was == "pass" and off:
            kinds["new"].append(check)
        elif was in DEVIATES and on:
            kinds["mended"].append(check)
    return Change(before, after, **{name: tuple(found) for name, found in kinds.items()})


def _both(before: Summary, after: Summary) -> Iterator[tuple[str, str, str]]:
    """The checks of both runs, and what each found; a profile may have left some out."""
    for level, checks in after.checks.items():
        for check in checks:
            if check in before.checks.get(level, {}):
                yield check, before.status(level, check), after.status(level, check)


def deviating(runs: Sequence[Summary]) -> list[tuple[str, str]]:
    """(level, check) of all that deviates in one of these runs, in the order of the checks."""
    found: dict[tuple[str, str], None] = {}
    for run in reversed(runs):
        for level, checks in run.checks.items():
            found |= {(level, check): None for check in checks}
    return [
        (level, check)
        for level, check in found
        if any(run.status(level, check) in DEVIATES for run in runs)
    ]
