"""The tensors of a safetensors file, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minilora.audit.stored.module import Held
from minilora.io.header import Place, places
from minilora.spec.ops import Array


def held_in(file: Path) -> dict[str, Held]:
    """The tensors by their names.

    Errors: FormatError for a damaged file.
    """
    return {
        name: Held(name, place.dtype, place.shape, _reader(place))
        for name, place in places(file)[0].items()
    }


def _reader(place: Place) -> Callable[[], Array]:
    return lambda: place.rows(0, place.shape[0] if place.shape else 1).reshape(place.shape)
