"""Text in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from minilora.forms.words import printable

MARKDOWN_BYTES = 2**20
"""GitHub takes so much of a step's summary."""


def escaped(words: object) -> str:
    """Text that Markdown takes as it is, in a cell of a table too."""
    line = " ".join(str(words).split())
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", escape(line, quote=False))


def fenced(lines: str) -> str:
    """Code, between more backticks than it has in a row."""
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", lines)), 3)
    return f"{ticks}text\n{lines}\n{ticks}\n"


def fitted(head: str, parts: Sequence[str], limit: int) -> str:
    """``head`` and so many of the parts as make ``limit`` bytes; what is left out is counted."""
    head, parts = printable(head), [printable(part) for part in parts]
    room = limit - len(head.encode()) - 200  # the last line's
    kept: list[str] = []
    for part in parts:
        room -= len(part.encode())
        if room < 0:
            break
        kept.append(part)
    left = len(parts) - len(kept)
    last = f"\n{left} of {len(parts)} deviations are left out here; the other forms have them.\n"
    whole = head + "".join(kept) + (last if left else "")
    return whole if len(whole.encode()) <= limit else last.lstrip() if limit >= 200 else ""
