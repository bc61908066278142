"""The error of every reader and writer of files."""

from collections.abc import Iterable
from pathlib import Path


class FormatError(ValueError):
    """A file does not hold what it should.

    Made of the file, the place in it, what was found, what was expected and what to do.
    """

    def __init__(
        self, path: Path | str, where: str, found: object, expected: object, remedy: str
    ) -> None:
        super().__init__(path, where, found, expected, remedy)

    def __str__(self) -> str:
        path, where, found, expected, remedy = self.args
        return (
            f"{path}: {_short(where)}: found {_short(found)}, expected {_short(expected)}; {remedy}"
        )


def _short(value: object, limit: int = 400) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[:limit] + "…"


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(map(str, names))
    more = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {more} more" if more > 0 else "")
