"""RoPE's settings in ``config.json``: its base, and Llama 3's scaling of its frequencies."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.io.errors import FormatError
from minilora.io.files import check_settings, typed
from minilora.spec.architectures import RopeScaling
from minilora.spec.models import Llama

ROPE_FIXED = {"partial_rotary_factor": (1.0, None)}

SCALING = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "length": "original_max_position_embeddings",
}
"""The fields of a `RopeScaling` and what the file calls them."""


def read_theta(path: Path, settings: Mapping[str, Any], default: float = 10000.0) -> float:
    """RoPE's base; ``default`` where the file has none.

    Errors: FormatError for every other kind of RoPE, and for two bases.
    """
    where, rope = _rope(path, settings)
    _check_kind(path, where, rope, ("default", None))
    return _base(path, where, rope, settings, default)


def read_rope(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's base, and its scaling if it has Llama 3's.

    Errors: FormatError for every other kind of RoPE, for two bases, and for a scaling that is none.
    """
    where, rope = _rope(path, settings)
    if "llama3" not in (rope.get("rope_type"), rope.get("type")):
        return {"theta": read_theta(path, settings)}
    _check_kind(path, where, rope, ("llama3", None))
    values = {
        name: typed(path, f"{where}.{key}", rope.get(key), int if name == "length" else float)
        for name, key in SCALING.items()
    }
    if not values["factor"] >= 1 or not 0 < values["low"] < values["high"] or values["length"] < 1:
        expected, remedy = "factor >= 1, 0 < low < high", "write it as transformers does"
        raise FormatError(path, where, json.dumps(rope), expected, remedy)
    return {"theta": _base(path, where, rope, settings), "scaling": RopeScaling(**values)}


def write_rope(c: Llama) -> dict[str, Any]:
    """RoPE's base both ways: ``rope_theta`` is for transformers before 5, and mlx-lm."""
    rope: dict[str, Any] = {"rope_theta": c.theta, "rope_type": "default"}
    scaling = getattr(c, "scaling", None)
    if scaling is None:
        return {"rope_parameters": rope, "rope_theta": c.theta}
    scaled = {key: getattr(scaling, name) for name, key in SCALING.items()}
    scaled |= {"rope_type": "llama3"}
    return {"rope_parameters": rope | scaled, "rope_scaling": scaled, "rope_theta": c.theta}


def _rope(path: Path, settings: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The setting that has RoPE's, and what it says.

    An empty rope_scaling yields to rope_parameters, as in transformers.
    """
    where = "rope_scaling" if settings.get("rope_scaling") else "rope_parameters"
    rope = settings.get(where) or {}
    if not isinstance(rope, dict):
        raise FormatError(path, where, rope, "an object", "write it as transformers does")
    return where, rope


def _check_kind(
    path: Path, where: str, rope: Mapping[str, Any], kinds: tuple[str | None, ...]
) -> None:
    """Errors: FormatError for another kind of RoPE, before what belongs to it; or more settings."""
    for key in ("rope_type", "type"):
        if rope.get(key) not in kinds:
            remedy = "other kinds of RoPE are not implemented here: take another model"
            expected = json.dumps(kinds[0])
            raise FormatError(f"{path}: {where}", key, json.dumps(rope[key]), expected, remedy)
    fixed = {"rope_type": kinds, "type": kinds, **ROPE_FIXED}
    known = ("rope_theta", *(SCALING.values() if "llama3" in kinds else ()))
    check_settings(f"{path}: {where}", rope, known, fixed, "")


def _base(
    path: Path,
    where: str,
    rope: Mapping[str, Any],
    settings: Mapping[str, Any],
    default: float = 10000.0,
) -> float:
    bases = [
        typed(path, key, value, float)
        for key, value in (
            (f"{where}.rope_theta", rope.get("rope_theta")),
            ("rope_theta", settings.get("rope_theta")),
        )
        if value is not None
    ]
    if len(set(bases)) > 1 or 0 in bases:
        remedy = "keep the one that the model was trained with"
        raise FormatError(path, "rope_theta", bases, "one number above 0", remedy)
    return bases[0] if bases else default
