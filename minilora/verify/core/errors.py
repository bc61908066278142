"""What goes wrong in a verification, and how it is told in one line."""

from __future__ import annotations

import linecache
import os
import traceback
from collections.abc import Iterable
from types import FrameType

CALLERS = tuple(
    f"minilora.verify.{module}"
    for module in (
        "implementation.guard",
        "implementation.arguments",
        "implementation.python_child",
        "implementation.worker",
        "loading",
    )
)
"""The modules that call a target: their lines are no place in it."""


class LoadError(Exception):
    """The target cannot be found, built or used; the message says why and what to do."""


class UsageError(ValueError):
    """A level, dtype, profile, case or file that does not exist; the message says what does."""


class Skip(Exception):
    """The implementation does not support what this case asks."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = tidy(reason)


ASKED = ", asked "
"""What stands in a fault's message before what was asked, which is not its cause."""


class Fault(Exception):
    """The implementation gave no answer that could be compared.

    ``kind`` is one of: raises, hangs, changes its inputs, changes its answers, not an array,
    shape, dtype, nan, missing, crashes, protocol, internal. The last is a fault of this package,
    and the two before it are of an implementation in another process.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = tidy(message, 600)


def tidy(text: object, limit: int = 300) -> str:
    """One printable line of at most ``limit`` characters, whatever a target said."""
    try:
        line = " ".join(str(text)[: 20 * limit].split())  # it may be of any length
    except Exception:
        line = f"<{type(text).__name__} that has no text>"
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def near(asked: str, known: list[str]) -> str:
    """A suggestion for a mistyped name, or nothing."""
    import difflib

    close = difflib.get_close_matches(asked, known, n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""


def type_words(value: object) -> str:
    """The type of a value with its article: a list, an int, None."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def describe(error: BaseException, home: str | None = None) -> str:
    """The exception's type, message and place: the last line in ``home``, the target's own file."""
    says = f"{type(error).__name__}: {tidy(error)}".removesuffix(": ")
    if isinstance(error, SyntaxError):  # whose message names the file and the line
        return says
    place = place_of(reversed(list(traceback.walk_tb(error.__traceback__))), home)
    return f"{says} ({place})" if place else says


def place_of(frames: Iterable[tuple[FrameType, int]], home: str | None) -> str:
    """The innermost line of the target's own file in these frames, innermost first."""
    outside = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in frames
        if frame.f_globals.get("__name__") not in CALLERS
    ]
    return place_words(outside, home)


def place_words(places: Iterable[tuple[str, int, str]], home: str | None) -> str:
    """The first of these places (file, line, function) in ``home``, or else the first, in words."""
    outside = [place for place in places if not place[0].startswith("<frozen importlib")]
    if not outside:
        return ""
    file, line, name = next((place for place in outside if place[0] == home), outside[0])
    linecache.checkcache(file)
    source = tidy(linecache.getline(file, line), 80)
    return f"{os.path.basename(file)}:{line}, in {name}" + (f": {source}" if source else "")
