"""An axis along which the cases of a level differ, and which of its values a call has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Axis:
    """An axis: its name, all values that it has, and the one of a call.

    ``of`` receives the arguments of a call by their names, and gives None where the axis does not
    apply, as rows do not to a merge.
    """

    name: str
    values: tuple[Any, ...]
    of: Callable[[Mapping[str, Any]], Any]


Values = tuple[Axis, ...]
