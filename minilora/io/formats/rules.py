"""Refusals as a table: a row says what is wrong, in which field, what was expected, what to do."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora.io.errors import FormatError, listed


@dataclass(frozen=True)
class Rule:
    """``found`` gives what is wrong, as text or as names, and something empty if nothing is.

    ``{x.NAME}`` or ``{x.NAME[0]}`` in a text stands for an attribute of the checked object.
    """

    field: str
    found: Callable[[Any], str | Iterable[object] | Literal[False] | None]
    expected: str
    remedy: str


def check(path: Path | str, rules: Sequence[Rule], x: Any) -> None:
    """Refuse ``x`` by the first rule that it breaks.

    Errors: FormatError.
    """
    for rule in rules:
        if found := rule.found(x):
            text = found if isinstance(found, str) else listed(found)
            field, expected, remedy = (
                part.format(x=x) for part in (rule.field, rule.expected, rule.remedy)
            )
            raise FormatError(path, field, text, expected, remedy)
