"""A report, read from the JSON that it was written as."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import inf
from typing import Any

from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.errors import UsageError, tidy
from minilora.verify.core.types import Diagnosis, Judgement, Picture
from minilora.verify.report.report import Report
from minilora.verify.report.result import STATUSES, FaultSeen, Known, Result

SCHEMA = 1
WRITES = "what `minilora verify TARGET --json FILE` writes"


def read_report(path: str) -> Report:
    """The report in a file. Raises UsageError with what was found, what was expected and why."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {tidy(error)}; expected {WRITES}") from None
    return from_json(document, path)


def from_json(document: Any, where: str) -> Report:
    """The report that a document of schema 1 says; ``where`` names it in what UsageError says.

    What later versions add to a document is left out, and what earlier ones lack is empty.
    """
    required = ("schema", "target", "results")
    if not isinstance(document, Mapping) or any(part not in document for part in required):
        keys = tidy(", ".join(map(str, document)), 80) if isinstance(document, Mapping) else ""
        found = f"an object with {keys or 'nothing'}" if isinstance(document, Mapping) else ""
        found = found or f"a {type(document).__name__}"
        expected = f"expected an object with {', '.join(required)}: {WRITES}"
        raise UsageError(f"{where} is not a report: found {found}, {expected}")
    if document["schema"] != SCHEMA:
        raise UsageError(
            f"{where}: found schema {tidy(document['schema'], 40)}, expected {SCHEMA}; "
            "read it with the version of minilora that wrote it, or write it again"
        )
    try:
        return _report(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"no {error}" if isinstance(error, KeyError) else tidy(error)
        raise UsageError(
            f"{where} is not a complete report: {message}; expected {WRITES}: write it again"
        ) from None


def _report(document: Mapping[str, Any]) -> Report:
    target, summary = document["target"], document.get("summary", {})
    results = tuple(_result(entry, i) for i, entry in enumerate(document["results"]))
    for (check, dtype), times in Counter((r.check, r.dtype) for r in results).items():
        if times > 1:
            raise ValueError(f"{check} in {dtype} stands in it {times} times")
    return Report(
        name=tidy(target["name"]),
        version=tidy(target["version"]),
        dtypes=tuple(map(tidy, target.get("dtypes", ()))),
        conventions=dict(target.get("conventions", {})),
        fixed=dict(target.get("fixed", {})),
        profile=tidy(document["profile"]),
        seed=int(document["seed"]),
        results=results,
        seconds=float(summary.get("seconds", 0)),
        notes=tuple(tidy(note, 2000) for note in document.get("notes", ())),
        interrupted=bool(summary.get("interrupted", False)),
        minilora=tidy(document.get("minilora", "unknown")),
    )


def _result(entry: Mapping[str, Any], number: int) -> Result:
    for name, allowed in (("status", STATUSES), ("dtype", tuple(DTYPES))):
        if entry[name] not in allowed:
            found = tidy(repr(entry[name]), 40)
            raise ValueError(f"result {number} has the {name} {found}, not of {', '.join(allowed)}")
    counterexample = entry["counterexample"] or {}
    worst = entry["worst"]
    return Result(
        check=tidy(entry["check"]),
        level=tidy(entry["level"]),
        title=tidy(entry["title"], 2000),
        dtype=entry["dtype"],
        is_relation=bool(entry.get("relation", False)),
        precision=Precision(**entry["precision"]),
        status=entry["status"],
        cases=int(entry["cases"]),
        skipped_cases=int(entry.get("skipped_cases", 0)),
        deviating_cases=int(entry.get("deviating_cases", 0)),
        known_cases=int(entry.get("known_cases", 0)),
        worst=None if worst is None else _judgement(worst),
        worst_case="" if worst is None else tidy(worst["case"]),
        case=tidy(counterexample.get("case", "")),
        only=tuple(tidy(each) for each in entry.get("only", ())),
        arrays=tuple(map(_judgement, counterexample.get("arrays", ()))),
        faults=tuple(
            FaultSeen(tidy(f["kind"]), tidy(f["message"], 2000), tidy(f["case"]), int(f["cases"]))
            for f in entry.get("faults", ())
        ),
        smallest=None
        if counterexample.get("smallest") is None
        else dict(counterexample["smallest"]),
        diagnosis=tuple(
            Diagnosis(
                tidy(d["id"]),
                tidy(d["sentence"], 2000),
                float(d["residual_z"]),
                tidy(d.get("separating", "")),
            )
            for d in entry["diagnosis"]
        ),
        reason=tidy(entry.get("reason", ""), 2000),
        known=_known(entry.get("known")),
        note=tidy(entry.get("note", ""), 2000),
        reproduce=tidy(entry["reproduce"], 10**6),  # a command is whole or useless
        seconds=float(entry.get("seconds", 0)),
    )


def _known(entry: Mapping[str, Any] | None) -> Known | None:
    if entry is None:
        return None
    versions = tuple(map(tidy, entry.get("versions", ())))
    seen = tuple(dict(each) for each in entry.get("seen", ()))
    link, until = tidy(entry.get("link", "")), tidy(entry.get("until", ""))
    return Known(tidy(entry["reason"], 600), link, versions, until, seen)


def _judgement(entry: Mapping[str, Any]) -> Judgement:
    picture = entry.get("picture")
    return Judgement(
        array=tidy(entry["array"]),
        verdict=entry["verdict"],
        elements=int(entry["elements"]),
        beyond=int(entry["beyond"]),
        z=_z(entry["z"]),
        rms=_z(entry["rms"]),
        limit=float(entry["limit"]),
        rms_limit=float(entry["rms_limit"]),
        index=tuple(map(int, entry["index"])),
        got=float(entry["got"]),  # which takes "NaN" and "Infinity", too
        want=float(entry["want"]),
        sigma=None if entry["sigma"] is None else float(entry["sigma"]),
        picture=None if picture is None else _picture(picture, entry["index"]),
    )


def _picture(entry: Mapping[str, Any], index: list[int]) -> Picture:
    shape = tuple(map(int, entry["shape"]))
    picture = Picture(shape, tuple(tuple(map(_z, row)) for row in entry["z"]))
    if not picture.z or not all(0 < len(row) == len(picture.z[0]) for row in picture.z):
        raise ValueError("the rows of a picture are of different lengths")
    if len(index) != len(shape) or not all(0 <= i < n for i, n in zip(index, shape, strict=True)):
        raise ValueError(f"index {index} lies outside of the shape {list(shape)}")
    return picture


def _z(value: float | None) -> float:
    return inf if value is None else float(value)
