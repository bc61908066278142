"""A result as JSON."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from minilora.verify.core.types import Judgement, Picture
from minilora.verify.report.result import Result

if TYPE_CHECKING:
    from minilora.verify.report.causes import Cause


def _judgement_json(judgement: Judgement) -> dict[str, Any]:
    entry = asdict(replace(judgement, picture=None))
    del entry["picture"]
    for name in ("z", "rms"):
        if not isfinite(entry[name]):
            entry[name] = None
    return entry


def _picture_json(picture: Picture | None) -> dict[str, Any] | None:
    if picture is None:
        return None
    rows = [[float(f"{z:.3g}") if isfinite(z) else None for z in row] for row in picture.z]
    return {"shape": picture.shape, "z": rows}


def cause_json(cause: Cause) -> dict[str, Any]:
    """A cause as one entry of the JSON document."""
    return {
        "id": cause.id,
        "sentence": cause.sentence,
        "sureness": cause.sureness(),
        "results": len(cause.results),
        "checks": cause.checks,
        "first": cause.first.check,
        "reproduce": cause.first.reproduce,
    }


def result_json(result: Result, seed: int) -> dict[str, Any]:
    """A result as one entry of the JSON document."""
    counterexample = None
    if result.case:
        counterexample = {
            "case": result.case,
            "seed": seed,
            "arrays": [_judgement_json(judgement) for judgement in result.arrays],
            "smallest": result.smallest,
        }
    worst = None
    if result.worst is not None:
        worst = _judgement_json(result.worst) | {"case": result.worst_case}
        worst["picture"] = _picture_json(result.worst.picture)
    return {
        "check": result.check,
        "level": result.level,
        "title": result.title,
        "dtype": result.dtype,
        "relation": result.is_relation,
        "precision": asdict(result.precision),
        "status": result.status,
        "cases": result.cases,
        "skipped_cases": result.skipped_cases,
        "deviating_cases": result.deviating_cases,
        "known_cases": result.known_cases,
        "only": result.only,
        "worst": worst,
        "faults": [asdict(fault) for fault in result.faults],
        "diagnosis": [asdict(each) for each in result.diagnosis],
        "counterexample": counterexample,
        "reason": result.reason,
        "known": None if result.known is None else asdict(result.known),
        "no_longer_fails": result.no_longer_fails,
        "note": result.note,
        "reproduce": result.reproduce,
        "seconds": round(result.seconds, 3),
    }
