"""Known deviations: declared by the implementation or in a file, and looked up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import filter as filter_names
from fnmatch import fnmatchcase
from typing import Any

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import UsageError, tidy
from minilora.verify.core.types import Check
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.plan import require_known
from minilora.verify.report.result import Known

FIELDS = {"check", "dtype", "reason", "link", "versions"}


def read_known(path: str) -> dict[str, Known]:
    """Known deviations from a JSON file: a list of {check, dtype?, reason, link?, versions?}.

    Raises UsageError.
    """
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {tidy(error)}") from None
    known = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        if not isinstance(entry, dict):
            raise UsageError(f'{path}: expected a list of {{"check": …, "reason": …}}')
        name = _name(entry, f"{path}, entry {number}")
        known[name] = _known(entry, path)
    return known


def _name(entry: Mapping[str, Any], where: str) -> str:
    if unknown := sorted(entry.keys() - FIELDS):
        raise UsageError(f"{where}: unknown {', '.join(unknown)}; expected {sorted(FIELDS)}")
    if not isinstance(entry.get("check"), str) or not entry.get("reason"):
        raise UsageError(f"{where}: 'check' and 'reason' are required")
    return f"{entry['check']}:{entry['dtype']}" if "dtype" in entry else str(entry["check"])


def _known(entry: Any, where: str) -> Known:
    if isinstance(entry, Known):
        return entry
    if isinstance(entry, str):
        return Known(tidy(entry, 600))
    if not isinstance(entry, Mapping) or "reason" not in entry:
        raise UsageError(f"{where}: expected the reason, or a dict with 'reason'")
    versions = entry.get("versions", ())
    versions = (versions,) if isinstance(versions, str) else tuple(map(str, versions))
    return Known(tidy(entry["reason"], 600), tidy(entry.get("link", "")), versions)


def declared(
    checks: Sequence[Check], subject: GuardedImplementation, known: Mapping[str, Any]
) -> tuple[dict[str, Known], tuple[str, ...]]:
    """The known deviations that apply to the subject's version, and notes on strange ones.

    Raises UsageError where ``known`` names a check or a dtype that does not exist.
    """
    names = [check.id for check in checks]
    for name in known:
        check, _, dtype = name.partition(":")
        if not filter_names(names, check):
            require_known("check", check, names)
        if dtype:
            require_known("dtype", dtype, list(DTYPES))
    strange = [n for n in subject.known if not filter_names(names, n.partition(":")[0])]
    notes = tuple(
        f"{subject.name} declares {name!r} as known; there is no such check" for name in strange
    )
    entries = {name: _known(entry, name) for name, entry in {**subject.known, **known}.items()}
    applying = {name: k for name, k in entries.items() if k.holds_for(subject.version)}
    return applying, notes


def known_for(declarations: Mapping[str, Known], check: str, dtype: str) -> Known | None:
    """What was declared of this check in this dtype: the most specific name that matches."""
    for name in (f"{check}:{dtype}", check):
        if name in declarations:
            return declarations[name]
    for name, known in declarations.items():
        if fnmatchcase(f"{check}:{dtype}", name if ":" in name else f"{name}:*"):
            return known
    return None
