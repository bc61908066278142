"""Known deviations: declared by the implementation or in a file, and looked up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from fnmatch import filter as filter_names
from fnmatch import fnmatchcase
from typing import Any

from minilora.findings.versions import is_in_range, require_range, version_key
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import UsageError, tidy
from minilora.verify.core.types import Check
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.plan import require_known
from minilora.verify.report.result import Known
from minilora.verify.seen import Seen, read_seen

FIELDS = {"reason", "link", "versions", "until", "seen"}
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
OF_A_FILE = FIELDS | {"check", "dtype"}
UNBOUND = (
    "is declared as known without 'seen', what the deviation looks like: nothing is excused "
    "(--update-known FILE records it)"
)


def read_known(path: str) -> dict[str, list[Known]]:
    """Known deviations from a JSON file, whose schema is beside this module.

    Several of one check are for different versions. Raises UsageError.
    """
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {tidy(error)}") from None
    known: dict[str, list[Known]] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise UsageError(f'{path}: expected a list of {{"check": …, "reason": …}}')
        name = _name(entry, where)
        fields = {key: entry[key] for key in entry.keys() & FIELDS}
        known.setdefault(name, []).append(_known(fields, where))
    return known


def _name(entry: Mapping[str, Any], where: str) -> str:
    if unknown := sorted(entry.keys() - OF_A_FILE):
        raise UsageError(f"{where}: unknown {', '.join(unknown)}; expected {sorted(OF_A_FILE)}")
    if not isinstance(entry.get("check"), str) or not entry.get("reason"):
        raise UsageError(f"{where}: 'check' and 'reason' are required")
    return f"{entry['check']}:{entry['dtype']}" if "dtype" in entry else str(entry["check"])


def _known(entry: Any, where: str) -> Known:
    if isinstance(entry, str):
        return Known(tidy(entry, 600))
    if isinstance(entry, Known):
        _known(vars(entry), where)
        return entry
    if not isinstance(entry, Mapping) or "reason" not in entry:
        raise UsageError(f"{where}: expected the reason, or a dict with 'reason'")
    if unknown := sorted(map(str, entry.keys() - FIELDS)):
        raise UsageError(f"{where}: unknown {', '.join(unknown)}; expected {sorted(FIELDS)}")
    try:
        if (seen := entry.get("seen", ())) != ():
            read_seen(seen)
        return Known(
            tidy(entry["reason"], 600),
            tidy(entry.get("link", "")),
            _ranges(entry.get("versions", ())),
            _end(entry.get("until", "")),
            (seen,) if isinstance(seen, Mapping) else tuple(seen),
        )
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def _ranges(versions: Any) -> tuple[str, ...]:
    """One range, or several of which one has to hold."""
    ranges = versions if isinstance(versions, list | tuple) else (versions,)
    return tuple(require_range(each) for each in ranges)


def _end(until: Any) -> str:
    """A date or a version. Raises ValueError."""
    if until and not (isinstance(until, str) and _DATE.fullmatch(until)):
        try:
            version_key(until)
        except (TypeError, ValueError):
            expected = "expected a date such as '2027-01-31', or a version such as '0.20'"
            raise ValueError(f"'until' is {tidy(until, 40)!r}, {expected}") from None
    elif until:
        date.fromisoformat(until)
    return str(until or "")


def today() -> date:
    """The date that ``until`` is compared with."""
    return date.today()


def has_expired(known: Known, version: str) -> bool:
    """Whether an entry excuses nothing any more, at this date and version of the target."""
    if _DATE.fullmatch(known.until):
        return today() >= date.fromisoformat(known.until)
    if not known.until:
        return False
    try:
        return not is_in_range((version.split() or [""])[0], f"<{known.until}")
    except ValueError:
        return False  # a target without a number has no end


@dataclass(frozen=True)
class Declarations:
    """The known deviations that apply to a target, and notes on those that cannot.

    ``entries`` are by patterns of ``check`` or ``check:dtype``.
    """

    entries: Mapping[str, Known] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, check: str, dtype: str) -> Known | None:
        """What was declared of this check in this dtype: the most specific name that matches."""
        for name in (f"{check}:{dtype}", check):
            if name in self.entries:
                return self.entries[name]
        for name, known in self.entries.items():
            if fnmatchcase(f"{check}:{dtype}", name if ":" in name else f"{name}:*"):
                return known
        return None


def _require_names(known: Iterable[str], names: Sequence[str]) -> None:
    """Raises UsageError for a check or a dtype that does not exist."""
    for name in known:
        _require_level(name)
        check, _, dtype = name.partition(":")
        if not filter_names(names, check):
            require_known("check", check, names)
        if dtype:
            require_known("dtype", dtype, list(DTYPES))


def _own(subject: GuardedImplementation, names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What the implementation declares itself, and notes on what excuses nothing."""
    own, notes = {}, []
    for name, entry in subject.known.items():
        if not filter_names(names, name.partition(":")[0]):
            notes.append(f"{subject.name} declares {name!r} as known; there is no such check")
        elif problem := _without_level(name):
            notes.append(f"{subject.name} declares {problem}: it excuses nothing")
        else:
            own[name] = entry
    return own, notes


def declared(
    checks: Sequence[Check], subject: GuardedImplementation, known: Mapping[str, Any]
) -> Declarations:
    """The known deviations that apply to the subject's version, and notes on strange ones.

    A * in a check's name stands for anything within a level. Raises UsageError where ``known``
    names a check or a dtype that does not exist, and where an entry cannot be read.
    """
    names = [check.id for check in checks]
    _require_names(known, names)
    own, notes = _own(subject, names)
    given = {**own, **known}
    # One entry for several checks stays one.
    pairs = [(name, entry) for name, several in given.items() for entry in each_of(several)]
    read = {id(entry): _known(entry, name) for name, entry in pairs}
    entries = [(name, read[id(entry)]) for name, entry in pairs]
    notes += [f"{name} {UNBOUND}" for name, entry in entries if not entry.seen]
    applying: dict[str, Known] = {}
    for name, entry in entries:
        holds, note = _holds_for(entry, subject.version)
        notes += [f"{name}: {note}"] if note else []
        if holds:
            applying.setdefault(name, entry)
    return Declarations(applying, tuple(dict.fromkeys(notes)))


def _require_level(name: str) -> None:
    if problem := _without_level(name):
        raise UsageError(problem)


def _without_level(name: str) -> str:
    """What is wrong with a pattern that names no level, or nothing."""
    level, *rest = name.partition(":")[0].split(".")
    if rest and not any(sign in level for sign in "*?["):
        return ""
    return f"{name!r} as known, which names no level; expected a check, such as 'merge.dense'"


def each_of(several: Any) -> list[Any]:
    """The entries of a check, of which there may be one or a list."""
    return several if isinstance(several, list) else [several]


def _holds_for(entry: Known, version: str) -> tuple[bool, str]:
    """Whether an entry was declared for this version, of which the first word counts; a note."""
    if has_expired(entry, version):
        return False, f"excused until {entry.until}, and no longer: {entry.reason}"
    if not entry.versions:
        return True, ""
    number = version.split()[0] if version.split() else ""
    try:
        version_key(number)
    except ValueError as error:
        return False, f"declared for versions {' or '.join(entry.versions)}, and {error}"
    return any(is_in_range(number, each) for each in entry.versions), ""


def seen_of(known: Known | None) -> tuple[Seen, ...]:
    """What a known deviation was seen as; nothing else of its check is excused."""
    return read_seen(known.seen) if known is not None and known.seen else ()
