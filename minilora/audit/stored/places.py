"""The tensors of a safetensors file, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minilora.audit.stored.module import Held
from minilora.io.errors import FormatError
from minilora.io.header import Place, places
from minilora.spec.ops import Array

LONGEST = 1000
"""No model's path has so many characters."""


def held_in(file: Path) -> dict[str, Held]:
    """The tensors by their names.

    Errors: FormatError for a damaged file, and for a name that is longer than any model's.
    """
    found = places(file)[0]
    if longest := next((name for name in found if len(name) > LONGEST), ""):
        what = f"a name of {len(longest)} characters"
        remedy = "is it an adapter's file? write it again"
        raise FormatError(file, longest[:40], what, f"{LONGEST} at most", remedy)
    return {
        name: Held(name, place.dtype, place.shape, _reader(place), place.rows)
        for name, place in found.items()
    }


def _reader(place: Place) -> Callable[[], Array]:
    return lambda: place.rows(0, place.shape[0] if place.shape else 1).reshape(place.shape)
