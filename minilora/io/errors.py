"""The error of every reader and writer of files."""

from collections.abc import Iterable
from pathlib import Path


class FormatError(ValueError):
    """A file, a field in it, what was found there, what was expected, and what to do.

    These are its ``args``.
    """

    def __init__(
        self, path: Path | str, field: str, found: object, expected: object, remedy: str
    ) -> None:
        super().__init__(path, field, found, expected, remedy)

    def __str__(self) -> str:
        path, field, found, expected, remedy = self.args
        found, expected = _short(found), _short(expected)
        return f"{path}: {_short(field)}: found {found}, expected {expected}; {remedy}"


def _short(value: object, limit: int = 400) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[:limit] + "…"


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first names in alphabetical order, and how many more there are."""
    ordered = sorted(map(str, names))
    more = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {more} more" if more > 0 else "")
