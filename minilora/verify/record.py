"""What deviates in a run, as entries of a file of known deviations (``--update-known``)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.findings.versions import version_key
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import STRUCTURE, Comparison, Diagnosis
from minilora.verify.known import each_of, has_expired
from minilora.verify.report.report import Report
from minilora.verify.report.result import Known, Result
from minilora.verify.seen import NARROWER, Asked, explained, read_seen, step_of

Form = dict[str, Any]


@dataclass
class Recorder:
    """The cases of a run that are wrong and not known, by check and dtype."""

    wrong: dict[tuple[str, str], list[Asked]] = field(default_factory=dict)

    def add(self, asked: Asked) -> None:
        """Keep a case."""
        self.wrong.setdefault((asked.check.id, asked.case.dtype), []).append(asked)

    def entries(self, report: Report, known: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The entries of ``known`` that still occur, and one for each deviation beside them.

        What has expired is left out, and recorded anew where it occurs.
        """
        occurring = {id(r.known) for r in report.results if r.known and not r.no_longer_fails}
        ran = {id(r.known) for r in report.results if r.known}
        kept = [
            _entry(name, entry)
            for name, several in known.items()
            for entry in each_of(several)
            if id(entry) in occurring or id(entry) not in ran
            if not has_expired(entry, report.version)
        ]
        return kept + [entry for check in self._checks() for entry in self._new(check, report)]

    def _checks(self) -> list[str]:
        return list(dict.fromkeys(check for check, _ in self.wrong))

    def _new(self, check: str, report: Report) -> Iterator[dict[str, Any]]:
        """One entry for all dtypes in which a check ran, or one for each of some."""
        results = [r for r in report.results if r.check == check and r.status != "skip"]
        forms = {
            r.dtype: _forms(self.wrong[check, r.dtype], _diagnosis(results))
            for r in results
            if (check, r.dtype) in self.wrong
        }
        first = next(iter(forms.values()))
        of_all = len(forms) == len(results) and all(form == first for form in forms.values())
        for dtype, form in {"": first}.items() if of_all else forms.items():
            if not form:  # nothing explains all cases
                continue
            entry: dict[str, Any] = {"check": check} | ({"dtype": dtype} if dtype else {})
            entry |= {"reason": _reason(results, form), "seen": form}
            yield entry | _versions(report.version)


def as_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """A file of known deviations."""
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def _entry(name: str, known: Known) -> dict[str, Any]:
    """A known deviation in the form of a file."""
    check, _, dtype = name.partition(":")
    entry: dict[str, Any] = {"check": check} | ({"dtype": dtype} if dtype else {})
    entry |= {"reason": known.reason} | ({"link": known.link} if known.link else {})
    entry |= {"versions": list(known.versions)} if known.versions else {}
    entry |= {"until": known.until} if known.until else {}
    return entry | {"seen": [dict(seen) for seen in known.seen]}


def _versions(version: str) -> dict[str, str]:
    """The target's version, as the only one that an entry was seen in."""
    number = version.split()[0] if version.split() else ""
    try:
        version_key(number)
    except ValueError:
        return {}
    return {"versions": f"=={number.partition('+')[0]}"}


def _diagnosis(results: Sequence[Result]) -> list[Diagnosis]:
    """What was found out of a check in the dtype that was diagnosed."""
    return [diagnosis for result in results for diagnosis in result.diagnosis]


def _reason(results: Sequence[Result], forms: Sequence[Form]) -> str:
    """What the entry's mutant is, or what was found out where the entry names none."""
    mutants = [form["mutant"] for form in forms if "mutant" in form]
    found = [each for each in _diagnosis(results) if each.id in mutants or not mutants]
    said = f"{found[0].id}, {found[0].sentence}" if found else ", ".join(mutants)
    return f"recorded, not yet explained{f': {said}' if said else ''}"


def _forms(wrong: Sequence[Asked], diagnosis: Sequence[Diagnosis]) -> list[Form]:
    """The most telling form that explains the values of all cases, and those of the errors."""
    errors = sorted({_error(a.end) for a in wrong if isinstance(a.end, Fault)})
    forms: list[Form] = [{"error": error} for error in errors]
    if not any(a.deviating for a in wrong):
        return forms
    for form in _of_values([a for a in wrong if a.deviating], diagnosis):
        if all(explained(read_seen([*forms, form]), a) for a in wrong):
            return [form, *forms]
    return forms


def _of_values(wrong: Sequence[Asked], diagnosis: Sequence[Diagnosis]) -> Iterator[Form]:
    """Forms that may explain the values of these cases, the most telling first."""
    for found in diagnosis:
        if not found.id.startswith(STRUCTURE):
            yield {"mutant": found.id}
    off = [c for a in wrong for c in a.deviating]
    names = sorted({re.sub(r"\d+", "*", c.array) for c in off})
    if (factor := _factor(off[0])) is not None:
        yield {"factor": factor, "arrays": names}
    own = unit_roundoff(wrong[0].case.dtype)
    for dtype in NARROWER:
        if unit_roundoff(dtype) > own:
            yield {"rounded_to": dtype, "arrays": names}
    steps = {step_of(a.deviating[0].array) for a in wrong}
    if "" not in steps:
        yield {"after": sorted(steps)}
    yield {"arrays": names}


def _factor(comparison: Comparison) -> float | None:
    """What an answer is a multiple of the correct one by, in as few digits as its dtype tells."""
    got, want = (np.asarray(a).astype(float).ravel() for a in (comparison.got, comparison.want))
    size = float(want @ want)
    if not size or not np.isfinite(got).all():
        return None
    factor = float(got @ want) / size
    dtype = next((d for d, kind in DTYPES.items() if comparison.got.dtype == kind), "float32")
    for digits in range(1, 17):
        rounded = float(f"{factor:.{digits}g}")
        if abs(rounded - factor) <= abs(factor) * unit_roundoff(dtype):
            return rounded
    return factor


def _error(fault: Fault) -> str:
    """The kind of an error and the beginning of its message, without numbers."""
    if fault.kind == "raises":
        head = re.match(r"(?:.*?\): )?\w+", fault.message)
        return f"raises: {head[0].partition('*')[0] if head else ''}*"
    head_of_any = re.split(r"[\d(*\[]", fault.message)[0]
    return f"{fault.kind}: {head_of_any}*"
